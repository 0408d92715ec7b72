"""Words as hashed features that one edit leaves mostly as they were.

Of a folded word: its runs of 2 to 5 characters, with its ends; the same of the word without doubled letters; its
consonants; and the word with each of its letters left out (Norvig's and SymSpell's deletions: a letter dropped, added,
exchanged or swapped with the next leaves two words with a deletion in common). Of two words side by side: the pair, and
of short ones the word that they are together. Features depend on the words alone, so each word is hashed once.
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Iterator

import numpy as np

from fastlm.data.filter.fold import fold

SIZE = 1 << 20  # places of features
HELD = 1 << 16  # words at hand
CUT = 5  # letters of the parts of a word that a blank may have cut
READ = 40  # letters of a word of which runs are made: what a cache of words is keyed by
LONG = 14  # letters of a word whose deletions count
_TWICE = re.compile(r"(.)\1+")
_VOWELS = str.maketrans("", "", "aeiouy")


def squeezed(word: str) -> str:
    """The word with every doubled letter once."""
    return _TWICE.sub(r"\1", word)


def consonants(word: str) -> str:
    """A word's first letter and its consonants, each once in a row."""
    return squeezed(word[:1] + word[1:].translate(_VOWELS))


def _runs(word: bytes, low: int, high: int) -> Iterator[bytes]:
    for n in range(low, high + 1):
        for at in range(len(word) - n + 1):
            yield word[at : at + n]


def _of_word(word: str) -> Iterator[bytes]:
    """Features by name. Those of characters are of bytes where a letter has several."""
    once = squeezed(word)
    yield from _runs(b" %b " % word.encode(), 2, 5)
    if once != word:
        yield from _runs(b" %b " % once.encode(), 2, 5)
    yield b"w" + word.encode()
    bare = consonants(word).encode()
    if len(bare) > 1:
        yield from _runs(b"_%b_" % bare, 3, 5)
        yield b"c" + bare
    if 3 <= len(once) <= LONG:
        yield b"d" + once.encode()
        for at in range(len(once)):
            yield b"d" + squeezed(once[:at] + once[at + 1 :]).encode()


def of_word(word: str) -> np.ndarray:
    """Places of a word's features, int32, each once."""
    return _of_begin(word[:READ])


@functools.lru_cache(maxsize=HELD)
def _of_begin(word: str) -> np.ndarray:
    hashes = np.array([*map(zlib.crc32, set(_of_word(word)))], np.uint32)
    return np.unique(hashes % SIZE).astype(np.int32)


def of_pair(first: str, second: str) -> Iterator[int]:
    """Places of the features of two words side by side: the pair, and of short ones the word that a gap may have cut."""
    yield zlib.crc32(f"p{first} {second}".encode()) % SIZE
    if len(first) <= CUT and len(second) <= CUT:
        whole = first + second
        yield zlib.crc32(f"w{whole}".encode()) % SIZE
        yield zlib.crc32(f"d{squeezed(whole)}".encode()) % SIZE


def places(text: str) -> np.ndarray:
    """Places of all features of a text, int32; those of a word that comes twice stand twice."""
    words = fold(text)
    pairs = [place for pair in itertools.pairwise(words) for place in of_pair(*pair)]
    return np.concatenate([*map(of_word, words), np.array(pairs, np.int32)])
