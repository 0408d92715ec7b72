"""Several processes as one trainer: who this process is among them, and what they tell each other.

`start` makes the `Ranks` (ranks.py) of this process: `SingleProcess`, or `ProcessGroup` from what torchrun, slurm or fastlm's
own launcher (launch.py) put into the environment.

What ranks say to each other about the run (stop, saved, an error) goes over a gloo group of its own, on the CPU: it waits
for no device, and a thread that saves can talk while the main thread trains.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fastlm.console import warn
from fastlm.data.errors import InputError
from fastlm.train.machine import pick_device
from fastlm.train.ranks import PeerError, Ranks, SingleProcess

T = TypeVar("T")
BUILT = ("pp", "dp", "fsdp", "tp")  # dimensions of a mesh, outermost first
PLANNED = ("cp", "ep")
BEAT, SILENT = 1.0, 15.0  # seconds between two signs of life, and without one until a rank counts as lost
FAILED = 5.0  # seconds that a rank has to end by itself when another has ended with an error
MEET = timedelta(minutes=2)  # until the ranks must have met
MEETING = (
    "FASTLM_MEETING"  # environment: the open socket on which rank 0 waits for the others, where a launcher gave one
)
TIMEOUT = timedelta(minutes=30)  # of a collective whose ranks all live: data preparation on one of them may take long


MOST = 65536  # processes of a mesh


def parse(text: str) -> dict[str, int]:
    """`"dp=2,fsdp=2"` as sizes by dimension. InputError names what cannot be."""
    sizes: dict[str, int] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        match = re.fullmatch(r"([a-z]+)=(\d+)", word)
        if not match or int(match[2]) < 1:
            raise InputError(f"--mesh must be sizes by dimension, such as dp=2,fsdp=2; {word!r} in {text!r} is not")
        name = match[1]
        if name in PLANNED:
            raise InputError(f"--mesh {word} is not built: this version knows {', '.join(BUILT)}")
        if name not in BUILT:
            raise InputError(f"--mesh {word}: there is no dimension {name}; it must be one of {', '.join(BUILT)}")
        if name in sizes:
            raise InputError(f"--mesh {text} names {name} twice")
        sizes[name] = int(match[2]) if len(match[2]) < 10 else MOST + 1
    if math.prod(sizes.values()) > MOST:
        raise InputError(f"--mesh {text} has more than {MOST} processes")
    return sizes


# ------------------------------------------------------------------------------------------- where a process was put


@dataclass(frozen=True)
class Place:
    """Where the launcher put this process."""

    rank: int
    size: int
    local: int  # number within its machine
    restarts: int = 0  # how often torchrun has started all ranks again
    by: str = "torchrun"


def find(env: Mapping[str, str]) -> Place | None:
    """This process's place by torchrun's, slurm's or fastlm's own launcher's environment; None for a process alone."""
    try:
        if "RANK" in env and "WORLD_SIZE" in env:
            local = int(env.get("LOCAL_RANK", env["RANK"]))
            restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
            return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), local, restarts)
        # SLURM_PROCID is also set in a batch script, which runs once; only a task of srun belongs to a step
        if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
            local = int(env["SLURM_LOCALID"])
            return Place(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), local, by="slurm")
    except (KeyError, ValueError) as error:
        raise InputError(f"the environment of torchrun or slurm is incomplete: {error}") from None
    return None


def first_host(nodes: str) -> str:
    """The first host of slurm's list: node[03-05,9] is node03, a[1-2]b is a1b."""
    head = re.match(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", head[0]) if head else nodes


def address(env: Mapping[str, str], place: Place) -> tuple[str, int]:
    """Where the ranks meet."""
    if place.by == "slurm":
        host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
        port = int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
    else:
        host, port = env.get("MASTER_ADDR", ""), int(env.get("MASTER_PORT") or 0)
    if not host or not port:
        raise InputError("several ranks need MASTER_ADDR and MASTER_PORT in the environment, as torchrun sets them")
    return host, port


# ------------------------------------------------------------------------------------------------------- who they are


class ProcessGroup(Ranks):
    """This process among several. `mesh` holds its dimensions pp, dp, fsdp and tp, each at least 1.

    Ranks that differ in pp and tp alone read the same samples; `data_rank` counts those that do not."""

    _watching = _leaving = False

    def __init__(self, sizes: Mapping[str, int], place: Place, env: Mapping[str, str], device: str) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.size, self.restarts = place.rank, place.size, place.restarts
        sizes = sizes or {"dp": self.size}
        if math.prod(sizes.values()) != self.size:
            made = " x ".join(f"{k}={v}" for k, v in sizes.items())
            raise InputError(f"--mesh {made} is for {math.prod(sizes.values())} processes; {self.size} were started")
        self.device = pick_device(device)
        if self.device.type == "mps":
            raise InputError("--device mps trains in one process; leave out --mesh and --nproc")
        if self.device.type == "cuda":
            if place.local >= torch.cuda.device_count():
                found = torch.cuda.device_count()
                raise InputError(
                    f"--nproc: process {place.local} of this machine has no GPU of its own; it has {found}"
                )
            self.device = torch.device("cuda", place.local)
            torch.cuda.set_device(self.device)
        host, port = address(env, place)
        self._where = (host, port)
        hosts = self.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._key = f"fastlm/{place.restarts}"
        try:
            store = dist.TCPStore(
                host,
                port,
                self.size,
                hosts,
                timeout=MEET,
                wait_for_workers=False,
                master_listen_fd=int(env[MEETING]) if hosts and MEETING in env else None,
            )
            store.set(f"{self._key}/met/{self.rank}", "")
            store.wait([f"{self._key}/met/{rank}" for rank in range(self.size)], MEET)
            self.folder = (
                store.get("fastlm/folder").decode() if place.restarts and store.check(["fastlm/folder"]) else ""
            )
            self._store = store
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(self._key, store),
                rank=self.rank,
                world_size=self.size,
                timeout=TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"rank {self.rank}: the {self.size} ranks did not meet at {host}:{port}: {str(error).splitlines()[0]}"
            ) from error
        self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._saving = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.on_host = self.gather(platform.node()).count(platform.node())
        shape = tuple(sizes.get(name, 1) for name in BUILT)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=BUILT)
        self.sizes = dict(zip(BUILT, shape))
        together = self.sizes["tp"]
        self.size_of_data = self.size_of_mean = self.sizes["dp"] * self.sizes["fsdp"]
        self.data_rank = self.rank // together % self.size_of_data
        self._counts = (
            self.rank // (together * self.size_of_data) == self.sizes["pp"] - 1
        )  # the last stage has the loss
        self._data: Any = None  # the group of this rank and those that differ from it in more than tp
        for at in range(together if together > 1 else 0):
            group = dist.new_group(list(range(at, self.size, together)))
            self._data = group if self.rank % together == at else self._data

    def sum(self, t: Tensor) -> Tensor:
        import torch.distributed as dist

        t = t if self._counts else torch.zeros_like(t)
        dist.all_reduce(t, group=self._data)
        return t

    def total(self, values: list[float]) -> list[float]:
        import torch.distributed as dist

        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t, group=self._control)
        return t.tolist()

    def agree(self, stop: str) -> str:
        import torch.distributed as dist

        number = int(bool(stop)) * 255  # a pause is the least of all reasons, a signal the next
        if stop.startswith("signal"):
            number = 1 + int(getattr(signal, stop.split()[1]))
        elif stop.startswith("pause"):
            number = 1
        asked = torch.tensor(number)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._control)
        most = int(asked.item())
        if most <= 1:
            return stop or ("pause" if most else "")
        if stop and number > 1:
            return stop
        return f"signal {signal.Signals(most - 1).name}" if most < 255 else "another rank stopped"

    def share(self, value: T) -> T:
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self._saving)
        return out

    def in_turn(self, work: Callable[[], T]) -> T:
        def attempt() -> tuple[T | None, Exception | None]:
            try:
                return work(), None
            except Exception as error:  # noqa: BLE001  raised below, once the others know
                return None, error

        result, error = attempt() if self.first else (None, None)
        failed = self.share(error is not None)
        if not failed and not self.first:
            result, error = attempt()
        wrong = [r for r, bad in enumerate(self.gather(error is not None)) if bad]
        if error is not None:
            raise error
        if wrong:
            raise PeerError(f"rank {wrong[0]} could not go on, for the reason it gave")
        return result  # type: ignore[return-value]

    def remember(self, folder: str) -> None:
        if self.first:
            self._store.set("fastlm/folder", folder)

    @contextlib.contextmanager
    def watch(self) -> Any:
        if self._watching:  # the one that is open already sees all that this one would
            yield
            return
        self._watching, self._leaving, stop = True, False, threading.Event()
        outcome = ["failed"]
        thread = threading.Thread(target=self._beat, args=(stop, outcome), daemon=True, name="fastlm-beat")
        thread.start()
        try:
            yield
            self._leaving = True
            self._meet()  # no rank takes the meeting place away while another one still listens there
            outcome[0] = "end"
        except RuntimeError as error:
            # gloo and NCCL raise this when a connection breaks; errors of the model's own are told apart by their source
            if any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "peer", "socket")):
                self._lost(f"a connection broke ({str(error).strip().splitlines()[0][:160]})")
            raise
        finally:
            stop.set()
            thread.join()
            self._watching = False

    def _meet(self) -> None:
        import torch.distributed as dist

        dist.barrier(group=self._control)

    def _beat(self, stop: threading.Event, outcome: list[str]) -> None:
        """Say "I live" through the store and listen for the others; leave when one has been silent for SILENT seconds, or
        failed FAILED seconds ago. At the end say how it ended.

        Silence counts from a rank's first sign of life on: it may come to where it is watched later than this one."""
        import torch.distributed as dist

        host, port = self._where
        count = 0
        heard: dict[int, tuple[str, float]] = {}  # what a rank said last, and since when
        try:
            # a client of its own: a store's client serves one caller at a time, and a collective may hold the other
            store = dist.TCPStore(host, port, None, False, timeout=timedelta(seconds=SILENT), wait_for_workers=False)
            while True:
                count += 1
                store.set(f"{self._key}/beat/{self.rank}", str(count))
                for rank in range(self.size):
                    key = f"{self._key}/beat/{rank}"
                    if rank == self.rank or not store.check([key]):
                        continue
                    said, now = store.get(key).decode(), time.monotonic()
                    if said != heard.get(rank, ("", 0.0))[0]:
                        heard[rank] = (said, now)
                    elif said == "failed" and now - heard[rank][1] > FAILED:
                        self._lost(f"rank {rank} ended with an error, for the reason it gave")
                    elif said not in ("failed", "end") and now - heard[rank][1] > SILENT:
                        self._lost(f"rank {rank} has shown no sign of life for {SILENT:.0f} seconds")
                if stop.wait(BEAT):
                    store.set(f"{self._key}/beat/{self.rank}", outcome[0])
                    return
        except RuntimeError as error:
            # rank 0, which may keep the meeting place, may have left it in order when this rank is about to
            if not stop.wait(SILENT if self._leaving else 0.0) and heard.get(0, ("", 0.0))[0] != "end":
                self._lost(f"the ranks' meeting place at {host}:{port} is gone ({str(error).splitlines()[0][:120]})")

    def _lost(self, why: str) -> None:
        """Say it and end at once: with a rank missing no collective returns, and none of ours would either."""
        warn(
            f"fastlm train: rank {self.rank}: another rank was lost: {why}; ending. "
            f"Go on from the last checkpoint with fastlm train --resume RUN"
        )
        os._exit(1)

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


had_peers = False  # whether this process has been one of several, and should `leave`


def leave(status: int) -> NoReturn:
    """End a process that was a rank, without taking the interpreter apart.

    gloo's threads may still be giving back tensors, and one that asks for the interpreter while it is taken apart aborts
    the process, whose work was done (PyTorch #179291).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start(mesh: str, device: str, env: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that this process belongs to; meets the others if there are any."""
    place, sizes = find(env), parse(mesh)
    if place is None or place.size == 1:
        if math.prod(sizes.values()) > 1:
            raise InputError(f"--mesh {mesh} needs {math.prod(sizes.values())} processes, and this is one alone")
        return SingleProcess()
    global had_peers
    had_peers = True
    return ProcessGroup(sizes, place, env, device)
