"""The processes of tests/train/test_kill.py: `fastlm train`, which on demand kills itself at its n-th file operation.

Run as a program this is a fork server: for each line of JSON on its input, the arguments of `train` for each rank, it forks
children with fastlm and torch imported already, writes their numbers, waits for all, and writes their exit statuses (-9:
killed).
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# what a run imports on its way; torch._dynamo alone is half of a short run's time
USED = ("fastlm.cli.train", "fastlm.train.job", "fastlm.swap", "matplotlib.pyplot", "torch._dynamo")
USED += ("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.pipelining")
OPERATIONS = ("fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir")


def train(folder: str, words: list[str], log: str, kill_at: int, env: dict[str, str]) -> None:
    """`fastlm train WORDS` in `folder`; SIGKILL before file operation `kill_at`, or never with 0.

    `env` tells a rank of its peers. The number of file operations done is the last line of the log.
    """
    os.environ.update(env)
    os.chdir(folder)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from fastlm.cli import main as cli
    from fastlm.train import checkpoint

    count = itertools.count(1)
    done = 0

    def tick() -> None:
        nonlocal done
        done = next(count)
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            tick()
            return real(*args, **options)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    write = checkpoint._Hashed.write

    def in_halves(self: checkpoint._Hashed, data: Any) -> None:
        half = len(data) // 2
        write(self, data[:half])
        self.file.flush()
        tick()
        write(self, data[half:])

    checkpoint._Hashed.write = in_halves  # type: ignore[method-assign]
    status = cli.main(["train", *words])
    print(done)
    sys.stdout.flush()
    os._exit(status)


def operations(log: Path) -> int:
    return int(log.read_text().splitlines()[-1])


if __name__ == "__main__":
    for module in USED:
        importlib.import_module(module)
    for line in sys.stdin:
        children = []
        for asked in json.loads(line):
            if child := os.fork():
                children.append(child)
            else:
                train(**asked)
        print(json.dumps(children), flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)
