"""Which side of the split a text falls on: training, validation, or neither.

A text goes by its mark, a number in [0, 1) that its hash gives; a row with a group by its group's. So it stays on its side
when documents are added, and copies fall together. A fold is an interval of marks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastlm.data.corpus import pieces
from fastlm.data.cutting import Job, Piece, cut, mark
from fastlm.data.errors import InputError
from fastlm.data.groups import fold_of, is_hash


def parse_fold(text: str) -> tuple[int, int]:
    """(number from 1, of how many) of a fold such as 2/5. Raises InputError for what is none."""
    number, _, folds = text.partition("/")
    if not (number.isdecimal() and folds.isdecimal() and 1 <= int(number) <= int(folds) and int(folds) >= 2):
        raise InputError(f"--fold must be I/K such as 2/5, K at least 2 and I from 1 to K; it is {text!r}")
    return int(number), int(folds)


def interval(marks: Sequence[float], number: int, folds: int) -> tuple[float, float]:
    """The marks [low, high) that fold `number` of so many holds out, of texts with these distinct `marks`.

    Folds are equal intervals, as `groups.fold_of` has them. Where texts are so few that one of these is empty, each has as many
    marks as another, to one. Raises InputError for fewer marks than folds.
    """
    if len({fold_of(one, folds) for one in marks}) == folds:
        return (number - 1) / folds, number / folds
    ordered = sorted(marks)
    if len(ordered) < folds:
        raise InputError(
            f"--fold {number}/{folds}: {folds} folds need as many documents, blocks or groups; the corpus has {len(ordered)}"
        )
    starts = [0.0, *(ordered[i * len(ordered) // folds] for i in range(1, folds)), 1.0]
    return starts[number - 1], starts[number]


@dataclass(frozen=True)
class Held:
    """Sorted marks of a validation set's documents that have no group, and of their blocks where its split is by blocks;
    and of its groups.

    What shares a group with the set is foreign to training. Two documents without a group share nothing here, even if
    they are equal: whoever validates on a part of the training text by name may do so.
    """

    documents: np.ndarray
    groups: np.ndarray

    def has(self, piece: Piece, unit: float) -> bool:
        """Whether a document, or its block of mark `unit`, is the set's."""
        own = _document_mark(piece)
        if piece.group:
            return _among(self.groups, own) or _among(self.documents, own)
        return _among(self.groups, own) or _among(self.groups, unit)


def _among(marks: np.ndarray, own: float) -> bool:
    at = int(np.searchsorted(marks, own))
    return at < len(marks) and bool(marks[at] == own)


@dataclass(frozen=True)
class Split:
    """Which texts are held out: those whose mark is below `limit`, by document (`block` 0) or by block of that size.

    A row with a group goes by the group's mark in either case. `without`: what further validation sets hold; it falls on
    neither side. Of a fold the marks that are held out begin at `low`. `part`: of the others what is trained on, those that
    follow the held-out marks, going round; a larger part holds every smaller one.
    """

    block: int
    limit: float
    without: Held | None = dataclasses.field(default=None, compare=False)
    low: float = 0.0
    part: float = 1.0

    def side(self, own: float) -> bool | None:
        """Whether a text of this mark is held out; None where it is on neither side."""
        if self.low <= own < self.limit:
            return True
        rest = 1.0 - (self.limit - self.low)
        return False if self.part >= 1 or (own - self.limit) % 1.0 < self.part * rest else None


def _document_mark(piece: Piece) -> float:
    return mark(piece.text) if piece.mark is None else piece.mark


def marked(job: Job, split: Split, name: str) -> Iterator[tuple[Piece, bytes, float, bool, bool]]:
    """(its piece, text, mark, first, last) of each document, or block of one."""
    for piece in pieces(job, name):
        if not split.block or piece.group or piece.where:
            yield piece, piece.text, _document_mark(piece), piece.first, piece.last
            continue
        blocks = cut(piece.text, split.block)
        for i, text in enumerate(blocks):
            yield piece, text, mark(text), piece.first and i == 0, piece.last and i == len(blocks) - 1


def sided(job: Job, split: Split, name: str) -> Iterator[tuple[Piece, bytes, bool | None, bool, bool]]:
    """(its piece, text, held out, first, last) of each document, or block of one. None in the place of "held out": on neither
    side, being of a further validation set or beyond the part that is trained on."""
    for piece, text, own, first, last in marked(job, split, name):
        foreign = split.without is not None and split.without.has(piece, own)
        yield piece, text, None if foreign else split.side(own), first, last


def documents_of(job: Job, split: Split, name: str) -> np.ndarray:
    """(mark, whether it is a group's) of each document that begins in a job and, in a split by blocks, of each block of one
    that has no group, [marks, 2]."""
    found = set[tuple[float, bool]]()
    for piece, _, own, first, _ in marked(job, split, name):
        if first:
            found.add((_document_mark(piece), bool(piece.group)))
        if split.block and not piece.group:
            found.add((own, False))
    return np.array(sorted(found), dtype=np.float64).reshape(-1, 2)


def named_and_there(job: Job, split: Split, name: str) -> np.ndarray:
    """(mark, whether it is of a group that is a hash) of the groups of rows, and of all texts that a group may name."""
    found = set[tuple[float, bool]]()
    for piece, text, own, *_ in marked(job, split, name):
        found.add((mark(text) if piece.group else own, False))
        if is_hash(piece.group):
            found.add((own, True))
        elif not piece.group:
            found.add((_document_mark(piece), False))
    return np.array(sorted(found), dtype=np.float64).reshape(-1, 2)
