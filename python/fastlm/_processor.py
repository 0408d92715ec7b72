"""What this processor is good for: whether 16-bit matrix products pay on it."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F

_SIZE = 256  # large enough for a rate, small enough not to be noticed where PyTorch has no fast path


def _linear_seconds(dtype: torch.dtype) -> float:
    """Seconds of a linear layer's three products, forward and both gradients, on [256, 256] matrices on the CPU."""
    x = torch.linspace(0, 1, _SIZE * _SIZE, device="cpu", dtype=torch.float32).view(_SIZE, _SIZE).to(dtype)
    begin = time.perf_counter()
    F.linear(x, x), x @ x, x.T @ x
    return time.perf_counter() - begin


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 the matrix products of training take in ``dtype`` on this CPU; measured once.

    Below one where the processor has instructions for it. Without (in bfloat16: x86 before AVX-512 BF16 and AMX) PyTorch
    has no fast path, and falls behind the more the larger the matrices. One thread, and the least of ten turns, so that a
    busy machine does not sway it.
    """
    if dtype == torch.float32:
        return 1.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads that wait for each other would hide what they compute
    try:
        turns = [(_linear_seconds(dtype), _linear_seconds(torch.float32)) for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    return min(t for t, _ in turns) / min(t for _, t in turns)


def sentence(dtype: torch.dtype) -> str:
    """``slowdown`` in words."""
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} matrix products take {float(f'{slowdown(dtype):.2g}'):g} times as long as float32's on this processor"
    )


def slow(dtype: torch.dtype) -> str:
    """That ``dtype`` does not pay in training on this CPU, with the figure; empty where it does."""
    return sentence(dtype) if slowdown(dtype) > 1.5 else ""
