"""quantize_int8 on the CPU: from tensors to ``csrc/cpu/quantize_int8.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._native import ABSENT, DTYPE, FLOATS, Packed
from fastlm.backend import YES, Support
from fastlm.reference.quantize_int8 import LEAST, scale_shape


def serves_forward(
    x: Tensor, dim: int | None, group: int, seed: Tensor | None, check: bool, transpose: bool
) -> Support:
    """float32, bfloat16 and float16, any strides."""
    why = _native.missing()
    if why:
        return Support(False, why)
    if x.dtype not in FLOATS:
        return Support(
            False, f"the cpu kernel takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
        )
    return YES


def forward(
    x: Tensor, dim: int | None, group: int, seed: Tensor | None, check: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    """As ``fastlm.reference.quantize_int8.forward``."""
    q = x.new_empty(x.shape[::-1], dtype=torch.int8) if transpose else torch.empty_like(x, dtype=torch.int8)
    scale = x.new_zeros(scale_shape(x.shape, dim, group), dtype=torch.float32)
    if not x.numel():
        return q, scale
    lines, out = x, q.t() if transpose else q
    along = scale
    if dim is not None:
        lines, out = lines.movedim(dim, -1), out.movedim(dim, -1)
        along = scale.movedim(dim, -1) if group else scale.unsqueeze(-1)
    elif x.dim() == 0:
        lines, out = x.unsqueeze(0), out.unsqueeze(0)
    if dim is None:
        _run(lines, out, lines.new_empty(1, dtype=torch.float32), 0, seed, _scale_of_all(lines, scale))
    else:
        _run(lines, out, along, group, seed, None)
    return q, scale


def _scale_of_all(x: Tensor, scale: Tensor) -> Tensor:
    """Fills ``scale`` [] from the largest magnitude of each line, in which a NaN is above all."""
    most = torch.empty(x.shape[:-1], dtype=torch.float32)
    sizes, (packed,), _, _copies = _native.rows(x.shape, (x,))
    _native._C.quantize_int8_cpu(
        sizes, packed, 0, ABSENT, ABSENT, ABSENT, ABSENT, _native.scalar(most), torch.get_num_threads()
    )
    largest = most.amax()
    found = largest / 127
    scale.copy_(torch.where(found < LEAST, 0.0, torch.where(largest < torch.inf, found, torch.nan)))
    return scale


def _run(x: Tensor, q: Tensor, scale: Tensor, group: int, seed: Tensor | None, given: Tensor | None) -> None:
    """Lines along the last axis of x [..., columns] to q [..., columns] and scale [..., groups]."""
    lead = x.shape[:-1]
    steps = [t.stride()[: len(lead)] for t in (x, q)]
    steps.append((0,) * len(lead) if given is not None else scale.stride()[: len(lead)])
    axes = _native.collapse(lead, [(*t,) for t in steps])
    if len(axes) > 3:  # more than cross the border
        values, scales = (
            torch.empty(x.shape, dtype=torch.int8),
            torch.empty_like(scale, memory_format=torch.contiguous_format),
        )
        _run(x.contiguous(), values, scale if given is not None else scales, group, seed, given)
        q.copy_(values)
        if given is None:
            scale.copy_(scales)
        return
    axes = [(1, (0, 0, 0))] * (3 - len(axes)) + axes
    sizes = (axes[0][0], axes[1][0], axes[2][0], x.shape[-1])

    def packed(t: Tensor, number: int) -> Packed:
        n0, n1, n2 = (axis[1][number] for axis in axes)
        return (t.data_ptr(), DTYPE[t.dtype], n0, n1, n2, t.stride(-1) if t.dim() else 0)

    _native._C.quantize_int8_cpu(
        sizes, packed(x, 0), group, _native.scalar(seed), _native.scalar(given), packed(q, 1), packed(scale, 2), ABSENT,
        torch.get_num_threads(),
    )  # fmt: skip
