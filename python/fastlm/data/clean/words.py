"""Words, and how often runs of them come again: the arithmetic that the rules and the signatures share."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence

import numpy as np

WORD = re.compile(r"\S+")
LETTERS = re.compile(r"\w+")
SHINGLE = 5
_MIX = np.uint64(0x9E3779B97F4A7C15)


@functools.lru_cache(maxsize=1)
def split(text: str) -> tuple[str, ...]:
    """What blanks part: the words that Gopher's rules count, punctuation with them. Two rules in a row ask for them."""
    return tuple(text.split())


class _Numbers(dict[str, int]):
    """A number of each word that depends on the word alone; forgotten when there are too many to hold."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1 << 18:
            self.clear()
        data = word.encode("utf-8", "surrogatepass")
        self[word] = number = zlib.crc32(data) << 32 | zlib.adler32(data)
        return number


_numbers = _Numbers()


def numbers(words: Sequence[str]) -> np.ndarray:
    """uint64 [words]."""
    return np.fromiter(map(_numbers.__getitem__, words), np.uint64, len(words))


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


_BLANK = bytes(i if LETTERS.fullmatch(chr(i)) else 32 for i in range(128)) + bytes(range(128, 256))
_MARKS = re.compile(r"[^\x00-\x7f\w]")


def plain(text: str) -> list[str]:
    """The words of a text in lower case and without punctuation: what LETTERS finds, in a third of the time."""
    low = text.lower()
    if not low.isascii():
        for mark in set(_MARKS.findall(low)):
            low = low.replace(mark, " ")
    return low.encode("utf-8", "surrogatepass").translate(_BLANK).decode("utf-8", "surrogatepass").split()


def unique(values: np.ndarray) -> np.ndarray:
    """The set of values, in order: numpy's own goes by a hash table, which takes ten times the time of a sort."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def shingles(text: str) -> np.ndarray:
    """The set of 5-word shingles of a text, lower case and without punctuation: sorted uint64. A short text is one."""
    ids = numbers(plain(text))
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
