"""Philox4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in plain PyTorch.

The definition that ``csrc/common/philox.h`` and ``kernels/philox.py`` are held to, bit for bit. All words are int64
tensors with values in [0, 2**32).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and Weyl constants of the paper, table 2
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

# XORed into the seed, so that two ops given the same seed draw unrelated masks.
OP_KEY = {
    "dropout_add_norm": 0x9E3779B97F4A7C15,
    "attention": 0xD1B54A32D192ED03,
    "quantize_int8": 0x8CB92BA72F3D8DD7,
}


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a*b, in int64 without overflow: b is taken in two halves of 16 bits."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS):
    """Four 32-bit words for each counter. ``counter`` and ``key``: int64 tensors that broadcast, values below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def key_of(seed: Tensor, op: str) -> tuple[Tensor, Tensor]:
    """The two 32-bit key words of ``seed`` (int64 scalar tensor) for ``op``. No value leaves the device."""
    constant = OP_KEY[op]
    signed = constant - (1 << 64) if constant >= 1 << 63 else constant
    key = seed ^ signed
    return key & _LOW, (key >> 32) & _LOW


def threshold_of(p: float) -> int:
    """Elements whose 16 random bits are below this are dropped: p in steps of 2**-16, and never all of them."""
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """What survivors are multiplied by: the inverse of the exact keep-probability."""
    return 65536 / (65536 - threshold_of(p))


def bits16(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], size: int) -> Tensor:
    """Sixteen random bits an element. ``counter[0]`` broadcasts along the last axis as ``arange(ceil(size / 8))``.

    Returns an int64 tensor whose last axis is ``size``: element 8c + 2w + h takes bits 16h to 16h+15 of word w.
    """
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, key)), dim=-1)  # [..., chunks, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-3)  # [..., chunks * 8]
    return halves[..., :size]


def keep_mask(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], p: float, size: int
) -> Tensor:
    """Boolean keep-decisions from ``bits16``, of its shape."""
    return bits16(counter, key, size) >= threshold_of(p)
