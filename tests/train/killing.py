"""Runs of `fastlm train` that are killed, go on, and are compared with the run that was never killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kill_worker
from fastlm.train import checkpoint, measuring
from fastlm.train.files import read_metrics
from ports import free_port

LIMIT = 400  # seconds after which a run that nobody was to kill counts as hung
CLOCKS = {"tokens_per_s", "stall", "seconds", *measuring.CLOCKS}
Server = subprocess.Popen[str]


@contextlib.contextmanager
def fork_server(cache: Path) -> Iterator[Server]:
    command = [sys.executable, kill_worker.__file__]
    env = os.environ | {"FASTLM_CACHE": str(cache)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) as server:  # ends with its input
        yield server


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """That many processes which take all the time of the cores that they get."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


class Place:
    """A folder of runs, and how runs in it are started, killed and compared."""

    def __init__(self, folder: Path, words: list[str], server: Server, ranks: int = 1) -> None:
        self.folder, self.words, self.server, self.ranks = folder, words, server, ranks
        (folder / "book.txt").write_text("".join(f"line {i * i % 97} about {i % 13} things\n" for i in range(2000)))
        self.seconds, start = 0.0, time.monotonic()
        assert self.attempt("never") == [0] * ranks, self.said()
        self.seconds = time.monotonic() - start
        self.operations = [kill_worker.operations(self.log(rank)) for rank in range(ranks)]
        self.expected = self.outcome("never")

    def log(self, rank: int) -> Path:
        return self.folder / f"log{rank}"

    def said(self) -> str:
        return "\n".join(self.log(rank).read_text() for rank in range(self.ranks))

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def attempt(
        self,
        name: str,
        *words: str,
        seconds: Mapping[int, float] | None = None,
        operations: Mapping[int, int] | None = None,
    ) -> list[int]:
        """Start the run, or go on with it; each rank's exit status, -9 for one that was killed.

        `seconds` and `operations` say by rank after which time, and before which file operation, it is killed.
        """
        seconds, operations = seconds or {}, operations or {}
        run = self.run(name)
        if run.is_dir() and not (run / "config.json").is_file():  # killed before it was a run
            shutil.rmtree(run)
        how = ["--resume", f"runs/{name}"] if run.is_dir() else [*self.words, "--name", name]
        port = str(free_port())
        asked: list[dict[str, Any]] = []
        for rank in range(self.ranks):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            asked.append(
                {
                    "folder": str(self.folder),
                    "words": [*how, *words],
                    "log": str(self.log(rank)),
                    "kill_at": operations.get(rank, 0),
                    "env": env if self.ranks > 1 else {},
                }
            )
        assert self.server.stdin
        assert self.server.stdout
        print(json.dumps(asked), file=self.server.stdin, flush=True)
        children: list[int] = json.loads(self.server.stdout.readline())
        hung: list[int] = []

        def kill(rank: int) -> None:
            if rank not in (seconds or {}):
                hung.append(rank)
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(children[rank], signal.SIGKILL)

        clocks = [threading.Timer(seconds.get(rank, LIMIT), kill, [rank]) for rank in range(self.ranks)]
        for clock in clocks:
            clock.start()
        statuses: list[int] = json.loads(self.server.stdout.readline())
        for clock in clocks:
            clock.cancel()
        assert not hung, f"a run that takes {self.seconds:.1f} s had not ended after {LIMIT}: {how}\n{self.said()}"
        return statuses

    def verify(self, name: str) -> None:
        """What has a checkpoint's name is whole at any instant."""
        for kind in ("step", "best"):
            for _, folder in checkpoint.steps(self.run(name), kind):
                checkpoint.verify(folder)

    def outcome(self, name: str) -> dict[str, Any]:
        """All that a finished run left, but for clocks and its name."""
        run = self.run(name)
        found: dict[str, Any] = {}
        self.verify(name)
        for kind in ("step", "best"):
            for step, folder in checkpoint.steps(run, kind):
                found |= {f"{kind} {step} {p.name}": p.read_bytes() for p in folder.glob("*.safetensors")}
                state = json.loads((folder / "state.json").read_text())
                state["config"]["run"]["name"] = ""
                found[f"{kind} {step} state"] = state
        rows = read_metrics(run)
        steps = int(self.words[self.words.index("--steps") + 1])
        assert len((run / "metrics.jsonl").read_text().splitlines()) == len(rows) == steps
        found["metrics"] = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
        found["samples"] = read_metrics(run, "samples.jsonl")
        found["result"] = json.loads((run / "result.json").read_text())
        assert not list((run / "checkpoints").glob(".*"))  # nothing of a killed save is left behind
        return found

    def check(self, name: str) -> None:
        """The run is as the one that was never killed."""
        found = self.outcome(name)
        assert found.keys() == self.expected.keys(), sorted(found.keys() ^ self.expected.keys())
        different = [key for key, value in self.expected.items() if found[key] != value]
        # names alone: pytest's picture of how two checkpoints differ takes more than ten minutes where CI=true
        assert not different, " ".join(different)


class Kills:
    """Instants to kill at, in turn by the clock and before a file operation, of one rank or of all."""

    def __init__(self, place: Place, draw: random.Random) -> None:
        self.place, self.draw, self.count = place, draw, 0

    def next(self) -> dict[str, Any]:
        place, draw = self.place, self.draw
        everyone = range(place.ranks)
        ranks = everyone if draw.random() < 0.5 else [draw.choice(everyone)]
        self.count += 1
        if self.count % 2:
            instant = draw.uniform(0.01, place.seconds)  # of several: as one machine's loss ends them
            return {"seconds": {rank: instant + draw.uniform(0, 0.1) * (place.ranks > 1) for rank in ranks}}
        share = draw.random()
        return {"operations": {rank: 1 + int(share * place.operations[rank]) for rank in ranks}}


def kill_and_go_on(place: Place, kills: int, draw: random.Random, spinning: int = 0) -> int:
    """Kill that many times, every other time beside `spinning` busy processes, and compare each run that ends.

    Returns the number of runs compared.
    """
    instants, done, number, in_a_row = Kills(place, draw), 0, 0, 0
    while True:
        name = f"run{number}"
        how = instants.next() if done < kills and in_a_row < 8 else {}
        with busy(spinning if done % 2 else 0):
            statuses = place.attempt(name, **how)
        killed = [rank for rank, status in enumerate(statuses) if status == -signal.SIGKILL]
        asked = {rank for ranks in how.values() for rank in ranks}
        assert asked >= set(killed), (how, statuses, place.said())
        if killed:  # the other ranks notice, and end by themselves
            done, in_a_row = done + 1, in_a_row + 1
            place.verify(name)
            continue
        assert not any(statuses), (how, statuses, place.said())
        place.check(name)
        number, in_a_row = number + 1, 0
        if done >= kills:
            return number
