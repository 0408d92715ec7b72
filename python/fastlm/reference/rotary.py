"""rotary in plain PyTorch: the definition that every backend is held to.

x [B, H, L, D], cos and sin [positions, R/2]. Row l of sample b stands at position p, which is l, or what ``positions``
says: int64 [] or [B], the position of the first row, or [B, L], that of each row. With i = 0 ... R/2 - 1, c = cos[p, i]
and s = sin[p, i] (inverse: -sin), the pairs (x_i, x_{i + R/2}), or interleaved (x_2i, x_{2i+1}), are turned:

    y_first = x_first * c - x_second * s        y_second = x_second * c + x_first * s

and what lies behind R stays (Su et al. 2021). A rotation's gradient is the inverse rotation of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.backend import YES, Support


def serves_forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Support:
    """Everything."""
    return YES


serves_backward = serves_forward


def row_positions(positions: Tensor | None, shape: torch.Size, table: int, device: torch.device) -> Tensor:
    """The position of each row, [B, L] or [1, L], kept within the table."""
    rows = torch.arange(shape[2], device=device)
    if positions is None:
        return rows.unsqueeze(0)
    if positions.dim() < 2:
        positions = positions.reshape(-1, 1) + rows
    return positions.clamp(0, table - 1)


def forward(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    """x [B, H, L, D] turned; computed in float32 at least, rounded once to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    place = row_positions(positions, x.shape, cos.shape[0], x.device)
    c = cos[place].to(wide).unsqueeze(1)
    s = sin[place].to(wide).unsqueeze(1)
    if inverse:
        s = -s
    turned = 2 * cos.shape[1]
    part = x[..., :turned].to(wide)
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    pair = (first * c - second * s, second * c + first * s)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.empty_like(x)
    y[..., :turned] = out.to(x.dtype)
    y[..., turned:] = x[..., turned:]
    return y


def backward(
    dout: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    """The gradient of x."""
    return forward(dout, cos, sin, positions, interleaved, not inverse)
