"""Attention in Triton: online softmax forward, split over the keys for decoding; the backward is _attention_backward.py.

    s = scale * q k^T;  softcap > 0: s = softcap * tanh(s / softcap);  s += bias - slope * |distance|;  hidden: -inf
    lse = log(exp(sink) + sum(exp(s)));  out = (exp(s - lse) * keep * keep_scale) v;  rest = what rounding took from lse

Bytes, at e an element: forward reads q, k, v and writes out, e * (2 Lq Hq + 2 Lk Hkv) * D * B, and lse; each block of
queries reads the keys again, mostly from L2. Flops 4 B Hq Lq Lk D forward, halved when causal; a backward in two kernels
does seven products where the convention counts five. Per score: two or three additions, one exp2, and 9/8 of a Philox
round's multiplication pair with dropout. float32 inputs use IEEE products (no TF32), which run on the plain float32 units,
at a tenth of the tensor cores' rate or less: that is the price of float32's exactness.

A program owns M queries of one head and walks over tiles of N keys, those hidden by causality, window or lengths left out;
tiles wholly visible skip the mask. Where Lq is small (decoding) the queries of all heads of a group make one tile, and the
keys are cut into pieces whose size follows from the shape alone; ``_combine_kernel`` merges the pieces in order. Lengths
are read on the device, so that one CUDA graph decodes many tokens. Where k0 is no multiple of eight the tiles of keys are
moved so that they start where a random number does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastlm.backend import YES, Support
from fastlm.kernels import _attention_backward
from fastlm.kernels._attention_tiles import (
    CALL_INTS,
    LIMIT,
    LN2,
    LN2_LOW,
    LOG2E,
    Call,
    batch_word,
    finite,
    join_sink,
    kept_tile,
    lengths,
    load_tile,
    operand,
    score,
    tiles,
    vectors,
)
from fastlm.kernels._common import TL_DTYPE, arch_of, launch, to_dtype
from fastlm.reference.attention import Options, empty_out, nothing_to_attend_to
from torch import Tensor

_FORWARD_INTS = f"{CALL_INTS} q_b q_h q_l q_d k_b k_h k_l k_d v_b v_h v_l v_d o_b o_h o_l o_d l_b l_h pieces piece"


@triton.jit(do_not_specialize=_FORWARD_INTS.split())
def _forward_kernel(
    q, k, v, out, lse, rest, part, ends, sinks, bias, slopes, seed, batch_ids, cu_q, cu_k, seqlens,
    heads, group, rows, keys, longest_q, longest_k, size, size_v, blocks, bias_b, bias_h, bias_q, bias_k, slope_b,
    base, left, right, head0, q0, chunk0, lead, threshold, scale, unit, cap_scale, softcap, keep_scale,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, o_b, o_h, o_l, o_d, l_b, l_h, pieces, piece,
    SHIFT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, DROPOUT: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    DIM: tl.constexpr, EVEN_V: tl.constexpr, DIM_V: tl.constexpr, DTYPE: tl.constexpr, PACK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile of out and lse. PACK: rows are (head of the group, query). ``part``: the sums of one piece of the keys, unscaled."""
    pid = tl.program_id(0)
    part_number = pid % pieces
    others = pid // pieces
    block = others % blocks
    if RIGHT:  # the longest first
        block = blocks - 1 - block
    others = others // blocks
    r_M = block * M + tl.arange(0, M)
    if PACK:
        kv_heads = heads // group
        kv = others % kv_heads
        b = others // kv_heads
        head = kv * group
        within_M = r_M // rows
        i_M = r_M % rows
        first_i = block * 0
        last_i = first_i + rows - 1
    else:
        head = others % heads
        b = others // heads
        kv = head // group
        within_M = r_M * 0
        i_M = r_M
        first_i = block * M
        last_i = first_i + M - 1
    start_q, len_q, start_k, len_k = lengths(cu_q, cu_k, seqlens, b, rows, keys, longest_q, longest_k)
    if PACK:
        ok_M = within_M < group
        edge = (block + 1) * M > group * rows
    else:
        if first_i >= len_q:
            return
        ok_M = i_M < len_q
        edge = first_i + M > len_q
        last_i = tl.minimum(last_i, len_q - 1)
    if SHIFT:
        base += len_k - len_q
    b64 = b.to(tl.int64)
    q += (b64 * q_b + head.to(tl.int64) * q_h + start_q.to(tl.int64) * q_l) * VEC
    k += (b64 * k_b + kv.to(tl.int64) * k_h + start_k.to(tl.int64) * k_l) * VEC
    v += (b64 * v_b + kv.to(tl.int64) * v_h + start_k.to(tl.int64) * v_l) * VEC
    ok_MD = ok_M[:, None]
    d_1D = tl.arange(0, DIM)[None, :]
    if not EVEN:
        ok_MD = ok_MD & (d_1D < size * VEC)
    along_1D = d_1D if UNIT else d_1D.to(tl.int64) * q_d
    q_MD = tl.load(
        q + (within_M.to(tl.int64) * q_h + i_M.to(tl.int64) * q_l)[:, None] * VEC + along_1D, ok_MD, other=0.0
    )
    q_MD = operand(q_MD.to(tl.float32), DTYPE)
    if BIAS >= 0:
        bias += b64 * bias_b + head.to(tl.int64) * bias_h
        if PACK:
            bias = (
                bias + (tl.minimum(within_M, group - 1).to(tl.int64) * bias_h)[:, None]
            )  # idle rows read no other head
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + b64 * slope_b + head + within_M, ok_M, other=0.0)[:, None]
    batch = batch_word(batch_ids, b)
    head_M = (head0 + head + within_M).to(tl.uint32)[:, None]
    t0, count, whole0, whole = tiles(first_i, last_i, base, left, right, len_k, lead, edge, LEFT, RIGHT, N)
    if part is not None:
        per = piece // N
        low = tl.maximum(t0, part_number * per)
        high = tl.minimum(t0 + count, part_number * per + per)
        count = tl.maximum(high - low, 0)
        whole_low = tl.minimum(tl.maximum(whole0, low), low + count)
        whole = tl.maximum(tl.minimum(whole0 + whole, low + count) - whole_low, 0)
        t0 = low
        whole0 = whole_low
    acc = tl.zeros([M, DIM_V], tl.float32)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    c = unit * LOG2E
    for MASKED in tl.static_range(2):  # the tiles that every row sees whole, then the others, on both sides of them
        begin = t0 if MASKED else whole0
        for t in range(0, count - whole if MASKED else whole):
            tile = begin + t
            if MASKED:
                tile += tl.where(t < whole0 - t0, 0, whole)
            j_N = tile * N - lead + tl.arange(0, N)
            ok_N = (j_N >= 0) & (j_N < len_k)
            k_ND = load_tile(k, j_N, ok_N, k_l, k_d, size, DTYPE, UNIT, VEC, EVEN, DIM)
            x_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
            x_MN, _ = score(
                x_MN, i_M[:, None], j_N[None, :], ok_M[:, None], bias, bias_q, bias_k, slope, base, len_k, left, right,
                scale, cap_scale, softcap, MASKED, NATURAL, SOFTCAP, LEFT, RIGHT, BIAS,
            )  # fmt: skip
            new = tl.maximum(m, tl.max(x_MN, 1))
            top = tl.where(tl.abs(new) == float("inf"), 0.0, new)  # inf - inf is no number
            if NATURAL:  # differences first: scores may be huge
                safe = top
                p_MN = tl.exp2((x_MN - safe[:, None]) * LOG2E)
                alpha = tl.exp2((m - safe) * LOG2E)
            else:  # one multiply-add a score
                safe = top * c
                p_MN = tl.exp2(x_MN * c - safe[:, None])
                alpha = tl.exp2(tl.where(m == float("-inf"), m, m * c) - safe)
            l = l * alpha + tl.sum(p_MN, 1)
            m = new
            if DROPOUT:
                kept = kept_tile(seed, batch, head_M, i_M[:, None], tile, chunk0, q0, threshold, False, M, N)
                p_MN = tl.where(kept, p_MN, 0.0)
            v_ND = load_tile(v, j_N, ok_N, v_l, v_d, size_v, DTYPE, UNIT, VEC, EVEN_V, DIM_V)
            acc = tl.dot(operand(p_MN, DTYPE), v_ND, acc * alpha[:, None], input_precision="ieee")
    # The logarithm of the sum in natural units, with what rounding m * c took from every exponent given back.
    # A row that sees nothing has sum 0; one of NaN has sum NaN, one with a score of inf sum inf and no probabilities.
    none_M = (m == float("-inf")) & (l == 0.0)
    safe_l = tl.where(none_M, 1.0, l)
    divisor_M = tl.where(l == float("inf"), float("nan"), safe_l)
    top_M = tl.where(tl.abs(m) == float("inf"), 0.0, m)
    lse_M = top_M * unit + tl.log(safe_l)
    if NATURAL:
        rest_M = (top_M - lse_M) + tl.log(safe_l)
    else:
        lse_M -= tl.fma(top_M, c, -(top_M * c)) * LN2
        rest_M = (tl.fma(top_M * c, LN2, -lse_M) + top_M * c * LN2_LOW) + tl.log(safe_l)
    lse_M = tl.where(none_M, m, lse_M)
    rest_M = tl.where(none_M, 0.0, finite(rest_M))
    share_M = tl.full([M], 1.0, tl.float32)
    head64_M = (head + within_M).to(tl.int64)
    row_M = b64 * l_b + head64_M * l_h + start_q + i_M
    d_1D = tl.arange(0, DIM_V)[None, :]
    ok_MD = ok_M[:, None]
    if not EVEN_V:
        ok_MD = ok_MD & (d_1D < size_v * VEC)
    if part is not None:
        row_M = row_M * pieces + part_number
        tl.store(ends + 2 * row_M, lse_M, ok_M)
        tl.store(ends + 2 * row_M + 1, rest_M, ok_M)
        place = part + row_M[:, None] * (size_v * VEC) + d_1D
        tl.store(place, tl.div_rn(acc, divisor_M[:, None]), ok_MD)
    else:
        if sinks is not None:
            sink_M = tl.load(sinks + head64_M, ok_M, other=float("-inf"))
            lse_M, rest_M, share_M = join_sink(lse_M, rest_M, sink_M)
        tl.store(lse + row_M, lse_M, ok_M)
        tl.store(rest + row_M, rest_M, ok_M)
        place = out + (b64 * o_b + start_q.to(tl.int64) * o_l) * VEC
        place = place + (head64_M * o_h + i_M.to(tl.int64) * o_l)[:, None] * VEC
        place = place + (d_1D if UNIT else d_1D.to(tl.int64) * o_d)
        value = tl.div_rn(acc, divisor_M[:, None]) * (share_M * keep_scale)[:, None]
        tl.store(place, to_dtype(value, out.dtype.element_ty), ok_MD)


@triton.jit(do_not_specialize=["total", "heads", "rows", "size", "pieces", "o_b", "o_h", "o_l", "o_d"])
def _combine_kernel(
    part, ends, sinks, out, lse, rest, total, heads, rows, size, pieces, o_b, o_h, o_l, o_d, keep_scale,
    VEC: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """out, lse and rest of ROWS rows, flat over [batch, head, query], from their pieces: PIECES at a time, in order."""
    r_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok_R = r_R < total
    d_D = tl.arange(0, DIM)
    top_R = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(0, pieces, PIECES):
        at_P = first + tl.arange(0, PIECES)
        ok_RP = ok_R[:, None] & (at_P < pieces)[None, :]
        place = r_R.to(tl.int64)[:, None] * pieces + at_P[None, :]
        top_R = tl.maximum(top_R, tl.max(tl.load(ends + 2 * place, ok_RP, other=float("-inf")), 1))
    safe_R = tl.where(tl.abs(top_R) == float("inf"), 0.0, top_R)
    sum_R = tl.zeros([ROWS], tl.float32)
    acc_RD = tl.zeros([ROWS, DIM], tl.float32)
    for first in range(0, pieces, PIECES):
        at_P = first + tl.arange(0, PIECES)
        ok_RP = ok_R[:, None] & (at_P < pieces)[None, :]
        place = r_R.to(tl.int64)[:, None] * pieces + at_P[None, :]
        lse_RP = tl.load(ends + 2 * place, ok_RP, other=float("-inf"))
        rest_RP = tl.load(ends + 2 * place + 1, ok_RP, other=0.0)
        weight_RP = tl.exp2(((lse_RP - safe_R[:, None]) + rest_RP) * LOG2E)
        sum_R += tl.sum(weight_RP, 1)
        ok_RPD = ok_RP[:, :, None] & (d_D < size * VEC)[None, None, :]
        value = tl.load(part + place[:, :, None] * (size * VEC) + d_D[None, None, :], ok_RPD, other=0.0)
        acc_RD += tl.sum(value * weight_RP[:, :, None], 1)
    none_R = (top_R == float("-inf")) & (sum_R == 0.0)
    sum_R = tl.where(none_R, 1.0, sum_R)
    more_R = tl.log(sum_R)
    lse_R = safe_R + more_R
    rest_R = finite(more_R - (lse_R - safe_R))
    lse_R = tl.where(none_R, top_R, lse_R)
    share_R = tl.full([ROWS], 1.0, tl.float32)
    if sinks is not None:
        sink_R = tl.load(sinks + r_R // rows % heads, ok_R, other=float("-inf"))
        lse_R, rest_R, share_R = join_sink(lse_R, rest_R, sink_R)
    tl.store(lse + r_R, lse_R, ok_R)
    tl.store(rest + r_R, rest_R, ok_R)
    i_R = r_R % rows
    head_R = r_R // rows % heads
    b_R = r_R // rows // heads
    place_R = (b_R.to(tl.int64) * o_b + head_R.to(tl.int64) * o_h + i_R.to(tl.int64) * o_l) * VEC
    along_1D = d_D[None, :] if UNIT else d_D[None, :].to(tl.int64) * o_d
    value = tl.div_rn(acc_RD, sum_R[:, None]) * (share_R * keep_scale)[:, None]
    ok_RD = ok_R[:, None] & (d_D < size * VEC)[None, :]
    tl.store(out + place_R[:, None] + along_1D, to_dtype(value, out.dtype.element_ty), ok_RD)


# ----------------------------------------------------------------------------------------------------------- launchers


def piece_size(programs: int, keys: int) -> int:
    """Keys in one piece of a split: a function of the shape alone. 256, doubled while there are more than 1,024 pieces."""
    size = 256
    while size < keys and programs * triton.cdiv(keys, size) > 1024:
        size *= 2
    return size


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, rest) of the schema; ``options`` are those of ``fastlm.reference.attention.forward``."""
    out_dtype = options[-1]
    packed = Options.of(options).cu_seqlens_q is not None
    out = empty_out(q, v, out_dtype)
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    make: dict[str, Any] = dict(dtype=torch.float32, device=q.device)
    lse, rest = torch.empty(shape, **make), torch.empty(shape, **make)
    if packed:  # tokens outside every sequence keep this
        out.zero_(), lse.fill_(-torch.inf), rest.zero_()
    if q.numel() == 0:
        return out, lse, rest
    if k.numel() == 0:
        return nothing_to_attend_to(out, lse, rest, Options.of(options).sinks)
    call = Call(q, k, v, [q, k, v, out], *options[:-1])
    if call.longest_q == 0:
        return out, lse, rest
    pack = not packed and call.rows <= 16
    config = call.config("attention_decode" if pack else "attention_forward")
    m, n = config["m"], config["n"]
    length, heads = call.longest_q, call.heads
    if pack:
        length, heads = call.rows * call.group, call.kv_heads
        m = max(16, min(m, triton.next_power_of_2(length)))
    blocks = triton.cdiv(length, m)
    piece, pieces = 0, 1
    if pack:
        piece = max(n, piece_size(call.batch * heads * blocks, call.keys))
        pieces = triton.cdiv(call.keys + call.lead, piece)
    part = ends = None
    if pieces > 1:
        part = torch.empty(*shape, pieces, v.shape[-1], **make)
        ends = torch.empty(*shape, pieces, 2, **make)
    with torch.cuda.device_of(q):
        launch(
            _forward_kernel, (pieces * blocks * heads * call.batch,),
            q, k, v, out, lse, rest, part, ends, call.sinks, *call.pointers, *call.scalars(blocks),
            *(s for t in (q, k, v, out) for s in call.strides(t)),
            *((0 if packed else lse.stride(0)), lse.stride(0 if packed else 1), pieces, piece),
            DTYPE=TL_DTYPE[q.dtype], PACK=pack, M=m, N=n, num_warps=config["num_warps"],
            num_stages=config["num_stages"], **call.constants,
        )  # fmt: skip
        if part is not None:
            rows = 1 if q.device.type != "cpu" else 16
            launch(
                _combine_kernel, (triton.cdiv(lse.numel(), rows),),
                part, ends, call.sinks, out, lse, rest, lse.numel(), call.heads, call.rows, v.shape[-1] // call.vec, pieces,
                *call.strides(out), call.keep_scale,
                VEC=call.vec, UNIT=call.unit, DIM=call.dim_v, ROWS=rows, PIECES=32, num_warps=4, num_stages=1,
            )  # fmt: skip
    return out, lse, rest


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dbias, dsinks) of the schema; ``options`` are those of ``fastlm.reference.attention.backward``."""
    return _attention_backward.backward(dout, dlse, q, k, v, out, lse, rest, *options)


def _serves(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Tensor], options: tuple[Any, ...]) -> Support:
    given_options = Options.of(options)
    bias, q0, k0 = given_options.bias, given_options.q0, given_options.k0
    for name, t in ({"q": q, "k": k, "v": v} | given).items():
        if t.dtype not in TL_DTYPE:
            return Support(False, f"the triton kernel takes float32, bfloat16 and float16; {name} is {t.dtype}")
        if t.dtype != q.dtype:
            return Support(False, f"the triton kernel takes tensors of one dtype; q is {q.dtype}, {name} {t.dtype}")
    if q.device.type == "cuda" and arch_of(q.device) < 80:
        return Support(
            False, f"the triton kernels need compute capability 8.0; {q.device} has {arch_of(q.device) / 10}"
        )
    if max(q.shape[-1], v.shape[-1]) > 512:
        return Support(False, f"the triton kernel takes head sizes up to 512, not {max(q.shape[-1], v.shape[-1])}")
    if bias is not None and bias.dtype not in (*TL_DTYPE, torch.bool):
        return Support(False, f"the triton kernel takes a bias of bool, float32, bfloat16 or float16, not {bias.dtype}")
    longest = max(q.shape[-2] if q.dim() == 4 else q.shape[0], k.shape[-2] if q.dim() == 4 else k.shape[0])
    if longest >= LIMIT or abs(q0 - k0) >= LIMIT:
        return Support(
            False, f"the triton kernel takes lengths and distances below 2**29, not {max(longest, abs(q0 - k0))}"
        )
    unit, vec = vectors([q, k, v, *given.values()])
    if not unit:
        return Support(True, "element by element: a last stride is not 1")
    return YES if vec > 1 else Support(True, "element by element: rows are not multiples of 8 elements")


def serves_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Support:
    """Whether the kernel takes these dtypes, head size and positions."""
    if options[-1] not in TL_DTYPE:
        return Support(False, f"the triton kernel writes float32, bfloat16 and float16, not {options[-1]}")
    return _serves(q, k, v, {}, options)


def serves_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Tensor,
    *options: Any,
) -> Support:  # fmt: skip
    """Whether the kernel takes these dtypes, head size and positions."""
    return _serves(q, k, v, {"dout": dout, "out": out}, options)
