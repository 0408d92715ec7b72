"""What this processor is good for: whether 16-bit matrix products pay on it."""

from __future__ import annotations

import functools
import statistics
import time

import torch
import torch.nn.functional as F

_SIZE = 256  # large enough for a rate, and 50 milliseconds where PyTorch has no fast path for the dtype


def _linear_seconds(dtype: torch.dtype) -> float:
    """Seconds of a linear layer's three products, forward and both gradients, on [256, 256] matrices on the CPU."""
    x, weight, dy = (torch.rand(_SIZE, _SIZE, device="cpu", dtype=torch.float32).to(dtype) for _ in range(3))
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        F.linear(x, weight), dy @ weight, dy.T @ x
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 the matrix products of training take in ``dtype`` on this CPU; measured once.

    Below one where the processor has instructions for it. Without (x86 before AVX-512 BF16 and AMX) PyTorch 2.13 takes
    ten to a hundred times as long.
    """
    return _linear_seconds(dtype) / _linear_seconds(torch.float32)


def slow(dtype: torch.dtype) -> str:
    """That ``dtype`` does not pay in training on this CPU, with the figure; empty where it does."""
    ratio = slowdown(dtype)
    if ratio <= 1.5:
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"{name} matrix products take {ratio:.3g} times as long as float32's on this processor"
