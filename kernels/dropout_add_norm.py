"""Dropout, residual add and normalisation in Triton: one pass over the rows forward, one backward.

    z = residual + rowscale * layerscale * dropout(x)                          rounded to z's dtype
    y = (z - mean) * rstd * (weight + weight_offset) + bias                    "layer"; "rms": mean = 0; of the rounded z
    q = y as it was rounded, in int8 with a scale for each row                 on request, as quantize_int8 gives it
    g = rstd * (dy*w - mean_C(dy*w) - xhat * mean_C(dy*w*xhat)) + dz           w = weight + weight_offset, "rms": no mean_C(dy*w)
    dresidual = g,  dx = rowscale * layerscale * mask * keep_scale * g
    dweight = sum_R dy*xhat,  dbias = sum_R dy,  dlayerscale = sum_R g * rowscale * dropout(x)

Bytes moved per element, at e bytes each: forward reads x and residual and writes y and z (4e); backward reads dy, z and dz
and writes dx and dresidual (5e), x too for dlayerscale. Parameters and statistics are read from cache. Flops per element:
about 12 forward, 20 backward, and with dropout 14/8 of a 32-bit multiplication in each (kernels/philox.py). So both are
bound by memory on every GPU that Triton serves.

A program holds whole rows in registers: one row, or several where rows are narrow. Rows too wide for that are cut into
column tiles and their statistics (backward: their two means) are found by a kernel of their own before.

Parameter gradients: a program walks down ``row_block(rows, columns)`` rows, a function of the shape alone, and leaves
float32 partial sums [blocks, columns]; ``combine_kernel`` adds these in a fixed order. No atomics.

Any strides: leading axes are collapsed to at most three jointly, so that a row number gives each tensor's offset without a
copy. The kernels are in _dropout_add_norm_kernels.py; here stand what they serve, the launchers, and the cases for tuning.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from fastlm.backend import YES, Support
from fastlm.kernels import quantize_int8, table
from fastlm.kernels._common import TL_DTYPE, OfflineCase, arch_of, collapse, launch, recording
from fastlm.kernels._dropout_add_norm_kernels import (
    backward_kernel,
    combine_kernel,
    forward_kernel,
    statistics_kernel,
    sums_kernel,
)
from fastlm.reference.philox import keep_scale, threshold_of
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------- launchers


def row_block(rows: int, columns: int) -> int:
    """Rows summed into one partial parameter gradient: a function of the shape alone, whatever the GPU.

    At most 512 blocks (256 of wide rows) fill the largest GPUs four (two) times over, and their partial sums stay small
    beside the tensors: 8,192 rows give blocks of 16 (32).
    """
    granule = _granule(columns)
    return granule * triton.cdiv(rows, granule * (512 if columns <= 4096 else 256))


def _granule(columns: int) -> int:
    return max(1, min(64, 4096 // triton.next_power_of_2(columns)))


def _tile(kernel: str, x: Tensor, columns: int, features: frozenset[str]) -> tuple[int, int, bool, dict[str, int]]:
    """Rows and columns of a tile, whether it holds whole rows, and the configuration."""
    config = table.config(
        kernel, arch=arch_of(x.device), dtype=table.DTYPE_NAME[x.dtype], size=columns, features=features
    )
    power = max(8, triton.next_power_of_2(columns))
    if "elements" in config:
        most = _granule(columns) if kernel.endswith("backward") else 64
        return max(1, min(most, config["elements"] // power)), power, True, config
    return 1, min(power, config["columns"]), power <= config["columns"], config


class _Geometry:
    """Strides of the tensors of a call over its jointly collapsed leading axes, as the kernels take them."""

    def __init__(
        self, shape: torch.Size, tensors: list[Tensor | None], vectors: list[Tensor | None], rowscale: Tensor | None
    ):
        columns = shape[-1]
        given = [t for t in tensors if t is not None]
        rowscale_strides = [] if rowscale is None else [rowscale.stride()]
        if all(t.is_contiguous() for t in given) and (rowscale is None or rowscale.is_contiguous()):
            self.sizes = [shape[:-1].numel()]
            strides = [[columns] for _ in given] + [[1] for _ in rowscale_strides]
        else:
            self.sizes, strides = collapse(shape[:-1], *(t.stride()[:-1] for t in given), *rowscale_strides)
        self.axes = len(self.sizes)
        self.unit = columns == 1 or all(t.stride(-1) == 1 for t in given + [v for v in vectors if v is not None])
        vec = 8
        while vec > 1 and not (
            self.unit and all(s % vec == 0 for k in strides[: len(given)] for s in k) and columns % vec == 0
        ):
            vec = 4 if vec == 8 else 1
        self.vec = vec
        if self.axes <= 3:
            pad = [0] * (3 - self.axes)
            rest = iter(strides)
            self.tensor = [
                (0, 0, 0, 0) if t is None else (*pad, *(s // vec for s in next(rest)), t.stride(-1)) for t in tensors
            ]
            self.rowscale = (0, 0, 0) if rowscale is None else (*pad, *next(rest))
            self.n1, self.n2 = ([1, 1] + self.sizes)[-2:]
            self.columns = columns // vec
        self.vector = [0 if v is None else v.stride(0) for v in vectors]

    def support(self) -> Support:
        if self.axes > 3:
            return Support(
                False, f"the triton kernel takes at most 3 leading axes that do not merge; here are {self.axes}"
            )
        if not self.unit:
            return Support(True, "element by element: a last stride is not 1")
        return YES if self.vec > 1 else Support(True, "element by element: rows are not aligned")


_STREAM = (torch.float32, torch.bfloat16, torch.float16)
_INT8_COLUMNS = 8192  # wider rows become int8 in a kernel behind: with their scale they spilled on sm_80 in float32


def _dtype_support(
    tensors: dict[str, Tensor | None], dtypes: dict[str, torch.dtype | None], device: torch.device
) -> Support:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _STREAM:
            return Support(False, f"the triton kernel takes float32, bfloat16 and float16; {name} is {tensor.dtype}")
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in _STREAM:
            return Support(False, f"the triton kernel gives float32, bfloat16 and float16; {name} is to be {dtype}")
    if device.type == "cuda" and arch_of(device) < 80:
        return Support(False, f"the triton kernels need compute capability 8.0; {device} has {arch_of(device) / 10}")
    return YES


def serves_forward(
    x, residual, weight, bias, layerscale, rowscale, seed, offset, p, eps, weight_offset, norm, y_dtype, z_dtype, need_z
) -> Support:
    support = _dtype_support({"x": x, "residual": residual}, {"y": y_dtype, "new_residual": z_dtype}, x.device)
    return _place_support(x.shape, [x, residual], [weight, bias, layerscale], rowscale) if support.ok else support


def serves_forward_int8(x: Tensor, *rest: Any) -> Support:
    """As the forward; wide rows take one kernel more."""
    support, columns = serves_forward(x, *rest), x.shape[-1]
    if support.ok and not support.why and columns > _INT8_COLUMNS:
        return Support(
            True, f"rows of {columns} columns become int8 in a kernel behind: above {_INT8_COLUMNS} they spill"
        )
    return support


def serves_backward(
    dy, dz, z, x, weight, layerscale, rowscale, mean, rstd, seed, offset, p, weight_offset, norm,
    x_dtype, residual_dtype, weight_dtype, bias_dtype, need,
) -> Support:  # fmt: skip
    given = dy if dy is not None else dz
    tensors = {"y's gradient": dy, "new_residual's gradient": dz, "new_residual": z, "x": x}
    support = _dtype_support(tensors, {"x": x_dtype, "residual": residual_dtype}, given.device)
    return _place_support(given.shape, [dy, dz, z, x], [weight, layerscale], rowscale) if support.ok else support


def _place_support(shape, tensors, vectors, rowscale) -> Support:
    everything = (*tensors, *vectors, rowscale)
    if shape[-1] % 8 == 0 and all(t is None or t.is_contiguous() for t in everything):
        return YES  # without working out the strides
    return _Geometry(shape, tensors, vectors, rowscale).support()


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of the op's schema; contiguous outputs."""
    return _forward(None, *args)


def forward_int8(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``forward``'s outputs, and y as int8 with its rows' scales. Rows too wide are quantised from y behind."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return (*_forward((q, scale), x, *rest), q, scale)


def _forward(
    int8, x, residual, weight, bias, layerscale, rowscale, seed, offset, p, eps, weight_offset, norm, y_dtype, z_dtype,
    need_z,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``int8``: None, or (q, scale) to fill."""
    columns = x.shape[-1]
    rows = x.shape[:-1].numel()
    normed = norm != "none"
    y = torch.empty(x.shape if normed else 0, dtype=y_dtype, device=x.device)
    z = torch.empty(x.shape if need_z else 0, dtype=z_dtype, device=x.device)
    mean = torch.empty(rows if norm == "layer" else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty(rows if normed else 0, dtype=torch.float32, device=x.device)
    if rows == 0 or not (normed or need_z):
        return y, z, mean, rstd
    place = _Geometry(x.shape, [x, residual], [weight, bias, layerscale], rowscale)
    features = frozenset(("dropout",) if p > 0 else ()) | {norm}
    row_tile, column_tile, whole, config = _tile("dropout_add_norm_forward", x, columns, features)
    at_once = int8 is not None and whole and column_tile <= _INT8_COLUMNS
    threshold = threshold_of(p)
    x_strides, r_strides = place.tensor
    weight_stride, bias_stride, layerscale_stride = place.vector
    offset_stride = offset.stride(0) if offset is not None and offset.dim() == 1 else 0
    stream = (
        *(rows, place.columns, place.n1, place.n2, *x_strides, *r_strides),
        *(layerscale_stride, *place.rowscale, offset_stride, threshold, keep_scale(p)),
    )
    constants = {
        "NORM": norm, "Z_DTYPE": TL_DTYPE[z_dtype], "DROPOUT": _dropout_mode(p, offset), "AXES": min(place.axes, 2),
        "UNIT": place.unit, "VEC": place.vec, "ROWS": row_tile, "COLUMNS": column_tile,
        "num_warps": config["num_warps"], "num_stages": config["num_stages"],
    }  # fmt: skip
    mean_, rstd_ = (mean if norm == "layer" else None), (rstd if normed else None)
    with torch.cuda.device_of(x):
        if normed and not whole:
            launch(
                statistics_kernel, (rows,),
                x, residual, layerscale, rowscale, seed, offset, mean_, rstd_, *stream, eps, **constants,
            )  # fmt: skip
        launch(
            forward_kernel, (triton.cdiv(rows, row_tile), triton.cdiv(columns, column_tile)),
            *(x, residual, weight, bias, layerscale, rowscale, seed, offset),
            *(y if normed else None, z if need_z else None, mean_, rstd_),
            *((int8 if at_once else (None, None)) + stream[:12]),
            *(weight_stride, bias_stride, *stream[12:], eps, weight_offset),
            GIVEN=not whole, **constants,
        )  # fmt: skip
        if int8 is not None and not at_once:
            quantize_int8.into(y, *int8)
    return y, z, mean, rstd


def _dropout_mode(p: float, offset: Tensor | None) -> int:
    return 0 if p == 0 else 2 if offset is not None and offset.dim() == 1 else 1


def backward(
    dy, dz, z, x, weight, layerscale, rowscale, mean, rstd, seed, offset, p, weight_offset, norm,
    x_dtype, residual_dtype, weight_dtype, bias_dtype, need,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward of the op's schema; contiguous outputs."""
    given = dy if dy is not None else dz
    shape, device = given.shape, given.device
    columns = shape[-1]
    rows = shape[:-1].numel()
    if dy is None:  # what only the norm's gradient reads
        z = weight = None
        norm = "none"
    if not need & 16:
        x = None

    def out(bit, size, dtype):
        return torch.empty(size if need & bit else 0, dtype=dtype if need & bit else given.dtype, device=device)

    dx, dresidual = out(1, shape, x_dtype), out(2, shape, residual_dtype)
    dweight, dbias = out(4, columns, weight_dtype), out(8, columns, bias_dtype)
    dlayerscale = out(16, columns, layerscale.dtype if layerscale is not None else None)
    outputs = (dx, dresidual, dweight, dbias, dlayerscale)
    summed = [t for t in outputs[2:] if t.numel()]
    if rows == 0:
        for t in summed:
            t.zero_()
        return outputs
    place = _Geometry(shape, [dy, dz, z, x], [weight, layerscale], rowscale)
    dy_strides, dz_strides, z_strides, x_strides = place.tensor
    weight_stride, layerscale_stride = place.vector
    features = frozenset(("dropout",) if p > 0 else ()) | {norm}
    features |= {"layerscale"} if need & 16 else frozenset()
    features |= {"mixed"} if any(t is not None and t.dtype != given.dtype for t in (dz, z)) else frozenset()
    row_tile, column_tile, whole, config = _tile("dropout_add_norm_backward", given, columns, features)
    block = row_block(rows, columns) if summed else row_tile
    blocks = triton.cdiv(rows, block)
    offset_stride = offset.stride(0) if offset is not None and offset.dim() == 1 else 0
    sums = torch.empty(rows, 2, dtype=torch.float32, device=device) if dy is not None and not whole else None
    partial = torch.empty(len(summed), blocks, columns, dtype=torch.float32, device=device)
    slot = iter(partial)
    partials = [next(slot) if t.numel() else None for t in outputs[2:]]
    constants = {
        "NORM": norm, "AXES": min(place.axes, 2), "UNIT": place.unit, "VEC": place.vec,
        "ROWS": row_tile, "COLUMNS": column_tile, "num_warps": config["num_warps"], "num_stages": config["num_stages"],
    }  # fmt: skip
    mean_ = mean if norm == "layer" else None
    rstd_ = rstd if dy is not None else None
    with torch.cuda.device_of(given):
        if sums is not None:
            launch(
                sums_kernel, (rows,),
                *(dy, z, weight, mean_, rstd_, sums, rows, place.columns, place.n1, place.n2, *dy_strides, *z_strides),
                *(weight_stride, weight_offset),
                **constants,
            )  # fmt: skip
        launch(
            backward_kernel, (blocks, triton.cdiv(columns, column_tile)),
            *(dy, dz, z, x, weight, layerscale, rowscale, mean_, rstd_, sums, seed, offset),
            *(dx if need & 1 else None, dresidual if need & 2 else None, *partials),
            *(rows, place.columns, place.n1, place.n2, block, *dy_strides, *dz_strides, *z_strides, *x_strides),
            *(weight_stride, layerscale_stride, *place.rowscale, offset_stride, threshold_of(p), keep_scale(p)),
            weight_offset, DROPOUT=_dropout_mode(p, offset), STAGES=config["num_stages"], **constants,
        )  # fmt: skip
        if summed:
            # Narrow tiles for many programs; the width changes no sum, and the interpreter likes few programs.
            tile = 32 if device.type != "cpu" else 4096
            launch(
                combine_kernel, (triton.cdiv(columns, tile), len(summed)),
                partial, *summed, *(None,) * (3 - len(summed)), blocks, columns,
                BLOCKS=128, COLUMNS=tile, num_warps=4, num_stages=1,
            )  # fmt: skip
    return outputs


# ------------------------------------------------------------------------------------------------------- offline cases


def offline_cases() -> list[OfflineCase]:
    """Calls that reach every rule of the table, at its widest rows, with dropout: bias and weight alone, and with all else.

    dtypes: all bfloat16, all float32, and bfloat16 beside a float32 residual stream and parameters (autocast).
    """
    bf16, f32 = torch.bfloat16, torch.float32
    kinds = {"bf16": (bf16, bf16), "f32": (f32, f32), "autocast": (bf16, f32)}
    cases: list[OfflineCase] = []
    for arch in (80, 90):
        for direction, record in (("forward", _offline_forward), ("backward", _offline_backward)):
            sizes = {rule.get("size", 65536) for rule in table.rules(f"dropout_add_norm_{direction}")}
            for columns in sorted(sizes):
                for kind, dtypes in kinds.items():
                    cases += record(arch, columns, "layer", kind, *dtypes, False)
                    cases += record(arch, columns, "layer", kind, *dtypes, True)
            for kind, dtypes in kinds.items():
                cases += record(arch, 4096, "rms", kind, *dtypes, False)
                cases += record(arch, 4096, "none", kind, *dtypes, True)
        sizes = {rule.get("size", 65536) for rule in table.rules("dropout_add_norm_forward")}
        for columns in sorted(sizes):
            for kind, dtypes in kinds.items():
                cases += _offline_forward(arch, columns, "layer", kind, *dtypes, True, int8=True)
    return cases + _measured_cases()


def _measured_cases() -> list[OfflineCase]:
    """A call that reaches each rule that ``--tune`` measured."""
    torch_dtype = {name: dtype for dtype, name in table.DTYPE_NAME.items()}
    cases: list[OfflineCase] = []
    for direction, record in (("forward", _offline_forward), ("backward", _offline_backward)):
        for rule in table.rules(f"dropout_add_norm_{direction}"):
            if rule.get("exact"):
                features, dtype = set(rule["features"]), torch_dtype[rule["dtype"][0]]
                norm = next(n for n in ("layer", "rms", "none") if n in features)
                p = 0.1 if "dropout" in features else 0.0
                cases += record(rule["arch"], rule["size"], norm, f"{rule['dtype'][0]} measured p={p:g}", dtype, dtype,
                                False, p)  # fmt: skip
    return cases


def candidates() -> list[table.Trial]:
    """For ``fastlm bench --tune``: widths of models, bfloat16 and float32, layer and rms norm, with and without dropout.

    Candidates: whole rows in 1, 2 or 4 times the warps' worth of elements, and tiles with the statistics in a pass before.
    """
    trials = []
    for size in (768, 1024, 2048, 4096, 8192, 16384):
        power = triton.next_power_of_2(size)
        whole = [{"elements": max(power, per * warps), "num_warps": warps, "num_stages": 1}
                 for warps in (2, 4, 8, 16, 32) for per in (256, 512, 1024) if power <= per * warps <= 4 * power]  # fmt: skip
        tiles = [{"columns": columns, "num_warps": 4 if columns == 1024 else 8, "num_stages": 1}
                 for columns in (1024, 4096) if columns < power and size >= 4096]  # fmt: skip
        for dtype in (torch.bfloat16, torch.float32):
            for norm in ("layer", "rms"):
                for p in (0.1, 0.0):
                    for direction in ("forward", "backward"):
                        trials.append(_trial(direction, size, dtype, norm, p, (*whole, *tiles)))
    return trials


def _trial(direction, size, dtype, norm, p, configs, rows: int | None = None) -> table.Trial:
    rows = rows or max(8192, 2**26 // size)
    features = frozenset((norm, "dropout") if p > 0 else (norm,))

    def arguments(device: str) -> tuple:
        generator = torch.Generator(device).manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        x, z, weight, seed = normal(rows, size), normal(rows, size), normal(size), torch.tensor(1, device=device)
        bias = normal(size) if norm == "layer" else None
        if direction == "forward":
            return (x, z, weight, bias, None, None, seed, None, p, 1e-5, 0.0, norm, dtype, dtype, True)
        mean = z.float().mean(1) if norm == "layer" else None
        centred = z.float() - mean[:, None] if mean is not None else z.float()
        rstd = (centred.square().mean(1) + 1e-5).rsqrt()
        empty = torch.empty(0, device=device)
        need = 1 + (2 if p > 0 else 0) + 4 + (8 if bias is not None else 0)
        return (x, normal(rows, size), z, None, weight, None, None, mean if mean is not None else empty, rstd, seed, None,
                p, 0.0, norm, dtype, dtype, dtype, dtype, need)  # fmt: skip

    tensors = 4 if direction == "forward" else 4 + (p > 0)
    moved = tensors * rows * size * torch.empty((), dtype=dtype).element_size()
    return table.Trial(
        "dropout_add_norm", direction, f"dropout_add_norm_{direction}", table.DTYPE_NAME[dtype], size, features, configs,
        arguments, moved, (12 if direction == "forward" else 20) * rows * size,
    )  # fmt: skip


def _meta(columns, x, other, full) -> dict[str, Any]:
    """The tensors of a call by name."""
    rows = max(8192, 2**26 // columns)
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
    t = {"x": empty(rows, columns, dtype=x), "y": empty(rows, columns, dtype=x), "z": empty(rows, columns, dtype=other)}
    t |= {"vector": empty(columns, dtype=other), "statistic": empty(rows), "seed": empty((), dtype=torch.int64)}
    scales = {"layerscale": t["vector"], "rowscale": empty(rows), "offset": t["seed"]}
    return t | (scales if full else dict.fromkeys(scales))


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _offline_forward(arch, columns, norm, kind, x, other, full, p=0.1, int8=False) -> list[OfflineCase]:
    t = _meta(columns, x, other, full)
    vector = t["vector"] if norm != "none" else None
    moved = _bytes(t["x"], t["z"], t["z"], t["y"] if norm != "none" else None)
    moved += t["x"].numel() if int8 else 0
    name = f"dropout_add_norm forward {norm} {len(t['x'])}x{columns} {kind}{' full' if full else ''}"
    with recording(arch, name + (" int8" if int8 else ""), bytes_moved=moved, flops=12 * t["x"].numel()) as cases:
        (forward_int8 if int8 else forward)(
            t["x"], t["z"], vector, vector, t["layerscale"], t["rowscale"], t["seed"], t["offset"], p, 1e-5, 0.0, norm,
            x, other, True,
        )  # fmt: skip
    return cases


def _offline_backward(arch, columns, norm, kind, x, other, full, p=0.1) -> list[OfflineCase]:
    t = _meta(columns, x, other, full)
    dy = t["y"] if norm != "none" else None
    moved = _bytes(t["z"], t["z"], t["x"]) + (_bytes(dy, t["z"]) if dy is not None else 0)
    moved += _bytes(t["x"]) if full else 0
    name = f"dropout_add_norm backward {norm} {len(t['x'])}x{columns} {kind}{' full' if full else ''}"
    need = 3 + (12 if dy is not None else 0) + (16 if full else 0)
    with recording(arch, name, bytes_moved=moved, flops=20 * t["x"].numel()) as cases:
        backward(
            dy, t["z"], t["z"], t["x"], t["vector"], t["layerscale"], t["rowscale"], t["statistic"], t["statistic"],
            t["seed"], t["offset"], p, 0.0, norm, x, other, other, other, need,
        )  # fmt: skip
    return cases
