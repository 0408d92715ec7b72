"""What a trainer asks of the processes it is one of; mesh.py has the counterpart for several.

Nothing here imports the rest of the trainer: layouts, checkpoints and callbacks name these types.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlm.data.errors import InputError

T = TypeVar("T")


class PeerError(InputError):
    """Another rank raised, and has told the user."""


class Ranks:
    """This process among those that train together. As it stands here each method answers for one process alone."""

    rank = data_rank = 0
    size = size_of_data = 1
    size_of_mean = 1  # by what the gradients were divided when they were reduced
    device: torch.device | None = None
    sizes: Mapping[str, int] = {}  # of the mesh, by dimension
    restarts = 0
    on_host = 1  # ranks of this machine
    folder: str = ""  # of the run that a restart by torchrun goes on with

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """The sum of every data rank's t."""
        return t

    def total(self, values: list[float]) -> list[float]:
        """The sum over all ranks of each of some numbers. NaN where one is."""
        return values

    def agree(self, stop: str) -> str:
        """Why to stop, if any rank was asked to."""
        return stop

    def share(self, value: T) -> T:
        """Rank 0's value on every rank."""
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value. Safe in one thread beside the main one."""
        return [value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work, then the others; what one of them raises ends all."""
        return work()

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        """While it is open, a rank that is lost ends this one within seconds."""
        return contextlib.nullcontext()

    def remember(self, folder: str) -> None:
        """Have a restart by torchrun find the run's folder."""

    def close(self) -> None:
        """Leave the group."""


class SingleProcess(Ranks):
    """One process alone: every method is the identity."""
