"""Who trains a run: a lock on RUN/.lock that the kernel releases when its process ends, however it ends.

`flock` holds on one machine and, through NFS, Lustre (mounted with -o flock) and GPFS, on all that share the disk. The
file stays; what it says (host, process, since when) counts only while it is locked. Of several ranks the first one locks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from fastlm.console import warn
from fastlm.data.errors import InputError
from fastlm.train.ranks import Ranks

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
PATIENCE = 1.0  # seconds: `holder` looks at a lock by sharing it for an instant


class Held(InputError):
    """Another process owns the run."""


class Lock:
    """A run that this process owns until `release`. Use `take`."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.firm = True  # False on a file system that knows no locks

    @property
    def held(self) -> bool:
        return self._handle >= 0

    def stands(self, folder: Path) -> bool:
        """Whether it is the lock of what bears the folder's name now, and not of a folder that was removed meanwhile."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(folder / NAME))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def take(folder: Path) -> Lock:
    """Own the run of a folder. Raises Held, which names host and process, where another one does.

    A file system that knows no locks is said on stderr: there nothing keeps a second process away.
    """
    path = folder / NAME
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    lock, until = Lock(handle), time.monotonic() + PATIENCE
    while (why := _try(handle, exclusive=True)) == "held":
        if time.monotonic() > until:
            owner = _owner(path)
            lock.release()
            raise Held(
                f"{folder} is being trained by {owner}: wait for its end, or stop it. fastlm generate, eval and export "
                f"work beside it, and --fork {folder} starts a run of its own from its last checkpoint"
            )
        time.sleep(0.05)
    lock.firm = not why
    if why:
        warn(f"{path} cannot be locked ({why}): take care that no second process trains this run")
    said = {"host": platform.node(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, and names nobody
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(said) + "\n").encode(), 0)
    return lock


class Owned:
    """Who trains the run of a folder, over all ranks: the first one holds the lock for the others."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.lock: Lock | None = None
        self._owned = self._entered = False

    def take_over(self, lock: Lock | None) -> None:
        """The run is this process's already, by the lock that the first rank holds."""
        self.lock, self._owned = lock, True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While it is open no other process trains the run; Held where one does. Ends `take_over`, and may be nested."""
        if self._owned and self._entered:
            yield
            return
        if not self._owned:
            self.take_over(self.ranks.in_turn(self._take))
        self._entered = True
        try:
            yield
        finally:
            self._owned = self._entered = False
            if self.lock is not None:
                self.lock.release()

    def _take(self) -> Lock | None:
        if not self.ranks.first:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return take(self.folder)


def holder(folder: Path) -> str:
    """Who trains the run of a folder, as `process N on HOST (since ...)`; "" for nobody, or where there is no telling."""
    path = folder / NAME
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return _owner(path) if _try(handle, exclusive=False) == "held" else ""
    finally:
        os.close(handle)


def _try(handle: int, exclusive: bool) -> str:
    """Lock an open file without waiting: "" where that worked, "held" where another has it, or why it cannot be."""
    if fcntl is None:
        return "this system has no flock"
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return error.strerror or "no locks"
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return "held"
        raise
    return ""


def _owner(path: Path) -> str:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return f"process {said['process']} on {said['host']} (since {said['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
