"""Sums over batch, heads and length of what attention's backward leaves for a bias that they share, in fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastlm.kernels._common import launch, to_dtype
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "inner", "columns", "blocks", "outer1", "x_0", "x_1", "r_0", "r_1"])
def _sum_kernel(
    x, out, rows, inner, columns, blocks, outer1, x_0, x_1, r_0, r_1, x_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out [outer, outer1, columns]: sums over ``rows``, where row r lies at r // inner * r_0 + r % inner * r_1; in order."""
    pid = tl.program_id(0)  # one axis: the others of a grid end at 65,535
    c_1C = pid % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    outer = pid // blocks
    x += (outer // outer1).to(tl.int64) * x_0 + (outer % outer1).to(tl.int64) * x_1
    sum_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        r_R1 = first + tl.arange(0, ROWS)[:, None]
        place = (r_R1 // inner).to(tl.int64) * r_0 + (r_R1 % inner).to(tl.int64) * r_1 + c_1C * x_c
        sum_RC += tl.load(x + place, (r_R1 < rows) & (c_1C < columns), other=0.0)
    value = to_dtype(tl.sum(sum_RC, 0), out.dtype.element_ty)[None, :]
    tl.store(out + outer.to(tl.int64) * columns + c_1C, value, c_1C < columns)


def sum_to(x: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """float32 [B, H, L] summed to ``shape``, each axis whole or 1: first over L, then over batch and heads."""
    batch, heads, length = x.shape
    wide = x.device.type == "cpu"
    if shape[2] != length:
        out = torch.empty(batch, heads, 1, dtype=torch.float32, device=x.device)
        launch(
            _sum_kernel, (batch * heads,), x, out, length, 1, 1, 1, heads, heads * length, length, 1, 0, 1,
            ROWS=1024, COLUMNS=1, num_warps=4, num_stages=1,
        )  # fmt: skip
        return sum_to(out, shape, dtype)
    over_b, over_h = shape[0] != batch, shape[1] != heads
    out = torch.empty(shape, dtype=dtype, device=x.device)
    rows, inner = (batch if over_b else 1) * (heads if over_h else 1), heads if over_h else 1
    columns = 1024 if wide else 64
    blocks = triton.cdiv(length, columns)
    launch(
        _sum_kernel, (blocks * shape[0] * shape[1],),
        x, out, rows, inner, length, blocks, shape[1], heads * length, length, heads * length, length, 1,
        ROWS=16, COLUMNS=columns, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
