"""The parts of tensors that processes hold, and their names in a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A box of a named tensor that a process holds: its values, the whole's shape, and where the box begins."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    kept: bool = True  # False where another rank holds the same and writes it into checkpoints

    @classmethod
    def whole(cls, t: Tensor) -> Piece:
        return cls(t, tuple(t.shape), (0,) * t.dim())


# By file ("model", "optimizer", ...), then by the tensor's name; of several pieces of one tensor all but the first are
# named NAME@1, NAME@2 ...
Groups = Mapping[str, Mapping[str, Piece]]


def label(name: str, pieces: list[Piece]) -> dict[str, Piece]:
    """One tensor's pieces by the names that they have in a file."""
    return {f"{name}@{i}" if i else name: piece for i, piece in enumerate(pieces)}


def plain_name(label: str) -> str:
    """The tensor's name."""
    return label.partition("@")[0]
