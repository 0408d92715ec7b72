"""`--nproc N`: N processes of the same command on this machine, and an eye on them.

Each gets what torchrun would give it (RANK, WORLD_SIZE, MASTER_ADDR, ...). The first that fails ends the others at once:
with one missing, none of them could finish a step. SIGINT, SIGTERM and SIGHUP are passed on; the ranks agree on the step
and save.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time

import torch

from fastlm.console import warn
from fastlm.data.errors import InputError
from fastlm.train import mesh, signals
from fastlm.train.config import RunConfig

GRACE = 2.0  # seconds that the others have to say what they saw
SIGNALLED = {128 + s for s in signals.STOPPING}  # a rank that was asked to stop, and saved
PAUSED = 75  # one that pauses, and saved ("try again later" in sysexits.h)


def processes(run: RunConfig) -> int:
    """How many processes to start from this one; 1 where another launcher started it, or one is enough."""
    sizes = mesh.parse(run.mesh)
    needed = math.prod(sizes.values())
    if mesh.find(os.environ) is not None:
        if run.nproc > 1 and "FASTLM_LAUNCHER" not in os.environ:
            raise InputError(f"--nproc {run.nproc} beside torchrun or slurm, which start the processes: leave it out")
        return 1
    if run.nproc and sizes and run.nproc != needed:
        raise InputError(f"--nproc {run.nproc} and --mesh {run.mesh}, which has {needed} processes, do not agree")
    gpus = torch.cuda.device_count() if run.device in ("auto", "cuda") else 0
    count = run.nproc or (needed if sizes else max(gpus, 1))
    if gpus and count > gpus:
        raise InputError(f"--nproc {count}: this machine has {gpus} GPUs, and each process needs one of its own")
    return count


def alone(command: list[str], asked: list[int]) -> int:
    """Start `command` once, which is then no rank of others, wait, and return its exit status. `asked` gets the numbers of
    the signals that come meanwhile, which are passed on."""
    return _run(command, [{}], None, asked)


def run(command: list[str], count: int, threads: int = 0, asked: list[int] | None = None) -> int:
    """Start `command` `count` times, wait, and return the exit status: 0, or that of the rank that failed first. `asked`
    gets the numbers of the signals that come meanwhile, which are passed on."""
    meeting = socket.socket()  # rank 0 gets it open: a port given back could be another's before rank 0 takes it
    meeting.bind(("127.0.0.1", 0))
    meeting.listen(128)
    places = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(meeting.getsockname()[1]),
        }
        for rank in range(count)
    ]
    if not threads:
        share = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
        places = [place | {"OMP_NUM_THREADS": share} for place in places]
    return _run(command, places, meeting, [] if asked is None else asked)


def _run(command: list[str], places: list[dict[str, str]], meeting: socket.socket | None, asked: list[int]) -> int:
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    old = {s: signal.signal(s, forward) for s in signals.ours()}
    try:
        for place in places:
            env = {**os.environ, **place, "FASTLM_LAUNCHER": str(os.getpid())}
            given: tuple[int, ...] = ()
            if meeting is not None and not children:
                given = (meeting.fileno(),)
                env[mesh.MEETING] = str(meeting.fileno())
            # a session of its own: the terminal's Ctrl-C comes through `forward`, and once
            children.append(subprocess.Popen(command, env=env, start_new_session=True, pass_fds=given))
        for number in asked[:1]:  # it came before they were there
            for child in children:
                child.send_signal(number)
        if meeting is not None:
            meeting.close()  # or it would still answer for a rank 0 that is gone
        return _watch(children, asked, meeting is None)
    finally:
        if meeting is not None:
            meeting.close()
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for number, handler in old.items():
            signal.signal(number, handler)


def _watch(children: list[subprocess.Popen[bytes]], asked: list[int], single: bool) -> int:
    while True:
        codes = [child.poll() for child in children]
        bad = [(rank, code) for rank, code in enumerate(codes) if code and code not in SIGNALLED | {PAUSED}]
        if bad:
            break
        if all(code is not None for code in codes):
            return next((code for code in codes if code), 0)  # type: ignore[misc]
        time.sleep(0.05)
    rank, code = min(
        bad, key=lambda end: end[1] > 0
    )  # of several, one that a signal ended: the rest ended for its loss
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"
    rest = [r for r, c in enumerate(codes) if c is None]
    if single:
        if code < 0 and not asked:
            warn(
                f"fastlm train: the process that trained {how}. Go on from the last checkpoint with fastlm train --resume RUN"
            )
    elif not asked:
        ending = f"; ending rank {', '.join(map(str, rest))}" if rest else ""
        warn(
            f"fastlm train: rank {rank} of {len(children)} {how}{ending}. "
            f"Go on from the last checkpoint with fastlm train --resume RUN"
            if code != 2
            else f"fastlm train: rank {rank} of {len(children)} could not go on{ending}"
        )
    until = time.monotonic() + GRACE
    while time.monotonic() < until and any(child.poll() is None for child in children):
        time.sleep(0.05)
    return code if code > 0 else 1


def die_with_launcher() -> None:
    """Have the kernel end this rank when its launcher is gone (Linux): no rank trains on unseen."""
    if "FASTLM_LAUNCHER" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
        if os.getppid() != int(os.environ["FASTLM_LAUNCHER"]):  # it went before the kernel knew
            sys.exit(1)
