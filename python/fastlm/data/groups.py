"""Groups: copies of one text stay on one side of the split into training and validation.

A row's `group` names what the split goes by in the place of the row's own text: the hash of the document (or block, where
the corpus is split by blocks) that the row was made from, or of a cluster of near-duplicates. The hash of a text as a
group has the mark that the text itself has, so a copy falls where its source does, also when the source is in another
file and has no group.
"""

from __future__ import annotations

import hashlib
import re

from fastlm.data import cutting

_HASH = re.compile("[0-9a-f]{16}")


def group_of(text: bytes) -> str:
    """The group of a text that has none: sixteen hexadecimal digits, from the bytes that `cutting.mark` is made of."""
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def is_hash(group: str) -> bool:
    """Whether a group may be the hash of a text, as `group_of` gives it."""
    return _HASH.fullmatch(group) is not None


def mark(group: str) -> float:
    """A number in [0, 1): of a hash by `group_of` the mark of the text that was hashed, of another name that of the name."""
    if is_hash(group):
        return int.from_bytes(bytes.fromhex(group), "little") / 2**64
    return cutting.mark(group.encode("utf-8", "surrogatepass"))


def fold_of(mark: float, folds: int) -> int:
    """Which of `folds` parts, 0 to folds - 1, holds out a text of this mark (its group's, where it has one).

    Copies share a mark, so no fold validates on a copy of what it trains on. Raises ValueError for fewer than 2 folds.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2; it is {folds}")
    return min(int(mark * folds), folds - 1)
