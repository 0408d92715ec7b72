"""dropout_add_norm on CUDA: from tensors to ``csrc/cuda/dropout_add_norm_*.cu``. Never run on a GPU yet."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastlm import _native
from fastlm._native import ABSENT, DTYPE, FLOATS, Packed, Sizes
from fastlm.backend import YES, Support

_NORM = {"layer": 0, "rms": 1, "none": 2}
_KEEPS_ROW = (8192, 65536)  # columns that a block, and a cluster of blocks, hold between the passes


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _refuse(name: str, dtype: torch.dtype) -> Support:
    given = str(dtype).removeprefix("torch.")
    return Support(False, f"the cuda kernel takes float32, bfloat16 and float16; {name} is {given}")


def _serves(
    vectors: tuple[tuple[str, Tensor | None], ...],
    rows: tuple[tuple[str, Tensor | None], ...],
    rowscale: Tensor | None,
) -> Support:
    why = _native.missing_cuda()
    if why:
        return Support(False, why)
    slow, columns, device = "", 1, None
    for name, t in rows:
        if t is None:
            continue
        if t.dtype not in FLOATS:
            return _refuse(name, t.dtype)
        columns, device = t.shape[-1], t.device
        if not slow:
            if columns % 8:
                slow = f"rows are read element by element: {columns} columns are no multiple of 8"
            elif t.stride(-1) != 1:
                slow = f"rows of {name} are read element by element: its last axis has stride {t.stride(-1)}, not 1"
            elif any(s * t.element_size() % 16 for s, n in zip(t.stride()[:-1], t.shape) if n > 1):
                slow = f"rows of {name} are read element by element: they do not start at multiples of 16 bytes"
    for name, t in vectors:
        if t is not None and t.dtype not in FLOATS:
            return _refuse(name, t.dtype)
    if device is None:
        return YES
    capability = _capability(device)
    if capability < (8, 0):
        have = ".".join(map(str, capability))
        return Support(False, f"the cuda kernel needs a GPU of compute capability 8.0 or newer; {device} has {have}")
    held = _KEEPS_ROW[capability >= (9, 0)]
    if columns > held:
        slow = slow or f"rows of {columns} columns are read again in each pass: this GPU holds {held}"
    slow = _native.copied(rows, rowscale) or slow
    return Support(True, slow) if slow else YES


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
    """Every floating dtype but float64, in any mixture, with any strides, from compute capability 8.0 on."""
    if y_dtype not in FLOATS:
        return _refuse("y", y_dtype)
    if z_dtype not in FLOATS:
        return _refuse("new_residual", z_dtype)
    vectors = (("weight", weight), ("bias", bias), ("layerscale", layerscale), ("rowscale", rowscale))
    return _serves(vectors, (("x", x), ("residual", residual)), rowscale)


def serves_forward_int8(*args: object) -> Support:
    """Not yet: the Triton kernel does, and is tried before it."""
    return Support(False, 'the cuda kernel gives no int8 rows (quantize="int8"); the triton kernel does')


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


def _place(t: Tensor) -> tuple[int, int]:
    """The device's number and PyTorch's current stream there."""
    index = t.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _whole(t: Tensor) -> Packed:
    """A contiguous vector made here; absent if empty."""
    return (t.data_ptr(), DTYPE[t.dtype], 0, 0, 0, 1) if t.numel() else ABSENT


def _offset(offset: Tensor | None, sizes: Sizes) -> tuple[Packed, bool]:
    if offset is None:
        return ABSENT, False
    return _native.per_row(offset, sizes), offset.dim() > 0


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
    """Returns (y, z, mean, rstd) as ``fastlm.reference.dropout_add_norm.forward`` does."""
    sizes, (x_at, residual_at), rowscale_at, alive = _native.rows(x.shape, (x, residual), rowscale)
    rows = sizes[0] * sizes[1] * sizes[2]
    y = x.new_empty((0,) if norm == "none" else x.shape, dtype=y_dtype)
    z = x.new_empty(x.shape if need_z else (0,), dtype=z_dtype)
    mean = x.new_empty(rows if norm == "layer" else 0, dtype=torch.float32)
    rstd = x.new_empty(0 if norm == "none" else rows, dtype=torch.float32)
    # The norm is that of z as rounded to its dtype, also where z is not written.
    z_at = _native.packed_rows(z, sizes) if z.numel() else (0, DTYPE[z_dtype], 0, 0, 0, 0)
    offset_at, per_row = _offset(offset, sizes)
    _native._C.dropout_add_norm_forward_cuda(
        sizes, x_at, residual_at, _native.vector(weight), _native.vector(bias), _native.vector(layerscale), rowscale_at,
        _native.scalar(seed), offset_at, per_row, p, eps, weight_offset, _NORM[norm], _native.packed_rows(y, sizes),
        z_at, _whole(mean), _whole(rstd), *_place(x),
    )  # fmt: skip
    del alive
    return y, z, mean, rstd


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
    shape, columns = given.shape, given.shape[-1]
    if dy is None:
        z = None
    if not need & 16:
        x = None

    def out(bit: int, size: torch.Size | int, dtype: torch.dtype | None) -> Tensor:
        return given.new_empty(size if need & bit else 0, dtype=dtype)

    sizes, (dy_at, dz_at, z_at, x_at), rowscale_at, alive = _native.rows(shape, (dy, dz, z, x), rowscale)
    dx, dresidual = out(1, shape, x_dtype), out(2, shape, residual_dtype)
    dweight, dbias = out(4, columns, weight_dtype), out(8, columns, bias_dtype)
    dlayerscale = out(16, columns, layerscale.dtype if layerscale is not None else None)
    if shape.numel() == 0:  # sums over no rows
        return dx, dresidual, dweight.zero_(), dbias.zero_(), dlayerscale.zero_()
    parts = _native._C.dropout_add_norm_parts_cuda(sizes[0] * sizes[1] * sizes[2])
    sums = sum(t.numel() > 0 for t in (dweight, dbias, dlayerscale))
    workspace = given.new_empty(sums * parts * columns, dtype=torch.float32)
    offset_at, per_row = _offset(offset, sizes)
    _native._C.dropout_add_norm_backward_cuda(
        sizes, dy_at, dz_at, z_at, x_at, _native.vector(weight), _native.vector(layerscale), rowscale_at, _whole(mean),
        _whole(rstd), _native.scalar(seed), offset_at, per_row, p, weight_offset, _NORM[norm],
        _native.packed_rows(dx, sizes), _native.packed_rows(dresidual, sizes), _whole(dweight), _whole(dbias),
        _whole(dlayerscale), (workspace.data_ptr(), DTYPE[torch.float32], workspace.numel(), 0, 0, 0), *_place(given),
    )  # fmt: skip
    del alive
    return dx, dresidual, dweight, dbias, dlayerscale
