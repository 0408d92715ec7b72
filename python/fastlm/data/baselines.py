"""What counting reaches on the same split: n-gram models over bytes, and zlib. A neural model must beat these to mean much.

The n-gram model interpolates all orders by Witten and Bell (1991): P_k(c | h) = (n(hc) + t(h) P_{k-1}(c | h')) /
(n(h) + t(h)), where n counts in the training text, t(h) is the number of different bytes seen after h, h' drops h's first
byte, and P_0 is 1/256. An n-gram of up to 8 bytes is one uint64, so counting is a sort and looking up a binary search.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

MOST = 32 << 20  # bytes of training text that are counted


def _codes(text: np.ndarray, order: int) -> np.ndarray:
    """The n-gram that ends at each byte from index order - 1 on."""
    code = np.zeros(len(text) - order + 1, dtype=np.uint64)
    for i in range(order):
        code = (code << np.uint64(8)) | text[i : len(text) - order + 1 + i]
    return code


def _find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def ngram_bits(train: bytes, val: bytes, orders: tuple[int, ...] = (2, 5)) -> dict[int, float]:
    """Bits per byte of validation text under the n-gram models of the given orders (2: bigram)."""
    seen = np.frombuffer(train[:MOST], dtype=np.uint8).astype(np.uint64)
    text = np.frombuffer(val, dtype=np.uint8).astype(np.uint64)
    p = np.full(len(text), 1 / 256)
    out = {}
    for order in range(1, max(orders) + 1):
        if len(seen) < order or len(text) < order:
            break
        keys, counts = np.unique(_codes(seen, order), return_counts=True)
        wanted = _codes(text, order)
        first = np.nonzero(np.diff(keys >> np.uint64(8), prepend=~(keys[:1] >> np.uint64(8))))[0]
        heads, kinds = keys[first] >> np.uint64(8), np.diff(np.append(first, len(keys)))
        totals = np.add.reduceat(counts, first)
        order_n = _find(keys, counts, wanted)
        head_n, head_t = _find(heads, totals, wanted >> np.uint64(8)), _find(heads, kinds, wanted >> np.uint64(8))
        below = p[order - 1 :]
        p[order - 1 :] = np.where(head_n > 0, (order_n + head_t * below) / np.maximum(head_n + head_t, 1), below)
        if order in orders:
            out[order] = float(-np.log2(p).mean())
    return out


def zlib_bits(val: bytes) -> float:
    return 8 * len(zlib.compress(val, 9)) / max(len(val), 1)


def baselines(train: bytes, val: bytes) -> dict[str, float]:
    grams = ngram_bits(train, val)
    names = {2: "bigram", 3: "trigram", 5: "5-gram"}
    found = {names[k]: v for k, v in grams.items() if math.isfinite(v)}
    return {**found, "zlib -9": zlib_bits(val)}
