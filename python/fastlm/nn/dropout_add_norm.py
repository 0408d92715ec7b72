"""The module over ``ops.dropout_add_norm``: owns the norm's weight and bias, and a place of ``fastlm.rng``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm import ops, rng


class DropoutAddNorm(nn.Module):
    """``y, new_residual = module(x, residual)``: ``new_residual = residual + dropout(x)``, ``y = norm(new_residual)``.

    Args:
        columns: size of the last axis.
        p: probability to drop an element of x.
        norm: "layer", "rms" or None; with None the module has no parameters and returns new_residual alone.
        eps, weight_offset: as in ``fastlm.ops.dropout_add_norm``. With weight_offset 1.0 weight starts at zero.
        elementwise_affine: False for a norm without parameters.
        bias: whether the norm has one; None: LayerNorm has, RMSNorm has not.
        residual_dtype: of the residual stream, for example torch.float32 under autocast; None: as it comes.
        quantize: "int8": it returns ``(y, new_residual, q, scale)``, y also as 8-bit rows for an Int8Linear that follows.

    ``fastlm.rng.set(model, ...)`` fixes its masks; without it they come from torch's default generator.
    """

    _fastlm_draws = 1
    _fastlm_places = None

    def __init__(
        self,
        columns: int,
        *,
        p: float = 0.0,
        norm: str | None = "layer",
        eps: float = 1e-5,
        weight_offset: float = 0.0,
        elementwise_affine: bool = True,
        bias: bool | None = None,
        residual_dtype: torch.dtype | None = None,
        quantize: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.columns, self.p, self.norm, self.eps, self.weight_offset = columns, p, norm, eps, weight_offset
        self.residual_dtype, self.quantize = residual_dtype, quantize
        affine = norm is not None and elementwise_affine
        with_bias = affine and (norm == "layer" if bias is None else bias)
        self.weight = nn.Parameter(torch.empty(columns, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.empty(columns, device=device, dtype=dtype)) if with_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight such that the norm's scale is one, bias zero."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """(y, new_residual), or new_residual alone with ``norm=None``; with ``quantize`` the rows behind them."""
        seed, offset = rng.rows(self, 0, x) if self.training and self.p > 0 else (None, None)
        return ops.dropout_add_norm(
            x, residual, self.weight, self.bias, norm=self.norm, p=self.p, eps=self.eps,
            weight_offset=self.weight_offset, residual_dtype=self.residual_dtype, quantize=self.quantize, seed=seed,
            offset=offset, training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        end = f", quantize={self.quantize!r}" if self.quantize else ""
        return f"{self.columns}, p={self.p}, norm={self.norm!r}, eps={self.eps}{end}"
