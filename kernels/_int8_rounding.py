"""How a line becomes 8-bit numbers, in Triton: shared by quantize_int8 and dropout_add_norm, whose bits are the same.

Divisions are rounded to nearest, and a largest magnitude is that of bits, where a NaN is above all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, float32, as int32: in the order of magnitudes, with NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(most):
    """The scale of a largest magnitude given by its bits: 0 below 2**-126, NaN for a NaN or an infinity."""
    scale = tl.div_rn(most.to(tl.float32, bitcast=True), 127.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    return tl.where(most < 0x7F800000, scale, float("nan"))


@triton.jit
def nearest(x, scale):
    """clamp(rint(x / scale), -127, 127) as int8; 0 where scale is 0 or NaN."""
    live = scale > 0.0
    ratio = tl.div_rn(x, tl.where(live, scale, 1.0))
    ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
    ratio = (ratio + 12582912.0) - 12582912.0  # 1.5 * 2**23: to nearest, ties to even
    return tl.where(live, ratio, 0.0).to(tl.int8)
