"""Philox4x32 with 7 rounds in Triton, and what fastlm makes of it: sixteen random bits an element, eight elements a call.

The twin of ``csrc/common/philox.h`` and ``fastlm.reference.philox``, held to the published known-answer vectors and to
those two bit for bit. One call costs fourteen 32x32->64 multiplications; asked for once per element it would cost a
memory-bound kernel more than its memory does, so a tile of random bits is made as [rows, columns / 8] calls and then
unfolded along the columns, in registers where the tile's layout gives a thread eight neighbouring columns.

Counters are given as tensors that broadcast against each other (chunk numbers as [1, columns / 8], row numbers as
[rows, 1], the rest scalars): the first two rounds mix no row word with a column word, so that they are computed
once a row and once a column instead of once an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

# XORed into the seed, low and high word, so that two ops given the same seed draw unrelated masks.
KEY_DROPOUT_ADD_NORM = 0x9E3779B97F4A7C15
KEY_ATTENTION = 0xD1B54A32D192ED03
KEY_QUANTIZE_INT8 = 0x8CB92BA72F3D8DD7


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four uint32 words per counter; all arguments uint32, tensors or scalars that broadcast."""
    M0: tl.constexpr = 0xD2511F53  # multipliers and Weyl constants: Salmon et al. 2011, table 2
    M1: tl.constexpr = 0xCD9E8D57
    W0: tl.constexpr = 0x9E3779B9
    W1: tl.constexpr = 0xBB67AE85
    for _ in tl.static_range(7):
        high0 = tl.umulhi(c0, tl.full([], M0, tl.uint32))
        low0 = tl.mul(c0, M0, sanitize_overflow=False)
        high1 = tl.umulhi(c2, tl.full([], M1, tl.uint32))
        low1 = tl.mul(c2, M1, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, W0, sanitize_overflow=False)
        k1 = tl.add(k1, W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def key_of(seed, CONSTANT: tl.constexpr):
    """The two key words of an int64 seed for the op whose constant is given."""
    LOW: tl.constexpr = CONSTANT & 0xFFFFFFFF
    HIGH: tl.constexpr = (CONSTANT >> 32) & 0xFFFFFFFF
    return low_word(seed) ^ tl.full([], LOW, tl.uint32), high_word(seed) ^ tl.full([], HIGH, tl.uint32)


@triton.jit
def low_word(value):
    return (value & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def high_word(value):
    return ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def random16(c0, c1, c2, c3, k0, k1, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sixteen random bits an element, uint32 [ROWS, COLUMNS]; c0 [1, COLUMNS // 8] chunk numbers, c1.. [ROWS, 1] or scalars.

    Element 8c + 2w + h of a row takes bits 16h to 16h+15 of word w of the call with chunk c.
    """
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    full = tl.zeros([ROWS, COLUMNS // 8], tl.uint32)
    # Two joins put the words in order w0 w1 w2 w3 along a new axis, the third splits each into its halves.
    words = tl.join(tl.join(w0 | full, w2 | full), tl.join(w1 | full, w3 | full))
    words = tl.reshape(words, [ROWS, COLUMNS // 2])
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def keep(c0, c1, c2, c3, k0, k1, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keep-decisions [ROWS, COLUMNS]: an element is dropped if its sixteen bits are below the threshold."""
    return random16(c0, c1, c2, c3, k0, k1, ROWS, COLUMNS) >= threshold.to(tl.uint32)


@triton.jit
def keep_down(c0, c1, c2, c3, k0, k1, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``keep`` of the transposed tile [ROWS, COLUMNS]: chunk numbers c0 [ROWS // 8, 1], the rest [1, COLUMNS] or scalars."""
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    full = tl.zeros([ROWS // 8, COLUMNS], tl.uint32)
    words = tl.join(tl.join(w0 | full, w2 | full), tl.join(w1 | full, w3 | full))
    words = tl.join(words & 0xFFFF, words >> 16)
    words = tl.reshape(tl.permute(words, (0, 2, 3, 4, 1)), [ROWS, COLUMNS])
    return words >= threshold.to(tl.uint32)
