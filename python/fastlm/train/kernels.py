"""fastlm's kernels under a model: swapped in, and told at each step where its dropout masks stand in the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Kernels:
    """`--kernels fused|torch` for one model. `table` is what swap reports."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.table: Any = None
        self._model, self._rng = model, None
        self.part = (0, 1)  # which of how many parts of the positions this rank's activations hold
        if kind == "fused":
            import fastlm

            self.table = fastlm.swap(model)  # type: ignore[attr-defined]
            self._rng = fastlm.rng  # type: ignore[attr-defined]

    def place(self, seed: int, step: int, ids: Any) -> None:
        """Before a forward: the run's seed, the step, and the numbers of the samples it reads."""
        if self._rng is not None:
            self._rng.set(self._model, seed, step, torch.as_tensor(ids), part=self.part)
