"""Flags of a command from a function: read by tyro; --help in groups, one a dataclass, with examples at its end."""

from __future__ import annotations

import contextlib
import inspect
import io
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, Any

import tyro

Corpus = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[CORPUS ...]")]
HELP = {"-h", "--help", "-hh", "--help-verbose"}


class _Held(io.StringIO):
    """What is printed, kept; to who prints it is the stream in whose place it stands."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return (self.stream.encoding or "utf-8").lower()  # as tyro spells it, or its boxes have no lines

    def isatty(self) -> bool:
        return bool(self.stream.isatty())


def _filled(text: str) -> str:
    """The help with its description as wide as the terminal: tyro wraps what is in boxes, and nothing else."""
    lines = text.splitlines()
    box = next(
        (i for i, line in enumerate(lines) if line and (line[0] in " +\x1b" or not line[0].isascii())), len(lines)
    )
    width = shutil.get_terminal_size().columns
    about = [textwrap.fill(" ".join(part.split()), width) for part in "\n".join(lines[:box]).strip().split("\n\n")]
    return "\n".join(["\n\n".join(about), "", *lines[box:], ""])


def call(function: Callable[..., Any], prog: str, argv: list[str], examples: str = "") -> Any:
    """`function` with its arguments from `argv`. A dataclass among them is a group of flags, each under its own name.

    `examples` are lines for the end of --help: a command, and what it does after a #.
    """
    asked = bool(HELP & set(argv))
    held = _Held(sys.stdout)
    try:
        with contextlib.redirect_stdout(held) if asked else contextlib.nullcontext():
            return tyro.cli(function, prog=prog, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        if asked and not end.code and examples:
            held.write("\nexamples:\n" + textwrap.indent(inspect.cleandoc(examples), "  ") + "\n")
        raise
    finally:
        if asked:
            print(_filled(held.getvalue()), end="")
