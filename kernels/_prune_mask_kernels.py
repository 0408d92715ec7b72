"""The kernels that ``prune_mask.py`` launches, which says what they compute and what they read.

Scores are matrices here, [rows, columns] with any strides; a tile is R rows of C columns, numbered in the flat order of
its elements. Shape suffixes: R, C; B bytes of a row; E all elements of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastlm.kernels._common import INTERPRETED, to_dtype, widened
from fastlm.reference import prune_mask as reference

LARGEST = tl.constexpr(reference.LARGEST)


# ------------------------------------------------------------------------------------------------- pieces of kernels


@triton.jit
def _scores(x, scale, row_R1, col_1C, ok_RC, xr, xc, MAGNITUDE: tl.constexpr):
    """float32: what is compared."""
    value_RC = widened(tl.load(x + row_R1 * xr + col_1C * xc, ok_RC, other=0.0))
    if MAGNITUDE:
        value_RC = tl.abs(value_RC)
    if scale is not None:
        value_RC = value_RC * tl.load(scale + col_1C, col_1C >= 0)
    return value_RC


@triton.jit
def _keys(value_RC):
    """int64 from 0 on in the order of float32, NaN 0, -0 as +0."""
    bits_RC = value_RC.to(tl.int32, bitcast=True)
    size_RC = (bits_RC & 0x7FFFFFFF).to(tl.int64)
    key_RC = tl.where(bits_RC < 0, -size_RC, size_RC) + 0x80000000
    return tl.where(value_RC == value_RC, key_RC, 0)


@triton.jit
def _place(tile, rows, columns, pieces, R: tl.constexpr, C: tl.constexpr):
    """Rows [R, 1] and columns [1, C] of a tile, and which of it are there."""
    row_R1 = (tile // pieces * R + tl.arange(0, R).to(tl.int64))[:, None]
    col_1C = (tile % pieces * C + tl.arange(0, C))[None, :]
    return row_R1, col_1C, (row_R1 < rows) & (col_1C < columns)


@triton.jit
def _store_bits(mask, keep_RC, row_R1, tile, rows, columns, pieces, R: tl.constexpr, C: tl.constexpr):
    """Packs a tile of booleans into the mask [rows, ceil(columns / 8)]."""
    width = (columns + 7) // 8
    keep_RB8 = tl.reshape(keep_RC.to(tl.int32), (R, C // 8, 8)) << tl.arange(0, 8)[None, None, :]
    byte_1B = (tile % pieces * (C // 8) + tl.arange(0, C // 8))[None, :]
    tl.store(mask + row_R1 * width + byte_1B, tl.sum(keep_RB8, 2).to(tl.uint8), (row_R1 < rows) & (byte_1B < width))


@triton.jit
def _spread(key_RC, ok_RC, prefix, SHIFT: tl.constexpr, HIGH: tl.constexpr, BINS: tl.constexpr, E: tl.constexpr):
    """int32 [BINS]: of the keys that share the bits from HIGH on with ``prefix``, how many have which bits below."""
    inside_RC = ok_RC & ((key_RC >> HIGH) == (prefix >> HIGH))
    bin_RC = tl.where(inside_RC, (key_RC >> SHIFT) & (BINS - 1), 0).to(tl.int32)
    found = tl.histogram(tl.reshape(bin_RC, (E,)), BINS)
    outside = E - tl.sum(tl.reshape(inside_RC.to(tl.int32), (E,)), 0)
    return found - tl.where(tl.arange(0, BINS) == 0, outside, 0)


@triton.jit
def _bin_of(found, gone, BINS: tl.constexpr):
    """The bin in which the ``gone``-th lies, and how many lie in the bins below."""
    upto = tl.cumsum(found, 0)
    bin = tl.sum((upto < gone).to(tl.int32), 0)
    return bin, tl.max(tl.where(upto < gone, upto, 0), 0)


@triton.jit
def _rank(equal_RC, R: tl.constexpr, C: tl.constexpr):
    """How many of a tile's Trues come before each element in flat order."""
    equal_E = tl.reshape(equal_RC.to(tl.int32), (R * C,))
    return tl.reshape(tl.cumsum(equal_E, 0) - equal_E, (R, C))


# ------------------------------------------------------------------------------------------------------- the k lowest


@triton.jit
def count_kernel(
    x, scale, state, found, rows, columns, pieces, tiles, per, xr, xc,
    MAGNITUDE: tl.constexpr, SHIFT: tl.constexpr, HIGH: tl.constexpr, BINS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Adds how the keys of ``per`` tiles spread to ``found`` int64 [BINS]."""
    prefix = tl.load(state)
    own = tl.zeros((BINS,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * per
    for i in range(per):
        if first + i < tiles:
            row_R1, col_1C, ok_RC = _place(first + i, rows, columns, pieces, R, C)
            key_RC = _keys(_scores(x, scale, row_R1, tl.minimum(col_1C, columns - 1), ok_RC, xr, xc, MAGNITUDE))
            own += _spread(key_RC, ok_RC, prefix, SHIFT, HIGH, BINS, R * C)
    tl.atomic_add(found + tl.arange(0, BINS), own.to(tl.int64), own != 0)


@triton.jit
def narrow_kernel(found, state, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """state: the bits of the threshold found so far, and how many of the scores with these bits go."""
    prefix, gone = tl.load(state), tl.load(state + 1)
    bin, below = _bin_of(tl.load(found + tl.arange(0, BINS)), gone, BINS)
    tl.store(state, prefix + (bin.to(tl.int64) << SHIFT))
    tl.store(state + 1, gone - below)


@triton.jit
def ties_kernel(
    x, scale, state, counts, rows, columns, pieces, tiles, per, xr, xc,
    MAGNITUDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """counts: of each program's tiles how many scores equal the threshold."""
    threshold = tl.load(state)
    ties = tl.zeros((), tl.int64)
    first = tl.program_id(0).to(tl.int64) * per
    for i in range(per):
        if first + i < tiles:
            row_R1, col_1C, ok_RC = _place(first + i, rows, columns, pieces, R, C)
            key_RC = _keys(_scores(x, scale, row_R1, tl.minimum(col_1C, columns - 1), ok_RC, xr, xc, MAGNITUDE))
            ties += tl.sum(tl.reshape((ok_RC & (key_RC == threshold)).to(tl.int32), (R * C,)), 0)
    tl.store(counts + tl.program_id(0), ties)


@triton.jit
def write_kernel(
    x, scale, state, counts, mask, rows, columns, pieces, tiles, per, xr, xc,
    MAGNITUDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The mask of each program's tiles. counts: how many ties come before them."""
    threshold, gone = tl.load(state), tl.load(state + 1)
    before = tl.load(counts + tl.program_id(0))
    first = tl.program_id(0).to(tl.int64) * per
    for i in range(per):
        if first + i < tiles:
            row_R1, col_1C, ok_RC = _place(first + i, rows, columns, pieces, R, C)
            key_RC = _keys(_scores(x, scale, row_R1, tl.minimum(col_1C, columns - 1), ok_RC, xr, xc, MAGNITUDE))
            equal_RC = ok_RC & (key_RC == threshold)
            keep_RC = (key_RC > threshold) | (equal_RC & (before + _rank(equal_RC, R, C) >= gone))
            _store_bits(mask, keep_RC & ok_RC, row_R1, first + i, rows, columns, pieces, R, C)
            before += tl.sum(tl.reshape(equal_RC.to(tl.int32), (R * C,)), 0)


@triton.jit
def _narrow_row(
    x, scale, prefix, gone, row, rows, columns, pieces, xr, xc,
    MAGNITUDE: tl.constexpr, SHIFT: tl.constexpr, HIGH: tl.constexpr, BINS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One pass over a row: as ``count_kernel`` and ``narrow_kernel``."""
    own = tl.zeros((BINS,), tl.int32)
    for piece in range(pieces):
        row_R1, col_1C, ok_RC = _place(row * pieces + piece, rows, columns, pieces, 1, C)
        key_RC = _keys(_scores(x, scale, row_R1, tl.minimum(col_1C, columns - 1), ok_RC, xr, xc, MAGNITUDE))
        own += _spread(key_RC, ok_RC, prefix, SHIFT, HIGH, BINS, C)
    bin, below = _bin_of(own.to(tl.int64), gone, BINS)
    return prefix + (bin.to(tl.int64) << SHIFT), gone - below


@triton.jit
def rows_kernel(
    x, scale, mask, gone, rows, columns, pieces, xr, xc, MAGNITUDE: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The ``gone`` lowest of one row."""
    row = tl.program_id(0).to(tl.int64)
    key, left = tl.zeros((), tl.int64), gone + tl.zeros((), tl.int64)
    key, left = _narrow_row(x, scale, key, left, row, rows, columns, pieces, xr, xc, MAGNITUDE, 21, 32, 2048, C)
    key, left = _narrow_row(x, scale, key, left, row, rows, columns, pieces, xr, xc, MAGNITUDE, 10, 21, 2048, C)
    key, left = _narrow_row(x, scale, key, left, row, rows, columns, pieces, xr, xc, MAGNITUDE, 0, 10, 1024, C)
    before = tl.zeros((), tl.int64)
    for piece in range(pieces):
        row_R1, col_1C, ok_RC = _place(row * pieces + piece, rows, columns, pieces, 1, C)
        key_RC = _keys(_scores(x, scale, row_R1, tl.minimum(col_1C, columns - 1), ok_RC, xr, xc, MAGNITUDE))
        equal_RC = ok_RC & (key_RC == key)
        keep_RC = (key_RC > key) | (equal_RC & (before + _rank(equal_RC, 1, C) >= left))
        _store_bits(mask, keep_RC & ok_RC, row_R1, row * pieces + piece, rows, columns, pieces, 1, C)
        before += tl.sum(tl.reshape(equal_RC.to(tl.int32), (C,)), 0)


# ----------------------------------------------------------------------------------------------------------- patterns


@triton.jit
def groups_kernel(
    x, scale, mask, rows, columns, pieces, xr, xc,
    N: tl.constexpr, M: tl.constexpr, MAGNITUDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """N of M: a score goes unless enough others of its group are lower."""
    tile = tl.program_id(0).to(tl.int64)
    row_R1, col_1C, ok_RC = _place(tile, rows, columns, pieces, R, C)
    key_RC = _keys(_scores(x, scale, row_R1, tl.minimum(col_1C, columns - 1), ok_RC, xr, xc, MAGNITUDE))
    start_1C = col_1C // M * M
    lower_RC = tl.zeros((R, C), tl.int32)
    for j in tl.static_range(M):
        at_1C = start_1C + j
        there_RC = (row_R1 < rows) & (at_1C < columns)
        other_RC = _keys(_scores(x, scale, row_R1, tl.minimum(at_1C, columns - 1), there_RC, xr, xc, MAGNITUDE))
        below_RC = (other_RC < key_RC) | ((other_RC == key_RC) & (at_1C < col_1C))
        lower_RC += (there_RC & below_RC).to(tl.int32)
    gone_1C = tl.maximum(tl.minimum(columns - start_1C, M) - N, 0)
    _store_bits(mask, (lower_RC >= gone_1C) & ok_RC, row_R1, tile, rows, columns, pieces, R, C)


@triton.jit
def _pair_sum(x, scale, row_B, col_B, there_B, pair, columns, xr, xc, MAGNITUDE: tl.constexpr):
    """The sum of two columns, the bits of ``pair``, of a row of blocks."""
    low = tl.where((pair & 1) != 0, 0, tl.where((pair & 2) != 0, 1, 2))
    high = tl.where((pair & 8) != 0, 3, tl.where((pair & 4) != 0, 2, 1))
    a_B = _clamped(_scores(x, scale, row_B, tl.minimum(col_B + low, columns - 1), there_B, xr, xc, MAGNITUDE))
    b_B = _clamped(_scores(x, scale, row_B, tl.minimum(col_B + high, columns - 1), there_B, xr, xc, MAGNITUDE))
    return a_B + b_B


@triton.jit
def _clamped(value):
    value = tl.where(value == value, value, -LARGEST)
    return tl.minimum(tl.maximum(value, -LARGEST), LARGEST)


@triton.jit
def transposable_kernel(
    x, scale, mask, classes, blocks, across, columns, xr, xc, MAGNITUDE: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """2:4t of B blocks. classes: int32 [19, 13]: how many pairs, six codes above, six below."""
    block_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    there_B = block_B < blocks
    row_B, col_B = block_B // across * 4, block_B % across * 4
    best_B, code_B = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.int32)
    for i in range(19):
        size = tl.load(classes + i * 13)
        top_B, above_B = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.int32)
        bottom_B, below_B = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.int32)
        for j in range(size):
            code = tl.load(classes + i * 13 + 1 + j)
            a_B = _pair_sum(x, scale, row_B, col_B, there_B, code & 15, columns, xr, xc, MAGNITUDE)
            sum_B = a_B + _pair_sum(x, scale, row_B + 1, col_B, there_B, code >> 4, columns, xr, xc, MAGNITUDE)
            better_B = (sum_B > top_B) | (j == 0)
            top_B, above_B = tl.where(better_B, sum_B, top_B), tl.where(better_B, code, above_B)
            code = tl.load(classes + i * 13 + 7 + j)
            a_B = _pair_sum(x, scale, row_B + 2, col_B, there_B, code & 15, columns, xr, xc, MAGNITUDE)
            sum_B = a_B + _pair_sum(x, scale, row_B + 3, col_B, there_B, code >> 4, columns, xr, xc, MAGNITUDE)
            better_B = (sum_B > bottom_B) | (j == 0)
            bottom_B, below_B = tl.where(better_B, sum_B, bottom_B), tl.where(better_B, code, below_B)
        sum_B = top_B + bottom_B
        better_B = (sum_B > best_B) | (i == 0)
        best_B, code_B = tl.where(better_B, sum_B, best_B), tl.where(better_B, above_B | (below_B << 8), code_B)
    for r in tl.static_range(4):  # a half byte for each row of each block
        tl.store(mask + (row_B + r) * across + block_B % across, ((code_B >> (4 * r)) & 15).to(tl.uint8), there_B)


@triton.jit
def sums_kernel(
    x, sums, rows, columns, high, wide, across, blocks, xr, xc, MAGNITUDE: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """The sums of B blocks of high x wide, over sixteen lanes and a tree."""
    block_B1 = (tl.program_id(0).to(tl.int64) * B + tl.arange(0, B))[:, None]
    lane_1L = tl.arange(0, 16)[None, :]
    sum_BL = tl.zeros((B, 16), tl.float32)
    for at in range(0, high * wide, 16):
        i_1L = at + lane_1L
        row_BL = block_B1 // across * high + i_1L // wide
        col_BL = block_B1 % across * wide + i_1L % wide
        ok_BL = (block_B1 < blocks) & (i_1L < high * wide) & (row_BL < rows) & (col_BL < columns)
        value_BL = widened(tl.load(x + row_BL * xr + col_BL * xc, ok_BL, other=0.0))
        sum_BL += tl.abs(value_BL) if MAGNITUDE else value_BL
    for half in tl.static_range(4):
        sum_BL = tl.sum(tl.reshape(sum_BL, (B, 2, 8 >> half)), 1)
    tl.store(sums + block_B1, sum_BL, block_B1 < blocks)


@triton.jit
def blocks_kernel(kept, mask, rows, columns, pieces, high, wide, across, R: tl.constexpr, C: tl.constexpr):
    """The mask of scores from that of blocks, bits [1, ceil(blocks / 8)]."""
    tile = tl.program_id(0).to(tl.int64)
    row_R1, col_1C, ok_RC = _place(tile, rows, columns, pieces, R, C)
    block_RC = row_R1 // high * across + col_1C // wide
    byte_RC = tl.load(kept + block_RC // 8, ok_RC, other=0).to(tl.int32)
    keep_RC = ((byte_RC >> (block_RC % 8).to(tl.int32)) & 1) != 0
    _store_bits(mask, keep_RC & ok_RC, row_R1, tile, rows, columns, pieces, R, C)


# ---------------------------------------------------------------------------------------------------- uses of a mask


@triton.jit
def _bits_of(mask, row_R1, col_1C, ok_RC, columns):
    byte_RC = tl.load(mask + row_R1 * ((columns + 7) // 8) + col_1C // 8, ok_RC, other=0).to(tl.int32)
    return (byte_RC >> (col_1C % 8)) & 1


@triton.jit
def apply_kernel(weight, mask, rows, columns, pieces, wr, wc, R: tl.constexpr, C: tl.constexpr):
    """Stores +0 where the bit is 0; reads no weight."""
    row_R1, col_1C, ok_RC = _place(tl.program_id(0).to(tl.int64), rows, columns, pieces, R, C)
    gone_RC = ok_RC & (_bits_of(mask, row_R1, col_1C, ok_RC, columns) == 0)
    tl.store(weight + row_R1 * wr + col_1C * wc, tl.zeros((R, C), weight.dtype.element_ty), gone_RC)


@triton.jit
def unpack_kernel(mask, out, rows, columns, pieces, R: tl.constexpr, C: tl.constexpr):
    """out: uint8 [rows, columns], 1 = keep."""
    row_R1, col_1C, ok_RC = _place(tl.program_id(0).to(tl.int64), rows, columns, pieces, R, C)
    tl.store(out + row_R1 * columns + col_1C, _bits_of(mask, row_R1, col_1C, ok_RC, columns).to(tl.uint8), ok_RC)


@triton.jit
def pack_kernel(keep, mask, rows, columns, pieces, kr, kc, R: tl.constexpr, C: tl.constexpr):
    """keep: uint8 [rows, columns]."""
    tile = tl.program_id(0).to(tl.int64)
    row_R1, col_1C, ok_RC = _place(tile, rows, columns, pieces, R, C)
    keep_RC = tl.load(keep + row_R1 * kr + col_1C * kc, ok_RC, other=0) != 0
    _store_bits(mask, keep_RC & ok_RC, row_R1, tile, rows, columns, pieces, R, C)


@triton.jit
def popcount_kernel(mask, counts, size, B: tl.constexpr):
    """The ones of B bytes."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    byte = tl.load(mask + at, at < size, other=0).to(tl.int32)
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    tl.store(counts + tl.program_id(0), tl.sum((byte + (byte >> 4)) & 15, 0).to(tl.int64))


# ------------------------------------------------------------------------------------------------------ masked AdamW


@triton.jit
def _fused(a, b, c):
    """a b + c, rounded once. The interpreter has no such instruction: a product of float32 is exact in float64."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def adamw_kernel(
    weight, grad, exp_avg, exp_avg_sq, mask, scalars, scale, found, decay, first, beta2, second, eps, size, columns,
    BASE: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """E elements of the step that ``csrc/cpu/prune_mask_adamw.cpp`` gives in formulas, with its roundings.

    scalars: float32 [-lr / (1 - beta1^t), sqrt(1 - beta2^t)]. BASE: the first moment goes from the gradient on.
    """
    at_E = tl.program_id(0).to(tl.int64) * E + tl.arange(0, E)
    ok_E = at_E < size
    col_E = at_E % columns
    byte_E = tl.load(mask + at_E // columns * ((columns + 7) // 8) + col_E // 8, ok_E, other=0).to(tl.int32)
    keep_E = ((byte_E >> (col_E % 8).to(tl.int32)) & 1) != 0
    w_E = widened(tl.load(weight + at_E, ok_E, other=0.0))
    m_E = widened(tl.load(exp_avg + at_E, ok_E, other=0.0))
    v_E = widened(tl.load(exp_avg_sq + at_E, ok_E, other=0.0))
    go = True
    if found is not None:
        go = tl.load(found) != 1.0
    if go:
        g_E = widened(tl.load(grad + at_E, ok_E, other=0.0))
        if scale is not None:
            g_E = tl.div_rn(g_E, tl.zeros((E,), tl.float32) + tl.load(scale))
            tl.store(grad + at_E, to_dtype(g_E, grad.dtype.element_ty), ok_E)
        w_E = w_E * decay
        m_E = _fused(first + tl.zeros((E,), tl.float32), g_E - m_E, g_E if BASE else m_E)
        v_E = _fused(second * g_E, g_E, v_E * beta2)
        root = tl.zeros((E,), tl.float32) + tl.load(scalars + 1)
        down_E = tl.div_rn(tl.sqrt_rn(v_E), root) + eps
        w_E = w_E + tl.div_rn(tl.load(scalars) * m_E, down_E)
    kind: tl.constexpr = weight.dtype.element_ty
    tl.store(weight + at_E, to_dtype(tl.where(keep_E, w_E, 0.0), kind), ok_E)
    tl.store(exp_avg + at_E, to_dtype(tl.where(keep_E, m_E, 0.0), kind), ok_E)
    tl.store(exp_avg_sq + at_E, to_dtype(tl.where(keep_E, v_E, 0.0), kind), ok_E)
