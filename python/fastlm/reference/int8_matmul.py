"""int8_matmul in plain PyTorch: the definition that every backend is held to.

a [M, K], b [K, N] int8. Where a is int8, with acc = a @ b an exact int32, in float32 and each step rounded on its own:

    y = activation((float(acc) * a_scale) * b_scale + bias), rounded once to out_dtype

a_scale [M], b_scale [N], bias [N]; a step whose tensor is None is left out, and without both scales y is acc itself.

Where a is floating (weight-only), b_scale is [N], or [G, N] for groups of 32, 64 or 128 of K, the last one short:

    y = activation(a @ (b * b_scale) + bias), accumulated in float32, rounded once to out_dtype

Activations: "gelu" x/2 (1 + erf(x / sqrt 2)), "gelu_tanh" (Hendrycks and Gimpel 2016), "silu" x / (1 + exp(-x)).
Gradients: da = dout @ (b * b_scale).T (floating a), dbias = the sum of dout's rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backend import YES, Support

GROUPS = (32, 64, 128)
ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def serves_forward(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype,
) -> Support:  # fmt: skip
    """Everything."""
    return YES


def serves_backward(
    dout: Tensor, b: Tensor, b_scale: Tensor | None, a_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> Support:
    """Everything."""
    return YES


def group_size(b: Tensor, b_scale: Tensor | None) -> int:
    """How many elements of K share a scale, of b_scale [G, N]; 0 for one scale a column. G > 1 says it uniquely."""
    if b_scale is None or b_scale.dim() == 1:
        return 0
    k, groups = b.shape[0], b_scale.shape[0]
    return next((g for g in GROUPS if (k + g - 1) // g == groups), -1)


def dequantise(b: Tensor, b_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """b * b_scale [K, N] in ``dtype``."""
    wide = b.to(dtype)
    if b_scale is None:
        return wide
    group = group_size(b, b_scale)
    return wide * (b_scale.repeat_interleave(group, 0)[: b.shape[0]] if group else b_scale).to(dtype)


def _accumulate(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float64, which holds every sum of products of int8 exactly."""
    return a.to(torch.float64) @ b.to(torch.float64)


def forward(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [M, N], contiguous, in out_dtype."""
    if a.dtype == torch.int8:
        total = _accumulate(a, b)
        if out_dtype == torch.int32:
            return total.to(torch.int32)
        y = total.to(torch.float32)
        if a_scale is not None:
            y = y * a_scale.unsqueeze(1)
        if b_scale is not None:
            y = y * b_scale
    else:
        wide = torch.promote_types(a.dtype, torch.float32)
        y = a.to(wide) @ dequantise(b, b_scale, wide)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return ACTIVATIONS[activation](y).to(out_dtype)


def backward(
    dout: Tensor, b: Tensor, b_scale: Tensor | None, a_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """da [M, K] in a_dtype and dbias [N] in bias_dtype; what is not asked for (dtype None) is empty."""
    wide = torch.promote_types(dout.dtype, torch.float32)
    da, dbias = dout.new_empty(0), dout.new_empty(0)
    if a_dtype is not None:
        da = (dout.to(wide) @ dequantise(b, b_scale, wide).mT).to(a_dtype)
    if bias_dtype is not None:
        dbias = dout.to(wide).sum(0).to(bias_dtype)
    return da, dbias
