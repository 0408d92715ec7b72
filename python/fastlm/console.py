"""What is printed: no terminal, pipe or log can end a training, whatever becomes of it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, ClassVar


def degrade() -> None:
    """Have stdout and stderr print `?` for what their encoding lacks, and make those that are closed lead nowhere.

    A file opened later would else get the number of a closed one, and be printed into.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # another program's stream may be of any kind
            continue
        stream.reconfigure(errors="replace")
        if isinstance(stream.buffer, io.BufferedWriter) and isinstance(stream.buffer.raw, io.FileIO):
            stream.flush()
            body = io.BufferedWriter(_Named(number, "w", closefd=False))
            lines = stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(body, stream.encoding, "replace", line_buffering=lines))


class _Named(io.FileIO):
    """Stdout or stderr, whose errors say which of them they are of."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, NAMES[self.fileno()]) from None


NAMES = {1: "<stdout>", 2: "<stderr>"}


def refused_by(error: OSError) -> str | None:
    """ "stdout" or "stderr" for an error in writing to it; None for every other one."""
    return error.filename[1:-1] if error.filename in NAMES.values() else None


class Lasting:
    """The stream `sys.stdout` or `sys.stderr` as it is at each call, for prints that must not raise.

    What the stream's encoding lacks becomes `?`. What a closed pipe, a terminal that is gone or a full disk does not take
    is lost; where the other stream still takes text, it says so once.
    """

    _lost: ClassVar[set[str]] = set()

    def __init__(self, name: str, beneath_rich: bool = False) -> None:
        """`beneath_rich`: the stream that lies under rich's own while a progress bar is shown, for rich to write to."""
        self.name, self._beneath = name, beneath_rich

    @property
    def lost(self) -> bool:
        """Whether the stream has refused a text."""
        return self.name in self._lost

    def _stream(self) -> Any:
        stream = getattr(sys, self.name)
        return getattr(stream, "rich_proxied_file", stream) if self._beneath else stream

    def write(self, text: str) -> int:
        stream = self._stream()
        try:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(stream, "encoding", None) or "ascii"
                stream.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError, AttributeError) as error:  # ValueError: closed; AttributeError: None
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream().flush()
        except (OSError, ValueError, AttributeError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if self.lost:
            return
        self._lost.add(self.name)
        other = STDERR if self.name == "stdout" else STDOUT
        if not other.lost and not isinstance(error, AttributeError):
            why = getattr(error, "strerror", None) or str(error)
            other.write(f"{self.name} cannot be written any more ({why}); what goes on is not shown there\n")
            other.flush()

    @property
    def encoding(self) -> str:
        return getattr(self._stream(), "encoding", None) or "ascii"

    def isatty(self) -> bool:
        try:
            return bool(self._stream().isatty())
        except (ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return int(self._stream().fileno())


STDOUT, STDERR = Lasting("stdout"), Lasting("stderr")


def say(text: str) -> None:
    """Print a line to stdout."""
    STDOUT.write(text + "\n")
    STDOUT.flush()


def warn(text: str) -> None:
    """Print a line to stderr."""
    STDERR.write(text + "\n")
    STDERR.flush()


def finish(code: int) -> int:
    """Flush stdout and stderr before the process ends; returns its exit status.

    Where the last lines of a stream find no place, a command that had succeeded so far has failed (1), and the other
    stream says so; unless that stream was known to be lost, as while a run trains, which says what it did in its folder
    too. A stream that takes nothing leads nowhere from here on: Python would else end the process with a message and a
    status of its own.
    """
    for own, other in ((STDOUT, STDERR), (STDERR, STDOUT)):
        stream: Any = getattr(sys, own.name)
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno != errno.EPIPE and not code and not own.lost:
                other.write(f"fastlm: {own.name}: {error.strerror}\n")
                other.flush()
            code = code or (0 if own.lost else 1)
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
    return code
