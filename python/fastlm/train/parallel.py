"""Several processes as one trainer: who this process is, and the functions that spread a plain model over them.

`Ranks()` is one process alone, for which every method is the identity.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.data.errors import InputError
from fastlm.train import state
from fastlm.train.config import Config


class Ranks:
    """One process alone."""

    rank = data_rank = 0
    size = size_of_data = 1
    size_of_mean = 1  # by what the gradients were divided when they were reduced
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        return t

    def norm(self, grads: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(grads)

    def agree(self, stop: bool) -> bool:
        return stop

    def no_sync(self, model: nn.Module, more: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def gather_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"0/{k}": v for k, v in tensors.items()}

    def scatter_random(self, tensors: dict[str, Tensor]) -> None:
        own = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.split("/", 1)[0] == str(self.rank)}
        if own:
            state.load_random(own)


def wrap(model: nn.Module, config: Config, ranks: Ranks) -> nn.Module:
    if config.run.mesh or config.run.nproc > 1:
        raise InputError("--mesh and --nproc are not built yet; leave them out")
    return model
