"""What befalls a run: forks killed early, spikes, vocabularies of any size, full disks, machines that changed."""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastlm.cli import main as cli
from fastlm.data import DatasetSource, InputError
from fastlm.data.sample import shares
from fastlm.train import Trainer, checkpoint, generation, job, parallel, report, state
from fastlm.train.callbacks import Callback
from fastlm.train.files import read_metrics
from fastlm.train.loop import autocast
from test_train import StopAt, _own_place, book, losses, poisoned, tiny, weights  # noqa: F401
from torch import nn

SMALL = "--layers 1 --heads 2 --width 64 --context 16 --batch 4 --eval-tokens 512 --sample 8".split()  # noqa: SIM905

# ------------------------------------------------------------------------------------------------------------------- forks


@pytest.fixture
def first(book: str) -> Path:  # noqa: F811
    """A run of 12 steps, the best of which it knows."""
    made = job.start(tiny(name="first", eval_every=6), (book,))
    made.trainer.fit()
    return made.folder


def test_a_fork_killed_at_its_first_step_goes_on_from_there(first: Path, book: str) -> None:  # noqa: F811
    made = job.fork(first, tiny(name="second", steps=15), (book,), other_data=False, say=str)
    made.begin()
    made.trainer.owner.release()  # as a kill does
    assert [s for s, _ in checkpoint.steps(made.folder)] == [12]
    again = job.resume(made.folder, tiny(name="second", steps=15), (book,), other_data=False, say=str)
    assert again.trainer.step == 12
    for name, w in weights(made.trainer).items():
        assert torch.equal(w, weights(again.trainer)[name]), name


def test_a_fork_killed_before_it_saved_starts_once_more_from_its_origin(first: Path, book: str) -> None:  # noqa: F811
    made = job.fork(first, tiny(name="second", steps=15), (book,), other_data=False, say=str)
    made.begin()
    made.trainer.owner.release()  # as a kill does
    kept = weights(made.trainer)
    for _, path in checkpoint.steps(made.folder):
        checkpoint._remove(path)
    said: list[str] = []
    again = job.resume(made.folder, tiny(name="second", steps=15), (book,), other_data=False, say=said.append)
    again.begin()
    assert again.trainer.step == 12
    assert "starts once more from" in said[0]
    assert [s for s, _ in checkpoint.steps(again.folder)] == [12]
    assert all(torch.equal(w, weights(again.trainer)[name]) for name, w in kept.items())
    again.trainer.owner.release()
    for path in (first / "checkpoints").iterdir():
        checkpoint._remove(path)
    for _, path in checkpoint.steps(made.folder):
        checkpoint._remove(path)
    with pytest.raises(InputError, match="step-00000012"):
        job.resume(made.folder, tiny(name="second", steps=15), (book,), other_data=False, say=str)


def test_the_best_of_a_fork_is_its_own(first: Path, book: str) -> None:  # noqa: F811
    worse = tiny(name="second", steps=60, eval_every=2, patience=2, lr=1.0, warmup=0, schedule="constant")
    made = job.fork(first, worse, (book,), other_data=False, say=str)
    assert (made.trainer.best, made.trainer.waited) == ({}, 0)
    why = made.trainer.fit()
    assert why.startswith("early")
    made.finish(why, str)
    assert made.trainer.best["step"] > 12


def test_a_spike_in_a_fork_goes_back_to_where_it_forked() -> None:
    trainer = poisoned(tiny(steps=20, batch=1, lr=1e-2), bad=set())
    trainer.fit()
    new = poisoned(tiny(steps=30, batch=1, spike=50.0, lr=1e-2), bad={25}, factor=1e4, folder="new")
    new.restore(checkpoint.newest(Path("run")))
    new.begin_own()
    new.fit()
    assert new.skipped == [(20, 26)]


# ----------------------------------------------------------------------------------------------------------- vocabularies


def test_a_run_of_few_characters_is_a_start_for_another(book: str) -> None:  # noqa: F811
    made = job.start(tiny(name="letters", tokenizer="chars", steps=3), (book,))
    made.trainer.fit()
    assert made.shape.vocab < 256
    config = tiny(name="next", init="letters", tokenizer=str(made.folder / "tokenizer.json"), steps=2)
    config.model.layers = config.model.heads = config.model.width = config.model.context = None
    tuned = job.start(config, (book,))
    for name, w in weights(made.trainer).items():
        assert torch.equal(w, weights(tuned.trainer)[name]), name


def test_rows_fewer_than_bytes_serve_a_small_tokenizer(book: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    made = job.start(tiny(name="rows", tokenizer="chars", rows=100, steps=2), (book,))
    made.trainer.fit()
    assert made.shape.vocab == 100
    assert cli.main(["data", "show", "0", "--run", "rows"]) == 0
    assert "predicted" in capsys.readouterr().out
    with pytest.raises(InputError, match="--rows must be at least the tokenizer's vocabulary of 2"):
        job.start(tiny(name="bytes", rows=100), (book,))


def test_rows_beyond_the_vocabulary_are_never_drawn(book: str) -> None:  # noqa: F811
    made = job.start(tiny(rows=512, eval_every=2, steps=4, name="run", sample=64), (book,))
    made.run(str)
    assert len(read_metrics(made.folder, "samples.jsonl")) == 2
    logits = torch.zeros(4, 512)
    logits[:, 300] = 1e3
    for temperature in (0.0, 1.0):
        assert int(generation.sampler(temperature, vocab=257)(logits).max()) < 257


# ------------------------------------------------------------------------------------------------------------------ spikes


class Buffered(Trainer):
    """Metrics wait for four steps, as they do on a GPU."""

    def flush(self, force: bool = False) -> bool:
        return super().flush(force) if force or len(self.pending) >= 4 else False


def spiking(bad: set[int], kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    trainer = poisoned(tiny(batch=1, spike=50.0, lr=1e-2, **changes), bad=bad, factor=1e4)
    trainer.__class__ = kind
    return trainer


def test_a_spike_among_buffered_steps_undoes_all_of_them() -> None:
    trainer = spiking({21, 22}, Buffered, steps=40, save_every=20)
    texts: list[tuple[str, int]] = []

    class Told(Callback):
        def rewind(self, trainer: Trainer) -> None:
            texts.append(("rewind", trainer.step))

    trainer.callbacks.append(Told())
    trainer.fit()
    assert trainer.skipped == [(20, 24)]
    assert texts == [("rewind", 20)]
    assert [r["step"] for r in read_metrics(Path("run"))] == list(range(1, 41))


def test_a_spike_at_a_step_that_saves_saves_nothing() -> None:
    trainer = spiking({19}, steps=25, save_every=10)
    trainer.fit()
    assert trainer.skipped == [(10, 20)]
    assert trainer.step == 25
    assert trainer.consumed == 35


def test_spikes_without_end_stop_with_a_reason() -> None:
    trainer = spiking(set(range(25, 200)), steps=100, save_every=20)
    with pytest.raises(InputError, match=r"after 3 times back to step 20: training stopped.*--lr.*--spike"):
        trainer.fit()
    assert trainer.guard.rolled_back == (20, 4)
    assert (
        trainer.guard.mean_loss == json.loads((checkpoint.newest(Path("run")) / "state.json").read_text())["mean_loss"]
    )


def test_samples_of_undone_steps_are_dropped(book: str) -> None:  # noqa: F811
    made = job.start(tiny(name="run", steps=12, save_every=4, eval_every=2, spike=3.0), (book,))
    judged, bad = made.trainer.guard.judge, iter([1])
    made.trainer.guard.judge = lambda step, loss, *found, **options: judged(  # type: ignore[method-assign]
        step, loss * (100 if step == 8 and next(bad, 0) else 1), *found, **options
    )
    made.trainer.fit()
    assert made.trainer.skipped == [(24, 32)]  # step 6 was the best so far, and saved
    assert [r["step"] for r in read_metrics(made.folder, "samples.jsonl")] == [2, 4, 6, 8, 10, 12]


def test_a_signal_after_a_skipped_step_saves_it() -> None:
    trainer = poisoned(tiny(steps=20, batch=1), bad={7})
    trainer.callbacks.append(StopAt(8))  # type: ignore[arg-type]
    assert trainer.fit() == "signal SIGTERM"
    assert trainer.guard.bad_in_row == 1
    assert checkpoint.newest(Path("run")).name == "step-00000008"
    again = poisoned(tiny(steps=20, batch=1), bad={7}, folder="other")
    again.restore(checkpoint.newest(Path("run")))
    assert (again.step, again.guard.bad_in_row) == (8, 1)
    assert all(torch.equal(w, weights(again)[name]) for name, w in weights(trainer).items())


# ------------------------------------------------------------------------------------------------------------------- ranks


def test_the_batch_ramp_is_the_same_on_any_number_of_ranks() -> None:
    trainer = poisoned(tiny(steps=20, batch=8, ramp=10), bad=set())
    sizes, read = {}, {}
    for count in (1, 2, 3):
        parts = []
        for rank in range(count):
            ranks = parallel.Ranks()
            ranks.size_of_data, ranks.data_rank = count, rank
            trainer.ranks = ranks
            parts.append(list(trainer.plan(0, 0)))
        sizes[count] = [trainer.batch_size(s) for s in range(20)]
        assert len({len(part) for part in parts}) == 1  # every rank makes as many micro-batches
        read[count] = [sorted(np.concatenate(step).tolist()) for step in zip(*parts)]
    assert sizes[1] == sizes[2] == sizes[3]
    assert sizes[1][0] == 1
    assert read[1] == read[2] == read[3]


# --------------------------------------------------------------------------------------------------------------- the disk


def test_a_disk_that_is_full_is_one_sentence_and_the_earlier_checkpoint_serves(book: str) -> None:  # noqa: F811
    small = [*SMALL, "--threads", "1"]
    command = [sys.executable, "-m", "fastlm", "train"]
    start = [*command, book, *small, "--name", "run", "--steps", "4", "--save-every", "2", "--kernels", "torch"]
    subprocess.run(start, check=True, capture_output=True, timeout=120)
    (kept,) = [p for s, p in checkpoint.steps(Path("runs/run")) if s == 4]
    size = Path("runs/run/loss.png").stat().st_size // 2
    assert size < (kept / "model.safetensors").stat().st_size

    def limit() -> None:  # no file larger than half of the picture: neither a checkpoint nor picture nor report
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    resumed = [*command, "--resume", "run", "--steps", "8"]
    done = subprocess.run(resumed, capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "fastlm train: cannot write the checkpoint runs/run/checkpoints/step-00000006: File too large" in done.stderr
    assert "picture in runs/run is not whole: File too large" in done.stderr
    assert "cannot write runs/run/report.html: File too large" in done.stderr
    written = [row["step"] for row in read_metrics(Path("runs/run"))]  # to where the failed save was waited for
    assert written == list(range(1, len(written) + 1))
    assert checkpoint.newest(Path("runs/run")) == kept
    assert not list(Path("runs/run/checkpoints").glob(".draft*"))


def test_an_end_that_cannot_write_hides_neither_the_others_nor_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = poisoned(tiny(steps=40, batch=1, max_bad=4), bad=set(range(12, 40)))
    ended = []

    class Full(Callback):
        def end(self, trainer: Trainer) -> None:
            raise OSError(28, "No space left on device")

    class After(Callback):
        def end(self, trainer: Trainer) -> None:
            ended.append(True)

    trainer.callbacks[:0] = [Full()]
    trainer.callbacks.append(After())
    with pytest.raises(InputError, match="4 steps in a row"):
        trainer.fit()
    assert ended
    assert trainer.callbacks[1].file.closed  # type: ignore[attr-defined]
    assert "full in run is not whole: No space left on device" in capsys.readouterr().err


def test_an_error_of_the_file_system_names_its_path(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(report, "all_runs", fail)
    assert cli.main(["runs"]) == 2
    assert capsys.readouterr().err == "fastlm runs: some/file: No space left on device\n"


# ----------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("generator", [random.random, np.random.rand, np.random.randn, lambda: random.gauss(0, 1)])
def test_a_loss_that_draws_from_any_generator_resumes_exactly(generator: Any) -> None:
    def make(folder: str) -> Trainer:
        trainer = poisoned(tiny(steps=11, batch=1, save_every=5), bad=set(), folder=folder)
        plain = trainer.loss
        trainer.loss = lambda model, *batch: (plain(model, *batch)[0] * (1 + generator()), torch.tensor(1))
        return trainer

    whole = make("whole")
    whole.fit()
    half = make("half")
    half.callbacks.append(StopAt(5))  # type: ignore[arg-type]
    half.fit()
    again = make("again")
    for _ in range(3):
        generator()
    again.restore(checkpoint.newest(Path("half")))
    again.fit()
    assert losses(Path("again")) == losses(Path("whole"))[5:]


def test_what_makes_a_resume_inexact_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = poisoned(tiny(steps=4, batch=1), bad=set())
    trainer.fit()
    other = poisoned(tiny(steps=8, batch=1, threads=2), bad=set(), folder="other")
    capsys.readouterr()
    other.restore(checkpoint.newest(Path("run")))
    assert "not bit for bit: threads: 1 -> 2\n" in capsys.readouterr().err
    same = poisoned(tiny(steps=8, batch=1), bad=set(), folder="same")
    same.restore(checkpoint.newest(Path("run")))
    assert "bit for bit" not in capsys.readouterr().err
    saved = {"ranks": 2, "threads": 1, "versions": {"torch": "1.0", "python": "3.0"}}
    assert [line.split(":")[0] for line in state.moved(saved, parallel.Ranks())] == ["ranks", "torch", "python"]


# -------------------------------------------------------------------------------------------------------- names and places


def test_init_and_resume_take_names_and_out(book: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    small = [*SMALL, "--quiet"]
    base = ["train", book, *small, "--kernels", "torch", "--steps", "2", "--out", "elsewhere", "--name", "first"]
    assert cli.main(base) == 0
    assert cli.main(["train", "--resume", "first", "--out", "elsewhere", "--steps", "3"]) == 0
    assert "going on from step 2 of 3" in capsys.readouterr().out
    tune = [
        "train",
        book,
        "--kernels",
        "torch",
        "--batch",
        "4",
        "--eval-tokens",
        "512",
        "--sample",
        "8",
        "--steps",
        "1",
    ]
    assert cli.main([*tune, "--init", "first", "--out", "elsewhere", "--name", "tuned", "--quiet"]) == 0
    assert cli.main(["train", "--fork", "first", "--out", "elsewhere", "--name", "forked", "--steps", "4"]) == 0
    assert checkpoint.newest(Path("elsewhere/forked")).name == "step-00000004"
    assert not Path("runs").exists()
    shutil.move("elsewhere/first", "runs/first")  # a run of the default place starts one of another
    assert cli.main([*tune, "--init", "first", "--out", "elsewhere", "--name", "again", "--quiet"]) == 0
    assert cli.main([*tune, "--init", "nobody"]) == 2
    assert "there is no run nobody" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- one's own module


def own(config: Any, folder: str = "own", **options: Any) -> Trainer:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    data = DatasetSource(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), seed=1)
    Path(folder).mkdir(exist_ok=True)
    loss = lambda model, x, y: ((model(x) - y).square().sum(), torch.tensor(len(x)))
    return Trainer(config, nn.Linear(4, 1), data, folder, loss=loss, **options)


def test_a_trainer_of_one_s_own_restores_the_best_weights() -> None:
    seen: list[tuple[float, torch.Tensor]] = []

    def evaluate(model: nn.Module, whole: bool) -> dict[str, float]:
        loss = float(abs(len(seen) - 2))  # the third is the best
        seen.append((loss, next(model.parameters()).detach().clone()))
        return {"val_loss": loss}

    trainer = own(tiny(steps=100, batch=4, eval_every=2, patience=3, lr=1e-2), evaluate=evaluate)
    assert trainer.fit().startswith("early")
    assert torch.equal(next(trainer.plain.parameters()), seen[2][1])
    assert not torch.equal(seen[-1][1], seen[2][1])


def test_early_stopping_where_nothing_was_finite_restores_nothing() -> None:
    trainer = own(tiny(steps=100, eval_every=2, patience=2), evaluate=lambda model, whole: {"val_loss": float("nan")})
    assert trainer.fit().startswith("early")
    assert trainer.best == {}


def test_a_trainer_of_one_s_own_heeds_the_settings_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        trainer = own(tiny(steps=3, batch=4, quiet=False, threads=1, deterministic=True, tensorboard=True))
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
        trainer.fit()
        assert "step 3/3" in capsys.readouterr().out
        assert list(Path("own/tensorboard").iterdir())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_settings_that_cannot_be_served_are_one_sentence() -> None:
    with pytest.raises(InputError, match="--patience 3 needs validation losses"):
        own(tiny(eval_every=2, patience=3))
    Path("own").rmdir()
    with pytest.raises(InputError, match=r"--optimizer muon .* `blocks`"):
        own(tiny(optimizer="muon"))


# --------------------------------------------------------------------------------------------------------------- the reports


def test_further_validation_sets_are_in_the_report(book: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "more.txt").write_text("gamma delta alpha\n" * 400)
    made = job.start(tiny(name="run", eval_every=4, val=(f"more={tmp_path / 'more.txt'}",)), (book,))
    made.run(str)
    text = (made.folder / "report.html").read_text()
    last = read_metrics(made.folder)[-1]
    assert "Validation sets" in text
    assert f"{last['val_more_loss']:.4f}" in text
    assert "validation more" in text  # a curve's name


def test_one_unreadable_run_does_not_hide_the_others(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("torn", "{"), ("strange", "[]"), ("other", '{"config": 3}')):
        (Path("runs") / name).mkdir()
        (Path("runs") / name / "config.json").write_text(content)
    assert cli.main(["runs"]) == 0
    out = capsys.readouterr().out
    assert out.count("unreadable") == 3
    assert "12/12" in out


def test_eval_measures_under_the_run_s_dtype(book: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    made = job.start(tiny(name="half", dtype="bfloat16", steps=10, lr=1e-2), (book,))
    made.run(str)
    capsys.readouterr()
    assert cli.main(["eval", "half", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    with torch.no_grad(), autocast(torch.device("cpu"), "float32"):
        wide = job.validation(made.data, made.config, made.shape.context, torch.device("cpu"))(made.model.eval(), True)
    assert found["loss"] == made.trainer.latest["val_loss"]
    assert found["loss"] != wide["val_loss"]


def test_a_weight_too_small_for_one_sample_is_refused(book: str, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "other.txt"
    other.write_text(Path(book).read_text().replace("alpha", "omega"))
    with pytest.raises(InputError, match=r"--weights: 0.0001 of corpus 2 .* must be at least"):
        job.start(tiny(weights=(1.0, 1e-4)), (book, str(other)))
    assert shares([1.0, 1e-3]).tolist() == [1023, 1]


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize(
    "which", ["fsdp=2", pytest.param("tp=2", marks=pytest.mark.slow), pytest.param("pp=2", marks=pytest.mark.slow)]
)
def test_two_processes_sample_after_each_evaluation(book: str, which: str) -> None:  # noqa: F811
    words = [
        *SMALL,
        "--threads",
        "1",
        "--layers",
        "2",
        "--steps",
        "6",
        "--eval-every",
        "2",
        "--ramp",
        "4",
        "--batch",
        "8",
    ]
    command = [sys.executable, "-m", "fastlm", "train", book, *words, "--mesh", which, "--name", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = read_metrics(Path("runs/run"), "samples.jsonl")
    assert [row["step"] for row in found] == [2, 4, 6]
    assert all(row["text"] for row in found)
    rows = read_metrics(Path("runs/run"))
    assert [row["samples"] for row in rows] == [1, 2, 4, 6, 8, 8]  # a first step of fewer samples than ranks
    assert all(row["loss"] is not None and not row["bad"] for row in rows)
