"""Runs that wait for a curve: they pause where it says so, keep the deadline, and end as the run that never paused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm.cli import main as cli
from fastlm.data import InputError
from fastlm.energy import schedule
from fastlm.train import job, launch, report, waiting
from fastlm.train.files import read_metrics
from killing import CLOCKS
from test_train import _own_place, book, losses, tiny, weights  # noqa: F401

NOW = 1_800_000_000.0


def write(path: Path, values: list[float], step: float, start: float = NOW) -> str:
    lines = [f"{start + i * step:.3f},{value}" for i, value in enumerate(values)]
    path.write_text("\n".join(["time,g/kWh", *lines]) + "\n")
    return str(path)


class Clock:
    """The time that `waiting` sees; each step of a run takes `pace` seconds of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: float = 1.0) -> None:
        self.now, self.pace = NOW, pace
        monkeypatch.setattr(waiting, "time", self)

    def time(self) -> float:
        return self.now

    def start(self, trainer: Any) -> None: ...

    def step(self, trainer: Any, row: dict[str, Any]) -> None:
        self.now += self.pace
        row["seconds"] = self.pace  # and not what the step took in this process


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Has this process be one that trains for a waiter; gives the file in which it says why it ended."""

    def tell(deadline: float, began: float, spent: float = 0.0) -> Path:
        box = tmp_path / "box.json"
        said = {"process": os.getppid(), "box": str(box), "deadline": deadline, "began": began, "spent": spent}
        monkeypatch.setenv(waiting.VARIABLE, json.dumps(said))
        return box

    return tell


Told = Callable[..., Path]


def test_a_run_that_pauses_is_the_run_that_never_paused(
    book: str,  # noqa: F811
    tmp_path: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    same = {"dropout": 0.2, "steps": 60, "eval_every": 20, "ema": 0.9}
    whole = job.start(tiny(name="whole", **same), (book,))
    whole.run(str)
    clock = Clock(monkeypatch)
    path = write(tmp_path / "curve.csv", [900.0, 10.0, 900.0, 11.0, 900.0, 12.0, 900.0, 13.0], 20)
    box, folder, pauses, trained = told(NOW + 160, NOW), Path("runs/paused"), [], None
    when = {"when": path, "deadline": "160s"}
    for _ in range(9):
        if folder.exists():
            config, corpus = job.read_config(folder)
            trained = job.resume(folder, config, corpus, other_data=False, say=str)
        else:
            trained = job.start(tiny(name="paused", **same, **when), (book,))
        trained.trainer.callbacks.insert(0, clock)
        why = trained.run(str).why
        if not why.startswith("pause"):
            break
        said = json.loads(box.read_text())
        assert said["step"] == trained.trainer.step
        assert Path(said["folder"]) == trained.folder
        assert report.summary(folder).state == why
        pauses.append((clock.now, said["until"]))
        clock.now = said["until"] + 1
        told(NOW + 160, said["until"], 1.0)
        torch.manual_seed(99)  # what else the process did must not matter
    assert trained is not None
    assert why == "all steps done"
    assert len(pauses) == 3, pauses
    assert clock.now <= NOW + 160
    assert losses(whole.folder) == losses(folder)
    plain = lambda run: [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(run)]
    assert plain(whole.folder) == plain(folder)
    for name, w in weights(whole.trainer).items():
        assert torch.equal(w, weights(trained.trainer)[name]), name
    for name, w in whole.trainer.ema.items():
        assert torch.equal(w, trained.trainer.ema[name]), name
    assert job.read_config(folder)[0].run.when == str(Path(path).resolve())
    assert "--when is of no effect" not in capsys.readouterr().err


class Run:
    """What `Waiting` sees of a trainer, without one."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.until, self.step = folder, "", 0
        self.config = tiny(steps=steps)

    def pause(self, until: str) -> None:
        self.until = until


def watched(tmp_path: Path, clock: Clock, values: list[float], steps: int, end: float, made: int) -> Run:
    """A run of `steps` of a second each after `made` of them, or fewer if it paused."""
    config = tiny(when=write(tmp_path / "c.csv", values, 60), deadline="1h").run
    told = {"process": 0, "box": str(tmp_path / "box"), "deadline": end, "began": NOW, "spent": 0.0}
    callback, run = waiting.Waiting(config, told), Run(tmp_path, steps)
    callback.ready(run)  # type: ignore[arg-type]
    callback.start(run)  # type: ignore[arg-type]
    while run.step < made and not run.until:
        clock.now += clock.pace
        run.step += 1
        callback.step(run, {"step": run.step, "seconds": clock.pace})  # type: ignore[arg-type]
    return run


def test_lines_that_come_at_once_have_their_steps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, ten at a time: with no time between them 580 steps are not done in no time."""
    Clock(monkeypatch, 0.0)
    config = tiny(when=write(tmp_path / "c.csv", [900.0] * 10 + [10.0] * 10, 60), deadline="1h").run
    told = {"process": 0, "box": str(tmp_path / "box"), "deadline": NOW + 1200, "began": NOW, "spent": 0.0}
    callback, run = waiting.Waiting(config, told), Run(tmp_path, 580)
    callback.ready(run)  # type: ignore[arg-type]
    callback.start(run)  # type: ignore[arg-type]
    for step in range(1, 11):
        callback.step(run, {"step": step, "seconds": 1.0})  # type: ignore[arg-type]
    assert not run.until


def test_a_pause_comes_when_the_time_of_steps_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    high = [900.0] * 10 + [10.0] * 10
    run = watched(tmp_path, clock, high, 100, NOW + 1200, 90)
    assert run.step == 1 + waiting.SETTLED
    assert run.until.startswith("2027-01-15 08:10")
    said = json.loads((tmp_path / "schedule.json").read_text())
    assert said["until"] == pytest.approx(NOW + 600, abs=1200 / schedule.CELLS)
    assert (said["seconds_per_step"], said["deadline"]) == (1.0, NOW + 1200)
    assert "g/kWh is 900 now and 10 then" in capsys.readouterr().out


@pytest.mark.parametrize(("values", "steps", "end", "why"), [
    ([10.0] * 10 + [900.0] * 10, 100, 1200, "low now"), ([5.0] * 20, 100, 1200, "flat"),
    ([900.0] * 10 + [10.0] * 10, 580, 1200, "no time to spare once it is low"),
    ([900.0] * 10 + [10.0] * 10, 2000, 1200, "the deadline is lost"),
    ([900.0] * 10 + [10.0], 100, 9000, "what follows is not known"),
    ([900.0] * 10 + [899.0] * 10, 100, 1200, "a restart costs more than it saves"),
])  # fmt: skip
def test_in_doubt_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], steps: int, end: float, why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    clock = Clock(monkeypatch)
    run = watched(tmp_path, clock, values, steps, NOW + end, 30)
    assert not run.until, why
    assert capsys.readouterr().err.count("--deadline: about") == (why == "the deadline is lost")


# ------------------------------------------------------------------------------------------------------- the one that waits


class Child:
    """What the waiter starts, without a process: it pauses `pauses` times for so many seconds each, then ends with `code`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, pauses: list[float], code: int = 0) -> None:
        self.words: list[list[str]] = []
        self.folder, self.pauses, self.code, self.times = folder, pauses, code, list[float]()
        monkeypatch.setattr(launch, "alone", self.alone)

    def alone(self, command: list[str], asked: list[int]) -> int:
        self.words.append(command[4:])
        self.times.append(time.time())
        told = json.loads(os.environ[waiting.VARIABLE])
        assert told["process"] == os.getpid()
        if not self.pauses:
            return self.code
        now = time.time()
        until = now + self.pauses.pop(0)
        Path(told["box"]).write_text(json.dumps({"folder": str(self.folder), "until": until, "at": now, "step": 7}))
        return launch.PAUSED


def waiter(tmp_path: Path, folder: Path | None = None, fresh: bool = False, values: Any = None) -> waiting.Waiter:
    path = write(tmp_path / "c.csv", values or [5.0] * 40, 60, time.time() - 60)
    return waiting.Waiter(tiny(when=path, deadline="30m").run, folder, fresh, 100)


def test_the_waiter_starts_the_run_again_after_each_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch, tmp_path / "run", [0.3, 0.4], code=7)
    assert waiter(tmp_path).run(["a.txt", "--when", "c.csv"], 1, 0) == 7
    assert child.words == [["a.txt", "--when", "c.csv"], *[["--resume", str(tmp_path / "run")]] * 2]
    assert child.times[1] - child.times[0] >= 0.3
    assert child.times[2] - child.times[1] >= 0.4
    assert waiting.VARIABLE not in os.environ


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_paused_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The run is saved, so a second signal has nothing to hasten."""
    child = Child(monkeypatch, tmp_path / "run", [3600.0])
    old = signal.signal(number, lambda *_: None)  # takes a second one that comes when the waiter has ended
    before = signal.getsignal(number)

    def send() -> None:
        while not child.times:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert waiter(tmp_path).run(["a.txt"], 1, 0) == 128 + number
    thread.join()
    assert len(child.words) == 1
    assert "paused at step 7, which is saved; go on with fastlm train --resume" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    signal.signal(number, old)


def test_a_signal_as_a_run_pauses_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch, tmp_path / "run", [3600.0])

    def late(command: list[str], asked: list[int]) -> int:
        code = child.alone(command, asked)
        asked.append(signal.SIGTERM)
        return code

    monkeypatch.setattr(launch, "alone", late)
    assert waiter(tmp_path).run(["a.txt"], 1, 0) == 128 + signal.SIGTERM


def paused_run(folder: Path, until: float, deadline: float) -> Path:
    folder.mkdir()
    said = {"deadline": deadline, "until": until, "step": 50, "seconds_per_step": 2.0, "restart": 5.0, "why": ""}
    (folder / "schedule.json").write_text(json.dumps(said))
    return folder


def test_a_paused_run_that_is_resumed_goes_on_waiting(tmp_path: Path) -> None:
    now = time.time()
    run = paused_run(tmp_path / "run", now + 900, now + 1700)
    high = [900.0] * 16 + [10.0] * 24
    kept = waiter(tmp_path, run, values=high)
    assert kept.deadline == now + 1700
    assert 840 <= kept.until - now <= 960
    fresh = waiter(tmp_path, run, fresh=True, values=high)
    assert fresh.deadline == pytest.approx(now + 1800, abs=60)
    assert fresh.until <= time.time()  # and is measured anew
    assert waiter(tmp_path, run, values=[10.0] * 16 + [900.0] * 24).until <= time.time()  # the curve is another now
    paused_run(tmp_path / "late", now + 900, now + 50)
    assert waiter(tmp_path, tmp_path / "late", values=high).until <= time.time()  # no time to lose
    (tmp_path / "late" / "schedule.json").write_text("{")
    assert waiter(tmp_path, tmp_path / "late", values=high).deadline > now + 1000


@pytest.mark.parametrize(("words", "said"), [
    (["--when", "c.csv"], "--when needs --deadline"), (["--when", "c.csv", "--deadline", "24"], "--deadline must be"),
    (["--when", "none.csv", "--deadline", "1h"], "--when none.csv cannot be read"),
    (["--when", "old.csv", "--deadline", "1h"], "and it is"), (["--when", "c.csv", "--deadline", "2001-01-01"], "is over at"),
    (["--carbon", "XYZW"], "--carbon must be"), (["--pue", "0.9"], "--pue must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "c.csv", [1.0] * 9, 3600, time.time() - 60)
    write(tmp_path / "old.csv", [1.0] * 9, 3600, 1000.0)
    assert cli.main(["train", "none.txt", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_a_launcher_of_others_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "c.csv", [1.0] * 9, 3600, time.time() - 60)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--when", "c.csv", "--deadline", "1h"]) == 2
    assert "--when beside torchrun or slurm" in capsys.readouterr().err


def test_without_a_waiter_it_is_said_that_nothing_waits(book: str, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    job.start(tiny(name="alone", when=write(tmp_path / "c.csv", [1.0] * 9, 60), deadline="1h"), (book,))
    assert "--when is of no effect here" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- for real


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile
            found += [int(c) for c in (task / "children").read_text().split()]
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mesh", ["", "dp=2"])
def test_a_paused_command_holds_nothing_and_goes_on_bit_for_bit(book: str, tmp_path: Path, mesh: str) -> None:  # noqa: F811
    """The power is dear until the test says otherwise: SIGTERM while paused, then --resume by hand, which waits, under a new
    curve, which does not."""
    config = tiny(steps=200, eval_every=100, dropout=0.2, mesh=mesh)
    flags: list[str] = []
    for group in vars(config).values():
        for one in dataclasses.fields(group):
            now, plain = getattr(group, one.name), getattr(type(group)(), one.name)
            name = one.name.replace("_", "-")
            flags += [] if now == plain else [f"--{name}"] if now is True else [f"--{name}", str(now)]
    command = [sys.executable, "-m", "fastlm", "train"]
    subprocess.run([*command, book, *flags, "--name", "whole"], check=True, capture_output=True)
    began = time.time()
    curve = write(tmp_path / "c.csv", [900.0, *[900.0] * 19, *[1.0] * 20], 600, began - 60)
    with subprocess.Popen([*command, book, *flags, "--name", "run", "--when", curve, "--deadline", "5h"]) as run:
        while not (said := waiting.saved(Path("runs/run"))) or children(run.pid):
            assert run.poll() is None
            assert time.time() - began < 300
            time.sleep(0.1)
        spent = processor_seconds(run.pid)
        time.sleep(2)
        assert processor_seconds(run.pid) - spent <= 0.1
        assert not children(run.pid)
        run.send_signal(signal.SIGTERM)
        assert run.wait(120) == 143
    assert said["until"] == pytest.approx(began - 60 + 12000, abs=60)
    with subprocess.Popen([*command, "--resume", "runs/run"], stdout=subprocess.PIPE, text=True) as again:
        assert again.stdout is not None
        assert "paused at step" in again.stdout.readline()
        again.send_signal(signal.SIGINT)
        assert again.wait(120) == 130
    write(tmp_path / "c.csv", [5.0] * 40, 600, time.time() - 60)
    subprocess.run([*command, "--resume", "runs/run"], check=True, capture_output=True)
    plain = lambda run: [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(Path("runs") / run)]
    assert plain("run") == plain("whole")
    files = [p for p in Path("runs/whole/checkpoints/step-00000200").iterdir() if p.suffix == ".safetensors"]
    assert len(files) > 2
    for path in files:
        assert path.read_bytes() == (Path("runs/run/checkpoints/step-00000200") / path.name).read_bytes(), path.name


def test_the_deadline_of_a_config_is_checked_by_the_command_alone() -> None:
    """A run whose deadline is over can be read, evaluated and resumed with another one."""
    config = tiny(when="gone.csv", deadline="2001-01-01T00:00Z")
    config.check()
    with pytest.raises(InputError, match="over"):
        waiting.deadline(config.run, NOW)
    assert schedule.deadline("1h", NOW) == NOW + 3600
