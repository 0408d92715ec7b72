"""Cards in Markdown: tables, and a last line that tells whether someone has edited the card since a program wrote it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path


def cell(value: str) -> str:
    """A text as a table's cell."""
    return " ".join(value.encode("utf-8", "replace").decode().split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, and an empty one."""
    yield f"| {' | '.join(head)} |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    yield from (f"| {' | '.join(map(cell, row))} |" for row in rows)
    yield ""


def sealed(body: str, maker: str) -> str:
    """The body with its last line, which names the command that made it and a digest of the body."""
    return body + f"\n<!-- {maker} {_digest(body)} -->\n"


def is_own(path: Path, maker: str) -> bool:
    """Whether a file is as that command wrote it."""
    body, found, mark = path.read_text(encoding="utf-8", errors="replace").rpartition(f"\n<!-- {maker} ")
    return bool(found) and mark.split(" ")[0] == _digest(body)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()[:16]
