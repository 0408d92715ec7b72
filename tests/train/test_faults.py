"""Faults of several ranks as a user meets them: one is lost, falls silent, is asked to stop, is started again by torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastlm.cli import main as cli
from fastlm.data import InputError
from fastlm.train import checkpoint, job, mesh
from fastlm.train.files import read_metrics
from ports import free_port
from test_train import tiny

SMALL = """
    book.txt --name a --layers 1 --heads 2 --width 32 --context 16 --batch 4 --dropout 0.1 --eval-every 0
    --eval-tokens 512 --sample 8 --device cpu --threads 1 --quiet
""".split()  # noqa: SIM905
RUN = Path("runs/a")
LIMIT = 240  # seconds after which a process counts as hung; nothing here is a test of speed


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    Path("book.txt").write_text("".join(f"line {i * i % 97} of a book about {i % 13} things\n" for i in range(3000)))


class Started:
    """A launcher and its ranks; what is left of them goes when the test ends."""

    def __init__(self, *words: str) -> None:
        self.out = open("out.txt", "ab")  # noqa: SIM115
        self.process = subprocess.Popen([sys.executable, "-m", *words], stdout=self.out, stderr=self.out)
        self.ranks: dict[int, psutil.Process] = {}

    def said(self) -> str:
        return Path("out.txt").read_text(errors="replace")

    def until(self, condition: Callable[[], bool], seconds: float = LIMIT) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def until_step(self, step: int, count: int = 2) -> None:
        """Wait for a line of metrics at or after `step`; `ranks` are then the processes by rank."""
        self.until(lambda: any(row["step"] >= step for row in read_metrics(RUN)))
        self.find_ranks()
        assert len(self.ranks) == count

    def find_ranks(self) -> None:
        found = psutil.Process(self.process.pid).children()
        self.ranks = {int(p.environ()["RANK"]): p for p in found if "RANK" in p.environ()}

    def end(self, seconds: float = LIMIT) -> int:
        status = self.process.wait(seconds)
        for rank in self.ranks.values():
            rank.wait(LIMIT)  # raises when it lives on
        return status

    def close(self) -> None:
        for process in (*self.ranks.values(), self.process):
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()
        self.process.wait()
        self.out.close()


@pytest.fixture
def begin() -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def start(*words: str) -> Started:
        started.append(Started(*words))
        return started[-1]

    yield start
    for one in started:
        one.close()


Begin = Callable[..., Started]
TRAIN = ["fastlm", "train", *SMALL]


def losses() -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(RUN)]


@pytest.mark.slow
def test_a_run_of_interleaved_stages_of_shards_goes_on_in_one_process(begin: Begin) -> None:
    stages = "--layers 4 --mesh pp=2,fsdp=2 --pp-stages 2 --dtype bfloat16 --micro 1 --steps 4"
    started = begin(*TRAIN, *stages.split())
    assert started.end() == 0, started.said()
    assert "a sample:" in started.said()
    again = ["fastlm", "train", "--resume", "a", "--steps", "6", "--mesh", "", "--nproc", "1"]
    started = begin(*again)
    assert started.end() == 2
    assert "--pp-stages must be 1 without a pipeline (--mesh pp=N with N above 1); it is 2" in started.said()
    started = begin(*again, "--pp-stages", "1")
    assert started.end() == 0, started.said()
    assert [step for step, _ in losses()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_lost_rank_ends_the_others_in_seconds_and_says_so(begin: Begin, lost: int) -> None:
    started = begin(*TRAIN, "--steps", "1000000", "--nproc", "2", "--save-every", "5")
    started.until(lambda: any(step >= 10 for step, _ in checkpoint.steps(RUN)))
    started.find_ranks()
    started.ranks[lost].kill()
    assert started.end() == 1  # within LIMIT, where a collective waits half an hour
    said = started.said()
    assert f"rank {lost} of 2 was ended by SIGKILL" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert int(checkpoint.newest(RUN).name.split("-")[1]) >= 10


@pytest.mark.slow
@pytest.mark.grid
def test_a_signal_to_several_ranks_saves_one_step_and_goes_on_from_it(begin: Begin) -> None:
    # shards that are gathered in bfloat16: what reads weights after the last step must be under autocast too
    started = begin(*TRAIN, "--steps", "1000000", "--mesh", "fsdp=2", "--dtype", "bfloat16", "--save-every", "0")
    started.until_step(10)
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == 128 + signal.SIGTERM, started.said()
    assert "Traceback" not in started.said()
    (found,) = checkpoint.steps(RUN)
    checkpoint.verify(found[1])
    assert (found[1] / "random.rank-00001.safetensors").is_file()
    before = losses()
    assert before[-1][0] == found[0]
    again = begin("fastlm", "train", "--resume", "runs/a", "--steps", str(found[0] + 3))
    assert again.end() == 0, again.said()
    assert "a sample:" in again.said()
    assert f"going on from step {found[0]} of {found[0] + 3}" in again.said()
    assert losses()[: len(before)] == before
    assert [step for step, _ in losses()] == list(range(1, found[0] + 4))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_meet_say_so(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "MEET", timedelta(seconds=1))
    monkeypatch.setattr(mesh, "had_peers", False)
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    port = free_port()
    with pytest.raises(InputError, match=f"rank {rank}: the 2 ranks did not meet at 127.0.0.1:{port}: "):
        mesh.start("", "cpu", {**place, "MASTER_PORT": str(port)})


class Slow(mesh.Ranks):
    """While the ranks agree at the third step, a signal comes: too late for this agreement."""

    calls = 0

    def agree(self, stop: str) -> str:
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return stop


def test_a_signal_while_the_ranks_agree_is_not_lost() -> None:
    made = job.start(tiny(name="a", steps=1000), ("book.txt",), ranks=Slow())
    assert made.trainer.fit() == "signal SIGTERM"
    assert made.trainer.step == 3
    assert checkpoint.newest(RUN).name == "step-00000003"


@pytest.mark.slow
def test_a_rank_asked_alone_has_all_of_them_save(begin: Begin) -> None:
    started = begin(*TRAIN, "--steps", "1000000", "--nproc", "2", "--save-every", "0")
    started.until_step(10)
    started.ranks[1].send_signal(signal.SIGTERM)
    assert started.end() == 128 + signal.SIGTERM, started.said()
    ((step, folder),) = checkpoint.steps(RUN)
    checkpoint.verify(folder)
    assert losses()[-1][0] == step


@pytest.mark.slow
def test_a_rank_that_falls_silent_is_missed(begin: Begin) -> None:
    started = begin(*TRAIN, "--steps", "1000000", "--nproc", "2")
    started.until_step(10)
    started.ranks[1].suspend()
    start = time.monotonic()
    assert started.end() == 1
    assert time.monotonic() - start >= mesh.SILENT - 2
    assert "rank 1 has shown no sign of life" in started.said()


WATCHED = """
import sys, time
from datetime import timedelta
from fastlm.data import InputError
from fastlm.train import mesh

what = sys.argv[1]
mesh.SILENT, mesh.FAILED = 600.0, 1.0  # a stalled machine is not what is tested
ranks = mesh.start("dp=2", "cpu")
if what == "late" and ranks.rank == 1:  # it comes late, as one that hashes what the others have hashed
    ranks._store.wait(["waited"], timedelta(seconds=200))
try:
    if what == "late" and ranks.rank == 0:
        mesh.SILENT = 1.0
    with ranks.watch():
        if what == "failed" and ranks.rank == 1:
            raise InputError("this rank cannot go on")
        if what == "failed":
            time.sleep(600)  # within a collective that notices no one's end, as NCCL's
        if ranks.rank == 0:
            time.sleep(4)
            mesh.SILENT = 600.0
            ranks._store.set("waited", "")
        ranks.gather(0)
        with ranks.watch():
            print("together", ranks.rank)
except InputError as error:
    print(error, flush=True)
    time.sleep(600)  # it has ended with an error, and its connections live
print("done", ranks.rank)
ranks.close()
mesh.leave(0)
"""


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("what", ["late", "failed"])
def test_a_late_rank_is_waited_for_and_one_that_failed_is_not(what: str) -> None:
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", WATCHED, what]
    out = subprocess.PIPE
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(r)}, stdout=out, stderr=subprocess.STDOUT, text=True)
        for r in range(2)
    ]
    try:
        said = ranks[0].communicate(timeout=LIMIT)[0]
        if what == "failed":
            assert ranks[0].returncode == 1, said
            assert "another rank was lost: rank 1 ended with an error, for the reason it gave; ending" in said
            assert "Traceback" not in said
        else:
            other = ranks[1].communicate(timeout=LIMIT)[0]
            assert [r.returncode for r in ranks] == [0, 0], said + other
            assert "together 0\ndone 0\n" in said
            assert "lost" not in said + other
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
@pytest.mark.grid
def test_tasks_of_slurm_train_together() -> None:
    """srun starts the same command as each task; the environment alone says which it is, and where they meet."""
    job_id = 500000 * 20000 + free_port() - 20000
    env = {**os.environ, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": str(job_id)}
    env |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "2"}
    command = [sys.executable, "-m", *TRAIN, "--steps", "3"]
    out, pipe = subprocess.STDOUT, subprocess.PIPE
    tasks = [
        subprocess.Popen(
            command,
            env={**env, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=pipe,
            stderr=out,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [task.communicate(timeout=LIMIT)[0] for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], said
        assert "2 processes" in said[0]
        assert [step for step, _ in losses()] == [1, 2, 3]
        assert json.loads((checkpoint.newest(RUN) / "state.json").read_text())["ranks"] == 2
    finally:
        for task in tasks:
            task.kill()
            task.communicate()


class Watched(mesh.Ranks):
    """Says whether it is being watched."""

    open = False

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        before, self.open = self.open, True
        yield
        self.open = before


@pytest.mark.parametrize("resume", [False, True])
def test_ranks_are_watched_from_the_corpus_to_the_report(resume: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, seen = Watched(), []
    if resume:
        assert cli.main(["train", *SMALL, "--steps", "1"]) == 0

    def note(owner: object, name: str) -> None:
        plain = getattr(owner, name)

        def noting(*args: Any, **named: Any) -> Any:
            seen.append((name, ranks.open))
            return plain(*args, **named)

        monkeypatch.setattr(owner, name, noting)

    monkeypatch.setattr(mesh, "start", lambda *_: ranks)
    note(job, "read_data")
    note(job.Trainer, "restore")
    note(job.Job, "finish")
    words = ["--resume", "runs/a", "--steps", "2"] if resume else [*SMALL, "--steps", "1"]
    assert cli.main(["train", *words]) == 0
    assert seen == [(name, True) for name in ("read_data", *(["restore"] if resume else []), "finish")]
    assert not ranks.open


@pytest.mark.slow
def test_ranks_go_with_their_launcher(begin: Begin) -> None:
    started = begin(*TRAIN, "--steps", "1000000", "--nproc", "2", "--save-every", "0")
    started.until_step(10)
    started.process.kill()
    started.end()
    ((step, folder),) = checkpoint.steps(RUN)  # the kernel asks them to stop, and they save
    checkpoint.verify(folder)
    assert losses()[-1][0] == step


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dp=2", "fsdp=2"])
def test_ranks_killed_at_any_moment_go_on_as_if_never_killed(begin: Begin, which: str) -> None:
    # the default warm-up follows from the steps, which differ here
    words = [*TRAIN, "--mesh", which, "--schedule", "constant", "--warmup", "5", "--save-every", "3"]
    for step in (0, 17, 40):
        how = words if step == 0 else ["fastlm", "train", "--resume", "runs/a"]
        started = begin(*how, "--steps", "1000000")  # however late the kill comes, it finds a run that goes on
        started.until_step(step)
        for rank in (1, 0) if step else (0, 1):
            started.ranks[rank].kill()
        assert started.end() == 1
        for _, folder in checkpoint.steps(RUN):
            checkpoint.verify(folder)
    steps = str(int(checkpoint.newest(RUN).name.split("-")[1]) + 20)
    started = begin("fastlm", "train", "--resume", "runs/a", "--steps", steps)
    assert started.end() == 0, started.said()
    found, last = losses(), checkpoint.newest(RUN)
    files = {p.name: p.read_bytes() for p in last.glob("*.safetensors")}
    assert len(files) > 2
    RUN.rename("runs/killed")
    assert (whole := begin(*words, "--steps", steps)).end() == 0, whole.said()
    assert losses() == found
    for name, raw in files.items():
        assert (checkpoint.newest(RUN) / name).read_bytes() == raw, name


LOSE = """
import os, shutil, signal, sys
from fastlm.cli.main import run
from fastlm.train.loop import Trainer

step, lost = Trainer.train_step, int(sys.argv.pop(1))
def train_step(self):
    if self.step == 23 and self.ranks.rank == lost and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        shutil.copy("runs/a/metrics.jsonl", "before.jsonl")
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)
Trainer.train_step = train_step
if __name__ == "__main__":
    run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost, alone", [(0, True), (1, False)])
def test_torchrun_starts_lost_ranks_again_and_the_run_goes_on(begin: Begin, lost: int, alone: bool) -> None:
    how = ["--standalone"] if alone else ["--master-port", str(free_port())]
    torchrun = ["torch.distributed.run", *how, "--nproc-per-node", "2", "--max-restarts", "1"]
    Path("lose.py").write_text(LOSE)
    started = begin(*torchrun, "lose.py", str(lost), *TRAIN[1:], "--steps", "40", "--save-every", "5")
    assert started.process.wait(LIMIT) == 0, started.said()
    said = started.said()
    assert "going on from step" in said
    assert [step for step, _ in losses()] == list(range(1, 41))
    before = [json.loads(line)["loss"] for line in Path("before.jsonl").read_text().splitlines()]
    assert [loss for _, loss in losses()[:20]] == before[:20]
    assert [p.name for p in Path("runs").iterdir()] == ["a"]
    assert os.stat(RUN / "result.json").st_size


@pytest.mark.slow
def test_torchrun_gives_up_after_its_restarts(begin: Begin) -> None:
    """A fault that comes back each time ends the job with the reason, and not in a hang."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m"]
    started = begin(*torchrun, "fastlm", "train", "missing.txt", *SMALL[1:])
    assert started.end() == 1
    assert started.said().count("missing.txt does not exist") >= 2
