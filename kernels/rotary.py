"""Rotary positions in Triton: pairs of channels turned by the angle of their position, forward and backward alike.

    y_first = x_first * c - x_second * s        y_second = x_second * c + x_first * s

c, s from row p of the tables cos and sin [positions, half], p the position of the row; pairs (i, i + half), or interleaved
(2i, 2i + 1); channels behind 2 half are copied. The gradient of x is the inverse rotation (s negated) of y's.

Bytes moved per element, at e bytes each: x read and y written once (2e); the tables' rows come from cache, since the
heads of one position are neighbours. Flops per element: 3. Bound by memory on every GPU.

A program turns ROWS rows, numbered (batch, position, head), each held whole. Any strides. Shape suffixes: R rows of a
tile, C pairs of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastlm.backend import YES, Support
from fastlm.kernels import table as configurations
from fastlm.kernels._common import OfflineCase, arch_of, launch, recording, to_dtype
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ the one kernel


@triton.jit(do_not_specialize=["rows", "heads", "length", "table", "pb", "pl"])
def _rotary_kernel(
    x, cos, sin, positions, out, rows, heads, length, half, size, table, xb, xh, xl, xd, ob, oh, ol, od, pb, pl,
    EACH: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """ROWS rows; PAIRS: the power of two at or above half; REST: that at or above what is copied, or 0."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok_R = row_R < rows
    head_R = row_R % heads
    l_R = (row_R // heads) % length
    b_R = row_R // heads // length
    place_R = l_R
    if positions is not None:
        if EACH:
            place_R = tl.load(positions + b_R * pb + l_R * pl, row_ok_R, other=0)
        else:
            place_R = tl.load(positions + b_R * pb, row_ok_R, other=0) + l_R
        place_R = tl.minimum(tl.maximum(place_R, 0), table - 1)  # no index may lead outside the tables
    pair_1C = tl.arange(0, PAIRS)[None, :]
    ok_RC = row_ok_R[:, None] & (pair_1C < half)
    angle_RC = place_R[:, None] * half + pair_1C
    c_RC = tl.load(cos + angle_RC, ok_RC, other=0.0)
    s_RC = tl.load(sin + angle_RC, ok_RC, other=0.0)
    if INVERSE:
        s_RC = -s_RC
    x_R1 = (b_R * xb + head_R * xh + l_R * xl)[:, None]
    out_R1 = (b_R * ob + head_R * oh + l_R * ol)[:, None]
    if INTERLEAVED:
        channel_1C = tl.arange(0, 2 * PAIRS)[None, :]
        both_ok_RC = row_ok_R[:, None] & (channel_1C < 2 * half)
        both_RC = tl.load(x + x_R1 + channel_1C * xd, both_ok_RC, other=0.0).to(tl.float32)
        first_RC, second_RC = tl.split(tl.reshape(both_RC, (ROWS, PAIRS, 2)))
        turned_RC = tl.reshape(
            tl.join(first_RC * c_RC - second_RC * s_RC, second_RC * c_RC + first_RC * s_RC), (ROWS, 2 * PAIRS)
        )
        tl.store(out + out_R1 + channel_1C * od, to_dtype(turned_RC, out.dtype.element_ty), both_ok_RC)
    else:
        first_RC = tl.load(x + x_R1 + pair_1C * xd, ok_RC, other=0.0).to(tl.float32)
        second_RC = tl.load(x + x_R1 + (pair_1C + half) * xd, ok_RC, other=0.0).to(tl.float32)
        y_RC = first_RC * c_RC - second_RC * s_RC
        tl.store(out + out_R1 + pair_1C * od, to_dtype(y_RC, out.dtype.element_ty), ok_RC)
        y_RC = second_RC * c_RC + first_RC * s_RC
        tl.store(out + out_R1 + (pair_1C + half) * od, to_dtype(y_RC, out.dtype.element_ty), ok_RC)
    if REST:
        rest_1C = 2 * half + tl.arange(0, REST)[None, :]
        rest_ok_RC = row_ok_R[:, None] & (rest_1C < size)
        tl.store(out + out_R1 + rest_1C * od, tl.load(x + x_R1 + rest_1C * xd, rest_ok_RC, other=0.0), rest_ok_RC)


# ----------------------------------------------------------------------------------------------------------- launchers


def serves_forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Support:
    """float32, bfloat16 and float16 with float32 tables, any strides."""
    if x.dtype not in configurations.DTYPE_NAME or cos.dtype != torch.float32:
        given = f"{x.dtype} with a table of {cos.dtype}".replace("torch.", "")
        return Support(False, f"the triton kernel takes float32, bfloat16 and float16 with float32 tables, not {given}")
    if x.device.type == "cuda" and arch_of(x.device) < 80:
        return Support(
            False, f"the triton kernels need compute capability 8.0; {x.device} has {arch_of(x.device) / 10}"
        )
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return Support(True, "element by element: the last stride is not 1")
    return YES


serves_backward = serves_forward


def forward(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    """As ``fastlm.reference.rotary.forward``."""
    out = torch.empty_like(x)
    if not x.numel():
        return out
    batch, heads, length, size = x.shape
    half = cos.shape[1]
    config = configurations.config(
        "rotary", arch=arch_of(x.device), dtype=configurations.DTYPE_NAME[x.dtype], size=size
    )
    pairs = triton.next_power_of_2(half)
    tile = max(1, config["elements"] // (2 * pairs))
    rows = batch * heads * length
    steps = (0, 0) if positions is None else (*positions.stride(), 0, 0)[:2]
    with torch.cuda.device_of(x):
        launch(
            _rotary_kernel, (triton.cdiv(rows, tile),),
            *(x, cos, sin, positions, out, rows, heads, length, half, size, cos.shape[0], *x.stride(), *out.stride()),
            *steps, EACH=positions is not None and positions.dim() == 2, INTERLEAVED=interleaved, INVERSE=inverse,
            ROWS=tile, PAIRS=pairs, REST=triton.next_power_of_2(size - 2 * half) if size > 2 * half else 0,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return out


def backward(
    dout: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    """As ``fastlm.reference.rotary.backward``."""
    return forward(dout, cos, sin, positions, interleaved, not inverse)


# ------------------------------------------------------------------------------------------------------- offline cases


def offline_cases() -> list[OfflineCase]:
    """Head sizes 64 and 128, both pairings, without and with positions; one partial rotation."""
    cases: list[OfflineCase] = []
    kinds = [("bf16", torch.bfloat16, size, pairing) for size in (64, 128) for pairing in (False, True)]
    kinds += [("f32", torch.float32, 128, pairing) for pairing in (False, True)]
    for arch in (80, 90):
        for kind, dtype, size, interleaved in kinds:
            for partial in (False, True):
                x = torch.empty(8, 4096, 16, size, dtype=dtype, device="meta").transpose(1, 2)
                table = torch.empty(4096, size // (4 if partial else 2), device="meta")
                positions = torch.empty(8, 4096, dtype=torch.int64, device="meta") if partial else None
                name = f"rotary {size} {kind}{' interleaved' if interleaved else ''}{' partial' if partial else ''}"
                moved = 2 * x.numel() * x.element_size() + 2 * table.numel() * 4
                with recording(arch, name, bytes_moved=moved, flops=3 * x.numel()) as recorded:
                    forward(x, table, table, positions, interleaved, False)
                cases += recorded
    return cases
