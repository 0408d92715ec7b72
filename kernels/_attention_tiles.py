"""What the Triton attention kernels share: where sequences lie, which tiles a mask leaves, scores, dropout; and a call's
arguments as the kernels take them.

Shape suffixes: M queries of a tile, N its keys, D the padded head size. Position vectors come shaped to broadcast ([M, 1]
and [1, N], or [1, M] and [N, 1]), so that ``score`` and ``probability_gradient`` serve tiles of either orientation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastlm.kernels import table
from fastlm.kernels._common import INTERPRETED, arch_of, rounded
from fastlm.kernels.philox import KEY_ATTENTION, keep, keep_down, key_of, low_word
from fastlm.reference.philox import keep_scale, threshold_of
from torch import Tensor

_KEY = tl.constexpr(KEY_ATTENTION)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E_LOW = tl.constexpr(1.4426950408889634 - 1.4426950216293335)  # what float32 takes from it
LN2_LOW = tl.constexpr(0.6931471805599453 - 0.6931471824645996)
LIMIT = 2**29  # lengths and distances stay below, so that positions fit into 32 bits

# The integers and floats of every call, in the order in which ``Call.scalars`` gives them.
CALL_INTS = (
    "heads group rows keys longest_q longest_k size size_v blocks bias_b bias_h bias_q bias_k slope_b base left right head0 q0 "
    "chunk0 lead threshold"
)


@triton.jit
def operand(value, DTYPE: tl.constexpr):
    """A float32 tile as an operand of tl.dot in DTYPE; the interpreter multiplies the rounded values in float32."""
    if INTERPRETED:
        return rounded(value, DTYPE)
    return value.to(DTYPE)


@triton.jit
def load_tile(pointer, at_R, ok_R, stride, stride_d, size, DTYPE: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
              EVEN: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Rows ``at_R`` of a [length, head size] matrix as an operand [R, DIM], zero outside; ``size`` in units of VEC."""
    d_1D = tl.arange(0, DIM)[None, :]
    place = at_R.to(tl.int64)[:, None] * (stride.to(tl.int64) * VEC) + (d_1D if UNIT else d_1D.to(tl.int64) * stride_d)
    ok = ok_R[:, None] if EVEN else ok_R[:, None] & (d_1D < size * VEC)
    value = tl.load(pointer + place, ok, other=0.0)
    if INTERPRETED:
        return rounded(value.to(tl.float32), DTYPE)
    return value.to(DTYPE)


@triton.jit
def sequence(cu, b, tokens, longest):
    """Start and length of packed sequence ``b``, led nowhere outside the tokens whatever ``cu`` holds."""
    start = tl.minimum(tl.maximum(tl.load(cu + b), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu + b + 1), 0), tokens)
    return start, tl.minimum(tl.maximum(end - start, 0), longest)


@triton.jit
def lengths(cu_q, cu_k, seqlens, b, rows, keys, longest_q, longest_k):
    """(first query, queries, first key, keys) of sequence ``b``."""
    zero = b * 0
    if cu_q is not None:
        start_q, len_q = sequence(cu_q, b, rows, longest_q)
        start_k, len_k = sequence(cu_k, b, keys, longest_k)
    else:
        start_q, len_q, start_k, len_k = zero, zero + rows, zero, zero + keys
        if seqlens is not None:
            len_k = tl.minimum(tl.maximum(tl.load(seqlens + b), 0), keys)
    return start_q, len_q, start_k, len_k


@triton.jit
def tiles(first, last, base, below, above, length, lead, edge, BELOW: tl.constexpr, ABOVE: tl.constexpr,
          STEP: tl.constexpr):  # fmt: skip
    """Tiles of the other axis that ``first``..``last`` of this one see: a sees c if a + base - below <= c <= a + base + above.

    Returns (first tile, tiles, first whole tile, whole tiles): what lies outside the whole ones needs its mask. Tile t
    starts at t * STEP - lead. ``edge``: no tile is whole.
    """
    low = length * 0
    high = length
    whole_low = length * 0
    whole_high = length
    if BELOW:
        low = tl.maximum(first + base - below, 0)
        whole_low = tl.maximum(last + base - below, 0)
    if ABOVE:
        high = tl.maximum(tl.minimum(high, last + base + above + 1), 0)
        whole_high = tl.maximum(tl.minimum(whole_high, first + base + above + 1), 0)
    begin = (low + lead) // STEP
    end = tl.where(high > low, (high + lead + STEP - 1) // STEP, begin)
    whole_begin = tl.minimum(tl.maximum((whole_low + lead + STEP - 1) // STEP, begin), end)
    whole_end = tl.minimum(tl.maximum((whole_high + lead) // STEP, whole_begin), end)
    whole_end = tl.where(edge, whole_begin, whole_end)
    return begin, end - begin, whole_begin, whole_end - whole_begin


@triton.jit
def tanh(y):
    """Within a few ulp also where y is small: Cephes' polynomial there, the exponential elsewhere."""
    z = y * y
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = ((p * z - 3.33332819422e-1) * z) * y + y
    e = tl.exp2(tl.abs(y) * (-2 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(y) < 0.625, small, tl.where(y < 0, -large, large))


@triton.jit
def score(x, i, j, ok_i, bias, bias_q, bias_k, slope, base, len_k, left, right, scale, cap_scale, softcap,
          MASKED: tl.constexpr, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
          BIAS: tl.constexpr):  # fmt: skip
    """The masked scores of a tile of q k^T, and tanh for softcap's gradient.

    NATURAL: in natural units; else without scale, to which the exponential's factor is then applied. BIAS: -1 none, else
    1 if it differs between queries, plus 2 if between keys. ``slope`` None: no ALiBi. ``ok_i`` only guards the bias.
    """
    t = x
    if SOFTCAP:
        t = tanh(x * cap_scale)
        x = softcap * t
    elif NATURAL:
        x = x * scale
    distance = base + i - j
    if BIAS >= 0:
        place = bias
        if BIAS % 2 == 1:
            place = place + i.to(tl.int64) * bias_q
        if BIAS >= 2:
            place = place + j.to(tl.int64) * bias_k
        if BIAS == 0:
            value = tl.load(place)
        elif BIAS == 1:
            value = tl.load(place, ok_i, other=0)
        elif BIAS == 2:
            value = tl.load(place, (j >= 0) & (j < len_k), other=0)
        else:
            value = tl.load(place, ok_i & (j >= 0) & (j < len_k), other=0)
        if bias.dtype.element_ty == tl.int1:
            x = tl.where(value != 0, x, float("-inf"))
        else:
            x = x + value.to(tl.float32)
    if slope is not None:
        x = x - slope * tl.abs(distance).to(tl.float32)
    if MASKED:
        visible = (j >= 0) & (j < len_k)
        if RIGHT:
            visible = visible & (distance >= -right)
        if LEFT:
            visible = visible & (distance <= left)
        x = tl.where(visible, x, float("-inf"))
    return x, t


@triton.jit
def join_sink(lse, rest, sink):
    """(lse, rest, share of the keys) of rows whose softmax has a sink as well; all -inf: -inf, 0 and 0."""
    top = tl.maximum(lse, sink)
    safe = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    keys = tl.exp2(((lse - safe) + rest) * LOG2E)
    whole = keys + tl.exp2((sink - safe) * LOG2E)
    none = whole == 0.0
    more = tl.log(tl.where(none, 1.0, whole))
    joined = tl.where(none, float("-inf"), safe + more)
    left = more - (joined - safe)
    return joined, finite(left), keys / tl.where(none, 1.0, whole)


@triton.jit
def finite(x):
    """0 in the place of what is no finite number."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def kept_tile(seed, batch, head, query, tile, chunk0, q0, threshold, DOWN: tl.constexpr, M: tl.constexpr,
              N: tl.constexpr):  # fmt: skip
    """Keep-decisions of key tile ``tile`` [M, N], or [N, M] if DOWN; ``query`` within the sequence, shaped [M, 1] or [1, M]."""
    k0, k1 = key_of(tl.load(seed), _KEY)
    first = tl.add(chunk0, tile * (N // 8), sanitize_overflow=False)
    c1 = tl.add(query.to(tl.uint32), (query * 0 + q0).to(tl.uint32), sanitize_overflow=False)
    if DOWN:
        c0 = tl.add(tl.arange(0, N // 8)[:, None], first, sanitize_overflow=False).to(tl.uint32)
        kept = keep_down(c0, c1, head, batch, k0, k1, threshold, N, M)
    else:
        c0 = tl.add(tl.arange(0, N // 8)[None, :], first, sanitize_overflow=False).to(tl.uint32)
        kept = keep(c0, c1, head, batch, k0, k1, threshold, M, N)
    return kept


@triton.jit
def batch_word(batch_ids, b):
    """The word of the counter that tells the sequence."""
    if batch_ids is not None:
        return low_word(tl.load(batch_ids + b))
    return low_word(b.to(tl.int64))


class Call:
    """The options of a call as the kernels take them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensors: list[Tensor],
        bias: Tensor | None,
        alibi_slopes: Tensor | None,
        seed: Tensor | None,
        batch_ids: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqlens_k: Tensor | None,
        sinks: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: int,
        window_left: int,
        window_right: int,
        softcap: float,
        scale: float,
        p: float,
        head0: int,
        q0: int,
        k0: int,
    ):
        self.packed = cu_seqlens_q is not None
        self.heads, self.group = q.shape[1], q.shape[1] // k.shape[1]
        self.kv_heads = k.shape[1]
        if cu_seqlens_q is not None:
            self.batch, self.rows, self.keys = cu_seqlens_q.shape[0] - 1, q.shape[0], k.shape[0]
            self.longest_q, self.longest_k = min(max_seqlen_q, self.rows), min(max_seqlen_k, self.keys)
        else:
            self.batch, self.rows, self.keys = q.shape[0], q.shape[2], k.shape[2]
            self.longest_q, self.longest_k = self.rows, self.keys
        self.q, self.bias, self.p, self.tensors = q, bias, p, tensors
        right = 0 if causal in (1, 2) else window_right
        self.lead = k0 % 8 if p > 0 else 0  # tiles of keys start where a random number does
        # float32: the backward must round its scores as the forward did, or lse does not normalize what it computes.
        floats = q.dtype == torch.float32 or (bias is not None and bias.dtype != torch.bool)
        natural = floats or alibi_slopes is not None or softcap > 0 or not 0 < scale <= 0.5
        self.unit, self.vec = vectors(tensors)
        size, size_v = q.shape[-1], v.shape[-1]
        self.dim, self.dim_v = (max(16, triton.next_power_of_2(n)) for n in (size, size_v))
        self.sinks = sinks
        self.pointers = (bias, alibi_slopes, seed, batch_ids, cu_seqlens_q, cu_seqlens_k, seqlens_k)
        bias_strides = (0, 0, 0, 0) if bias is None else bias.stride()
        slope_stride = alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0
        self._sizes = (
            *(self.heads, self.group, self.rows, self.keys, self.longest_q, self.longest_k),
            *(size // self.vec, size_v // self.vec),
        )
        self._places = (
            *(*bias_strides, slope_stride, q0 - k0, min(window_left, LIMIT * 2 - 1), min(right, LIMIT * 2 - 1)),
            *(head0, q0, k0 // 8, self.lead, threshold_of(p)),
        )
        self._floats = (
            scale,
            1.0 if natural else scale,
            scale / softcap if softcap > 0 else 0.0,
            softcap,
            keep_scale(p),
        )
        self.keep_scale = keep_scale(p)
        kind = -1
        if bias is not None:
            kind = (1 if bias.shape[2] > 1 and bias.stride(2) else 0) + (
                2 if bias.shape[3] > 1 and bias.stride(3) else 0
            )
        self.constants = {
            "SHIFT": causal < 2, "LEFT": 0 <= window_left < LIMIT * 2, "RIGHT": 0 <= right < LIMIT * 2, "BIAS": kind,
            "SOFTCAP": softcap > 0, "NATURAL": natural, "DROPOUT": p > 0, "VEC": self.vec, "UNIT": self.unit,
            "EVEN": self.dim == size, "DIM": self.dim, "EVEN_V": self.dim_v == size_v, "DIM_V": self.dim_v,
        }  # fmt: skip
        names = {"dropout": p > 0, "bias": bias is not None or alibi_slopes is not None or softcap > 0}
        self.features = frozenset(name for name, has in names.items() if has)

    def scalars(self, blocks: int) -> tuple[Any, ...]:
        """CALL_INTS and the floats."""
        return (*self._sizes, blocks, *self._places, *self._floats)

    def config(self, kernel: str) -> dict[str, Any]:
        """The table's choice."""
        dtype = table.DTYPE_NAME[self.q.dtype]
        return table.config(
            kernel, arch=arch_of(self.q.device), dtype=dtype, size=max(self.dim, self.dim_v), features=self.features
        )

    def strides(self, t: Tensor) -> tuple[int, int, int, int]:
        """Batch, head, row (in units of VEC) and column stride; of packed [T, H, D] the batch stride is 0."""
        b, h, length = (0, t.stride(1), t.stride(0)) if self.packed else t.stride()[:3]
        return b // self.vec, h // self.vec, length // self.vec, t.stride(-1)


def vectors(tensors: list[Tensor]) -> tuple[bool, int]:
    """Whether every last stride is 1, and how many elements every row's address is a multiple of: 8 or 1."""
    unit = all(t.stride(-1) == 1 for t in tensors)
    aligned = unit and all(s % 8 == 0 for t in tensors for s in (*t.stride()[:-1], t.shape[-1]))
    return unit, 8 if aligned else 1
