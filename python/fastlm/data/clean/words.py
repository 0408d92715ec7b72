"""Words, and how often runs of them come again: the arithmetic that the rules and the signatures share."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np

WORD = re.compile(r"\S+")
LETTERS = re.compile(r"\w+")
SHINGLE = 5
_MIX = np.uint64(0x9E3779B97F4A7C15)


def split(text: str) -> list[str]:
    """What blanks part: the words that Gopher's rules count, punctuation with them."""
    return text.split()


class _Numbers(dict[str, int]):
    """A number of each word that depends on the word alone; forgotten when there are too many to hold."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1 << 18:
            self.clear()
        data = word.encode("utf-8", "surrogatepass")
        self[word] = number = zlib.crc32(data) << 32 | zlib.adler32(data)
        return number


_numbers = _Numbers()


def numbers(words: Iterable[str]) -> np.ndarray:
    """uint64 [words]."""
    return np.array([_numbers[w] for w in words], dtype=np.uint64)


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


def shingles(text: str) -> np.ndarray:
    """The set of 5-word shingles of a text, lower case and without punctuation: sorted uint64. A short text is one."""
    ids = numbers(LETTERS.findall(text.lower()))
    if not len(ids):
        return np.empty(0, np.uint64)
    return np.unique(runs(ids, min(SHINGLE, len(ids))))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two sets, each sorted."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


_draw = np.random.RandomState(20)
_A = _draw.randint(0, 1 << 32, 128, dtype=np.uint64) << np.uint64(32) | _draw.randint(0, 1 << 32, 128, dtype=np.uint64)
_A |= np.uint64(1)
_B = _draw.randint(0, 1 << 32, 128, dtype=np.uint64) << np.uint64(32)


def signature(found: np.ndarray, count: int, rows: int) -> np.ndarray:
    """MinHash of a set: the hash of each of `count` bands of `rows` minima, uint64 [count]."""
    lowest = np.full(count * rows, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(found), 4096):
        part = found[start : start + 4096, None] * _A[None, : count * rows] + _B[None, : count * rows]
        np.minimum(lowest, (part >> np.uint64(16)).min(axis=0), out=lowest)
    banded = lowest.reshape(count, rows)
    out = np.arange(1, count + 1, dtype=np.uint64)
    for row in range(rows):
        out = (out ^ banded[:, row]) * _MIX
        out ^= out >> np.uint64(31)
    return out
