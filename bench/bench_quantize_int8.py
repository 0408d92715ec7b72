"""quantize_int8 beside what people write for it, eager and compiled, and a copy of the same bytes.

Bytes: x read once and q written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fastlm
import torch
from fastlm.bench.harness import DTYPES, Case, Contender, Goal, Prepared, pytest_cases
from torch import Tensor


def compose(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What users of PyTorch write for it."""
    wide = x.float()
    scale = wide.abs().amax(dim, keepdim=True) / 127
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale.squeeze(dim)


def _error(dim: int) -> Callable[[Any, Tensor], float]:
    def error(result: Any, x: Tensor) -> float:
        """The share of numbers that are not the definition's: none may be."""
        q, scale = compose(x, dim)
        return float((result[0] != q).float().mean() + (result[1] != scale).float().mean())

    return error


def _close(dim: int) -> Callable[[Any, Tensor], float]:
    def error(result: Any, x: Tensor) -> float:
        """0 if every number is within one of the definition's and every scale within rounding, else 1."""
        q, scale = compose(x, dim)
        off = (result[0].int() - q.int()).abs().max() > 1
        return float(bool(off or not torch.allclose(result[1], scale, rtol=1e-6, atol=0)))

    return error


def _case(shape: tuple[int, int], dtype: str, dim: int, device: str, smoke: bool = False) -> Case:
    rows, columns = shape

    def inputs(seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, DTYPES[dtype])

    def compiled(x: Tensor) -> Prepared:
        function = torch.compile(compose)
        return lambda: function(x, dim)

    contenders = [
        Contender("fastlm", lambda x: lambda: fastlm.ops.quantize_int8(x, dim=dim), "ours"),
        Contender("eager", lambda x: lambda: compose(x, dim)),
    ]
    if not smoke:  # compiled, a division may become a product: close, not the definition's bits
        contenders.append(Contender("torch.compile", compiled, check=_close(dim)))
    return Case(
        "quantize_int8", f"{rows}x{columns} {dtype} {'rows' if dim else 'columns'}", inputs, tuple(contenders),
        rows * columns * (DTYPES[dtype].itemsize + 1), 0, dtype, device, {"shape": list(shape), "dim": dim}, "alone",
        _error(dim), 0.0, () if smoke else (Goal("eager", 3.0),), smoke, not smoke,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """Activations of a layer of 768, by rows and by columns."""
    yield _case((17, 65), "float32", -1, device, smoke=True)
    yield _case((17, 65), "bfloat16", 0, device, smoke=True)
    for dtype in ("float32", "bfloat16"):
        for dim in (-1, 0):
            yield _case((2048, 768), dtype, dim, device)


SHORT = {"odd": (17, 65), "profile": (2048, 768), "interpreted odd": (5, 65), "interpreted profile": (8, 128)}


def short(device: str, dtype: torch.dtype, kind: str) -> Iterator[Callable[[], Tensor]]:
    """Calls, each returning a number, for the sanitizer and the profiler (fastlm.bench.short)."""
    x = torch.randn(SHORT[kind], device=device).to(dtype)
    yield lambda: fastlm.ops.quantize_int8(x)[1].sum()
    yield lambda: fastlm.ops.quantize_int8(x, dim=0, group=32, transpose=True)[1].sum()


test_bench = pytest_cases(cases)
