"""int8_matmul: 8-bit matrix product with scales, bias and activation in one pass; exact in its integers.

The public function, the schema, the fake kernels and autograd. The maths is in ``fastlm.reference.int8_matmul``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.ops._library import FLOATS, Op, autocast_dtype, check_tensor
from fastlm.reference.int8_matmul import ACTIVATIONS, GROUPS, group_size

OP = "int8_matmul"
K_MOST = 131_071  # 2**14 times as much is the most that int32 holds
_FORWARD = (
    "(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, Tensor? bias, str activation, ScalarType out_dtype) "
    "-> Tensor"
)
_BACKWARD = "(Tensor dout, Tensor b, Tensor? b_scale, ScalarType? a_dtype, ScalarType? bias_dtype) -> (Tensor, Tensor)"


def _fake_forward(a, b, a_scale, b_scale, bias, activation, out_dtype):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _fake_backward(dout, b, b_scale, a_dtype, bias_dtype):
    return (
        dout.new_empty(0) if a_dtype is None else dout.new_empty((dout.shape[0], b.shape[0]), dtype=a_dtype),
        dout.new_empty(0) if bias_dtype is None else dout.new_empty(b.shape[1], dtype=bias_dtype),
    )


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a, b, a_scale, b_scale, bias, activation, out_dtype):
        ctx.save_for_backward(b, b_scale)
        ctx.dtypes = (a.dtype, None if bias is None else bias.dtype)
        return _operators.forward(a, b, a_scale, b_scale, bias, activation, out_dtype)

    @staticmethod
    def backward(ctx: Any, dout):
        wants_a, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        da, dbias = _operators.backward(
            dout, *ctx.saved_tensors, ctx.dtypes[0] if wants_a else None, ctx.dtypes[1] if wants_bias else None
        )
        return da if wants_a else None, None, None, None, dbias if wants_bias else None, None, None


_operators = Op(OP, _FORWARD, _BACKWARD, _fake_forward, _fake_backward, _Int8Matmul)


def _per_line(scale: Tensor | None, name: str, size: int, letter: str, other: int, device: torch.device):
    """A scale of one element, [size], or [size, 1] (other 1) or [1, size] (other 0), as a view [size]."""
    check_tensor(scale, name, OP, device=device, dtypes=(torch.float32,))
    if scale is None:
        return None
    if scale.requires_grad:
        raise ValueError(f"{OP}: {name} requires a gradient, which is not computed; pass {name}.detach()")
    if scale.dim() == 0 or (scale.dim() == 1 and scale.shape[0] == 1):
        return scale.expand(size)
    column = (size, 1) if other else (1, size)
    if tuple(scale.shape) == (size,):
        return scale
    if tuple(scale.shape) == column:
        return scale.squeeze(other)
    shown = f"[{letter}, 1]" if other else f"[1, {letter}]"
    raise ValueError(
        f"{OP}: {name} has shape {list(scale.shape)}; it must be [], [{letter}] or {shown} with {letter} = {size}"
    )


def _b_scales(b: Tensor, b_scale: Tensor | None, weight_only: bool, device: torch.device) -> Tensor | None:
    """b_scale as a view [N], or [G, N] of groups."""
    k, n = b.shape
    if not isinstance(b_scale, Tensor) or b_scale.dim() != 2 or b_scale.shape[0] == 1:
        return _per_line(b_scale, "b_scale", n, "N", 0, device)
    check_tensor(b_scale, "b_scale", OP, device=device, dtypes=(torch.float32,))
    if b_scale.requires_grad:
        raise ValueError(f"{OP}: b_scale requires a gradient, which is not computed; pass b_scale.detach()")
    if b_scale.shape[1] != n or group_size(b, b_scale) < 0:
        counts = ", ".join(str((k + g - 1) // g) for g in GROUPS)
        raise ValueError(
            f"{OP}: b_scale has shape {list(b_scale.shape)}; it must be [], [N], [1, N], or [G, N] for groups of 32, 64 "
            f"or 128 along K: for b of shape {[k, n]} N is {n} and G one of {counts}"
        )
    if not weight_only:
        raise ValueError(
            f"{OP}: b_scale has shape {list(b_scale.shape)}, scales of groups, with an int8 a; groups are served with a "
            f"floating a (weight-only), an int8 a takes b_scale [N]"
        )
    return b_scale


def _arguments(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.device, tuple[Any, ...]]:
    """Checks a public call and turns it into the schema's arguments."""
    check_tensor(a, "a", OP, dtypes=(torch.int8, *FLOATS), required=True)
    device = a.device
    check_tensor(b, "b", OP, device=device, dtypes=(torch.int8,), required=True)
    if a.dim() != 2 or b.dim() != 2:
        name, given, form = ("a", a, "[M, K]") if a.dim() != 2 else ("b", b, "[K, N]")
        raise ValueError(f"{OP}: {name} has shape {list(given.shape)}; it must be {form}")
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"{OP}: b has shape {list(b.shape)}; its rows must be as many as a of shape {list(a.shape)} has columns"
        )
    weight_only = a.dtype != torch.int8
    if not weight_only and a.shape[1] > K_MOST:
        raise ValueError(f"{OP}: K is {a.shape[1]}; it must be at most {K_MOST}, so that every sum fits into int32")
    if weight_only and a_scale is not None:
        raise ValueError(
            f"{OP}: a_scale was given with a floating a ({a.dtype}); an int8 a has a scale, this one must not"
        )
    a_scale = _per_line(a_scale, "a_scale", a.shape[0], "M", 1, device)
    b_scale = _b_scales(b, b_scale, weight_only, device)
    check_tensor(bias, "bias", OP, shape=b.shape[1:], device=device)
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ValueError(f'{OP}: activation is {activation!r}; it must be None, "gelu", "gelu_tanh" or "silu"')
    integers = not weight_only and a_scale is None and b_scale is None
    if out_dtype is None:
        wanted = torch.int32 if integers else torch.float32
        out_dtype = (autocast_dtype(device) or a.dtype) if weight_only else wanted
    elif out_dtype not in ((torch.int32, *FLOATS) if integers else FLOATS):
        allowed = "a floating dtype, or int32 for an int8 a without scales"
        raise TypeError(f"{OP}: out_dtype is {out_dtype}; it must be {allowed}")
    if out_dtype == torch.int32 and (bias is not None or activation not in (None, "none")):
        name = "bias" if bias is not None else "activation"
        raise ValueError(
            f"{OP}: {name} was given with an int32 result; pass a scale or a floating out_dtype, or leave it out"
        )
    return device, (a, b, a_scale, b_scale, bias, activation or "none", out_dtype)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation((a @ b) * a_scale * b_scale + bias)`` for 8-bit matrices; with a floating ``a`` weight-only.

    Args:
        a: [M, K], any strides. int8: the integers are multiplied and summed exactly in int32. float32, bfloat16 or
            float16 (float64 on the reference backend): b is taken as ``b * b_scale``, and sums are float32.
        b: [K, N] int8, any strides. A weight [N, K] is passed as ``weight.t()``: that layout is read as it lies, and
            nothing is packed or copied.
        a_scale: float32 [], [M] or [M, 1]; None is 1. An int8 a alone.
        b_scale: float32 [], [N] or [1, N]; None is 1. With a floating a also [G, N], for groups of 32, 64 or 128 along K
            with G = ceil(K / group): ``quantize_int8(weight, group=32)`` gives its transpose.
        bias: [N], any floating dtype, or None.
        activation: None, "gelu" (exact, by erf), "gelu_tanh" or "silu". Where a gradient is asked for it is applied by
            PyTorch behind the product, rounded once more.
        out_dtype: None: int32 where a is int8 and neither scale is given, else float32; with a floating a its own dtype
            (under autocast autocast's). Else a floating dtype.

    Returns:
        [M, N], contiguous. With an int8 a: ``(float(acc) * a_scale) * b_scale + bias`` in float32, in this order, each
        step rounded on its own (no fused multiply-add), then rounded to out_dtype: the same bits on every backend and
        instruction set, but for activations, which may differ in the last place.

    Gradients: of a floating a and of bias; scales get none.

    Raises:
        TypeError, ValueError: naming the argument, what it was and must be. An int8 a with K above 131,071, whose sums
            could pass int32, is refused.
        fastlm.backend.BackendError: a forced backend that cannot serve.
        RuntimeError: on double backward.
    """
    _, args = _arguments(a, b, a_scale, b_scale, bias=bias, activation=activation, out_dtype=out_dtype)
    name = args[5]
    learns = torch.is_grad_enabled() and (a.requires_grad or (bias is not None and bias.requires_grad))
    if learns and name != "none":
        y: Tensor = ACTIVATIONS[name](_operators(*args[:5], "none", args[6]))
        return y
    out: Tensor = _operators(*args)
    return out


def _example(device: str) -> dict[str, Any]:
    weight = torch.empty(64, 768, dtype=torch.int8, device=device)
    scales = torch.empty(8, device=device), torch.empty(64, device=device)
    return {"a": torch.empty(8, 768, dtype=torch.int8, device=device), "b": weight.t(), "a_scale": scales[0],
            "b_scale": scales[1]}  # fmt: skip


backend.register(OP, _arguments, _example)
