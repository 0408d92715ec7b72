"""rotary on the CPU: from tensors to ``csrc/cpu/rotary.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._native import ABSENT, DTYPE, FLOATS, Packed
from fastlm.backend import YES, Support


def serves_forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Support:
    """float32, bfloat16 and float16 with float32 tables, any strides."""
    why = _native.missing()
    if why:
        return Support(False, why)
    if x.dtype not in FLOATS or cos.dtype != torch.float32:
        given = f"{x.dtype} with a table of {cos.dtype}".replace("torch.", "")
        return Support(False, f"the cpu kernel takes float32, bfloat16 and float16 with float32 tables, not {given}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return Support(True, f"rows of x are gathered first: its last axis has stride {x.stride(-1)}, not 1")
    return YES


serves_backward = serves_forward


def _four(t: Tensor) -> Packed:
    s = t.stride()
    return (t.data_ptr(), DTYPE[t.dtype], s[0], s[1], s[2], s[3])


def forward(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    """As ``fastlm.reference.rotary.forward``."""
    out = torch.empty_like(x)
    if not x.numel():
        return out
    place = ABSENT
    if positions is not None:
        batch, row, *_ = (*positions.stride(), 0, 0)
        place = (positions.data_ptr(), DTYPE[positions.dtype], batch, row, 0, 0)
    b, h, length, d = x.shape
    _native._C.rotary_cpu(
        (b, h, length, d), _four(x), _native.vector(cos.view(-1)), _native.vector(sin.view(-1)), place,
        positions is not None and positions.dim() == 2, cos.shape[0], cos.shape[1], interleaved, inverse, _four(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    """As ``fastlm.reference.rotary.backward``."""
    return forward(dout, cos, sin, positions, interleaved, not inverse)
