"""rotary beside what models write (rotated halves over spread tables), torch.compile of it, and a copy of the same bytes.

Bytes: x read and y written once; in the backward their gradients as well. x is a transposed view of [B, L, H, D], as it
comes from a projection. "then matmul": y goes through a matrix [D, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fastlm
import torch
from fastlm.bench.harness import DTYPES, Case, Contender, Goal, Prepared, pytest_cases, ratio_error
from torch import Tensor

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
FORWARD, BOTH = "forward", "forward+backward"


class Inputs(NamedTuple):
    x: Tensor
    cos: Tensor
    sin: Tensor
    dy: Tensor
    matrix: Tensor | None  # [D, D] of the matmul behind the op


def _inputs(shape: tuple[int, int, int, int], dtype: str, device: str, then: bool):
    batch, heads, length, size = shape

    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        x, dy = (torch.randn(batch, length, heads, size, generator=generator) for _ in range(2))
        angle = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, size, 2).float() / size))
        x, dy = (t.to(device, DTYPES[dtype]).transpose(1, 2) for t in (x, dy))
        matrix = (torch.randn(size, size, generator=generator) / size**0.5).to(device, DTYPES[dtype]) if then else None
        return Inputs(x.requires_grad_(), angle.cos().to(device), angle.sin().to(device), dy, matrix)

    return make


def _ours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return fastlm.ops.rotary(x, cos, sin)


def _eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _calls(f: Any, i: Inputs, part: str) -> Prepared:
    """What is timed: y, what the matmul behind it makes of it where inputs have its matrix, and the gradient of x."""

    def outputs() -> tuple[Tensor, ...]:
        y = f(i.x, i.cos, i.sin)
        return (y,) if i.matrix is None else (y, y @ i.matrix)

    def forward() -> Any:
        with torch.no_grad():
            return outputs()

    def both() -> Any:
        found = outputs()
        return *found, *torch.autograd.grad(found[-1], i.x, i.dy)

    return forward if part == FORWARD else both


def _contender(name: str, function: Any, part: str, kind: str) -> Contender:
    def prepare(i: Inputs) -> Prepared:
        return _calls(torch.compile(function) if name == "torch.compile" else function, i, part)

    return Contender(name, prepare, kind)


def _copy(nbytes: int) -> Contender:
    def prepare(i: Inputs) -> Prepared:
        source = torch.empty(nbytes // 2, dtype=torch.int8, device=i.x.device).fill_(1)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Contender("copy_ of the same bytes", prepare, "ceiling", checked=False)


def _error(part: str):
    def error(result: Any, i: Inputs) -> float:
        wide = Inputs._make(None if t is None else t.detach().double() for t in i)
        wide.x.requires_grad_()
        return ratio_error(result, [t.detach() for t in _calls(_eager, wide, part)()])

    return error


def _case(shape: tuple[int, int, int, int], dtype: str, part: str, device: str, smoke: bool = False,
          timed: bool = True, then: bool = False) -> Case:  # fmt: skip
    elements = shape[0] * shape[1] * shape[2] * shape[3] * (1 if part == FORWARD else 2)
    nbytes = 2 * elements * DTYPES[dtype].itemsize
    contenders = (
        _contender("fastlm", _ours, part, "ours"), _contender("eager", _eager, part, "baseline"),
        *((_contender("torch.compile", _eager, part, "baseline"),) if timed else ()),
        *((_copy(nbytes),) if not then else ()),
    )  # fmt: skip
    goals = (Goal("eager", 3.0), Goal("torch.compile", 1.0)) if not smoke and not then else ()
    return Case(
        "rotary", f"{'x'.join(map(str, shape))} {dtype} {part}{' then matmul' if then else ''}",
        _inputs(shape, dtype, device, then), contenders, nbytes, (3 + 2 * shape[3] * then) * elements, dtype, device,
        {"shape": list(shape), "part": part}, "before a matmul" if then else "alone", _error(part), TOLERANCE[dtype],
        goals, smoke, timed,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """Queries of small and middle-sized models; a GPU gets tensors beyond its caches."""
    yield _case((2, 4, 64, 64), "float32", BOTH, device, smoke=True)
    yield _case((1, 2, 17, 32), "bfloat16", BOTH, device, smoke=True, timed=False)
    for shape in [(4, 12, 512, 64), (1, 12, 2048, 128)] if device == "cpu" else [(8, 32, 4096, 64), (4, 32, 4096, 128)]:
        for dtype in TOLERANCE:
            for part in (FORWARD, BOTH):
                yield _case(shape, dtype, part, device)
    for part in (FORWARD, BOTH):
        yield _case((4, 12, 512, 64) if device == "cpu" else (8, 32, 4096, 64), "float32", part, device, then=True)
    yield _case((1, 2, 17, 32), "float32", BOTH, device, smoke=True, timed=False, then=True)


# By kind: the odd shapes for the sanitizer, the real one for the profiler, the same for Triton's interpreter.
SHORT = {"odd": [(2, 3, 65, 80), (1, 2, 17, 128)], "profile": [(4, 32, 4096, 128)],
         "interpreted odd": [(1, 2, 65, 80)], "interpreted profile": [(1, 2, 128, 128)]}  # fmt: skip


def short(device: str, dtype: torch.dtype, kind: str) -> Iterator[Callable[[], Tensor]]:
    """Calls, each returning a loss, for the sanitizer and the profiler (fastlm.bench.short)."""
    for batch, heads, length, size in SHORT[kind]:
        x = torch.randn(batch, length, heads, size, device=device).to(dtype).transpose(1, 2).requires_grad_()
        cos, sin = torch.rand(2, length, size // 2, device=device).unbind()

        def call(x: Tensor = x, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            return fastlm.ops.rotary(x, cos, sin).float().square().sum()

        yield call


test_bench = pytest_cases(cases)
