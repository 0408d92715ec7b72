"""Words, and how often runs of them come again: the arithmetic that the rules and the signatures share."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import numpy as np

WORD = re.compile(r"\S+")
LETTERS = re.compile(r"\w+")
SHINGLE = 5
_MIX = np.uint64(0x9E3779B97F4A7C15)
_ASCII = bytes(range(128))
PIECE = 1 << 16  # bytes that are hashed at once


def _table(chosen: Iterable[int]) -> np.ndarray:
    """bool [256], true at the chosen bytes."""
    out = np.zeros(256, bool)
    out[list(chosen)] = True
    return out


_SPACE = _table(i for i in range(128) if chr(i).isspace())
_NO_WORD = _table(i for i in range(128) if not LETTERS.fullmatch(chr(i)))


def _bytes(text: str, parts: re.Pattern[str]) -> bytes:
    """The text in UTF-8, with a blank for each character beyond ASCII that `parts` matches."""
    data = text.encode("utf-8", "surrogatepass")
    if rest := data.translate(None, _ASCII):
        for sign in filter(parts.match, set(rest.decode("utf-8", "surrogatepass"))):
            data = data.replace(sign.encode("utf-8", "surrogatepass"), b" ")
    return data


def _ends(data: np.ndarray, blank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words begin and end: places of uint8 [bytes] between which no byte is `blank`."""
    inside = np.zeros(len(data) + 2, bool)
    np.logical_not(blank[data], out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


_CODES = np.random.RandomState(7).randint(0, 1 << 32, (2, 256), dtype=np.uint64)
_CODE = _CODES[0] << np.uint64(32) | _CODES[1]
_BASE = 0xD6E8FEB86659FD93  # odd, so that it has an inverse modulo 2**64


@functools.lru_cache(maxsize=1)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    made = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        made.append(np.cumprod(factors))
    return made[0], made[1]


def _numbers(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A number of each word that depends on its bytes alone: a polynomial in them, modulo 2**64. uint64 [words]."""
    out, first = np.empty(len(starts), np.uint64), 0
    while first < len(starts):
        low = starts[first]
        last = max(int(np.searchsorted(ends, low + PIECE, side="right")), first + 1)
        part = data[low : ends[last - 1]]
        power, inverse = _powers(max(PIECE, len(part)))
        total = np.zeros(len(part) + 1, np.uint64)
        np.cumsum(_CODE[part] * power[: len(part)], out=total[1:])
        at = starts[first:last] - low
        out[first:last] = (total[ends[first:last] - low] - total[at]) * inverse[at]
        first = last
    out ^= out >> np.uint64(32)
    return out * _MIX


_LETTER, _OTHER, _BEYOND = 1, 2, 4  # a byte's kind: a letter; no punctuation; a part of a character beyond ASCII


@functools.lru_cache(maxsize=2)
def _kinds(marks: frozenset[str]) -> np.ndarray:
    """uint8 [256]; 0 for what parts words."""
    out = np.zeros(256, np.uint8)
    for i in np.flatnonzero(~_SPACE):
        sign = chr(i)
        out[i] = _BEYOND if i > 127 else sign.isalpha() * _LETTER + (sign not in marks) * _OTHER
    return out


class Words:
    """The words of a text, parted by blanks, punctuation with them: what rules ask of each, without a string for it."""

    _parts = re.compile(r"\s")

    def __init__(self, text: str) -> None:
        self.bytes = _bytes(text, self._parts)
        self.data = np.frombuffer(self.bytes, np.uint8)
        self.starts, self.ends = _ends(self.data, _SPACE)
        self.numbers = _numbers(self.data, self.starts, self.ends)
        self.lengths = self.ends - self.starts  # in characters, once those of several bytes count once
        if len(self.bytes) != len(text):
            later = np.flatnonzero((self.data & 0xC0) == 0x80)
            at = np.searchsorted(self.starts, later, side="right") - 1
            self.lengths = self.lengths - np.bincount(at, minlength=len(self))

    def __len__(self) -> int:
        return len(self.starts)

    def word(self, at: int) -> str:
        return self.bytes[self.starts[at] : self.ends[at]].decode("utf-8", "surrogatepass")

    def lettered_and_marks(self, punctuation: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
        """bool [words] each: which have a letter, and which have nothing but punctuation."""
        if not len(self):
            return np.zeros(0, bool), np.zeros(0, bool)
        kinds = np.bitwise_or.reduceat(_kinds(punctuation)[self.data], self.starts)
        lettered, marks = (kinds & _LETTER) > 0, (kinds & _OTHER) == 0
        for at in np.flatnonzero(kinds & _BEYOND).tolist():
            word = self.word(at)
            lettered[at], marks[at] = any(map(str.isalpha, word)), punctuation.issuperset(word)
        return lettered, marks

    def holds(self, words: tuple[str, ...]) -> int:
        """How many of these words are in the text."""
        return int((_numbers_of(words)[:, None] == self.numbers).any(axis=1).sum())


@functools.lru_cache(maxsize=1)
def of(text: str) -> Words:
    """The words of a text. Two rules in a row ask for them."""
    return Words(text)


@functools.lru_cache(maxsize=4)
def _numbers_of(words: tuple[str, ...]) -> np.ndarray:
    return Words(" ".join(words)).numbers


def runs(ids: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of n words, uint64 [words - n + 1]."""
    size = len(ids) - n + 1
    if size <= 0:
        return np.empty(0, np.uint64)
    out = np.zeros(size, np.uint64)
    for i in range(n):
        out = (out ^ ids[i : i + size]) * _MIX
        out ^= out >> np.uint64(29)
    return out


_NO_LETTER = re.compile(r"\W")


def plain_numbers(text: str) -> np.ndarray:
    """Numbers of the words of a text in lower case and without punctuation, which are what LETTERS finds. uint64 [words]."""
    data = np.frombuffer(_bytes(text.lower(), _NO_LETTER), np.uint8)
    return _numbers(data, *_ends(data, _NO_WORD))


def unique(values: np.ndarray) -> np.ndarray:
    """The set of values, in order: numpy's own goes by a hash table, which takes ten times the time of a sort."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def shingles(text: str) -> np.ndarray:
    """The set of 5-word shingles of a text, lower case and without punctuation: sorted uint64. A short text is one."""
    ids = plain_numbers(text)
    return unique(runs(ids, min(SHINGLE, max(len(ids), 1))))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two sets, each sorted."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


_draw = np.random.RandomState(20)
_A = _draw.randint(0, 1 << 32, (128, 1), dtype=np.uint64).astype(np.uint32) | np.uint32(1)
_B = _draw.randint(0, 1 << 32, (128, 1), dtype=np.uint64).astype(np.uint32)


def signature(found: np.ndarray, count: int, rows: int) -> np.ndarray:
    """MinHash of a set: the hash of each of `count` bands of `rows` minima, uint64 [count]."""
    size, upper = count * rows, (found >> np.uint64(32)).astype(np.uint32)
    lowest = np.full(size, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(upper), 1024):
        part = _A[:size] * upper[start : start + 1024]
        part += _B[:size]
        np.minimum(lowest, part.min(axis=1), out=lowest)
    banded = lowest.reshape(count, rows).astype(np.uint64)
    out = np.arange(1, count + 1, dtype=np.uint64)
    for row in range(rows):
        out = (out ^ banded[:, row]) * _MIX
        out ^= out >> np.uint64(31)
    return out
