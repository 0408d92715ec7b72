"""A command that is refused changes nothing: no file of a run, no new folder. And one process owns a run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastlm.cli import main as cli
from fastlm.data import InputError
from fastlm.train import checkpoint, job, lock
from fastlm.train.files import read_metrics
from fastlm.train.loop import Trainer
from test_runs import own
from test_train import _own_place, book, tiny  # noqa: F401


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock's, which a look at the run may touch."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != lock.NAME}


@pytest.fixture
def run(book: str) -> Path:  # noqa: F811
    """A run of characters that was killed: lines of steps after its last checkpoint, and a save torn."""
    made = job.start(tiny(name="run", tokenizer="chars", save_every=6, eval_every=6), (book,))
    made.run(str)
    for _, folder in checkpoint.steps(made.folder)[1:]:
        checkpoint._remove(folder)
    (made.folder / "checkpoints" / ".draft-step-00000012").mkdir()
    return made.folder


def refuse(run: Path, book: str, **changes: Any) -> None:  # noqa: F811
    config, corpus = job.read_config(run)
    for name, value in changes.items():
        group = next(g for g in (config.model, config.data, config.optim, config.run) if hasattr(g, name))
        setattr(group, name, value)
    with pytest.raises(InputError):
        job.resume(run, config, corpus, other_data=False, say=str).run(str)


def test_a_refused_resume_leaves_every_file_as_it_was(run: Path, book: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    before = contents(run)
    for changes in (
        {"width": 128},
        {"context": 8},
        {"tokenizer": "bytes"},
        {"packing": "documents"},
        {"style": "gpt2"},
        {"layers": 96, "width": 1 << 16, "heads": 64},
        {"lr": -1.0},
        {"val": (f"more={book}.missing",)},
    ):
        refuse(run, book, **changes)
        assert contents(run) == before, changes
    damaged = next((run / "checkpoints").glob("step-*")) / "optimizer.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    refuse(run, book, lr=1e-4)
    damaged.write_bytes(whole)
    assert contents(run) == before
    # Ctrl-C while the corpus is read, and a package that refuses at the last moment
    with monkeypatch.context() as patch:
        # a shell that starts the tests in the background has them ignore SIGINT
        heeded = signal.signal(signal.SIGINT, signal.default_int_handler)
        patch.setattr(job, "read_data", lambda *args: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
        with pytest.raises(KeyboardInterrupt):
            refuse(run, book, lr=1e-4)
    signal.signal(signal.SIGINT, heeded)
    config, corpus = job.read_config(run)
    config.optim.lr = 1e-4
    made = job.resume(run, config, corpus, other_data=False, say=str)
    made.trainer.callbacks.append(Unready())
    with pytest.raises(InputError, match="not today"):
        made.run(str)
    assert contents(run) == before
    made = job.resume(run, config, corpus, other_data=False, say=str)
    made.run(str)
    assert contents(run) != before  # the comparison can fail
    assert job.read_config(run)[0].optim.lr == 1e-4


class Unready:
    """No subclass of Callback, and a service that cannot be had."""

    def ready(self, trainer: Trainer) -> None:
        raise InputError("not today")


@pytest.mark.parametrize("kind", ["start", "fork"])
def test_a_refused_new_run_leaves_no_folder(run: Path, book: str, kind: str) -> None:  # noqa: F811
    config, corpus = job.read_config(run)
    config.run.name = "new"
    if kind == "start":
        made = job.start(config, corpus)
    else:
        config.model.width = 128
        with pytest.raises(InputError):
            job.fork(run, config, corpus, other_data=False, say=str)
        assert not Path("runs/new").exists()
        config.model.width = None
        config = job.read_config(run)[0]
        config.run.name = "new"
        made = job.fork(run, config, corpus, other_data=False, say=str)
    made.trainer.callbacks.append(Unready())
    with pytest.raises(InputError, match="not today"):
        made.run(str)
    assert not Path("runs/new").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "facts.json", "config.json", "metrics.jsonl"])
def test_a_new_run_that_cannot_be_written_leaves_no_folder_whichever_file_it_is(
    book: str,  # noqa: F811
    name: str,
) -> None:
    made = job.start(tiny(name="new", tokenizer="chars", steps=1), (book,))
    (made.folder / name).mkdir()  # refuses a file of its name
    with pytest.raises(InputError, match=f"cannot write .*{name}"):
        made.run(str)
    assert not made.folder.exists() or name == "config.json"
    assert not list(made.folder.glob("metrics.jsonl/*"))


def test_a_run_killed_before_it_began_gives_its_name_back(book: str) -> None:  # noqa: F811
    Path("runs/run").mkdir(parents=True)
    job.start(tiny(name="run", steps=1), (book,)).trainer.fit()
    assert [r["step"] for r in read_metrics(Path("runs/run"))] == [1]


def test_runs_that_start_in_the_same_second_have_a_folder_each(book: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("time.strftime", lambda *args: "20260101-000000")
    one = job.start(tiny(steps=1), (book,))
    two = job.start(tiny(steps=1), (book,))
    assert (one.folder.name, two.folder.name) == ("20260101-000000", "20260101-000000-2")
    assert f"process {os.getpid()}" in lock.holder(one.folder)  # from its first instant on
    two.withdraw()
    assert one.folder.exists()
    assert not two.folder.exists()
    one.trainer.fit()
    one.withdraw()  # it has begun
    assert [r["step"] for r in read_metrics(one.folder)] == [1]


def test_a_folder_is_given_up_by_its_owner_alone(book: str) -> None:  # noqa: F811
    Path("runs/run").mkdir(parents=True)
    with held(Path("runs/run")), pytest.raises(InputError, match="not overwritten"):  # killed or not, it is not ours
        job.start(tiny(name="run", steps=1), (book,))
    made = job.start(tiny(name="run", steps=1), (book,))  # a lock that nobody has: killed before it began
    assert made.owner is not None
    made.owner.release()
    with held(made.folder):
        made.withdraw()
        assert made.folder.exists()
    (made.folder / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="not overwritten"):
        job.start(tiny(name="run", steps=1), (book,))


def test_a_lock_of_a_folder_that_was_removed_counts_for_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with lock.take(folder) as own:
        assert own.stands(folder)
        (folder / lock.NAME).unlink()
        assert not own.stands(folder)
        with lock.take(folder) as other:
            assert other.stands(folder)
            assert not own.stands(folder)


# ------------------------------------------------------------------------------------------------------------ one owner

HOLD = "import sys, time; from pathlib import Path; from fastlm.train import lock; held = lock.take(Path(sys.argv[1])); print(1, flush=True); time.sleep(600)"  # fmt: skip  # noqa: E501


@contextlib.contextmanager
def held(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the run."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        try:
            assert other.stdout.readline() == "1\n"
            yield other
        finally:
            other.kill()


def test_a_second_process_is_refused_and_readers_are_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    with held(run) as other:
        assert cli.main(["train", "--resume", "run", "--lr", "1e-2"]) == 2
        said = capsys.readouterr().err
        assert f"process {other.pid} on {os.uname().nodename}" in said
        assert "being trained" in said
        assert contents(run) == before
        assert cli.main(["generate", "run", "--tokens", "3"]) == 0
        assert cli.main(["eval", "run"]) == 0
        assert cli.main(["export", "run", "--folder", "out"]) == 0
        assert cli.main(["runs"]) == 0
        assert "all steps done" in capsys.readouterr().out
        (run / "result.json").rename("result.json")
        assert cli.main(["runs"]) == 0
        assert f"running: process {other.pid}" in capsys.readouterr().out
        Path("result.json").rename(run / "result.json")
        with pytest.raises(InputError, match=f"process {other.pid}"):  # one's own trainer in the same folder too
            own(tiny(), folder=str(run)).fit()
    assert not lock.holder(run)  # a kill lets go
    assert cli.main(["train", "--resume", "run", "--quiet"]) == 0
    assert not lock.holder(run)


def test_an_owner_of_this_process_counts_too(run: Path) -> None:
    with lock.take(run):
        assert f"process {os.getpid()}" in lock.holder(run)
        with pytest.raises(InputError, match="being trained"):
            lock.take(run)
    lock.take(run).release()


def test_a_disk_without_locks_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    lock.take(run).release()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_checkpoint_that_goes_while_it_is_read_is_read_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training run does beside `generate`: the best checkpoint gives way to the next."""
    from fastlm.train import export

    (step, best) = checkpoint.steps(run, "best")[-1]
    real = checkpoint.verify

    def removed(folder: Path) -> None:
        monkeypatch.setattr(checkpoint, "verify", real)
        best.rename(best.with_name(f"best-{step + 6:08d}"))
        real(folder)

    monkeypatch.setattr(checkpoint, "verify", removed)
    assert export.read_model(run).tensors
    monkeypatch.setattr(checkpoint, "verify", lambda folder: (_ for _ in ()).throw(checkpoint.CheckpointError("torn")))
    with pytest.raises(checkpoint.CheckpointError, match="torn"):
        export.read_model(run)


# ------------------------------------------------------------------------------------------------------------ strangers


def test_files_that_a_system_leaves_behind_are_no_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = (".DS_Store", "Thumbs.db", ".nfs00000001", "._model.safetensors", "model.rank-00009.safetensors", "ema.old")
    for folder in [run, run / "checkpoints", *(run / "checkpoints").iterdir()]:
        for name in names:
            (folder / name).write_bytes(b"\0")
    assert cli.main(["generate", "run", "--tokens", "3"]) == 0
    assert cli.main(["export", "run", "--folder", "out"]) == 0
    assert cli.main(["eval", "run"]) == 0
    assert cli.main(["train", "--resume", "run", "--quiet", "--ema", "0.9"]) == 0, capsys.readouterr().err
    assert [s for s, _ in checkpoint.steps(run)] == [6, 12]
    assert not list((run / "checkpoints").glob(".draft-*"))


def test_a_folder_that_cannot_be_emptied_is_no_obstacle(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file on NFS that another process reads stays in its folder as .nfs..., whatever is removed."""
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)
    folder = run / "checkpoints" / "step-00000006"
    for _ in range(3):
        checkpoint._remove(folder)
        folder.mkdir()
        (folder / "file").touch()


# ------------------------------------------------------------------------------------------------------------ callbacks


def test_a_callback_of_any_class_is_told_all(tmp_path: Path) -> None:
    told: list[str] = []

    class Any_:
        def __getattr__(self, name: str) -> Callable[..., None]:
            if name.startswith("_") or name == "everywhere":
                raise AttributeError(name)
            return lambda *args: told.append(name)

    trainer = own(tiny(steps=3, eval_every=2), evaluate=lambda model, whole: {"val_loss": 1.0}, callbacks=[Any_()])
    trainer.fit()
    assert told == ["ready", "start", "step", "evaluated", "step", "evaluated", "step", "end"]
    with pytest.raises(InputError, match="a callback must have a method"):
        own(tiny(), callbacks=[object()])


def test_an_error_behind_a_failing_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The saver's thread fails, and the run ends for another reason before it asks the thread."""
    trainer = own(tiny(steps=9, save_every=2))
    real = trainer.saver._write

    def full(*args: Any) -> None:
        trainer.saver.run = Path("/dev/null/none")
        real(*args)

    class Stops:
        def step(self, trainer: Trainer, row: dict[str, Any]) -> None:
            if row["step"] == 3:
                raise InputError("enough")

    trainer.saver._write = full  # type: ignore[method-assign]
    trainer.callbacks.append(Stops())
    with pytest.raises(InputError, match="enough"):
        trainer.fit()
    assert "cannot write the checkpoint" in capsys.readouterr().err
