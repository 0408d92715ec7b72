"""dropout_add_norm on the CPU: from tensors to ``csrc/cpu/dropout_add_norm_*.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from fastlm._native import ABSENT, FLOATS, Packed, Sizes
from fastlm.backend import YES, Support

_NORM = {"layer": 0, "rms": 1, "none": 2}


def _serves(
    named: tuple[tuple[str, Tensor | None], ...],
    rows: tuple[tuple[str, Tensor | None], ...],
    rowscale: Tensor | None,
) -> Support:
    why = _native.missing()
    if why:
        return Support(False, why)
    slow = ""
    for name, t in rows:
        if t is not None:
            if t.dtype not in FLOATS:
                return _refuse(name, t.dtype)
            if t.stride(-1) != 1 and t.shape[-1] > 1:
                slow = slow or f"rows of {name} are gathered first: its last axis has stride {t.stride(-1)}, not 1"
    for name, t in named:
        if t is not None and t.dtype not in FLOATS:
            return _refuse(name, t.dtype)
    slow = _native.copied(rows, rowscale) or slow
    return Support(True, slow) if slow else YES


def _refuse(name: str, dtype: torch.dtype) -> Support:
    given = str(dtype).removeprefix("torch.")
    return Support(False, f"the cpu kernel takes float32, bfloat16 and float16; {name} is {given}")


def serves_forward(
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
) -> Support:
    """Every floating dtype but float64, in any mixture, with any strides."""
    if y_dtype not in FLOATS:
        return _refuse("y", y_dtype)
    if z_dtype not in FLOATS:
        return _refuse("new_residual", z_dtype)
    vectors = (("weight", weight), ("bias", bias), ("layerscale", layerscale), ("rowscale", rowscale))
    return _serves(vectors, (("x", x), ("residual", residual)), rowscale)


serves_forward_int8 = serves_forward


serves_forward_int8 = serves_forward


def serves_backward(
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
) -> Support:
    """As the forward."""
    for name, dtype in (("x", x_dtype), ("residual", residual_dtype), ("weight", weight_dtype), ("bias", bias_dtype)):
        if dtype is not None and dtype not in FLOATS:
            return _refuse(name, dtype)
    if rstd.dtype != torch.float32 or mean.dtype != torch.float32:
        return _refuse("rstd", rstd.dtype)
    vectors = (("weight", weight), ("layerscale", layerscale), ("rowscale", rowscale))
    return _serves(vectors, (("dy", dy), ("dz", dz), ("z", z), ("x", x)), rowscale)


def _like(t: Tensor, dtype: torch.dtype | None, wanted: int) -> Tensor:
    """An output shaped like ``t``, contiguous; empty unless ``wanted``."""
    if not wanted:
        return t.new_empty(0, dtype=dtype)
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def _statistic(t: Tensor) -> Packed:
    return (t.data_ptr(), 0, 0, 0, 0, 1) if t.numel() else ABSENT


def _offset(offset: Tensor | None, sizes: Sizes) -> tuple[Packed, bool]:
    if offset is None:
        return ABSENT, False
    return _native.per_row(offset, sizes), offset.dim() > 0


def _prepared(
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
) -> tuple[Sizes, tuple[Tensor, Tensor, Tensor, Tensor], Any, list[Tensor]]:
    """The sizes, the outputs (y, z, mean, rstd), what the compiled function takes up to them, and copies to keep alive."""
    sizes, (x_at, residual_at), rowscale_at, alive = _native.rows(x.shape, (x, residual), rowscale)
    rows = sizes[0] * sizes[1] * sizes[2]
    y = _like(x, y_dtype, norm != "none")
    z = _like(x, z_dtype, need_z)
    mean = x.new_empty(rows if norm == "layer" else 0, dtype=torch.float32)
    rstd = x.new_empty(0 if norm == "none" else rows, dtype=torch.float32)
    offset_at, per_row = _offset(offset, sizes)
    given = (
        sizes, x_at, residual_at, _native.vector(weight), _native.vector(bias), _native.vector(layerscale), rowscale_at,
        _native.scalar(seed), offset_at, per_row, p, eps, weight_offset, _NORM[norm], _native.packed_rows(y, sizes),
        _native.packed_rows(z, sizes), _statistic(mean), _statistic(rstd),
    )  # fmt: skip
    return sizes, (y, z, mean, rstd), given, alive


def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (y, z, mean, rstd) as ``fastlm.reference.dropout_add_norm.forward`` does."""
    _, out, given, alive = _prepared(x, *rest)
    _native._C.dropout_add_norm_forward_cpu(*(*given, torch.get_num_threads()))
    del alive
    return out


def forward_int8(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Returns (y, z, mean, rstd, q, scale) as ``fastlm.reference.dropout_add_norm.forward_int8`` does."""
    sizes, out, given, alive = _prepared(x, *rest)
    q = _like(x, torch.int8, 1)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    given = (*given, _native.packed_rows(q, sizes), _statistic(scale), torch.get_num_threads())
    _native._C.dropout_add_norm_int8_cpu(*given)
    del alive
    return (*out, q, scale)


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
    """Returns (dx, dresidual, dweight, dbias, dlayerscale) as ``fastlm.reference.dropout_add_norm.backward`` does."""
    given = dy if dy is not None else dz
    assert given is not None
    sizes, (dy_at, dz_at, z_at, x_at), rowscale_at, alive = _native.rows(given.shape, (dy, dz, z, x), rowscale)
    columns = sizes[3]
    dx = _like(given, x_dtype, need & 1)
    dresidual = _like(given, residual_dtype, need & 2)
    dweight = given.new_empty(columns if need & 4 else 0, dtype=weight_dtype)
    dbias = given.new_empty(columns if need & 8 else 0, dtype=bias_dtype)
    scale_dtype = None if layerscale is None else layerscale.dtype
    dlayerscale = given.new_empty(columns if need & 16 else 0, dtype=scale_dtype)
    offset_at, per_row = _offset(offset, sizes)
    _native._C.dropout_add_norm_backward_cpu(
        sizes, dy_at, dz_at, z_at, x_at, _native.vector(weight), _native.vector(layerscale), rowscale_at,
        _statistic(mean), _statistic(rstd), _native.scalar(seed), offset_at, per_row, p, weight_offset, _NORM[norm],
        _native.packed_rows(dx, sizes), _native.packed_rows(dresidual, sizes), _native.vector(dweight),
        _native.vector(dbias), _native.vector(dlayerscale), torch.get_num_threads(),
    )  # fmt: skip
    del alive
    return dx, dresidual, dweight, dbias, dlayerscale
