"""The kernel of int8_matmul; what it computes and how it is launched is told in int8_matmul.py.

Shape suffixes: M rows of the result, N its columns, K the summed axis. A tile is held as [N, K] x [K, M]: the weight is the
left operand, which a tensor core may take from registers, where int8 becomes what a floating a is; and few rows of a then
fill the short side of its instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastlm.kernels._common import INTERPRETED, rounded, to_dtype, widened
from triton.language.extra import libdevice


@triton.jit
def _exp(x):
    """e**x to the last place: tl.exp is an approximate 2**(x log2 e), whose error grows with x."""
    if INTERPRETED:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """The activation of float32 values. "gelu_tanh" is y / (1 + exp(-2 u)), which is y/2 (1 + tanh u) without its cancellation."""
    if ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return tl.div_rn(y, 1.0 + _exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    if ACTIVATION == "silu":
        return tl.div_rn(y, 1.0 + _exp(-y))
    return y


@triton.jit
def _operand(tile, kind: tl.constexpr):
    """A tile as an operand of tl.dot of dtype kind; the interpreter multiplies 16-bit values in float32."""
    if INTERPRETED and kind != tl.int8:
        return rounded(widened(tile), kind)
    return tile.to(kind)


@triton.jit
def int8_matmul_kernel(
    a, b, a_scale, b_scale, k_scale, bias, out, M, N, K, am, ak, bk, bn, sa, sg, sn, tg, tk, bias_n,
    kind: tl.constexpr, GROUP: tl.constexpr, K_GROUP: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of the result. kind: the dtype of a and of the products.

    b_scale [G, N] with steps sg, sn: multiplies each GROUP of K on its own, or with GROUP 0 the sum. k_scale [G, K] with steps
    tg, tk: multiplies a, where K_GROUP is the number of columns of the result that share a row of it, or 0. EVEN: BK divides K.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    strip = tl.program_id(0) // (STRIP * tiles_n)  # STRIP tiles down, then across: what they read stays in L2
    height = tl.minimum(tiles_m - strip * STRIP, STRIP)
    within = tl.program_id(0) - strip * (STRIP * tiles_n)
    first_m = (strip * STRIP + within % height) * BM
    first_n = within // height * BN
    row_M = first_m + tl.arange(0, BM)
    column_N = first_n + tl.arange(0, BN)
    inside_M = tl.minimum(row_M, M - 1).to(tl.int64)  # what is read beyond the edge is not written
    inside_N = tl.minimum(column_N, N - 1).to(tl.int64)
    k_K = tl.arange(0, BK)
    a_KM = a + (inside_M * am)[None, :] + (k_K.to(tl.int64) * ak)[:, None]
    b_NK = b + (inside_N * bn)[:, None] + (k_K.to(tl.int64) * bk)[None, :]
    a_step = tl.full([], BK, tl.int64) * ak
    b_step = tl.full([], BK, tl.int64) * bk
    acc_NM = tl.zeros([BN, BM], tl.int32 if kind == tl.int8 else tl.float32)
    for first in range(0, K, BK):
        if EVEN:
            x_KM = tl.load(a_KM)
            w_NK = tl.load(b_NK)
        else:
            x_KM = tl.load(a_KM, (first + k_K < K)[:, None], other=0)
            w_NK = tl.load(b_NK, (first + k_K < K)[None, :], other=0)
        if k_scale is not None:
            place_K = k_scale + (first + k_K).to(tl.int64) * tk
            if K_GROUP:
                place_K += (first_n // K_GROUP).to(tl.int64) * tg
            scale_K = tl.load(place_K, first + k_K < K, other=0.0)
            v_KM = widened(x_KM) * scale_K[:, None]
            if kind == tl.float32:
                acc_NM = tl.dot(_operand(w_NK, kind), v_KM, acc_NM, input_precision="tf32x3")
            else:  # in two parts, with which sixteen bits of the scaled value count
                high_KM = rounded(v_KM, tl.bfloat16)
                w_NK = _operand(w_NK, tl.bfloat16)
                acc_NM = tl.dot(w_NK, _operand(high_KM, tl.bfloat16), acc_NM)
                acc_NM = tl.dot(w_NK, _operand(v_KM - high_KM, tl.bfloat16), acc_NM)
        elif GROUP:
            part_NM = tl.dot(_operand(w_NK, kind), _operand(x_KM, kind), input_precision="tf32x3")
            group = tl.full([], 0, tl.int64) + first // GROUP
            scale_N = tl.load(b_scale + group * sg + inside_N * sn)
            acc_NM += part_NM * scale_N[:, None]
        elif kind == tl.int8:
            acc_NM = tl.dot(w_NK, x_KM, acc_NM, out_dtype=tl.int32)
        else:
            acc_NM = tl.dot(_operand(w_NK, kind), _operand(x_KM, kind), acc_NM, input_precision="tf32x3")
        a_KM += a_step
        b_NK += b_step
    ok_NM = (column_N < N)[:, None] & (row_M < M)[None, :]
    out_NM = out + (row_M.to(tl.int64) * N)[None, :] + column_N[:, None]
    if out.dtype.element_ty == tl.int32:
        tl.store(out_NM, acc_NM, ok_NM)
    else:
        y_NM = acc_NM.to(tl.float32)
        if a_scale is not None:
            y_NM = y_NM * tl.load(a_scale + inside_M * sa)[None, :]
        if b_scale is not None and GROUP == 0:
            y_NM = y_NM * tl.load(b_scale + inside_N * sn)[:, None]
        if bias is not None:
            y_NM = y_NM + widened(tl.load(bias + inside_N * bias_n))[:, None]
        tl.store(out_NM, to_dtype(activated(y_NM, ACTIVATION), out.dtype.element_ty), ok_NM)
