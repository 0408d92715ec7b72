"""What the edited forward of a block calls: dropout, residual add and norm as one op, or one by one where it must be.

Whether a chain may be fused is asked at each call: hooks on the dropout or norm must run, a norm may have been given
back its class, ``p`` and ``training`` may have changed. Then the parts are called as the original would.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops, rng
from fastlm.swap.dropout import TORCHS_DROPOUT, DropoutForward, drop
from fastlm.swap.functional import plain_norm_arguments
from fastlm.swap.norms import NormArguments, NormForward, norm_arguments
from fastlm.swap.seen import idle, ran, stepped_back
from fastlm.swap.tensors import plain

# A dropout to be done: none, a module, or (p, training) of F.dropout.
Drop = nn.Module | tuple[float, bool] | None
# A module, or a function of the model's own.
Norm = Callable[[Tensor], Tensor]


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _begin(dropout: Drop, x: Tensor) -> tuple[Tensor, float]:
    """(x, p) with the dropout still to be done; p is 0 where there is none, or it had to be done now."""
    if dropout is None:
        return x, 0.0
    if isinstance(dropout, tuple):
        p, training = dropout
        if not 0 <= p < 1 or F.dropout is not TORCHS_DROPOUT:
            return F.dropout(x, p, training), 0.0
        return x, p if training else 0.0
    if not isinstance(dropout, DropoutForward) or hooked(dropout) or dropout.p >= 1 or not isinstance(x, Tensor):
        return dropout(x), 0.0
    if not dropout.training or dropout.p == 0:
        idle(dropout)
        return x, 0.0
    ran(dropout)
    return x, dropout.p


class Chains(nn.Module):
    """The methods that edited source calls. ``place`` counts the calls in the source, for ``fastlm.rng``."""

    def _fastlm_drop(self, place: int, x: Tensor, p: float, training: bool) -> Tensor:
        """``F.dropout(x, p, training)``."""
        x, p = _begin((p, training), x)
        return drop(self, place, x, p)

    def _fastlm_add(self, place: int, dropout: Drop, *, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + dropout(x)``."""
        x, p = _begin(dropout, x)
        if p == 0:
            idle(self)
            return residual + x
        if not _fits(x, residual):
            return residual + drop(self, place, x, p)
        ran(self)
        seed, offset = rng.rows(self, place, x)
        z = ops.dropout_add_norm(
            x, residual, norm=None, p=p, residual_dtype=_sum_dtype(x, residual), seed=seed, offset=offset
        )
        assert isinstance(z, Tensor)
        return z

    def _fastlm_norm(self, place: int, norm: Norm, dropout: Drop, *, x: Tensor, residual: Tensor) -> Tensor:
        """``norm(residual + dropout(x))``."""
        return self._fastlm_both(place, norm, dropout, x=x, residual=residual, both=False)[0]

    def _fastlm_both(
        self, place: int, norm: Norm, dropout: Drop, *, x: Tensor, residual: Tensor, both: bool = True
    ) -> tuple[Tensor, Tensor]:
        """``norm(z), z`` with ``z = residual + dropout(x)``."""
        x, p = _begin(dropout, x)
        arguments = _arguments(norm, x, residual)
        if arguments is None:
            stepped_back(self, "runs dropout, add and norm apart: hooks, or shapes or classes that do not fit")
            z = residual + drop(self, place, x, p)
            return norm(z), z
        ran(self)
        if isinstance(norm, nn.Module):
            ran(norm)
        seed, offset = rng.rows(self, place, x) if p > 0 else (None, None)
        out = ops.dropout_add_norm(
            x, residual, arguments.weight, arguments.bias, p=p, residual_dtype=_sum_dtype(x, residual),
            return_residual=both, seed=seed, offset=offset, **arguments.options(),
        )  # fmt: skip
        return (out[0], out[1]) if isinstance(out, tuple) else (out, out)


def _arguments(norm: Norm, x: Tensor, residual: Tensor) -> NormArguments | None:
    """What the op gets of ``norm``; None: it must be called by itself."""
    if not _fits(x, residual):
        return None
    if not isinstance(norm, nn.Module):
        return plain_norm_arguments(norm, x, _sum_dtype(x, residual))
    if not isinstance(norm, NormForward) or hooked(norm):
        return None
    return norm_arguments(norm, x, _sum_dtype(x, residual))


def _fits(x: Tensor, residual: Tensor) -> bool:
    return plain(x, residual) and x.shape == residual.shape and x.dim() > 0


def _sum_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
