"""Rule: ``nn.Dropout`` alone, through dropout_add_norm without residual and norm (a block's own dropouts: blocks.py)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops, rng
from fastlm.swap.rules import Facts, Reason, Rewrite, Rule
from fastlm.swap.seen import idle, ran, stepped_back
from fastlm.swap.tensors import plain
from fastlm.swap.written import Scores

TORCHS_DROPOUT = F.dropout  # PyTorch's own, whatever is put in its place later


def drop(module: nn.Module, place: int, x: Tensor, p: float) -> Tensor:
    """Dropout of ``x`` with the seed of ``module``'s ``place``; what the op does not take is PyTorch's."""
    if p == 0:
        return x
    if isinstance(x, Scores):  # dropout of weights belongs to their attention
        return F.dropout(x, p, True)
    if p >= 1 or not plain(x) or x.dim() == 0:
        stepped_back(module, "drops by PyTorch's own function: p is 1, or its input does not fit")
        return F.dropout(x, p, True)
    ran(module)
    seed, offset = rng.rows(module, place, x)
    dropped = ops.dropout_add_norm(x, norm=None, p=p, seed=seed, offset=offset)
    assert isinstance(dropped, Tensor)
    return dropped


class DropoutForward:
    """``nn.Dropout.forward`` by the op; ``p`` and ``training`` are read at each call."""

    p: float
    training: bool

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            idle(self)  # type: ignore[arg-type]
            return input
        if F.dropout is not TORCHS_DROPOUT:
            stepped_back(self, "calls the function that stands in place of F.dropout")  # type: ignore[arg-type]
            return F.dropout(input, self.p, True)
        return drop(self, 0, input, self.p)  # type: ignore[arg-type]


class DropoutRule(Rule):
    name = "dropout"
    mixin = DropoutForward
    draws = 1

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        if isinstance(module, nn.Dropout):
            if module.inplace:
                return Reason("it drops in place, and the op does not")
            if type(module).forward is nn.Dropout.forward:
                return self.describe(module, ())
            return Reason("a Dropout with a forward of its own")
        return None

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        return Rewrite(self.name, facts, "dropout_add_norm(norm=None)", "dropout_add_norm")
