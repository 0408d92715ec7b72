"""dropout_add_norm: dropout, residual add and normalisation in one pass, forward and backward.

The public functions, the schema, the fake kernels and autograd. The maths is in ``fastlm.reference.dropout_add_norm``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.ops._library import FLOATS, Op, autocast_dtype, check_p, check_tensor, seed_tensor, sharded
from fastlm.ops._norm_arguments import OP, offset_tensor

NORMS = ("layer", "rms", "none")
_DX, _DRESIDUAL, _DWEIGHT, _DBIAS, _DLAYERSCALE = 1, 2, 4, 8, 16

_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? layerscale, Tensor? rowscale, Tensor? seed, "
    "Tensor? offset, float p, float eps, float weight_offset, str norm, ScalarType y_dtype, ScalarType z_dtype, "
    "bool need_z) -> (Tensor, Tensor, Tensor, Tensor)"
)
_FORWARD_INT8 = _FORWARD.replace("-> (Tensor, ", "-> (Tensor, Tensor, Tensor, ")
_BACKWARD = (
    "(Tensor? dy, Tensor? dz, Tensor? z, Tensor? x, Tensor? weight, Tensor? layerscale, Tensor? rowscale, "
    "Tensor mean, Tensor rstd, Tensor? seed, Tensor? offset, float p, float weight_offset, str norm, "
    "ScalarType x_dtype, ScalarType? residual_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype, int need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake_forward(
    x, residual, weight, bias, layerscale, rowscale, seed, offset, p, eps, weight_offset, norm, y_dtype, z_dtype, need_z
):
    rows = math.prod(x.shape[:-1])
    stats = torch.float64 if x.dtype == torch.float64 or _is_double(residual) else torch.float32
    return (
        x.new_empty(0 if norm == "none" else x.shape, dtype=y_dtype),
        x.new_empty(x.shape if need_z else 0, dtype=z_dtype),
        x.new_empty(rows if norm == "layer" else 0, dtype=stats),
        x.new_empty(0 if norm == "none" else rows, dtype=stats),
    )


def _fake_forward_int8(x, *rest):
    out = _fake_forward(x, *rest)
    return (*out, x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32))


def _is_double(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float64


def _fake_backward(
    dy, dz, z, x, weight, layerscale, rowscale, mean, rstd, seed, offset, p, weight_offset, norm,
    x_dtype, residual_dtype, weight_dtype, bias_dtype, need,
):  # fmt: skip
    given = dy if dy is not None else dz
    columns = given.shape[-1]

    def out(bit, shape, dtype):
        return given.new_empty(shape, dtype=dtype) if need & bit else given.new_empty(0)

    return (
        out(_DX, given.shape, x_dtype),
        out(_DRESIDUAL, given.shape, residual_dtype),
        out(_DWEIGHT, columns, weight_dtype),
        out(_DBIAS, columns, bias_dtype),
        out(_DLAYERSCALE, columns, layerscale.dtype if layerscale is not None else None),
    )


class _DropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, layerscale, rowscale, seed, offset, *options):
        out = _operators.forward(x, residual, weight, bias, layerscale, rowscale, seed, offset, *options)
        _DropoutAddNorm.keep(ctx, out, x, residual, weight, bias, layerscale, rowscale, seed, offset, options)
        return out

    @staticmethod
    def keep(ctx: Any, out, x, residual, weight, bias, layerscale, rowscale, seed, offset, options) -> None:
        """What the backward reads; ``out`` is (y, z, mean, rstd) and what else is without a gradient."""
        _, z, mean, rstd, *more = out
        p, _, weight_offset, norm, _, _, need_z = options
        # What the backward reads: z for the norm (x itself where they are one), x only for layerscale's gradient.
        saved_z = None if norm == "none" else (z if need_z else x)
        saved_x = x if layerscale is not None and ctx.needs_input_grad[4] else None
        ctx.save_for_backward(saved_z, saved_x, weight, layerscale, rowscale, mean, rstd, seed, offset)
        ctx.options = (p, weight_offset, norm, need_z)
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (x, residual, weight, bias))
        ctx.mark_non_differentiable(mean, rstd, *more)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy, dz, *_):
        z, x, weight, layerscale, rowscale, mean, rstd, seed, offset = ctx.saved_tensors
        p, weight_offset, norm, need_z = ctx.options
        # An output that was left empty may still be handed an empty gradient.
        dy = None if norm == "none" else dy
        dz = dz if need_z else None
        if dy is None and dz is None:
            return (None,) * 15
        wants = ctx.needs_input_grad
        need = _DX * wants[0] + _DRESIDUAL * wants[1] + _DLAYERSCALE * wants[4]
        if dy is not None:
            need += _DWEIGHT * wants[2] + _DBIAS * wants[3]
        # Without dropout or a scale, dx is dresidual: one tensor serves both, and is written once.
        shared = (
            wants[0] and wants[1] and p == 0 and layerscale is None and rowscale is None
            and ctx.dtypes[0] == ctx.dtypes[1]
        )  # fmt: skip
        if shared:
            need -= _DRESIDUAL
        dx, dresidual, dweight, dbias, dlayerscale = _operators.backward(
            dy, dz, z, x, weight, layerscale, rowscale, mean, rstd, seed, offset, p, weight_offset, norm,
            *ctx.dtypes, need,
        )  # fmt: skip
        return (
            dx if need & _DX else None,
            dx if shared else (dresidual if need & _DRESIDUAL else None),
            dweight if need & _DWEIGHT else None,
            dbias if need & _DBIAS else None,
            dlayerscale if need & _DLAYERSCALE else None,
            *(None,) * 10,
        )


class _DropoutAddNormInt8(_DropoutAddNorm):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, layerscale, rowscale, seed, offset, *options):
        out = _operators_int8.forward(x, residual, weight, bias, layerscale, rowscale, seed, offset, *options)
        _DropoutAddNorm.keep(ctx, out, x, residual, weight, bias, layerscale, rowscale, seed, offset, options)
        return out


_operators = Op(OP, _FORWARD, _BACKWARD, _fake_forward, _fake_backward, _DropoutAddNorm)
# With int8 rows, an operator of its own: the plain one stays as fast as it is. Its backward is the plain one's.
_operators_int8 = Op(
    f"{OP}_int8", _FORWARD_INT8, None, _fake_forward_int8, None, _DropoutAddNormInt8, runs=(OP, "forward_int8")
)


def _arguments(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str | None = "layer",
    p: float = 0.0,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    layerscale: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    y_dtype: torch.dtype | None = None,
    return_residual: bool = True,
    quantize: str | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    training: bool = True,
) -> tuple[torch.device, tuple[Any, ...]]:
    """Checks a public call and turns it into the schema's arguments."""
    check_tensor(x, "x", OP, required=True)
    device = x.device
    if x.layout != torch.strided:
        raise ValueError(f"{OP}: x has layout {x.layout}; it must be a dense tensor (x.to_dense())")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{OP}: eps is {eps}; it must be at least 0 and finite")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{OP}: x has shape {list(x.shape)}; it must be [..., columns] with at least one column")
    if norm is not None and norm not in NORMS[:2]:
        raise ValueError(f'{OP}: norm is {norm!r}; it must be "layer", "rms" or None')
    check_p(p, OP)
    if quantize not in (None, "int8"):
        raise ValueError(f'{OP}: quantize is {quantize!r}; it must be None or "int8"')
    if quantize is not None and norm is None:
        raise ValueError(f"{OP}: quantize is {quantize!r} with norm None; what it quantises is the norm's output")
    columns = x.shape[-1:]
    check_tensor(residual, "residual", OP, shape=x.shape, device=device)
    for name, vector in (("weight", weight), ("bias", bias), ("layerscale", layerscale)):
        check_tensor(vector, name, OP, shape=columns, device=device)
    if norm is None and (weight is not None or bias is not None):
        given = "weight" if weight is not None else "bias"
        raise ValueError(f"{OP}: {given} was given with norm None, which has no parameters; pass norm or leave it out")
    check_tensor(rowscale, "rowscale", OP, shape=x.shape[:-1], device=device)
    if rowscale is not None and rowscale.requires_grad:
        raise ValueError(f"{OP}: rowscale requires a gradient, which is not computed; pass rowscale.detach()")
    z_dtype = residual_dtype or (residual.dtype if residual is not None else x.dtype)
    for name, dtype in (("residual_dtype", residual_dtype), ("y_dtype", y_dtype)):
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"{OP}: {name} is {dtype}; it must be a floating dtype")
    y_dtype = y_dtype or autocast_dtype(device) or x.dtype

    if not training:
        p = 0.0
    if p * 65536 <= 0.5:  # rounds to a threshold of zero: nothing would be dropped
        p = 0.0
    if p == 0:
        seed = offset = None
    else:
        seed = seed_tensor(seed, device, OP)
        offset = offset_tensor(offset, x, device)
    plain = p == 0 and residual is None and layerscale is None and rowscale is None and z_dtype == x.dtype
    need_z = not plain and (
        norm is None
        or return_residual
        or (
            (
                torch.is_grad_enabled() or torch.jit.is_tracing()
            )  # torch.jit.trace checks its graph in the other grad mode
            and any(t is not None and t.requires_grad for t in (x, residual, weight, bias, layerscale))
        )
    )
    return device, (
        x, residual, weight, bias, layerscale, rowscale, seed, offset, float(p), float(eps), float(weight_offset),
        norm or "none", y_dtype, z_dtype, need_z,
    )  # fmt: skip


def dropout_add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str | None = "layer",
    p: float = 0.0,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    layerscale: Tensor | None = None,
    rowscale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    y_dtype: torch.dtype | None = None,
    return_residual: bool = True,
    quantize: str | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    training: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """``new_residual = residual + rowscale * layerscale * dropout(x)`` and ``y = norm(new_residual)``, fused.

    Args:
        x: [..., columns], float32, bfloat16 or float16 (float64 on the reference backend); any strides.
        residual: shaped like x, or None for no addition. Its dtype may differ (a float32 residual stream).
        weight, bias: [columns], any floating dtype, or None.
        norm: "layer" (Ba et al. 2016), "rms" (Zhang and Sennrich 2019), or None: no normalisation.
        p: probability to drop an element, 0 <= p < 1, served in steps of 2**-16.
        eps: added to the variance or mean square.
        weight_offset: added to weight; 1.0 for checkpoints that store the weight less one.
        layerscale: [columns], scales the branch (Touvron et al. 2021, CaiT), or None.
        rowscale: x.shape[:-1], scales each row of the branch (stochastic depth, Huang et al. 2016), or None.
            It gets no gradient.
        residual_dtype: of new_residual; None: residual's dtype, else x's.
        y_dtype: of y; None: the autocast dtype under autocast, else x's.
        return_residual: False where nobody reads new_residual.
        quantize: "int8": y also as 8-bit rows with their scales, from the same pass, for an ``Int8Linear`` that follows
            (``linear(y, (q, scale))``). y is given all the same, for its gradient. Not with norm None.
        seed: None (drawn from torch's default generator of the device), an int, or an int64 tensor of one element on
            x's device, which is what torch.compile and CUDA graphs carry without recompiling or synchronising.
        offset: where these rows stand in the whole, for shards: the first global row (int or int64 scalar tensor), or
            an int64 tensor with the global number of each row. The mask depends on seed, that number and column alone.
        training: False switches dropout off.

    DTensors are served where x, residual and rowscale are sharded alike by rows (any axis but the last) and the vectors are
    replicated: each rank computes its rows, with their part of the mask of the whole. seed and offset are the whole's.

    Returns:
        (y, new_residual), or y alone with ``return_residual=False``; with ``norm=None`` new_residual alone.
        y has y_dtype. It is the norm of the rounded new_residual.
        With ``quantize="int8"`` q and scale behind them: int8 of x's shape and float32 x.shape[:-1], the bits that
        ``quantize_int8(y)`` gives. They have no gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range; the message names the argument, what it was and must be.
        fastlm.backend.BackendError: a forced backend that cannot serve.
        RuntimeError: on double backward.
    """
    if sharded(x, residual, weight, bias, layerscale, rowscale, offset):
        from fastlm.ops import _dtensor

        return _dtensor.dropout_add_norm(
            dropout_add_norm, x, residual, weight, bias, norm=norm, p=p, eps=eps, weight_offset=weight_offset,
            layerscale=layerscale, rowscale=rowscale, residual_dtype=residual_dtype, y_dtype=y_dtype,
            return_residual=return_residual, quantize=quantize, seed=seed, offset=offset, training=training,
        )  # fmt: skip
    _, args = _arguments(
        x, residual, weight, bias, norm=norm, p=p, eps=eps, weight_offset=weight_offset, layerscale=layerscale,
        rowscale=rowscale, residual_dtype=residual_dtype, y_dtype=y_dtype, return_residual=return_residual,
        quantize=quantize, seed=seed, offset=offset, training=training,
    )  # fmt: skip
    int8: tuple[Tensor, ...] = ()
    if quantize is None:
        y, z, _, _ = _operators(*args)
    else:
        y, z, _, _, *int8 = _operators_int8(*args)
    if not args[-1] and (norm is None or return_residual):
        z = x  # new_residual is x itself, bit for bit
    if int8:
        return (y, z, *int8) if return_residual else (y, *int8)
    if norm is None:
        return z
    return (y, z) if return_residual else y


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    y_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm or RMSNorm of the last axis alone, by the kernels of ``dropout_add_norm``.

    Args and errors as there: x [..., columns]; weight, bias [columns] or None. Returns x's shape in
    y_dtype (None: the autocast dtype under autocast, else x's).
    """
    y = dropout_add_norm(
        x, None, weight, bias, norm=norm, eps=eps, weight_offset=weight_offset, y_dtype=y_dtype, return_residual=False
    )
    assert isinstance(y, Tensor)
    return y


def _example(device: str) -> dict[str, Any]:
    x = torch.empty(64, 768, device=device)
    return {"x": x, "residual": x, "p": 0.1}


def _function(*args: Any, quantize: str | None = None, **named: Any) -> str:
    return "forward" if quantize is None else "forward_int8"


backend.register(OP, _arguments, _example, _function)
