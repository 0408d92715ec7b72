"""`--when CURVE --deadline SPAN`: a run that pauses while the curve is high, and is done by the deadline.

The command's own process waits, and starts the process (or ranks) that train; these plan as they go, by the time that their
steps take, and to pause they save and end. So what is paused holds no processor and no memory of a GPU, and what goes on is a
`--resume`, bit for bit the run that never paused. RUN/schedule.json says what was planned, for a resume by hand too.

Whatever is not known starts or goes on at once: how long a step takes, before a few were made; how long a restart takes; the
curve beyond its end.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fastlm.console import say, warn
from fastlm.data.errors import InputError
from fastlm.energy import EnergyError, curve, schedule
from fastlm.train import launch, signals
from fastlm.train.callbacks import Callback, RunView, clock
from fastlm.train.config import RunConfig
from fastlm.train.files import write_text

VARIABLE = "FASTLM_WAITER"  # tells the process that trains who waits for it, and where to say why it ended
SETTLED = 5  # steps after the first, before their time is believed
SPARE = 0.1  # of the time that is left: what the deadline keeps for steps that take longer, and evaluations
ENDING = 0.5  # of a restart: what it keeps for the last evaluation, save and report, whose time is not known before
NAME = "schedule.json"


def read(run: RunConfig) -> curve.Curve:
    """The curve of --when. InputError, naming the flag, where it cannot be."""
    try:
        return curve.read(run.when)
    except EnergyError as error:
        raise InputError(f"--when {error}") from None


def parent() -> dict[str, Any] | None:
    """What the waiting process that started this one says; None where none did."""
    found = json.loads(os.environ.get(VARIABLE, "null"))
    return found if found and found["process"] == os.getppid() else None


# ------------------------------------------------------------------------------------------------- the process that waits


class Waiter:
    """Starts the command that trains, again after each pause, until it ends for another reason."""

    def __init__(self, run: RunConfig, folder: Path | None, fresh: bool, steps: int) -> None:
        """`folder`: of a run that is resumed. `fresh`: whether --deadline counts from now on, whatever was said before."""
        now = time.time()
        found = read(run)
        if not found.covers(now):
            raise InputError(
                f"--when {run.when} tells of {curve.shown(found.start)} to {curve.shown(found.end)}, and it is "
                f"{curve.shown(now)}: give a curve that holds now"
            )
        said = saved(folder) if folder is not None else {}
        if fresh or "deadline" not in said:
            self.deadline = deadline(run, now)
            said.pop("until", None)
        else:
            self.deadline = float(said["deadline"])
        self.folder, self.said, self.steps, self.asked = folder, said, steps, list[int]()
        self.until = _resumed(found, said, self.deadline, now, steps)
        self._woken = threading.Event()

    def run(self, words: list[str], count: int, threads: int) -> int:
        """Train by `fastlm train WORDS`; the exit status."""
        old = {s: launch.signal.signal(s, self._hear) for s in signals.ours()}
        handle, name = tempfile.mkstemp(prefix="fastlm-", suffix=".json")
        os.close(handle)
        box, spent = Path(name), 0.0
        try:
            while True:
                if not self._wait():
                    return self._stopped()
                box.write_text("{}")
                began = time.time()
                told = {
                    "process": os.getpid(),
                    "box": str(box),
                    "deadline": self.deadline,
                    "began": began,
                    "spent": spent,
                }
                os.environ[VARIABLE] = json.dumps(told)
                command = [sys.executable, "-m", "fastlm", "train", *words]
                many = count > 1
                code = launch.run(command, count, threads, self.asked) if many else launch.alone(command, self.asked)
                if code != launch.PAUSED:
                    return 128 + self.asked[0] if self.asked and code not in launch.SIGNALLED else code
                self.said = json.loads(box.read_text())
                self.folder, self.until = Path(self.said["folder"]), float(self.said["until"])
                spent = max(time.time() - float(self.said["at"]), 0.0)
                words = ["--resume", str(self.folder)]
        finally:
            os.environ.pop(VARIABLE, None)
            box.unlink(missing_ok=True)
            for number, handler in old.items():
                launch.signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        self.asked.append(number)
        self._woken.set()

    def _wait(self) -> bool:
        """Sleep until the plan says to run; False where a signal came first. The clock may be set meanwhile."""
        while (left := self.until - time.time()) > 0 and not self.asked:
            self._woken.wait(min(left, 60.0))
        return not self.asked

    def _stopped(self) -> int:
        name = launch.signal.Signals(self.asked[0]).name
        if self.folder is not None:
            warn(f"fastlm train: stopped by {name} while paused at step {self.said.get('step', 0)}, which is saved; go on with "
                 f"fastlm train --resume {self.folder}")  # fmt: skip
        return 128 + self.asked[0]


def deadline(run: RunConfig, now: float) -> float:
    try:
        return schedule.deadline(run.deadline, now)
    except EnergyError as error:
        raise InputError(str(error)) from None


def saved(folder: Path) -> dict[str, Any]:
    """RUN/schedule.json, or {} where there is none. A file of other words is as none: all in it is measured anew."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return {k: float(found[k]) for k in ("deadline", "until", "step", "seconds_per_step", "restart")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _resumed(found: curve.Curve, said: dict[str, Any], end: float, now: float, steps: int) -> float:
    """Until when a resumed run waits at first: by the curve as it is now, and what the run said as it paused."""
    if "until" not in said or said["until"] <= now:
        return now
    until, note = _decide(found, said["seconds_per_step"] * (steps - said["step"]), now, end, said["restart"], False)
    if until > now:
        say(f"paused at step {int(said['step'])} until {curve.shown(until)}: {note}")
    return until


def _decide(
    found: curve.Curve, left: float, now: float, end: float, restart: float, running: bool
) -> tuple[float, str]:
    """(when to run: now, or later; why), with `left` seconds of work."""
    need = left * (1 + SPARE) + restart * (1 + ENDING)
    plan = schedule.planned(found, need, now, end, restart, running)
    start = plan[0][0]
    if start <= now or start + need > end:
        return now, ""
    rest = sum(b - a for a, b in plan)
    mean = schedule.cost(found, plan) / rest
    at_once = found.cost(now, now + need) / need
    return start, (
        f"{found.name} is {found.at(now):.4g} now and {found.at(start):.4g} then (over what is left {mean:.4g} on average, at "
        f"once {at_once:.4g}); about {clock(left)} of training to do by {curve.shown(end)}"
    )


# ------------------------------------------------------------------------------------------------ the process that trains


class Waiting(Callback):
    """Asks the trainer to pause where the curve says so. Only the first rank has one."""

    def __init__(self, run: RunConfig, told: dict[str, Any]) -> None:
        self.run, self.told = run, told
        self.curve: curve.Curve | None = None
        self.restart = math.inf

    def ready(self, trainer: RunView) -> None:
        self.curve = read(self.run)

    def start(self, trainer: RunView) -> None:
        self.next, self.first, self.done, self.spent, self.warned = 0.0, 0.0, 0, 0.0, False

    def step(self, trainer: RunView, row: dict[str, Any]) -> None:
        now = time.time()
        if not self.first:
            self.first = now
            # a new run's start reads and prepares data besides: too much, until a restart is measured
            self.restart = max(now - self.told["began"] + self.told["spent"], 0.0)
            return
        self.done += 1
        self.spent += row["seconds"]
        if self.done < SETTLED or now < self.next or trainer.step >= trainer.config.optim.steps:
            return
        # evaluations and saves are in the first; of a GPU the lines of several steps come at once, without time between
        pace = max(now - self.first, self.spent) / self.done
        left = pace * (trainer.config.optim.steps - row["step"])
        self.next = now + max(left / 100, 0.25)
        self._consider(trainer, row["step"], pace, left, now)

    def _consider(self, trainer: RunView, step: int, pace: float, left: float, now: float) -> None:
        end, found = float(self.told["deadline"]), self.curve
        assert found is not None
        if left * (1 + SPARE) > end - now and not self.warned:
            self.warned = True
            warn(
                f"--deadline: about {clock(left)} of training are left and {clock(max(end - now, 0))} of time: no pauses"
            )
        until, note = _decide(found, left, now, end, self.restart, True)
        if until - now <= self.restart:
            return
        state = {"deadline": end, "until": until, "step": step, "seconds_per_step": pace, "restart": self.restart}
        try:
            write_text(trainer.folder / NAME, json.dumps(state | {"why": note}, indent=1))
            Path(self.told["box"]).write_text(json.dumps(state | {"folder": str(trainer.folder), "at": now}))
        except OSError as error:
            raise InputError(f"cannot write {self.told['box']}: {error.strerror}") from error
        say(f"pausing at step {step} until {curve.shown(math.ceil(until))}: {note}")
        trainer.pause(curve.shown(math.ceil(until)))
        self.next = math.inf
