"""The one timer of the benchmarks, and the dtypes by the names that cases have for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Prepared = Callable[[], Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Clock:
    """Times one call: events on a GPU, with the L2 cache flushed before each call; the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(4 * l2, dtype=torch.int8, device=device)

    def __call__(self, function: Prepared, repeat: int) -> float:
        if self.cuda:
            total = 0.0
            for _ in range(repeat):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.flush.zero_()
                start.record()
                function()
                end.record()
                end.synchronize()
                total += start.elapsed_time(end) / 1e3
            return total / repeat
        begin = time.perf_counter()
        for _ in range(repeat):
            function()
        return (time.perf_counter() - begin) / repeat
