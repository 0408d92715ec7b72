"""quantize_int8 in Triton: symmetric 8-bit numbers with a scale for each line, group of a line, or all of x.

    scale = max |x| / 127        q = clamp(rint(x / scale), -127, 127)        with a seed: floor(x / scale + u)

The same bits as ``fastlm.reference.quantize_int8``: divisions are rounded to nearest, and a largest magnitude is that of
bits, where a NaN is above all.

Bytes moved per element, at e bytes each: x read once (e), q written (1). Lines too long for registers, and one scale for
all of x, are read twice (2e). Flops per element: about 4, and with a seed 14/8 of a 32-bit multiplication. So it is bound by
memory on every GPU.

A unit is what shares a scale: a line along ``dim``, or a group of one. A program takes ROWS units, each whole in registers or
walked down twice. One scale for all takes a kernel before, whose programs join their maxima by an atomic maximum of
integers, which has one result in any order.

Any strides: leading axes are collapsed to at most three jointly. Shape suffixes: R units of a tile, C elements of a unit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastlm.backend import YES, Support
from fastlm.kernels import table
from fastlm.kernels._common import OfflineCase, arch_of, collapse, launch, line_offset, recording, widened
from fastlm.kernels._int8_rounding import magnitude_bits, nearest, scale_of
from fastlm.kernels.philox import KEY_QUANTIZE_INT8, high_word, key_of, low_word, random16
from fastlm.reference.quantize_int8 import scale_shape
from torch import Tensor

_KEY = tl.constexpr(KEY_QUANTIZE_INT8)

# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _upwards(x, scale, unit):
    """clamp(floor(x / scale + unit), -127, 127) as int8, unit in [0, 1); 0 where scale is 0 or NaN."""
    live = scale > 0.0
    ratio = tl.floor(tl.div_rn(x, tl.where(live, scale, 1.0)) + unit)
    return tl.where(live, tl.minimum(tl.maximum(ratio, -127.0), 127.0), 0.0).to(tl.int8)


@triton.jit
def _quantize_kernel(
    x, q, scale, seed, most, lines, groups, length, n1, n2, x0, x1, x2, xc, q0, q1, q2, qc, s0, s1, s2, sg,
    GROUP: tl.constexpr, DOWN: tl.constexpr, AXES: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS units. GROUP 0: units are lines. DOWN: neighbouring units are of neighbouring lines, not of one.

    most: None, or the bits of the largest magnitude of all, whose scale is then written once.
    """
    unit_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok_R1 = (unit_R < lines * groups)[:, None]
    line_R = unit_R
    first_R = tl.zeros([ROWS], tl.int64)
    end_R1 = length
    if GROUP:
        line_R = unit_R % lines if DOWN else unit_R // groups
        group_R = unit_R // lines if DOWN else unit_R % groups
        first_R += group_R * GROUP
        end_R1 = tl.minimum(length - first_R, GROUP)[:, None]
    x_R1 = (line_offset(line_R, n1, n2, x0, x1, x2, AXES, 1) + first_R * xc)[:, None]
    column_1C = tl.arange(0, COLUMNS)[None, :]
    if WHOLE:
        x_RC = widened(tl.load(x + x_R1 + column_1C.to(tl.int64) * xc, ok_R1 & (column_1C < end_R1), other=0.0))
    if most is None:
        if WHOLE:
            most_R = tl.max(magnitude_bits(x_RC), 1)
        else:
            most_R = tl.zeros([ROWS], tl.int32)
            for start in range(0, length, COLUMNS):
                at_1C = start + column_1C
                x_RC = widened(tl.load(x + x_R1 + at_1C.to(tl.int64) * xc, ok_R1 & (at_1C < end_R1), other=0.0))
                most_R = tl.maximum(most_R, tl.max(magnitude_bits(x_RC), 1))
        scale_R = scale_of(most_R)
        place_R = line_offset(line_R, n1, n2, s0, s1, s2, AXES, 1)
        if GROUP:
            place_R += group_R.to(tl.int64) * sg
        tl.store(scale + place_R, scale_R, unit_R < lines * groups)
    else:
        one = scale_of(tl.load(most))
        scale_R = tl.zeros([ROWS], tl.float32) + one
        tl.store(scale, one, tl.program_id(0) == 0)
    scale_R1 = scale_R[:, None]
    q_R1 = (line_offset(line_R, n1, n2, q0, q1, q2, AXES, 1) + first_R * qc)[:, None]
    if WHOLE:
        if seed is None:
            q_RC = nearest(x_RC, scale_R1)
        else:
            q_RC = _upwards(x_RC, scale_R1, _units(seed, line_R, first_R, 0, ROWS, COLUMNS))
        tl.store(q + q_R1 + column_1C.to(tl.int64) * qc, q_RC, ok_R1 & (column_1C < end_R1))
    else:
        for start in range(0, length, COLUMNS):
            at_1C = start + column_1C
            ok_RC = ok_R1 & (at_1C < end_R1)
            x_RC = widened(tl.load(x + x_R1 + at_1C.to(tl.int64) * xc, ok_RC, other=0.0))
            if seed is None:
                q_RC = nearest(x_RC, scale_R1)
            else:
                q_RC = _upwards(x_RC, scale_R1, _units(seed, line_R, first_R, start, ROWS, COLUMNS))
            tl.store(q + q_R1 + at_1C.to(tl.int64) * qc, q_RC, ok_RC)


@triton.jit
def _units(seed, line_R, first_R, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Random numbers in [0, 1) by sixteenths of bits, of the places from first + start on in each line."""
    k0, k1 = key_of(tl.load(seed), _KEY)
    chunk_RC = ((first_R + start) // 8)[:, None] + tl.arange(0, COLUMNS // 8)[None, :]
    line_R1 = line_R.to(tl.int64)[:, None]
    zero = tl.full([], 0, tl.uint32)
    bits = random16(chunk_RC.to(tl.uint32), low_word(line_R1), high_word(line_R1), zero, k0, k1, ROWS, COLUMNS)
    return bits.to(tl.float32) * 1.52587890625e-05  # 2**-16


@triton.jit
def _largest_kernel(
    x, most, lines, length, n1, n2, x0, x1, x2, xc, AXES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The bits of the largest magnitude of ROWS lines joined into ``most``, int32, which starts at 0."""
    line_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok_R1 = (line_R < lines)[:, None]
    x_R1 = line_offset(line_R, n1, n2, x0, x1, x2, AXES, 1)[:, None]
    most_R = tl.zeros([ROWS], tl.int32)
    for start in range(0, length, COLUMNS):
        at_1C = start + tl.arange(0, COLUMNS)[None, :]
        x_RC = widened(tl.load(x + x_R1 + at_1C.to(tl.int64) * xc, ok_R1 & (at_1C < length), other=0.0))
        most_R = tl.maximum(most_R, tl.max(magnitude_bits(x_RC), 1))
    tl.atomic_max(most, tl.max(most_R, 0))


# ----------------------------------------------------------------------------------------------------------- launchers


def serves_forward(
    x: Tensor, dim: int | None, group: int, seed: Tensor | None, check: bool, transpose: bool
) -> Support:
    """float32, bfloat16 and float16, any strides."""
    if x.dtype not in table.DTYPE_NAME:
        return Support(
            False, f"the triton kernel takes float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
        )
    if x.device.type == "cuda" and arch_of(x.device) < 80:
        return Support(
            False, f"the triton kernels need compute capability 8.0; {x.device} has {arch_of(x.device) / 10}"
        )
    if x.numel() >= 2**31 and x.numel() // max(x.shape[-1 if dim is None else dim], 1) * (4 if group else 1) >= 2**31:
        return Support(False, "the triton kernel numbers lines in 31 bits; x has more")
    if x.dim() > 4 and not x.is_contiguous():
        return Support(True, "copied first where more than three axes do not merge")
    return YES


def forward(
    x: Tensor, dim: int | None, group: int, seed: Tensor | None, check: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    """As ``fastlm.reference.quantize_int8.forward``."""
    q = x.new_empty(x.shape[::-1], dtype=torch.int8) if transpose else torch.empty_like(x, dtype=torch.int8)
    if not x.numel():
        return q, x.new_zeros(scale_shape(x.shape, dim, group), dtype=torch.float32)
    scale = x.new_empty(scale_shape(x.shape, dim, group), dtype=torch.float32)
    lines, out = x, q.t() if transpose else q
    if dim is not None:
        lines, out = lines.movedim(dim, -1), out.movedim(dim, -1)
        along = scale.movedim(dim, -1) if group else scale.unsqueeze(-1)
    else:
        if x.dim() == 0:
            lines, out = x.unsqueeze(0), out.unsqueeze(0)
        along = scale.expand(*lines.shape[:-1], 1)
    lead = lines.shape[:-1]
    sizes, strides = collapse(lead, *(t.stride()[:-1] for t in (lines, out, along)))
    if len(sizes) > 3:
        values, scales = forward(x.contiguous(), dim, group, seed, check, False)
        return q.copy_(values.mT if transpose else values), scales
    _launch(lines, out, along, sizes, strides, group, seed, dim is None)
    return q, scale


def into(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """Rows of x, contiguous [..., columns], to q [..., columns] and scale [...], both contiguous."""
    if x.numel():
        columns = x.shape[-1]
        rows, out, along = x.view(-1, columns), q.view(-1, columns), scale.view(-1, 1)
        _launch(rows, out, along, [len(rows)], [[columns], [columns], [1]], 0, None, False)


def _launch(
    x: Tensor, q: Tensor, scale: Tensor, sizes: list[int], strides: list[list[int]], group: int, seed: Tensor | None,
    one: bool,
) -> None:  # fmt: skip
    """Lines along the last axis of x to q and scale [..., groups], or with ``one`` a scale for all."""
    length = x.shape[-1]
    lines = x.numel() // length
    groups = triton.cdiv(length, group) if group else 1
    down = length > 1 and x.stride(-1) != 1 and strides[0][-1] == 1
    row_tile, column_tile, config = _tile(x, group or length, down, bool(group))
    pad = [0] * (3 - len(sizes))
    n1, n2 = ([1, 1] + sizes)[-2:]
    ends = [t.stride(-1) for t in (x, q, scale)]
    places = [(*pad, *kept, end) for kept, end in zip(strides, ends, strict=True)]
    constants = {"AXES": min(len(sizes), 2), "ROWS": row_tile, "COLUMNS": column_tile,
                 "num_warps": config["num_warps"], "num_stages": config["num_stages"]}  # fmt: skip
    most = torch.zeros((), dtype=torch.int32, device=x.device) if one else None
    with torch.cuda.device_of(x):
        if one:
            launch(
                _largest_kernel, (triton.cdiv(lines, row_tile),), x, most, lines, length, n1, n2, *places[0], **constants
            )  # fmt: skip
        launch(
            _quantize_kernel, (triton.cdiv(lines * groups, row_tile),),
            x, q, scale, seed, most, lines, groups, length, n1, n2, *places[0], *places[1], *places[2],
            GROUP=group, DOWN=down, WHOLE=column_tile >= (group or length), **constants,
        )  # fmt: skip


def _tile(x: Tensor, length: int, down: bool, grouped: bool) -> tuple[int, int, dict[str, Any]]:
    """Units and elements of a tile, and the configuration. Whole units, or tiles of them."""
    features = frozenset(name for name, on in (("down", down), ("group", grouped)) if on)
    config = table.config(
        "quantize_int8", arch=arch_of(x.device), dtype=table.DTYPE_NAME[x.dtype], size=length, features=features
    )
    power = max(8, triton.next_power_of_2(length))
    if grouped:
        return config["elements"] // length, length, config
    if "elements" in config:
        return max(1, config["elements"] // power), power, config
    return config.get("rows", 1), min(power, config["columns"]), config


# ------------------------------------------------------------------------------------------------------- offline cases


def offline_cases() -> list[OfflineCase]:
    """Calls that reach every rule of the table: by rows, columns, groups, for all of x, and with random rounding."""
    cases: list[OfflineCase] = []
    for arch in (80, 90):
        for kind, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            for columns in sorted({rule.get("size", 65536) for rule in table.rules("quantize_int8")}):
                cases += _offline(arch, kind, dtype, columns, "", -1)
            cases += _offline(arch, kind, dtype, 4096, " random", -1, random=True)
            cases += _offline(arch, kind, dtype, 4096, " columns", 0)
            cases += _offline(arch, kind, dtype, 4096, " columns turned", 0, transpose=True)
            cases += _offline(arch, kind, dtype, 4096, " all", None)
            for group in (32, 128):
                cases += _offline(arch, kind, dtype, 4096, f" groups of {group}", -1, group)
            cases += _offline(arch, kind, dtype, 4096, " groups of 32 down columns", 0, 32)
    return cases


def _offline(arch, kind, dtype, columns, what, dim, group=0, random=False, transpose=False) -> list[OfflineCase]:
    x = torch.empty(2**26 // columns, columns, dtype=dtype, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta") if random else None
    moved = x.numel() * (x.element_size() + 1)
    with recording(arch, f"quantize_int8 {columns} {kind}{what}", bytes_moved=moved, flops=4 * x.numel()) as recorded:
        forward(x, dim, group, seed, False, transpose)
    return recorded
