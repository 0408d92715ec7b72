"""Attention's backward in Triton: one kernel for dk and dv, one for dq, no atomics, every sum in a fixed order.

    D = sum_D(dout * out) - dlse;  p = exp(s - lse - rest);  dp = dout v^T * keep * keep_scale;  ds = p * (dp - D)
    dv = (p * keep)^T dout * keep_scale;  dx = ds * (1 - tanh^2);  dk = scale * dx^T q;  dq = scale * dx k;  dbias = ds
    dsink = -exp(sink - lse - rest) * D, summed over batch and queries

dk and dv: a program owns N keys of one key head and walks over the queries of every head of its group, with transposed
scores, which are then the left operands of both products without leaving the registers. dq: a program owns M queries. Seven
products where one pass would need five; that pass would need atomics or an ordered semaphore for dq.

dbias: where the bias differs in query and key and no axis is summed, dq's kernel writes it; where batch or heads are summed,
``_bias_kernel`` computes each tile's scores again and adds them up in order; where queries are summed, the keys' kernel
keeps a sum a key and head, where keys are summed, dq's kernel a sum a query and head, and ``sum_to`` adds these in
order. Nothing is ever expanded. Shape suffixes: M queries of a tile, N keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastlm.kernels._attention_sums import sum_to
from fastlm.kernels._attention_tiles import (
    CALL_INTS,
    LOG2E,
    LOG2E_LOW,
    Call,
    batch_word,
    kept_tile,
    lengths,
    load_tile,
    operand,
    score,
    tiles,
)
from fastlm.kernels._common import TL_DTYPE, launch, to_dtype
from fastlm.reference.attention import Options, sinks_alone
from torch import Tensor

_STRIDES = "q_b q_h q_l q_d k_b k_h k_l k_d v_b v_h v_l v_d g_b g_h g_l g_d l_b l_h"
_INTS = f"{CALL_INTS} {_STRIDES} x_b x_h x_l x_d y_b y_h y_l y_d s_b s_h s_q s_k n_h reduce reduce_h"
_DELTA_INTS = "heads rows size blocks g_b g_h g_l g_d o_b o_h o_l o_d l_b l_h"


@triton.jit(do_not_specialize=_DELTA_INTS.split())
def _delta_kernel(
    dout, out, lse, rest, dlse, sinks, delta, sunk, heads, rows, size, blocks, g_b, g_h, g_l, g_d, o_b, o_h, o_l, o_d, l_b, l_h,
    VEC: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """D of each row, and what it gives to its sink; 0 of one that sees nothing, whatever its gradients are: its probabilities are 0, and 0 * inf is not."""
    pid = tl.program_id(0)
    i_M = pid % blocks * M + tl.arange(0, M)
    ok_M = i_M < rows
    head = (pid // blocks % heads).to(tl.int64)
    b = (pid // blocks // heads).to(tl.int64)
    g = dout + (b * g_b + head * g_h) * VEC
    o = out + (b * o_b + head * o_h) * VEC
    g_MD = load_tile(g, i_M, ok_M, g_l, g_d, size, tl.float32, UNIT, VEC, EVEN, DIM)
    o_MD = load_tile(o, i_M, ok_M, o_l, o_d, size, tl.float32, UNIT, VEC, EVEN, DIM)
    sum_M = tl.sum(g_MD * o_MD, 1)
    place = b * l_b + head * l_h + i_M
    if dlse is not None:
        sum_M = sum_M - tl.load(dlse + place, ok_M, other=0.0).to(tl.float32)
    lse_M = tl.load(lse + place, ok_M, other=float("-inf"))
    none_M = lse_M == float("-inf")
    sum_M = tl.where(none_M, 0.0, sum_M)
    tl.store(delta + place, sum_M, ok_M)
    if sinks is not None:
        above_M = (tl.load(sinks + head) - tl.where(none_M, 0.0, lse_M)) - tl.load(rest + place, ok_M, other=0.0)
        tl.store(sunk + place, tl.where(none_M, 0.0, -tl.exp2(above_M * LOG2E) * sum_M), ok_M)


@triton.jit
def _gradient(
    left, over, right, under, i, j, ok_i, lse, rest, delta, tile, head_word, batch, bias, bias_q, bias_k, slope, seed, base,
    len_k, window_left, window_right, chunk0, q0, threshold, scale, c, cap_scale, softcap, keep_scale,
    DOWN: tl.constexpr, MASKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, DROPOUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(kept probabilities, ds, ds before softcap) of a tile: scores left right^T, gradient of probabilities over under^T.

    DOWN: the rows are keys: left k, over v, right q, under dout; else the rows are queries and the pairs change sides.
    ``i``, ``lse``, ``rest``, ``delta`` and ``ok_i`` are shaped along the queries, ``j`` along the keys.
    """
    x = tl.dot(left, tl.trans(right), input_precision="ieee")
    x, t = score(
        x, i, j, ok_i, bias, bias_q, bias_k, slope, base, len_k, window_left, window_right,
        scale, cap_scale, softcap, MASKED, NATURAL, SOFTCAP, LEFT, RIGHT, BIAS,
    )  # fmt: skip
    dp = tl.dot(over, tl.trans(under), input_precision="ieee")
    lse = tl.where(lse == float("inf"), float("nan"), lse)  # a score of inf leaves no probabilities
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that sees nothing
    if NATURAL:
        # A score of 1e9 and more that is summed in another order than the forward's may pass lse by more than exp2 takes.
        p = tl.exp2(tl.minimum(((x - lse) - rest) * LOG2E, 0.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        high = lse * LOG2E
        low = tl.where(tl.abs(lse) < float("inf"), tl.fma(lse, LOG2E, -high) + lse * LOG2E_LOW, 0.0) + rest * LOG2E
        p = tl.exp2((x * c - high) - low)
    used = p
    if DROPOUT:
        kept = kept_tile(seed, batch, head_word, i, tile, chunk0, q0, threshold, DOWN, M, N)
        used = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    dx = ds
    if SOFTCAP:
        dx = ds * (1.0 - t * t)
    return used, dx, ds


@triton.jit(do_not_specialize=_INTS.split())
def _keys_kernel(
    q, k, v, g, lse, rest, delta, dk, dv, sums, bias, slopes, seed, batch_ids, cu_q, cu_k, seqlens,
    heads, group, rows, keys, longest_q, longest_k, size, size_v, blocks, bias_b, bias_h, bias_q, bias_k, slope_b,
    base, left, right, head0, q0, chunk0, lead, threshold, scale, unit, cap_scale, softcap, keep_scale,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, g_b, g_h, g_l, g_d, l_b, l_h,
    x_b, x_h, x_l, x_d, y_b, y_h, y_l, y_d,
    SHIFT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, EVEN_V: tl.constexpr, DIM_V: tl.constexpr, DTYPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys; ``sums`` [B, heads, keys]: of ds over the queries, or None."""
    pid = tl.program_id(0)
    tile = pid % blocks
    kv_heads = heads // group
    kv = pid // blocks % kv_heads
    b = pid // blocks // kv_heads
    start_q, len_q, start_k, len_k = lengths(cu_q, cu_k, seqlens, b, rows, keys, longest_q, longest_k)
    n0 = tile * N - lead
    j_N = n0 + tl.arange(0, N)
    ok_N = (j_N >= 0) & (j_N < len_k)
    stored_N = ok_N
    if cu_q is None:
        stored_N = (j_N >= 0) & (j_N < keys)
    elif n0 >= len_k:
        return
    if SHIFT:
        base += len_k - len_q
    b64 = b.to(tl.int64)
    kv64 = kv.to(tl.int64)
    k += (b64 * k_b + kv64 * k_h + start_k.to(tl.int64) * k_l) * VEC
    v += (b64 * v_b + kv64 * v_h + start_k.to(tl.int64) * v_l) * VEC
    k_ND = load_tile(k, j_N, ok_N, k_l, k_d, size, DTYPE, UNIT, VEC, EVEN, DIM)
    v_ND = load_tile(v, j_N, ok_N, v_l, v_d, size_v, DTYPE, UNIT, VEC, EVEN_V, DIM_V)
    batch = batch_word(batch_ids, b)
    c = unit * LOG2E
    last_j = tl.minimum(n0 + N, len_k) - 1
    edge = (n0 < 0) | (n0 + N > len_k)
    first, count, whole0, whole = tiles(tl.maximum(n0, 0), last_j, -base, right, left, len_q, 0, edge, RIGHT, LEFT, M)
    if n0 >= len_k:
        count = 0
        whole = 0
    dk_ND = tl.zeros([N, DIM], tl.float32)
    dv_ND = tl.zeros([N, DIM_V], tl.float32)
    for number in range(0, group):
        head = kv * group + number
        head64 = head.to(tl.int64)
        qh = q + (b64 * q_b + head64 * q_h + start_q.to(tl.int64) * q_l) * VEC
        gh = g + (b64 * g_b + head64 * g_h + start_q.to(tl.int64) * g_l) * VEC
        row = b64 * l_b + head64 * l_h + start_q
        biash = bias
        if BIAS >= 0:
            biash = bias + (b64 * bias_b + head64 * bias_h)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + b64 * slope_b + head)
        head_word = (head0 + head).to(tl.uint32)
        db_N = tl.zeros([N], tl.float32)
        for MASKED in tl.static_range(
            2
        ):  # the tiles that see all of these keys, then the others, on both sides of them
            begin = first if MASKED else whole0
            for t in range(0, count - whole if MASKED else whole):
                block = begin + t
                if MASKED:
                    block += tl.where(t < whole0 - first, 0, whole)
                i_M = block * M + tl.arange(0, M)
                ok_M = i_M < len_q
                q_MD = load_tile(qh, i_M, ok_M, q_l, q_d, size, DTYPE, UNIT, VEC, EVEN, DIM)
                g_MD = load_tile(gh, i_M, ok_M, g_l, g_d, size_v, DTYPE, UNIT, VEC, EVEN_V, DIM_V)
                lse_1M = tl.load(lse + row + i_M, ok_M, other=float("-inf"))[None, :]
                rest_1M = tl.load(rest + row + i_M, ok_M, other=0.0)[None, :]
                delta_1M = tl.load(delta + row + i_M, ok_M, other=0.0)[None, :]
                used_NM, dx_NM, ds_NM = _gradient(
                    k_ND, v_ND, q_MD, g_MD, i_M[None, :], j_N[:, None], ok_M[None, :], lse_1M, rest_1M, delta_1M, tile, head_word,
                    batch, biash, bias_q, bias_k, slope, seed, base, len_k, left, right, chunk0, q0, threshold, scale, c,
                    cap_scale, softcap, keep_scale, True, MASKED, LEFT, RIGHT, BIAS, SOFTCAP, NATURAL, DROPOUT, M, N,
                )  # fmt: skip
                dv_ND = tl.dot(operand(used_NM, DTYPE), g_MD, dv_ND, input_precision="ieee")
                if sums is not None:
                    db_N += tl.sum(ds_NM, 1)
                dk_ND = tl.dot(operand(dx_NM, DTYPE), q_MD, dk_ND, input_precision="ieee")
        if sums is not None:
            tl.store(sums + (b64 * heads + head) * keys + j_N, tl.where(ok_N, db_N, 0.0), stored_N)
    d_1D = tl.arange(0, DIM)[None, :]
    ok_ND = stored_N[:, None] & (d_1D < size * VEC)
    start64 = start_k.to(tl.int64)
    x_ND = (b64 * x_b + kv64 * x_h + (start64 + j_N)[:, None] * x_l) * VEC + (d_1D if UNIT else d_1D.to(tl.int64) * x_d)
    e_1D = tl.arange(0, DIM_V)[None, :]
    y_ND = (b64 * y_b + kv64 * y_h + (start64 + j_N)[:, None] * y_l) * VEC + (e_1D if UNIT else e_1D.to(tl.int64) * y_d)
    dk_ND = tl.where(ok_N[:, None], dk_ND * scale, 0.0)
    dv_ND = tl.where(ok_N[:, None], dv_ND * keep_scale, 0.0)
    tl.store(dk + x_ND, to_dtype(dk_ND, dk.dtype.element_ty), ok_ND)
    tl.store(dv + y_ND, to_dtype(dv_ND, dv.dtype.element_ty), stored_N[:, None] & (e_1D < size_v * VEC))


@triton.jit(do_not_specialize=_INTS.split())
def _queries_kernel(
    q, k, v, g, lse, rest, delta, dq, sums, whole_bias, bias, slopes, seed, batch_ids, cu_q, cu_k, seqlens,
    heads, group, rows, keys, longest_q, longest_k, size, size_v, blocks, bias_b, bias_h, bias_q, bias_k, slope_b,
    base, left, right, head0, q0, chunk0, lead, threshold, scale, unit, cap_scale, softcap, keep_scale,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, g_b, g_h, g_l, g_d, l_b, l_h,
    x_b, x_h, x_l, x_d, s_b, s_h, s_q, s_k,
    SHIFT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, EVEN_V: tl.constexpr, DIM_V: tl.constexpr, DTYPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries; ``sums`` [B, heads, queries]: of ds over the keys; ``whole_bias``: ds itself; or None."""
    pid = tl.program_id(0)
    block = pid % blocks
    if RIGHT:
        block = blocks - 1 - block
    head = pid // blocks % heads
    b = pid // blocks // heads
    kv = head // group
    start_q, len_q, start_k, len_k = lengths(cu_q, cu_k, seqlens, b, rows, keys, longest_q, longest_k)
    first_i = block * M
    if first_i >= len_q:
        return
    if SHIFT:
        base += len_k - len_q
    i_M = first_i + tl.arange(0, M)
    ok_M = i_M < len_q
    b64 = b.to(tl.int64)
    head64 = head.to(tl.int64)
    start64 = start_q.to(tl.int64)
    q += (b64 * q_b + head64 * q_h + start64 * q_l) * VEC
    g += (b64 * g_b + head64 * g_h + start64 * g_l) * VEC
    k += (b64 * k_b + kv.to(tl.int64) * k_h + start_k.to(tl.int64) * k_l) * VEC
    v += (b64 * v_b + kv.to(tl.int64) * v_h + start_k.to(tl.int64) * v_l) * VEC
    row_M = b64 * l_b + head64 * l_h + start_q + i_M
    q_MD = load_tile(q, i_M, ok_M, q_l, q_d, size, DTYPE, UNIT, VEC, EVEN, DIM)
    g_MD = load_tile(g, i_M, ok_M, g_l, g_d, size_v, DTYPE, UNIT, VEC, EVEN_V, DIM_V)
    lse_M = tl.load(lse + row_M, ok_M, other=float("-inf"))
    rest_M = tl.load(rest + row_M, ok_M, other=0.0)
    delta_M = tl.load(delta + row_M, ok_M, other=0.0)
    if BIAS >= 0:
        bias += b64 * bias_b + head64 * bias_h
    if whole_bias is not None:
        whole_bias += b64 * s_b + head64 * s_h
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + b64 * slope_b + head)
    batch = batch_word(batch_ids, b)
    head_word = (head0 + head).to(tl.uint32)
    c = unit * LOG2E
    last_i = tl.minimum(first_i + M, len_q) - 1
    first, count, whole0, whole = tiles(
        first_i, last_i, base, left, right, len_k, lead, first_i + M > len_q, LEFT, RIGHT, N
    )
    dq_MD = tl.zeros([M, DIM], tl.float32)
    db_M = tl.zeros([M], tl.float32)
    for MASKED in tl.static_range(2):
        begin = first if MASKED else whole0
        for t in range(0, count - whole if MASKED else whole):
            tile = begin + t
            if MASKED:
                tile += tl.where(t < whole0 - first, 0, whole)
            j_N = tile * N - lead + tl.arange(0, N)
            ok_N = (j_N >= 0) & (j_N < len_k)
            k_ND = load_tile(k, j_N, ok_N, k_l, k_d, size, DTYPE, UNIT, VEC, EVEN, DIM)
            v_ND = load_tile(v, j_N, ok_N, v_l, v_d, size_v, DTYPE, UNIT, VEC, EVEN_V, DIM_V)
            _, dx_MN, ds_MN = _gradient(
                q_MD, g_MD, k_ND, v_ND, i_M[:, None], j_N[None, :], ok_M[:, None], lse_M[:, None], rest_M[:, None],
                delta_M[:, None], tile,
                head_word, batch, bias, bias_q, bias_k, slope, seed, base, len_k, left, right, chunk0, q0, threshold,
                scale, c, cap_scale, softcap, keep_scale, False, MASKED, LEFT, RIGHT, BIAS, SOFTCAP, NATURAL, DROPOUT, M, N,
            )  # fmt: skip
            if sums is not None:
                db_M += tl.sum(ds_MN, 1)
            if whole_bias is not None:
                place = whole_bias + i_M.to(tl.int64)[:, None] * s_q + j_N.to(tl.int64)[None, :] * s_k
                tl.store(place, to_dtype(ds_MN, whole_bias.dtype.element_ty), ok_M[:, None] & ok_N[None, :])
            dq_MD = tl.dot(operand(dx_MN, DTYPE), k_ND, dq_MD, input_precision="ieee")
    if sums is not None:
        tl.store(sums + (b64 * heads + head) * rows + i_M, db_M, ok_M)
    d_1D = tl.arange(0, DIM)[None, :]
    x_MD = (b64 * x_b + head64 * x_h + (start64 + i_M)[:, None] * x_l) * VEC + (
        d_1D if UNIT else d_1D.to(tl.int64) * x_d
    )
    tl.store(dq + x_MD, to_dtype(dq_MD * scale, dq.dtype.element_ty), ok_M[:, None] & (d_1D < size * VEC))


@triton.jit(do_not_specialize=_INTS.split())
def _bias_kernel(
    q, k, v, g, lse, rest, delta, dbias, bias, slopes, seed, batch_ids, cu_q, cu_k, seqlens,
    heads, group, rows, keys, longest_q, longest_k, size, size_v, blocks, bias_b, bias_h, bias_q, bias_k, slope_b,
    base, left, right, head0, q0, chunk0, lead, threshold, scale, unit, cap_scale, softcap, keep_scale,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, g_b, g_h, g_l, g_d, l_b, l_h,
    s_b, s_h, s_q, s_k, n_h, reduce, reduce_h,
    SHIFT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, EVEN_V: tl.constexpr, DIM_V: tl.constexpr, DTYPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of a bias that batch or heads share: ds of each, added in order.

    ``n_h`` heads of dbias; ``reduce`` pairs of batch and head are added, ``reduce_h`` heads of each batch.
    """
    pid = tl.program_id(0)
    row_blocks = (rows + M - 1) // M
    i_M = pid % row_blocks * M + tl.arange(0, M)
    tile = pid // row_blocks % blocks
    to_h = pid // row_blocks // blocks % n_h
    to_b = pid // row_blocks // blocks // n_h
    ok_M = i_M < rows
    j_N = tile * N - lead + tl.arange(0, N)
    c = unit * LOG2E
    sum_MN = tl.zeros([M, N], tl.float32)
    for r in range(0, reduce):
        b = to_b + r // reduce_h
        head = to_h + r % reduce_h
        b64 = b.to(tl.int64)
        head64 = head.to(tl.int64)
        kv64 = (head // group).to(tl.int64)
        _, len_q, _, len_k = lengths(cu_q, cu_k, seqlens, b, rows, keys, longest_q, longest_k)
        here = base
        if SHIFT:
            here = base + len_k - len_q
        ok_N = (j_N >= 0) & (j_N < len_k)
        qh = q + (b64 * q_b + head64 * q_h) * VEC
        gh = g + (b64 * g_b + head64 * g_h) * VEC
        kh = k + (b64 * k_b + kv64 * k_h) * VEC
        vh = v + (b64 * v_b + kv64 * v_h) * VEC
        row_M = b64 * l_b + head64 * l_h + i_M
        lse_M = tl.load(lse + row_M, ok_M, other=float("-inf"))
        rest_M = tl.load(rest + row_M, ok_M, other=0.0)
        delta_M = tl.load(delta + row_M, ok_M, other=0.0)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + b64 * slope_b + head)
        q_MD = load_tile(qh, i_M, ok_M, q_l, q_d, size, DTYPE, UNIT, VEC, EVEN, DIM)
        k_ND = load_tile(kh, j_N, ok_N, k_l, k_d, size, DTYPE, UNIT, VEC, EVEN, DIM)
        g_MD = load_tile(gh, i_M, ok_M, g_l, g_d, size_v, DTYPE, UNIT, VEC, EVEN_V, DIM_V)
        v_ND = load_tile(vh, j_N, ok_N, v_l, v_d, size_v, DTYPE, UNIT, VEC, EVEN_V, DIM_V)
        _, _, ds_MN = _gradient(
            q_MD, g_MD, k_ND, v_ND, i_M[:, None], j_N[None, :], ok_M[:, None], lse_M[:, None], rest_M[:, None],
            delta_M[:, None], tile,
            (head0 + head).to(tl.uint32), batch_word(batch_ids, b), bias + (b64 * bias_b + head64 * bias_h), bias_q, bias_k,
            slope, seed, here, len_k, left, right, chunk0, q0, threshold, scale, c, cap_scale, softcap, keep_scale,
            False, True, LEFT, RIGHT, BIAS, SOFTCAP, NATURAL, DROPOUT, M, N,
        )  # fmt: skip
        sum_MN += ds_MN
    place = dbias + to_b.to(tl.int64) * s_b + to_h.to(tl.int64) * s_h
    place = place + i_M.to(tl.int64)[:, None] * s_q + j_N.to(tl.int64)[None, :] * s_k
    ok_MN = ok_M[:, None] & ((j_N >= 0) & (j_N < keys))[None, :]
    tl.store(place, to_dtype(sum_MN, dbias.dtype.element_ty), ok_MN)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``fastlm.kernels.attention.backward``."""
    *options_, need_dbias, dbias_shape = options
    bias, sinks = Options.of(options).bias, Options.of(options).sinks
    packed = Options.of(options).cu_seqlens_q is not None
    make = torch.zeros_like if packed else torch.empty_like
    dq, dk, dv = make(q), make(k), make(v)
    if q.numel() == 0 or k.numel() == 0:
        dbias = torch.zeros(dbias_shape, dtype=bias.dtype, device=q.device) if need_dbias and bias is not None else None
        dbias = q.new_empty(0) if dbias is None else dbias
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, sinks_alone(q, dlse, sinks)
    call = Call(q, k, v, [q, k, v, dout, out, dq, dk, dv], *options_)
    if call.longest_q == 0 or call.longest_k == 0:
        return dq, dk, dv, q.new_empty(0), sinks_alone(q, dlse if call.longest_q else None, sinks)
    lse, rest = lse.contiguous(), rest.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    sunk = None if sinks is None else torch.empty_like(lse)
    rows = (0, lse.stride(0)) if packed else (lse.stride(0), lse.stride(1))
    # How the gradient of the bias is found.
    dbias, sums_q, sums_k, whole, shared = q.new_empty(0), None, None, None, False
    if need_dbias:
        assert bias is not None
        full = list(bias.shape)
        summed = [a != b for a, b in zip(dbias_shape, full, strict=True)]
        if summed[3]:
            sums_q = torch.empty(*full[:3], dtype=torch.float32, device=q.device)
        elif summed[2]:
            sums_k = torch.empty(full[0], full[1], full[3], dtype=torch.float32, device=q.device)
        elif summed[0] or summed[1]:
            shared = True
            dbias = torch.empty(dbias_shape, dtype=bias.dtype, device=q.device)
        else:
            whole = dbias = torch.zeros(dbias_shape, dtype=bias.dtype, device=q.device)
    inputs = (q, k, v, dout, lse, rest, delta)
    strides = (*(s for t in (q, k, v, dout) for s in call.strides(t)), *rows)
    constants = {**call.constants, "DTYPE": TL_DTYPE[q.dtype]}

    def options_of(kernel: str) -> tuple[int, int, dict[str, Any]]:
        config = call.config(kernel)
        tile = {
            "M": config["m"],
            "N": config["n"],
            "num_warps": config["num_warps"],
            "num_stages": config["num_stages"],
        }
        return config["m"], config["n"], constants | tile

    with torch.cuda.device_of(q):
        tile = 64 if q.device.type != "cpu" else 256
        blocks = triton.cdiv(call.rows, tile)
        launch(
            _delta_kernel, (blocks * call.heads * (1 if packed else call.batch),),
            dout, out, lse, rest, dlse, sinks, delta, sunk, call.heads, call.rows, v.shape[-1] // call.vec, blocks, *call.strides(dout), *call.strides(out), *rows,
            VEC=call.vec, UNIT=call.unit, EVEN=call.constants["EVEN_V"], DIM=call.dim_v, M=tile, num_warps=4, num_stages=1,
        )  # fmt: skip
        _, n, chosen = options_of("attention_backward_kv")
        blocks = triton.cdiv(call.longest_k + call.lead, n)
        launch(
            _keys_kernel, (blocks * call.kv_heads * call.batch,),
            *inputs, dk, dv, sums_k, *call.pointers, *call.scalars(blocks), *strides, *call.strides(dk), *call.strides(dv),
            **chosen,
        )  # fmt: skip
        m, n, chosen = options_of("attention_backward_q")
        blocks = triton.cdiv(call.longest_q, m)
        launch(
            _queries_kernel, (blocks * call.heads * call.batch,),
            *inputs, dq, sums_q, whole, *call.pointers, *call.scalars(blocks), *strides, *call.strides(dq),
            *((0, 0, 0, 0) if whole is None else whole.stride()),
            **chosen,
        )  # fmt: skip
        if shared:
            blocks = triton.cdiv(call.keys + call.lead, n)
            reduce_h = call.heads if summed[1] else 1
            launch(
                _bias_kernel, (triton.cdiv(call.rows, m) * blocks * dbias_shape[0] * dbias_shape[1],),
                *inputs, dbias, *call.pointers, *call.scalars(blocks), *strides, *dbias.stride(), dbias_shape[1],
                (call.batch if summed[0] else 1) * reduce_h, reduce_h,
                **chosen,
            )  # fmt: skip
        for sums, kept in ((sums_q, dbias_shape[2:3]), (sums_k, dbias_shape[3:])):
            if sums is not None:
                assert bias is not None
                dbias = sum_to(sums, (dbias_shape[0], dbias_shape[1], kept[0]), bias.dtype).view(dbias_shape)
    dsinks = q.new_empty(0)
    if sunk is not None and sinks is not None:
        sunk = sunk.view(1, *sunk.shape) if packed else sunk
        dsinks = sum_to(sunk, (1, call.heads, 1), sinks.dtype).view(-1)
    return dq, dk, dv, dbias, dsinks
