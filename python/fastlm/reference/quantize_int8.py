"""quantize_int8 in plain PyTorch: the definition that every backend is held to.

Symmetric 8-bit numbers. A line is what shares a scale: all of x (``dim`` None), or what lies along ``dim``, in groups of
``group`` elements where that is not 0 (the last group may be short). In float32, every division rounded correctly:

    scale = max |x| / 127        q = clamp(rint(x / scale), -127, 127)        rint: to nearest, ties to even

A scale below 2**-126, the least normal float32, becomes 0 and its q 0: a line of zeros gives zeros. A line that holds a
NaN or an infinity gets q 0 and the scale NaN, so that all that is computed from it shows as NaN.

With a seed: q = clamp(floor(x / scale + u), -127, 127), u = bits / 65536, of mean x / scale. ``bits`` are the sixteen of
Philox that ``philox.bits16`` describes, with the counter (place in the row div 8, row low, row high, 0): the place is
that along ``dim``, the row's number that among x's other axes in order (``dim`` None: rows of the last axis).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.backend import YES, Support
from fastlm.reference import philox

LEAST = 2.0**-126


def serves_forward(
    x: Tensor, dim: int | None, group: int, seed: Tensor | None, check: bool, transpose: bool
) -> Support:
    """Everything."""
    return YES


def random_units(shape: torch.Size, seed: Tensor) -> Tensor:
    """u in [0, 1), float32, for rows along the last axis of ``shape``."""
    columns = shape[-1]
    rows = shape.numel() // columns
    key = philox.key_of(seed, "quantize_int8")
    chunk = torch.arange((columns + 7) // 8, device=seed.device).unsqueeze(0)
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    bits = philox.bits16((chunk, row & 0xFFFFFFFF, row >> 32, zero), key, columns)
    return (bits.to(torch.float32) / 65536).view(shape)


def lines(x: Tensor, scale: Tensor, group: int) -> Tensor:
    """scale [..., ceil(columns / group)] spread over the columns of x [..., columns]; scale [..., 1] stays."""
    return scale.repeat_interleave(group, -1)[..., : x.shape[-1]] if group else scale


def forward(
    x: Tensor, dim: int | None, group: int, seed: Tensor | None, check: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    """q int8 of x's shape (``transpose``: x's transposed, contiguous) and scale float32, x's shape without ``dim``."""
    q = x.new_empty(x.shape[::-1], dtype=torch.int8) if transpose else torch.empty_like(x, dtype=torch.int8)
    wide = x.to(torch.float32)
    last = wide if dim is None else wide.movedim(dim, -1)
    if not x.numel():
        return q, x.new_zeros(scale_shape(x.shape, dim, group), dtype=torch.float32)
    size = last.abs()
    if dim is None:
        most = size.amax()
    elif group:
        short = -last.shape[-1] % group
        most = torch.nn.functional.pad(size, (0, short)).unflatten(-1, (-1, group)).amax(-1)
    else:
        most = size.amax(-1, keepdim=True)
    scale = most / 127
    scale = torch.where(scale < LEAST, 0.0, torch.where(most < torch.inf, scale, torch.nan))
    spread = lines(last, scale, group)
    ratio = last / spread
    if seed is None:
        ratio = ratio.round()
    else:
        flat = last.unsqueeze(0) if last.dim() == 0 else last
        ratio = (ratio + random_units(flat.shape, seed).view(last.shape)).floor()
    values = torch.where(spread > 0, ratio.clamp(-127, 127), 0.0).to(torch.int8)
    values = values if dim is None else values.movedim(-1, dim)
    q.copy_(values.mT if transpose else values)
    if dim is None:
        return q, scale
    shaped = x.new_empty(scale_shape(x.shape, dim, group), dtype=torch.float32)
    return q, shaped.copy_(scale.movedim(-1, dim) if group else scale.squeeze(-1))


def scale_shape(shape: torch.Size, dim: int | None, group: int) -> list[int]:
    """The shape of scale: [] for ``dim`` None, else x's without ``dim``, or with its number of groups there."""
    if dim is None:
        return []
    dim %= len(shape)
    groups = [(shape[dim] + group - 1) // group] if group else []
    return [*shape[:dim], *groups, *shape[dim + 1 :]]
