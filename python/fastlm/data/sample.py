"""Which tokens are sample n: a pure function of (seed, data, n), the same for any number of ranks, workers or restarts.

Epoch e visits every window of the training tokens once, in the order of a pseudo-random permutation: a Feistel network
over the next power of four with cycle walking (Black and Rogaway 2002), so nothing is shuffled and nothing remembered.
Windows start at a phase drawn per epoch, so that epochs cut the text at different places. Sources are mixed by weight
in rounds of ROUND samples, each round holding an exact number of samples of each source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

ROUND = 1024
MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def key(*parts: object) -> int:
    """A 64-bit key of anything printable."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, seed: int, rounds: int = 6) -> np.ndarray:
    """The places of `index` (each in [0, size)) under the permutation of [0, size) that `seed` names."""
    half = np.uint64(max((max(size - 1, 1).bit_length() + 1) // 2, 1))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(key(seed, r)) for r in range(rounds)]
    out = index.astype(np.uint64)
    walking = np.ones(len(out), dtype=bool)
    while walking.any():
        x = out[walking]
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (_mix(right + k) & low)
        out[walking] = (left << half) | right
        walking[walking] = out[walking] >= np.uint64(size)
    return out.astype(np.int64)


class Windows:
    """Samples of `context` + 1 tokens out of shards: `tokens(n)` for an array of sample numbers gives [len(n), context+1]."""

    def __init__(self, shards: Sequence[np.ndarray], context: int, seed: int, name: str) -> None:
        self.context, self.seed, self.name = context, seed, name
        self.shards = [s for s in shards if len(s) > context]
        self.counts = np.array([max((len(s) - context) // context, 1) for s in self.shards], dtype=np.int64)
        self.ends = np.cumsum(self.counts)
        self.size = int(self.ends[-1]) if len(self.ends) else 0

    def tokens(self, n: np.ndarray) -> np.ndarray:
        out = np.empty((len(n), self.context + 1), dtype=np.int64)
        for epoch in np.unique(n // self.size):
            rows = np.nonzero(n // self.size == epoch)[0]
            window = permute(n[rows] % self.size, self.size, key(self.seed, self.name, int(epoch)))
            shard = np.searchsorted(self.ends, window, side="right")
            for s in np.unique(shard):
                tokens, count = self.shards[s], int(self.counts[s])
                room = min(len(tokens) - count * self.context, self.context)
                phase = key(self.seed, self.name, int(epoch), int(s)) % room
                at = rows[shard == s]
                start = (window[shard == s] - (self.ends[s] - count)) * self.context + phase
                out[at] = tokens[start[:, None] + np.arange(self.context + 1)]
        return out

    def batch(self, n: np.ndarray) -> tuple[np.ndarray, ...]:
        """Inputs and targets [len(n), context] of samples n."""
        tokens = self.tokens(n)
        return tokens[:, :-1], tokens[:, 1:]


def shares(weights: Sequence[float]) -> np.ndarray:
    """Samples of each source in a round."""
    ends = np.rint(np.cumsum(np.array(weights, dtype=np.float64) / sum(weights)) * ROUND)
    return np.diff(ends.astype(np.int64), prepend=0)


def mixture(n: np.ndarray, weights: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, number within the source) of samples n: each round of ROUND samples holds fixed shares of the sources."""
    if len(weights) == 1:
        return np.zeros(len(n), dtype=np.int64), n
    counts = shares(weights)
    ends = np.cumsum(counts)
    place = np.empty(len(n), dtype=np.int64)
    for number in np.unique(n // ROUND):
        rows = n // ROUND == number
        place[rows] = permute(n[rows] % ROUND, ROUND, key(seed, "mixture", int(number)))
    source = np.searchsorted(ends, place, side="right")
    return source, (n // ROUND) * counts[source] + place - (ends - counts)[source]
