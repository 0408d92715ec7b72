"""Dropout, residual add and normalisation in plain PyTorch: the definition of the op.

    z = residual + rowscale * layerscale * dropout(x)   rounded to z_dtype
    y = norm(z)                                         of the rounded z, so y is exactly what a norm of z gives
    norm "layer": (z - mean) * rstd * (weight + weight_offset) + bias,  rstd = 1 / sqrt(var + eps)
    norm "rms":   z * rstd * (weight + weight_offset) + bias,           rstd = 1 / sqrt(mean(z^2) + eps)

(Ba et al. 2016, "Layer normalization"; Zhang and Sennrich 2019, "Root mean square layer normalization".)

Arithmetic is float32, or float64 where x, z or the residual is float64. Slow, and right on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.backend import YES, Support
from fastlm.reference import philox, quantize_int8


def serves_forward(*args: object) -> Support:
    """The reference serves every call."""
    return YES


serves_backward = serves_forward_int8 = serves_forward


def dropout_mask(rows: int, columns: int, seed: Tensor, offset: Tensor | None, p: float) -> Tensor:
    """The keep-mask, bool [rows, columns]: counter (column // 8, row low, row high, 0). ``offset`` as in the op."""
    device = seed.device
    row = torch.arange(rows, device=device)
    if offset is not None:
        row = row + offset if offset.dim() == 0 else offset
    row = row.unsqueeze(1)
    chunk = torch.arange((columns + 7) // 8, device=device)
    counter = (chunk, row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, torch.zeros_like(chunk))
    return philox.keep_mask(counter, philox.key_of(seed, "dropout_add_norm"), p, columns)


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _branch_scale(
    x_shape: torch.Size,
    layerscale: Tensor | None,
    rowscale: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    p: float,
    wide: torch.dtype,
) -> Tensor | float:
    """What x is multiplied by on its way into z, layerscale left out if None was given: [rows, columns] or 1.0."""
    rows, columns = x_shape[:-1].numel(), x_shape[-1]
    scale: Tensor | float = 1.0
    if p > 0:
        assert seed is not None
        scale = dropout_mask(rows, columns, seed, offset, p).to(wide) * philox.keep_scale(p)
    if rowscale is not None:
        scale = scale * rowscale.reshape(rows, 1).to(wide)
    if layerscale is not None:
        scale = scale * layerscale.to(wide)
    return scale


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layerscale: Tensor | None,
    rowscale: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    p: float,
    eps: float,
    weight_offset: float,
    norm: str,
    y_dtype: torch.dtype,
    z_dtype: torch.dtype,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (y, z, mean, rstd); y is [0] without a norm, z is [0] unless ``need_z``, mean and rstd are [rows]."""
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    wide = _wide(x, residual)
    z = x.reshape(rows, columns).to(wide) * _branch_scale(x.shape, layerscale, rowscale, seed, offset, p, wide)
    if residual is not None:
        z = residual.reshape(rows, columns).to(wide) + z
    z = z.to(z_dtype).contiguous()  # one order of summation whatever the strides of the inputs
    nothing = x.new_empty(0, dtype=torch.float32)
    z_out = z.reshape(x.shape).clone(memory_format=torch.contiguous_format) if need_z else x.new_empty(0, dtype=z_dtype)
    if norm == "none":
        return x.new_empty(0, dtype=y_dtype), z_out, nothing, nothing.clone()
    z = z.to(wide)
    mean = nothing
    if norm == "layer":
        mean = z.mean(1)
        z = z - mean.unsqueeze(1)
    rstd = torch.rsqrt(z.square().mean(1) + eps)
    y = z * rstd.unsqueeze(1)
    if weight is not None:
        y = y * (weight.to(wide) + weight_offset)
    if bias is not None:
        y = y + bias.to(wide)
    stats_dtype = wide if wide == torch.float64 else torch.float32
    return y.to(y_dtype).reshape(x.shape).contiguous(), z_out, mean.to(stats_dtype), rstd.to(stats_dtype)


def forward_int8(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Arguments of ``forward``; its outputs, and y as ``quantize_int8`` gives it: int8 of x's shape, scales x.shape[:-1]."""
    out = forward(x, *rest)
    return (*out, *quantize_int8.forward(out[0], -1, 0, None, False, False))


def backward(
    dy: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    layerscale: Tensor | None,
    rowscale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    offset: Tensor | None,
    p: float,
    weight_offset: float,
    norm: str,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    need: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (dx, dresidual, dweight, dbias, dlayerscale); what ``need`` does not ask for is [0].

    ``need``: 1 dx, 2 dresidual, 4 dweight, 8 dbias, 16 dlayerscale, added up.
    """
    given = dy if dy is not None else dz
    assert given is not None
    shape = given.shape
    rows, columns = shape[:-1].numel(), shape[-1]
    wide = _wide(dy, dz, z)
    nothing = given.new_empty(0)
    dweight = dbias = dlayerscale = nothing
    g = torch.zeros(rows, columns, dtype=wide, device=given.device)
    if dy is not None:
        assert z is not None
        dy = dy.reshape(rows, columns).to(wide).contiguous()
        xhat = z.reshape(rows, columns).to(wide).contiguous()
        if norm == "layer":
            xhat = xhat - mean.unsqueeze(1).to(wide)
        xhat = xhat * rstd.unsqueeze(1).to(wide)
        dxhat = dy if weight is None else dy * (weight.to(wide) + weight_offset)
        g = dxhat - xhat * (dxhat * xhat).mean(1, keepdim=True)
        if norm == "layer":
            g = g - dxhat.mean(1, keepdim=True)
        g = g * rstd.unsqueeze(1).to(wide)
        if need & 4:
            dweight = (dy * xhat).sum(0).to(weight_dtype)
        if need & 8:
            dbias = dy.sum(0).to(bias_dtype)
    if dz is not None:
        g = g + dz.reshape(rows, columns).to(wide)
    dresidual = g.to(residual_dtype).reshape(shape).clone() if need & 2 else nothing
    if need & 16:
        assert x is not None
        branch = x.reshape(rows, columns).to(wide) * _branch_scale(shape, None, rowscale, seed, offset, p, wide)
        assert layerscale is not None
        dlayerscale = (g * branch).sum(0).to(layerscale.dtype)
    dx = nothing
    if need & 1:
        dx = (g * _branch_scale(shape, layerscale, rowscale, seed, offset, p, wide)).to(x_dtype).reshape(shape)
    # Outputs of an op may not share memory.
    return tuple(t.clone() if t is nothing else t for t in (dx, dresidual, dweight, dbias, dlayerscale))  # type: ignore[return-value]
