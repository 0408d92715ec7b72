"""Where text is cut: documents into pieces, long files into parts that several processes read apart.

A document above `WHOLE` bytes comes in pieces of about `BLOCK` bytes cut at line ends, the same whether it is compressed
or not. A part is about `JOB` bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastlm.data.errors import InputError

BLOCK = 64 << 10
JOB = 4 << 20
WHOLE = 8 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes of one document; `last` closes it, and `first` opens it.

    `mark` is what the split goes by where that is not the text: the mark of the row's `group`, or of the document's head
    where the text is only a part of it. `source` is what the row says it is from. Of a whole row as JSON `where` names the file
    and the line or row; where `at` is not -1, the file alone, in which the row's line begins at this byte.
    """

    text: bytes
    last: bool = True
    first: bool = True
    mark: float | None = None
    group: str = ""
    source: str = ""
    where: str = ""
    at: int = -1

    def place(self) -> str:
        """Where a whole row stands: its file, and its line or number."""
        return self.where if self.at < 0 else f"{self.where}, line {line_at(Path(self.where), self.at)}"


@dataclass(frozen=True)
class Part:
    """The bytes [start, end) of a plain file of `size` bytes, borders moved to line ends: a whole short file, or some of
    a long one. `rows`: its lines are rows of JSON."""

    path: Path
    start: int
    end: int
    size: int
    rows: bool = False


Job = tuple["Piece | Part", ...]


def line_at(path: Path, at: int) -> int:
    """The number of the line that begins at a byte of a file."""
    number = 1
    with open(path, "rb") as file:
        while at > 0:
            read = file.read(min(at, JOB))
            number, at = number + read.count(b"\n"), at - len(read)
    return number


def mark(text: bytes) -> float:
    """A number in [0, 1) that depends on the text alone: below the validation fraction, the text is held out."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") / 2**64


def refuse_zero(text: bytes, path: Path, at: int) -> None:
    """InputError, by name and place, for a text from byte `at` of the file on that holds the byte 0."""
    if (found := text.find(b"\0")) >= 0:
        raise InputError(
            f"{path} is no text: byte {at + found} is 0, as in binary files and UTF-16; leave it out, or convert it to "
            f"UTF-8"
        )


def border(text: bytes, at: int, reach: int = BLOCK) -> int:
    """The first line end in text[at - 1 : at + reach], else `at` moved back to where no character is cut."""
    line = text.find(b"\n", max(at - 1, 0), at + reach)
    if line >= 0:
        return line + 1
    back = at
    while back > max(at - 3, 1) and back < len(text) and text[back] & 0xC0 == 0x80:
        back -= 1
    return back


def cut(text: bytes, size: int = BLOCK) -> list[bytes]:
    """Blocks of about `size` bytes, each ending at a line end where one comes within a block's length."""
    out, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = start + border(text[start : end + size], size, size)
        out.append(text[start:end])
        start = end
    return out


def regions(stream: IO[bytes], text: bytes = b"") -> Iterator[tuple[bytes, bool]]:
    """(text, last) of about JOB bytes each, from a stream whose first bytes are `text`; borders as `read_part` has them."""
    at, target = 0, JOB
    while True:
        while len(text) <= target - at + 2 * BLOCK:
            more = stream.read(JOB)
            if not more:
                yield text, True
                return
            text += more
        end = border(text, target - at)
        yield text[:end], False
        at, target, text = at + end, target + JOB, text[end:]


def split(text: bytes, last: bool, first: bool, head: float) -> Iterator[Piece]:
    blocks = cut(text)
    for i, block in enumerate(blocks):
        yield Piece(block, last and i == len(blocks) - 1, first and i == 0, head)


def long(stream: IO[bytes], text: bytes) -> Iterator[Piece]:
    """A document above WHOLE, in pieces."""
    head, first = mark(cut(text[: 2 * BLOCK])[0]), True
    for region, last in regions(stream, text):
        yield from split(region, last, first, head)
        first = False


def read_part(part: Part) -> Iterator[Piece]:
    """The pieces of a part of a plain text file."""
    with open(part.path, "rb") as file:
        if part.size <= WHOLE:
            text = file.read()
            refuse_zero(text, part.path, 0)
            yield Piece(text)
            return
        head = mark(cut(file.read(2 * BLOCK))[0])
        ends = []
        for at in (part.start, part.end):
            if 0 < at < part.size:
                file.seek(at - 4)
                at += border(file.read(BLOCK + 4), 4) - 4
            ends.append(at)
        file.seek(ends[0])
        text = file.read(ends[1] - ends[0])
        refuse_zero(text, part.path, ends[0])
        yield from split(text, ends[1] == part.size, part.start == 0, head)


def parts(path: Path, size: int, rows: bool = False) -> Iterator[Part]:
    """A long plain file in parts; none begins so near the end that it would be empty."""
    starts = [s for s in range(0, size, JOB) if not s or s < size - 2 * BLOCK]
    yield from (Part(path, s, e, size, rows) for s, e in zip(starts, [*starts[1:], size]))
