"""Faults of several ranks as a user meets them: one is lost, falls silent, is asked to stop, is started again by torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fastlm.train import checkpoint, job, mesh
from fastlm.train.callbacks import read_metrics
from test_train import tiny

SMALL = """
    book.txt --name a --layers 1 --heads 2 --width 32 --context 16 --batch 4 --dropout 0.1 --eval-every 0
    --eval-tokens 512 --sample 8 --device cpu --threads 1 --quiet
""".split()  # noqa: SIM905
RUN = Path("runs/a")


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

    def until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def until_step(self, step: int, count: int = 2) -> None:
        """Wait for a line of metrics at or after `step`; `ranks` are then the processes by rank."""
        self.until(lambda: any(row["step"] >= step for row in read_metrics(RUN)))
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.ranks = {int(p.environ()["RANK"]): p for p in found if "RANK" in p.environ()}
        assert len(self.ranks) == count

    def end(self, seconds: float = 240) -> int:
        status = self.process.wait(seconds)
        for rank in self.ranks.values():
            rank.wait(60)  # raises when it lives on
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
    started.until_step(12)
    started.ranks[lost].kill()
    start = time.monotonic()
    assert started.end() == 1
    assert time.monotonic() - start < 45  # a fraction of a second on an idle machine
    said = started.said()
    assert f"rank {lost} of 2 was ended by SIGKILL" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert int(checkpoint.newest(RUN).name.split("-")[1]) >= 10


def test_a_signal_to_several_ranks_saves_one_step_and_goes_on_from_it(begin: Begin) -> None:
    # shards that are gathered in bfloat16: what reads weights after the last step must be under autocast too
    started = begin(*TRAIN, "--steps", "1000000", "--mesh", "fsdp=2", "--dtype", "bfloat16")
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
    started = begin(*TRAIN, "--steps", "1000000", "--nproc", "2")
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
    assert started.end(mesh.SILENT + 60) == 1
    assert time.monotonic() - start >= mesh.SILENT - 2
    assert "rank 1 has shown no sign of life" in started.said()


@pytest.mark.slow
def test_ranks_go_with_their_launcher(begin: Begin) -> None:
    started = begin(*TRAIN, "--steps", "1000000", "--nproc", "2")
    started.until_step(10)
    started.process.kill()
    started.end()
    ((step, folder),) = checkpoint.steps(RUN)  # the kernel asks them to stop, and they save
    checkpoint.verify(folder)
    assert losses()[-1][0] == step


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dp=2", "fsdp=2"])
def test_ranks_killed_at_any_moment_go_on_as_if_never_killed(begin: Begin, which: str, tmp_path: Path) -> None:
    words = [*TRAIN, "--mesh", which, "--steps", "150", "--save-every", "3"]
    assert (whole := begin(*words)).end() == 0, whole.said()
    expected, last = losses(), checkpoint.newest(RUN)
    files = {p.name: p.read_bytes() for p in last.glob("*.safetensors")}
    assert len(files) > 2
    RUN.rename("runs/whole")
    for step in (0, 17, 40):
        started = begin(*words) if step == 0 else begin("fastlm", "train", "--resume", "runs/a")
        started.until_step(step)
        for rank in (1, 0) if step else (0, 1):
            started.ranks[rank].kill()
        assert started.end() == 1
        for _, folder in checkpoint.steps(RUN):
            checkpoint.verify(folder)
    started = begin("fastlm", "train", "--resume", "runs/a")
    assert started.end() == 0, started.said()
    assert losses() == expected
    for name, raw in files.items():
        assert (checkpoint.newest(RUN) / name).read_bytes() == raw, name


@pytest.mark.slow
@pytest.mark.parametrize("lost, alone", [(0, True), (1, False)])
def test_torchrun_starts_lost_ranks_again_and_the_run_goes_on(begin: Begin, lost: int, alone: bool) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        how = ["--standalone"] if alone else ["--master-port", str(s.getsockname()[1])]
    torchrun = ["torch.distributed.run", *how, "--nproc-per-node", "2", "--max-restarts", "1", "-m"]
    started = begin(*torchrun, *TRAIN, "--steps", "400", "--save-every", "5")
    started.until_step(23)
    before = losses()
    started.ranks[lost].kill()
    assert started.process.wait(240) == 0, started.said()
    said = started.said()
    assert "going on from step" in said
    assert [step for step, _ in losses()] == list(range(1, 401))
    assert losses()[:20] == before[:20]
    assert [p.name for p in Path("runs").iterdir()] == ["a"]
    assert os.stat(RUN / "result.json").st_size


@pytest.mark.slow
def test_torchrun_gives_up_after_its_restarts(begin: Begin) -> None:
    """A fault that comes back each time ends the job with the reason, and not in a hang."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m"]
    started = begin(*torchrun, "fastlm", "train", "missing.txt", *SMALL[1:])
    assert started.end() == 1
    assert started.said().count("missing.txt does not exist") >= 2
