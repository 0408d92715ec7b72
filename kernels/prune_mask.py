"""Pruning masks in Triton: which scores go, exactly, and what is done with masks. The bits are the reference's.

The k lowest of N scores without sorting and without waiting for the device: a score's key is an integer in its order, of
32 bits, and three passes count how the keys spread over 2,048, 2,048 and 1,024 bins, each among those that share the bits
found before. A fourth counts, per program, the scores equal to the threshold; a fifth writes the mask, and of those the
first by flat index go. Bytes: five reads of the scores and N / 8 written; 64 KiB beside it and 8 bytes a program.

Patterns n:m compare each score with those of its group, which lie in the first cache; 2:4t goes through the classes of
``reference.prune_mask.transposable``; rows, columns and blocks are summed in sixteen lanes and a tree, and of these sums
the lowest go by the same selection.

Scores are matrices here, [rows, columns] with any strides; a tile is R rows of C columns, numbered in the flat order of
its elements. Shape suffixes: R, C; B bytes of a row; E all elements of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastlm.backend import YES, Support
from fastlm.kernels._common import OfflineCase, arch_of, launch, recording
from fastlm.reference import prune_mask as reference
from fastlm.reference.prune_mask import parse, pruned_of
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # elements
PROGRAMS = 2048  # of a pass over all scores, at most
PASSES = ((21, 32, 2048), (10, 21, 2048), (0, 10, 1024))  # lowest bit, bit above, bins
LARGEST = tl.constexpr(reference.LARGEST)


# ------------------------------------------------------------------------------------------------- pieces of kernels


@triton.jit
def _floats(value):
    """float32; of bfloat16 by its bits, since the interpreter's cast loses denormals."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _scores(x, scale, row_R1, col_1C, ok_RC, xr, xc, MAGNITUDE: tl.constexpr):
    """float32: what is compared."""
    value_RC = _floats(tl.load(x + row_R1 * xr + col_1C * xc, ok_RC, other=0.0))
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
def _count_kernel(
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
def _narrow_kernel(found, state, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """state: the bits of the threshold found so far, and how many of the scores with these bits go."""
    prefix, gone = tl.load(state), tl.load(state + 1)
    bin, below = _bin_of(tl.load(found + tl.arange(0, BINS)), gone, BINS)
    tl.store(state, prefix + (bin.to(tl.int64) << SHIFT))
    tl.store(state + 1, gone - below)


@triton.jit
def _ties_kernel(
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
def _write_kernel(
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
    """One pass over a row: as ``_count_kernel`` and ``_narrow_kernel``."""
    own = tl.zeros((BINS,), tl.int32)
    for piece in range(pieces):
        row_R1, col_1C, ok_RC = _place(row * pieces + piece, rows, columns, pieces, 1, C)
        key_RC = _keys(_scores(x, scale, row_R1, tl.minimum(col_1C, columns - 1), ok_RC, xr, xc, MAGNITUDE))
        own += _spread(key_RC, ok_RC, prefix, SHIFT, HIGH, BINS, C)
    bin, below = _bin_of(own.to(tl.int64), gone, BINS)
    return prefix + (bin.to(tl.int64) << SHIFT), gone - below


@triton.jit
def _rows_kernel(
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
def _groups_kernel(
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
def _transposable_kernel(
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
def _sums_kernel(
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
        value_BL = _floats(tl.load(x + row_BL * xr + col_BL * xc, ok_BL, other=0.0))
        sum_BL += tl.abs(value_BL) if MAGNITUDE else value_BL
    for half in tl.static_range(4):
        sum_BL = tl.sum(tl.reshape(sum_BL, (B, 2, 8 >> half)), 1)
    tl.store(sums + block_B1, sum_BL, block_B1 < blocks)


@triton.jit
def _blocks_kernel(kept, mask, rows, columns, pieces, high, wide, across, R: tl.constexpr, C: tl.constexpr):
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
def _apply_kernel(weight, mask, rows, columns, pieces, wr, wc, R: tl.constexpr, C: tl.constexpr):
    """Stores +0 where the bit is 0; reads no weight."""
    row_R1, col_1C, ok_RC = _place(tl.program_id(0).to(tl.int64), rows, columns, pieces, R, C)
    gone_RC = ok_RC & (_bits_of(mask, row_R1, col_1C, ok_RC, columns) == 0)
    tl.store(weight + row_R1 * wr + col_1C * wc, tl.zeros((R, C), weight.dtype.element_ty), gone_RC)


@triton.jit
def _unpack_kernel(mask, out, rows, columns, pieces, R: tl.constexpr, C: tl.constexpr):
    """out: uint8 [rows, columns], 1 = keep."""
    row_R1, col_1C, ok_RC = _place(tl.program_id(0).to(tl.int64), rows, columns, pieces, R, C)
    tl.store(out + row_R1 * columns + col_1C, _bits_of(mask, row_R1, col_1C, ok_RC, columns).to(tl.uint8), ok_RC)


@triton.jit
def _pack_kernel(keep, mask, rows, columns, pieces, kr, kc, R: tl.constexpr, C: tl.constexpr):
    """keep: uint8 [rows, columns]."""
    tile = tl.program_id(0).to(tl.int64)
    row_R1, col_1C, ok_RC = _place(tile, rows, columns, pieces, R, C)
    keep_RC = tl.load(keep + row_R1 * kr + col_1C * kc, ok_RC, other=0) != 0
    _store_bits(mask, keep_RC & ok_RC, row_R1, tile, rows, columns, pieces, R, C)


@triton.jit
def _popcount_kernel(mask, counts, size, B: tl.constexpr):
    """The ones of B bytes."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    byte = tl.load(mask + at, at < size, other=0).to(tl.int32)
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    tl.store(counts + tl.program_id(0), tl.sum((byte + (byte >> 4)) & 15, 0).to(tl.int64))


# ----------------------------------------------------------------------------------------------------------- launchers


class _Matrix(NamedTuple):
    """A tensor as rows of columns and how it is cut: R rows of C columns a tile, ``pieces`` tiles across."""

    x: Tensor
    rows: int
    columns: int
    pieces: int
    R: int
    C: int

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.R) * self.pieces

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows, self.columns, self.pieces


def _matrix(x: Tensor, tile: int = TILE) -> _Matrix:
    """Collapses the leading axes, by a copy where they are no one axis."""
    x = x.reshape(-1, x.shape[-1])
    rows, columns = x.shape
    wide = min(max(triton.next_power_of_2(columns), 8), tile)
    return _Matrix(x, rows, columns, -(-columns // wide), max(tile // wide, 1), wide)


def _refusal(x: Tensor, dtypes: tuple[torch.dtype, ...], what: str) -> Support:
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return Support(False, f"the triton kernel takes {names} {what}, not {str(x.dtype).removeprefix('torch.')}")
    if x.device.type == "cuda" and arch_of(x.device) < 80:
        return Support(False, f"the triton kernels need compute capability 8.0; this has {arch_of(x.device) / 10}")
    return YES


def serves_forward(
    scores: Sequence[Tensor], scales: Sequence[Tensor], sparsity: float | None, pattern: str, dim: int, scope: str,
    magnitude: bool, check: bool,
) -> Support:  # fmt: skip
    """float32, bfloat16 and float16, any strides."""
    for s in scores:
        found = _refusal(s, FLOATS, "scores")
        if not found.ok:
            return found
    return YES


def forward(
    scores: Sequence[Tensor], scales: Sequence[Tensor], sparsity: float | None, pattern: str, dim: int, scope: str,
    magnitude: bool, check: bool,
) -> list[Tensor]:  # fmt: skip
    """As ``fastlm.reference.prune_mask.forward``."""
    kind, a, b = parse(pattern)
    part = 0.0 if sparsity is None else sparsity
    scale = lambda i: scales[i].contiguous() if scales else None
    if check or scores[0].device.type == "cpu":
        reference.check_values([reference.values(s, scale(i), magnitude) for i, s in enumerate(scores)])
    magnitude = magnitude or bool(scales)
    if scope == "global":
        gone = pruned_of(part, sum(s.numel() for s in scores))
        return _lowest(scores, [scale(i) for i in range(len(scores))], magnitude, gone)
    out = []
    for i, s in enumerate(scores):
        along = dim % s.dim()
        if not s.numel():
            out.append(_empty_mask(s))
        elif along != s.dim() - 1 and (kind == "n:m" or scope == "row"):
            if scales:
                s = reference.values(s, scale(i), magnitude)
            moved = s.movedim(along, -1)
            (mask,) = forward([moved], [], sparsity, pattern, -1, scope, magnitude, False)
            out.append(pack(unpack(mask, moved.shape[-1]).movedim(-1, along)))
        else:
            out.append(_one(s, scale(i), part, (kind, a, b), scope, magnitude))
    return out


def _empty_mask(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8)


def _one(
    s: Tensor, scale: Tensor | None, part: float, pattern: tuple[str, int, int], scope: str, magnitude: bool
) -> Tensor:
    kind, a, b = pattern
    if kind == "unstructured" and scope == "tensor":
        return _lowest([s], [scale], magnitude, pruned_of(part, s.numel()))[0]
    if kind in ("row", "column", "block"):
        if scale is not None:  # a product within a sum could be fused, and be other bits
            s, scale, magnitude = reference.values(s, scale, True), None, False
        high, wide = {"row": (1, s.shape[1]), "column": (s.shape[0], 1), "block": (a, b)}[kind]
        return _blocks(s, magnitude, part, high, wide)
    m, mask = _matrix(s), _empty_mask(s)
    strides = m.x.stride()
    with torch.cuda.device_of(s):
        if kind == "2:4t":
            return _transposable(m, scale, magnitude)
        if kind == "n:m":
            m = _matrix(s, TILE // 4)  # a whole tile spills
            launch(_groups_kernel, (m.tiles,), m.x, scale, mask, *m.sizes, *strides, N=a, M=b, MAGNITUDE=magnitude,
                   R=m.R, C=m.C, num_warps=8, num_stages=1)  # fmt: skip
            return mask
        gone = pruned_of(part, m.columns)
        if gone in (0, m.columns):
            return _all_or_none(s, gone == 0)
        columns = min(m.C, 1024)  # 2,048 spill in bfloat16
        launch(_rows_kernel, (m.rows,), m.x, scale, mask, gone, m.rows, m.columns, -(-m.columns // columns), *strides,
               MAGNITUDE=magnitude, C=columns, num_warps=8, num_stages=1)  # fmt: skip
    return mask


def _all_or_none(x: Tensor, keep: bool) -> Tensor:
    return pack(torch.full(x.shape, keep, dtype=torch.bool, device=x.device))


def _lowest(scores: Sequence[Tensor], scales: Sequence[Tensor | None], magnitude: bool, gone: int) -> list[Tensor]:
    """The masks of tensors of which the ``gone`` lowest scores go, all together."""
    count = sum(s.numel() for s in scores)
    if gone in (0, count):
        return [_all_or_none(s, gone == 0) for s in scores]
    device = scores[0].device
    state = torch.zeros(2, dtype=torch.int64, device=device)
    state[1:].fill_(gone)
    given = [(_matrix(s), scale, i) for i, (s, scale) in enumerate(zip(scores, scales, strict=True)) if s.numel()]
    cuts = [-(-m.tiles // -(-m.tiles // PROGRAMS)) for m, _, _ in given]  # programs of each
    masks = [_empty_mask(s) for s in scores]
    with torch.cuda.device_of(scores[0]):
        for shift, top, bins in PASSES:
            found = torch.zeros(bins, dtype=torch.int64, device=device)
            for (m, scale, _), programs in zip(given, cuts, strict=True):
                # the last pass has fewer bins, and spills with few warps
                launch(_count_kernel, (programs,), m.x, scale, state, found, *m.sizes, m.tiles,
                       -(-m.tiles // programs), *m.x.stride(), MAGNITUDE=magnitude, SHIFT=shift, HIGH=top, BINS=bins,
                       R=m.R, C=m.C, num_warps=8 if shift else 16, num_stages=1)  # fmt: skip
            launch(_narrow_kernel, (1,), found, state, SHIFT=shift, BINS=bins, num_warps=8, num_stages=1)
        counts = torch.zeros(sum(cuts), dtype=torch.int64, device=device)
        parts = counts.split(cuts)
        for (m, scale, _), own, programs in zip(given, parts, cuts, strict=True):
            launch(_ties_kernel, (programs,), m.x, scale, state, own, *m.sizes, m.tiles, -(-m.tiles // programs),
                   *m.x.stride(), MAGNITUDE=magnitude, R=m.R, C=m.C, num_warps=8, num_stages=1)  # fmt: skip
        parts = (counts.cumsum(0) - counts).split(cuts)
        for (m, scale, i), own, programs in zip(given, parts, cuts, strict=True):
            launch(_write_kernel, (programs,), m.x, scale, state, own, masks[i], *m.sizes, m.tiles,
                   -(-m.tiles // programs), *m.x.stride(), MAGNITUDE=magnitude, R=m.R, C=m.C, num_warps=8,
                   num_stages=1)  # fmt: skip
    return masks


@functools.cache
def _classes(device: torch.device) -> Tensor:
    rows = []
    for above, below in reference.transposable():
        fill = [0] * (6 - len(above))
        rows.append([len(above), *(a | b << 4 for a, b in above), *fill, *(a | b << 4 for a, b in below), *fill])
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _transposable(m: _Matrix, scale: Tensor | None, magnitude: bool) -> Tensor:
    """Half bytes first, one for each row of each block, and then two to a byte."""
    across, blocks = m.columns // 4, m.rows // 4 * (m.columns // 4)
    halves = torch.empty(m.rows, across, dtype=torch.uint8, device=m.x.device)
    launch(_transposable_kernel, (-(-blocks // 128),), m.x, scale, halves, _classes(m.x.device), blocks, across,
           m.columns, *m.x.stride(), MAGNITUDE=magnitude, B=128, num_warps=4,
           num_stages=1)  # fmt: skip
    if across % 2:
        halves = torch.nn.functional.pad(halves, (0, 1))
    return halves[:, ::2] | halves[:, 1::2] << 4


def _blocks(s: Tensor, magnitude: bool, part: float, high: int, wide: int) -> Tensor:
    m = _matrix(s)
    down, across = -(-m.rows // high), -(-m.columns // wide)
    sums = torch.empty(1, down * across, device=s.device)
    with torch.cuda.device_of(s):
        launch(_sums_kernel, (-(-down * across // 64),), m.x, sums, m.rows, m.columns, high, wide, across, down * across,
               *m.x.stride(), MAGNITUDE=magnitude, B=64, num_warps=4, num_stages=1)  # fmt: skip
        (kept,) = _lowest([sums], [None], False, pruned_of(part, down * across))
        mask = _empty_mask(s)
        launch(_blocks_kernel, (m.tiles,), kept, mask, *m.sizes, high, wide, across, R=m.R, C=m.C, num_warps=4,
               num_stages=1)  # fmt: skip
    return mask


def serves_apply(weight: Tensor, mask: Tensor) -> Support:
    """float32, bfloat16 and float16, whose leading axes are one axis."""
    found = _refusal(weight, FLOATS, "weights")
    if found.ok and weight.numel() and weight.reshape(-1, weight.shape[-1]).data_ptr() != weight.data_ptr():
        return Support(False, "weight has leading axes that are no one axis")
    return found


def apply(weight: Tensor, mask: Tensor) -> None:
    """As ``fastlm.reference.prune_mask.apply``."""
    if not weight.numel():
        return
    m = _matrix(weight)
    with torch.cuda.device_of(weight):
        launch(_apply_kernel, (m.tiles,), m.x, mask.contiguous(), *m.sizes, *m.x.stride(), R=m.R, C=m.C, num_warps=4,
               num_stages=1)  # fmt: skip


def serves_count(mask: Tensor) -> Support:
    """Everything."""
    return _refusal(mask, (torch.uint8,), "masks")


def count(mask: Tensor) -> Tensor:
    """As ``fastlm.reference.prune_mask.count``."""
    if not mask.numel():
        return torch.zeros((), dtype=torch.int64, device=mask.device)
    counts = torch.empty(-(-mask.numel() // TILE), dtype=torch.int64, device=mask.device)
    with torch.cuda.device_of(mask):
        launch(_popcount_kernel, (counts.numel(),), mask.contiguous(), counts, mask.numel(), B=TILE, num_warps=4,
               num_stages=1)  # fmt: skip
    return counts.sum()


def serves_unpack(mask: Tensor, columns: int) -> Support:
    """Everything."""
    return _refusal(mask, (torch.uint8,), "masks")


def unpack(mask: Tensor, columns: int) -> Tensor:
    """As ``fastlm.reference.prune_mask.unpack``."""
    out = torch.empty((*mask.shape[:-1], columns), dtype=torch.uint8, device=mask.device)
    if out.numel():
        m = _matrix(out)
        with torch.cuda.device_of(mask):
            launch(_unpack_kernel, (m.tiles,), mask.contiguous(), m.x, *m.sizes, R=m.R, C=m.C, num_warps=4,
                   num_stages=1)  # fmt: skip
    return out.view(torch.bool)


def serves_pack(keep: Tensor) -> Support:
    """Everything."""
    return _refusal(keep, (torch.bool,), "tensors")


def pack(keep: Tensor) -> Tensor:
    """As ``fastlm.reference.prune_mask.pack``."""
    out = _empty_mask(keep)
    if keep.numel():
        m = _matrix(keep.view(torch.uint8))
        with torch.cuda.device_of(keep):
            launch(_pack_kernel, (m.tiles,), m.x, out, *m.sizes, *m.x.stride(), R=m.R, C=m.C, num_warps=4,
                   num_stages=1)  # fmt: skip
    return out


def serves_adamw(*args: Any) -> Support:
    """Nothing yet: PyTorch's fused kernel and three masks after it serve."""
    return Support(False, "this release has no triton kernel of masked_adamw_; PyTorch's and apply_mask_ serve")


# ------------------------------------------------------------------------------------------------------- offline cases


def offline_cases() -> list[OfflineCase]:
    """A matrix of a large model by each pattern, and each use of a mask."""
    cases: list[OfflineCase] = []
    score = torch.empty(4096, 4096, device="meta")
    half = score.to(torch.bfloat16)
    mask = torch.empty(4096, 512, dtype=torch.uint8, device="meta")
    options: dict[str, dict[str, Any]] = {
        "50%": {"part": 0.5}, "50% a row": {"part": 0.5, "scope": "row"}, "2:4": {"pattern": "2:4"}, "4:8": {"pattern": "4:8"},
        "2:4t": {"pattern": "2:4t"}, "column": {"part": 0.5, "pattern": "column"},
    }  # fmt: skip
    for arch in (80, 90):
        for name, o in options.items():
            for kind, x in (("f32", score), ("bf16", half)):
                moved = x.numel() * x.element_size() + mask.numel()
                with recording(arch, f"prune_mask {name} {kind}", bytes_moved=moved, flops=0) as recorded:
                    forward([x], [], o.get("part"), o.get("pattern", "unstructured"), -1, o.get("scope", "tensor"), True,
                            False)  # fmt: skip
                cases += recorded
        calls = {
            "apply_mask_": (lambda: apply(half, mask), 2 * half.numel() * 2),
            "mask_count": (lambda: count(mask), mask.numel()),
            "mask_to_bool": (lambda: unpack(mask, 4096), 9 * mask.numel()),
            "bool_to_mask": (lambda: pack(torch.empty(4096, 4096, dtype=torch.bool, device="meta")), 9 * mask.numel()),
        }
        for name, (call, moved) in calls.items():
            with recording(arch, name, bytes_moved=moved, flops=0) as recorded:
                call()
            cases += recorded
    return cases
