"""The kernels of dropout_add_norm; what they compute and how rows are cut is told in dropout_add_norm.py.

Shape suffixes: R rows of a tile, C its columns. Strides come divided by VEC where the last stride is 1 everywhere (VEC: 8, 4
or 1, the largest that divides them all), so that the compiler knows their alignment and loads vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastlm.kernels._common import rounded, to_dtype, widened
from fastlm.kernels._int8_rounding import magnitude_bits, nearest, scale_of
from fastlm.kernels.philox import KEY_DROPOUT_ADD_NORM, high_word, keep, key_of, low_word

_KEY = tl.constexpr(KEY_DROPOUT_ADD_NORM)
_FORWARD_INTS = "rows columns n1 n2 x0 x1 x2 xc r0 r1 r2 rc wc bc lc s0 s1 s2 o threshold"
_BACKWARD_INTS = (
    "rows columns n1 n2 block dy0 dy1 dy2 dyc dz0 dz1 dz2 dzc z0 z1 z2 zc x0 x1 x2 xc wc lc s0 s1 s2 o threshold"
)

# ---------------------------------------------------------------------------------------------- pieces of both kernels


@triton.jit
def _offset(row_R, n1, n2, s0, s1, s2, AXES: tl.constexpr, VEC: tl.constexpr):
    """Offset of the first element of each row, int64: row = (i0 * n1 + i1) * n2 + i2."""
    if AXES == 1:
        return row_R.to(tl.int64) * (s2.to(tl.int64) * VEC)
    i2_R = row_R % n2
    rest_R = row_R // n2
    base_R = i2_R.to(tl.int64) * (s2.to(tl.int64) * VEC)
    base_R += (rest_R % n1).to(tl.int64) * (s1.to(tl.int64) * VEC)
    return base_R + (rest_R // n1).to(tl.int64) * (s0.to(tl.int64) * VEC)


@triton.jit
def _load(pointer, base_R, col_1C, stride, ok_RC, UNIT: tl.constexpr):
    """A tile of a tensor as float32, zero outside. Read once, so that it should not push the parameters out of L1."""
    if UNIT:
        place_RC = pointer + base_R[:, None] + col_1C
    else:
        place_RC = pointer + base_R[:, None] + col_1C.to(tl.int64) * stride
    return tl.load(place_RC, ok_RC, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _load_vector(pointer, col_1C, stride, width, UNIT: tl.constexpr):
    """The columns' entries of a parameter as float32 [1, C]. Every program reads them."""
    place_1C = pointer + col_1C if UNIT else pointer + col_1C.to(tl.int64) * stride
    return tl.load(place_1C, col_1C < width, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _kept(
    seed, offset, o, row_R, row_ok_R, first, threshold, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Keep-decisions of a tile whose columns start at ``first``. DROPOUT 2: offset has a row number for each row."""
    place_R = row_R.to(tl.int64)
    if DROPOUT == 2:
        place_R = tl.load(offset + place_R * o, row_ok_R, other=0)
    elif offset is not None:
        place_R += tl.load(offset)
    place_R1 = place_R[:, None]
    k0, k1 = key_of(tl.load(seed), _KEY)
    chunk_1C = (first // 8 + tl.arange(0, COLUMNS // 8)[None, :]).to(tl.uint32)
    zero = tl.full([], 0, tl.uint32)
    return keep(chunk_1C, low_word(place_R1), high_word(place_R1), zero, k0, k1, threshold, ROWS, COLUMNS)


@triton.jit
def _stream(
    x, residual, layerscale, rowscale, seed, offset,
    row_R, row_ok_R, col_1C, first, width, n1, n2, x0, x1, x2, xc, r0, r1, r2, rc, lc, s0, s1, s2, o,
    threshold, keep_scale,
    Z_DTYPE: tl.constexpr, DROPOUT: tl.constexpr, AXES: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of z, rounded to its dtype, as float32; zero outside."""
    ok_RC = row_ok_R[:, None] & (col_1C < width)
    z_RC = _load(x, _offset(row_R, n1, n2, x0, x1, x2, AXES, VEC), col_1C, xc, ok_RC, UNIT)
    if DROPOUT:
        kept_RC = _kept(seed, offset, o, row_R, row_ok_R, first, threshold, DROPOUT, ROWS, COLUMNS)
        z_RC = tl.where(kept_RC, z_RC * keep_scale, 0.0)
    if rowscale is not None:
        scale_R = tl.load(rowscale + _offset(row_R, n1, n2, s0, s1, s2, AXES, 1), row_ok_R, other=0.0)
        z_RC = z_RC * scale_R.to(tl.float32)[:, None]
    if layerscale is not None:
        z_RC = z_RC * _load_vector(layerscale, col_1C, lc, width, UNIT)
    if residual is not None:
        z_RC = z_RC + _load(residual, _offset(row_R, n1, n2, r0, r1, r2, AXES, VEC), col_1C, rc, ok_RC, UNIT)
    return rounded(z_RC, Z_DTYPE)


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=_FORWARD_INTS.split())
def forward_kernel(
    x, residual, weight, bias, layerscale, rowscale, seed, offset, y, z, mean, rstd, q, q_scale,
    rows, columns, n1, n2, x0, x1, x2, xc, r0, r1, r2, rc, wc, bc, lc, s0, s1, s2, o,
    threshold, keep_scale, eps, weight_offset,
    NORM: tl.constexpr, GIVEN: tl.constexpr, Z_DTYPE: tl.constexpr, DROPOUT: tl.constexpr, AXES: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of z and y. GIVEN: the statistics are read, and the tile may be narrower than the row.

    q: None, or where y goes as int8 too, whose scale is that of the whole row: not with GIVEN.
    """
    width = columns * VEC
    first = tl.program_id(1) * COLUMNS
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok_R = row_R < rows
    col_1C = first + tl.arange(0, COLUMNS)[None, :]
    ok_RC = row_ok_R[:, None] & (col_1C < width)
    z_RC = _stream(
        x, residual, layerscale, rowscale, seed, offset,
        row_R, row_ok_R, col_1C, first, width, n1, n2, x0, x1, x2, xc, r0, r1, r2, rc, lc, s0, s1, s2, o,
        threshold, keep_scale, Z_DTYPE, DROPOUT, AXES, UNIT, VEC, ROWS, COLUMNS,
    )  # fmt: skip
    out_RC = row_R.to(tl.int64)[:, None] * width + col_1C
    if z is not None:
        tl.store(z + out_RC, to_dtype(z_RC, z.dtype.element_ty), ok_RC)
    if NORM != "none":
        count = width.to(tl.float32)
        if GIVEN:
            rstd_R = tl.load(rstd + row_R, row_ok_R, other=0.0)
            if NORM == "layer":
                z_RC = z_RC - tl.load(mean + row_R, row_ok_R, other=0.0)[:, None]
        else:
            if NORM == "layer":
                mean_R = tl.div_rn(tl.sum(z_RC, 1), count)
                z_RC = tl.where(ok_RC, z_RC - mean_R[:, None], 0.0)
                tl.store(mean + row_R, mean_R, row_ok_R)
            rstd_R = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(z_RC * z_RC, 1), count) + eps))
            tl.store(rstd + row_R, rstd_R, row_ok_R)
        y_RC = z_RC * rstd_R[:, None]
        if weight is not None:
            y_RC = y_RC * (_load_vector(weight, col_1C, wc, width, UNIT) + weight_offset)
        if bias is not None:
            y_RC = y_RC + _load_vector(bias, col_1C, bc, width, UNIT)
        tl.store(y + out_RC, to_dtype(y_RC, y.dtype.element_ty), ok_RC)
        if q is not None:
            y_RC = tl.where(ok_RC, widened(to_dtype(y_RC, y.dtype.element_ty)), 0.0)
            scale_R = scale_of(tl.max(magnitude_bits(y_RC), 1))
            tl.store(q_scale + row_R, scale_R, row_ok_R)
            tl.store(q + out_RC, nearest(y_RC, scale_R[:, None]), ok_RC)


@triton.jit(do_not_specialize=_FORWARD_INTS.split())
def statistics_kernel(
    x, residual, layerscale, rowscale, seed, offset, mean, rstd,
    rows, columns, n1, n2, x0, x1, x2, xc, r0, r1, r2, rc, lc, s0, s1, s2, o,
    threshold, keep_scale, eps,
    NORM: tl.constexpr, Z_DTYPE: tl.constexpr, DROPOUT: tl.constexpr, AXES: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """mean and rstd of rows wider than a tile: two passes within a tile, tiles joined as in Chan, Golub, LeVeque 1979."""
    width = columns * VEC
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok_R = row_R < rows
    mean_R = tl.zeros([ROWS], tl.float32)
    square_R = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, COLUMNS):
        col_1C = first + tl.arange(0, COLUMNS)[None, :]
        z_RC = _stream(
            x, residual, layerscale, rowscale, seed, offset,
            row_R, row_ok_R, col_1C, first, width, n1, n2, x0, x1, x2, xc, r0, r1, r2, rc, lc, s0, s1, s2, o,
            threshold, keep_scale, Z_DTYPE, DROPOUT, AXES, UNIT, VEC, ROWS, COLUMNS,
        )  # fmt: skip
        if NORM == "layer":
            count = tl.minimum(width - first, COLUMNS).to(tl.float32)
            before = tl.full([], 0, tl.int32) + first
            share = tl.div_rn(count, before.to(tl.float32) + count)
            tile_R = tl.div_rn(tl.sum(z_RC, 1), count)
            z_RC = tl.where(col_1C < width, z_RC - tile_R[:, None], 0.0)
            delta_R = tile_R - mean_R
            mean_R += delta_R * share
            square_R += delta_R * delta_R * (before.to(tl.float32) * share)
        square_R += tl.sum(z_RC * z_RC, 1)
    rstd_R = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square_R, width.to(tl.float32)) + eps))
    if NORM == "layer":
        tl.store(mean + row_R, mean_R, row_ok_R)
    tl.store(rstd + row_R, rstd_R, row_ok_R)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=_BACKWARD_INTS.split())
def backward_kernel(
    dy, dz, z, x, weight, layerscale, rowscale, mean, rstd, sums, seed, offset,
    dx, dresidual, dweight, dbias, dlayerscale,
    rows, columns, n1, n2, block, dy0, dy1, dy2, dyc, dz0, dz1, dz2, dzc, z0, z1, z2, zc, x0, x1, x2, xc, wc, lc,
    s0, s1, s2, o, threshold, keep_scale, weight_offset,
    NORM: tl.constexpr, DROPOUT: tl.constexpr, AXES: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of ``block`` rows, a tile of ROWS at a time, and their partial sums for the parameters.

    ``sums`` [rows, 2]: the two means over the columns, where the tile is narrower than the row; else None. dy is None if
    there is no gradient through the norm.
    """
    width = columns * VEC
    number = tl.program_id(0)
    first = tl.program_id(1) * COLUMNS
    col_1C = first + tl.arange(0, COLUMNS)[None, :]
    count = width.to(tl.float32)
    dweight_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    dlayerscale_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in tl.range(number * block, tl.minimum((number + 1) * block, rows), ROWS, num_stages=STAGES):
        row_R = row + tl.arange(0, ROWS)
        row_ok_R = row_R < rows
        ok_RC = row_ok_R[:, None] & (col_1C < width)
        g_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
        if dy is not None:
            dy_RC = _load(dy, _offset(row_R, n1, n2, dy0, dy1, dy2, AXES, VEC), col_1C, dyc, ok_RC, UNIT)
            xhat_RC = _load(z, _offset(row_R, n1, n2, z0, z1, z2, AXES, VEC), col_1C, zc, ok_RC, UNIT)
            rstd_R1 = tl.load(rstd + row_R, row_ok_R, other=0.0)[:, None]
            if NORM == "layer":
                xhat_RC = xhat_RC - tl.load(mean + row_R, row_ok_R, other=0.0)[:, None]
            xhat_RC = xhat_RC * rstd_R1
            if dweight is not None:
                dweight_RC += dy_RC * xhat_RC
            if dbias is not None:
                dbias_RC += dy_RC
            if weight is not None:
                dy_RC = dy_RC * (_load_vector(weight, col_1C, wc, width, UNIT) + weight_offset)
            if sums is not None:
                along_R1 = tl.load(sums + row_R.to(tl.int64) * 2, row_ok_R, other=0.0)[:, None]
            else:
                along_R1 = tl.div_rn(tl.sum(dy_RC * xhat_RC, 1), count)[:, None]
            g_RC = dy_RC - xhat_RC * along_R1
            if NORM == "layer":
                if sums is not None:
                    g_RC = g_RC - tl.load(sums + row_R.to(tl.int64) * 2 + 1, row_ok_R, other=0.0)[:, None]
                else:
                    g_RC = g_RC - tl.div_rn(tl.sum(dy_RC, 1), count)[:, None]
            g_RC = g_RC * rstd_R1
        if dz is not None:
            g_RC = g_RC + _load(dz, _offset(row_R, n1, n2, dz0, dz1, dz2, AXES, VEC), col_1C, dzc, ok_RC, UNIT)
        out_RC = row_R.to(tl.int64)[:, None] * width + col_1C
        if dresidual is not None:
            tl.store(dresidual + out_RC, to_dtype(g_RC, dresidual.dtype.element_ty), ok_RC)
        if dx is not None or dlayerscale is not None:
            if rowscale is not None:
                scale_R = tl.load(rowscale + _offset(row_R, n1, n2, s0, s1, s2, AXES, 1), row_ok_R, other=0.0)
                g_RC = g_RC * scale_R.to(tl.float32)[:, None]
            if DROPOUT:
                kept_RC = _kept(seed, offset, o, row_R, row_ok_R, first, threshold, DROPOUT, ROWS, COLUMNS)
                g_RC = tl.where(kept_RC, g_RC * keep_scale, 0.0)
            if dlayerscale is not None:
                x_RC = _load(x, _offset(row_R, n1, n2, x0, x1, x2, AXES, VEC), col_1C, xc, ok_RC, UNIT)
                if DROPOUT:
                    x_RC = tl.where(kept_RC, x_RC, 0.0)  # a dropped infinity contributes nothing
                dlayerscale_RC += tl.where(ok_RC, g_RC * x_RC, 0.0)
            if dx is not None:
                if layerscale is not None:
                    g_RC = g_RC * _load_vector(layerscale, col_1C, lc, width, UNIT)
                tl.store(dx + out_RC, to_dtype(g_RC, dx.dtype.element_ty), ok_RC)
    partial_1C = number.to(tl.int64) * width + col_1C
    if dweight is not None:
        tl.store(dweight + partial_1C, tl.sum(dweight_RC, 0)[None, :], col_1C < width)
    if dbias is not None:
        tl.store(dbias + partial_1C, tl.sum(dbias_RC, 0)[None, :], col_1C < width)
    if dlayerscale is not None:
        tl.store(dlayerscale + partial_1C, tl.sum(dlayerscale_RC, 0)[None, :], col_1C < width)


@triton.jit(do_not_specialize=_BACKWARD_INTS.split())
def sums_kernel(
    dy, z, weight, mean, rstd, sums,
    rows, columns, n1, n2, dy0, dy1, dy2, dyc, z0, z1, z2, zc, wc, weight_offset,
    NORM: tl.constexpr, AXES: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The two means over the columns that the gradient of a norm needs, of rows wider than a tile."""
    width = columns * VEC
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok_R = row_R < rows
    dy_base_R = _offset(row_R, n1, n2, dy0, dy1, dy2, AXES, VEC)
    z_base_R = _offset(row_R, n1, n2, z0, z1, z2, AXES, VEC)
    rstd_R1 = tl.load(rstd + row_R, row_ok_R, other=0.0)[:, None]
    if NORM == "layer":
        mean_R1 = tl.load(mean + row_R, row_ok_R, other=0.0)[:, None]
    along_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    plain_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        col_1C = first + tl.arange(0, COLUMNS)[None, :]
        ok_RC = row_ok_R[:, None] & (col_1C < width)
        dy_RC = _load(dy, dy_base_R, col_1C, dyc, ok_RC, UNIT)
        z_RC = _load(z, z_base_R, col_1C, zc, ok_RC, UNIT)
        if weight is not None:
            dy_RC = dy_RC * (_load_vector(weight, col_1C, wc, width, UNIT) + weight_offset)
        if NORM == "layer":
            z_RC = z_RC - mean_R1
            plain_RC += dy_RC
        along_RC += dy_RC * (z_RC * rstd_R1)
    count = width.to(tl.float32)
    tl.store(sums + row_R.to(tl.int64) * 2, tl.div_rn(tl.sum(along_RC, 1), count), row_ok_R)
    if NORM == "layer":
        tl.store(sums + row_R.to(tl.int64) * 2 + 1, tl.div_rn(tl.sum(plain_RC, 1), count), row_ok_R)


@triton.jit(do_not_specialize=["blocks", "columns"])
def combine_kernel(partial, out0, out1, out2, blocks, columns, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds partial sums [3 at most, blocks, columns] over the blocks, in an order that the shape alone fixes."""
    which = tl.program_id(1)
    col_1C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sum_BC = tl.zeros([BLOCKS, COLUMNS], tl.float32)
    for first in range(0, blocks, BLOCKS):
        block_B1 = first + tl.arange(0, BLOCKS)[:, None]
        place_BC = (which * blocks + block_B1).to(tl.int64) * columns + col_1C
        sum_BC += tl.load(partial + place_BC, (block_B1 < blocks) & (col_1C < columns), other=0.0)
    sum_1C = tl.sum(sum_BC, 0)[None, :]
    if which == 0:
        tl.store(out0 + col_1C, to_dtype(sum_1C, out0.dtype.element_ty), col_1C < columns)
    if out1 is not None:  # nested: what is None is dropped when compiling
        if which == 1:
            tl.store(out1 + col_1C, to_dtype(sum_1C, out1.dtype.element_ty), col_1C < columns)
    if out2 is not None:
        if which == 2:
            tl.store(out2 + col_1C, to_dtype(sum_1C, out2.dtype.element_ty), col_1C < columns)
