"""int8_matmul on the CPU: from tensors to ``csrc/cpu/int8_matmul.cpp`` and ``int8_weight_only.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm._native import ABSENT, DTYPE, FLOATS, Packed
from fastlm.backend import YES, Support
from fastlm.reference.int8_matmul import ACTIVATIONS, group_size

_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}


def serves_forward(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype,
) -> Support:  # fmt: skip
    """int8, float32, bfloat16 and float16, any strides; float64 nowhere."""
    why = _native.missing()
    if why:
        return Support(False, why)
    if torch.float64 in (a.dtype, out_dtype) or (bias is not None and bias.dtype == torch.float64):
        return Support(False, "the cpu kernel takes no float64")
    if out_dtype != torch.int32 and out_dtype not in FLOATS:
        return Support(False, f"the cpu kernel gives no {str(out_dtype).removeprefix('torch.')}")
    apart = [n for n, t, axis in (("a", a, 1), ("b", b, 0)) if t.shape[axis] > 1 and t.stride(axis) != 1]
    if apart and not (apart == ["a"] and a.dtype != torch.int8):
        names = " and ".join(apart)
        return Support(
            True, f"{names} gathered first, a block at a time: along K the elements lie apart (weight.t() does not)"
        )
    return YES


def serves_backward(
    dout: Tensor, b: Tensor, b_scale: Tensor | None, a_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> Support:
    """As the forward."""
    why = _native.missing()
    if why:
        return Support(False, why)
    if torch.float64 in (dout.dtype, a_dtype, bias_dtype):
        return Support(False, "the cpu kernel takes no float64")
    return YES


def _matrix(t: Tensor) -> Packed:
    return (t.data_ptr(), DTYPE[t.dtype], t.stride(0), t.stride(1), 0, 0)


def forward(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As ``fastlm.reference.int8_matmul.forward``."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    if not out.numel():
        return out
    group = group_size(b, b_scale)
    scales = ABSENT
    if b_scale is not None:
        steps = (b_scale.stride(0), b_scale.stride(1)) if group else (0, b_scale.stride(0))
        scales = (b_scale.data_ptr(), DTYPE[b_scale.dtype], *steps, 0, 0)
    rows = ABSENT if a_scale is None else (a_scale.data_ptr(), DTYPE[a_scale.dtype], a_scale.stride(0), 0, 0, 0)
    _native._C.int8_matmul_cpu(
        (a.shape[0], b.shape[1], a.shape[1]), _matrix(a), _matrix(b), rows, scales, group, _native.vector(bias),
        _CODE[activation], _matrix(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, b: Tensor, b_scale: Tensor | None, a_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """As ``fastlm.reference.int8_matmul.backward``: a product with the transposed weight, whose scales then lie along the
    summed axis and multiply dout (one scale a column), or are multiplied in (groups)."""
    da, dbias = dout.new_empty(0), dout.new_empty(0)
    if a_dtype is not None:
        if b_scale is None:
            da = forward(dout, b.t(), None, None, None, "none", a_dtype)
        elif b_scale.dim() == 1:
            da = forward(dout.to(torch.float32) * b_scale, b.t(), None, None, None, "none", a_dtype)
        else:
            da = _through_groups(dout, b, b_scale, a_dtype)
    if bias_dtype is not None:
        dbias = dout.sum(0, dtype=torch.float32).to(bias_dtype)
    return da, dbias


def _through_groups(dout: Tensor, b: Tensor, b_scale: Tensor, a_dtype: torch.dtype) -> Tensor:
    """Group by group along K, each with its own scales along N: [M, group] of da at a time."""
    group, wide = group_size(b, b_scale), dout.to(torch.float32)
    da = dout.new_empty((dout.shape[0], b.shape[0]), dtype=a_dtype)
    for g, scale in enumerate(b_scale):
        part = slice(g * group, min((g + 1) * group, b.shape[0]))
        da[:, part] = forward(wide * scale, b[part].t(), None, None, None, "none", a_dtype)
    return da
