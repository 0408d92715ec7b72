"""What a process of tests/test_kill.py does: `fastlm train`, which on demand kills itself at its n-th file operation.

A function of a module of its own: the fork server's children import it, with fastlm and torch imported already.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir")


def train(folder: str, words: list[str], log: str, kill_at: int) -> None:
    """`fastlm train WORDS` in `folder`; SIGKILL before file operation `kill_at`, or never with 0.

    The number of file operations done is the last line of the log.
    """
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
