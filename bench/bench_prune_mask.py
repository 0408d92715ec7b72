"""prune_mask beside what people write: np.partition, torch.topk, reshape and topk for n:m; and a read of the same bytes.

Bytes: the scores read once and the mask written once; of apply_mask_ the weight read and written and the mask read. A
selection must read the scores at least twice where they fit in no cache: once to find the threshold, once to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fastlm
import numpy as np
import torch
from fastlm.bench.harness import DTYPES, Case, Contender, Goal, Prepared, pytest_cases
from torch import Tensor

SIZE = 4096


class Inputs(NamedTuple):
    score: Tensor  # [R, C], what is compared: no negative ones
    options: dict[str, Any]
    mask: Tensor  # of apply_mask_


def _scores(kind: str, rows: int, columns: int, dtype: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "sorted":
        return torch.arange(rows * columns).view(rows, columns).to(DTYPES[dtype])
    if kind == "all-equal":
        return torch.full((rows, columns), 0.5, dtype=DTYPES[dtype])
    x = torch.randn(rows, columns, generator=generator).abs()
    return (x > 1).to(DTYPES[dtype]) if kind == "two-valued" else x.to(DTYPES[dtype])


def _ours(i: Inputs) -> Prepared:
    return lambda: fastlm.ops.prune_mask(i.score, **i.options)


def _partition(i: Inputs) -> Prepared:
    """The threshold by numpy's introselect, and a comparison: ties make the count inexact."""
    flat, count = i.score.float().flatten().numpy(), round(i.options["sparsity"] * i.score.numel())
    return lambda: flat > np.partition(flat, max(count - 1, 0))[max(count - 1, 0)]


def _topk(i: Inputs) -> Prepared:
    count = i.score.numel() - round(i.options["sparsity"] * i.score.numel())

    def run() -> Tensor:
        keep = torch.zeros(i.score.numel(), dtype=torch.bool, device=i.score.device)
        keep[i.score.flatten().topk(count, sorted=False).indices] = True
        return keep

    return run


def _groups(i: Inputs) -> Prepared:
    n, m = map(int, i.options["pattern"].split(":"))

    def run() -> Tensor:
        groups = i.score.view(-1, m)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, dim=1).indices, True)

    return run


def _by_size(result: Any, i: Inputs) -> float:
    """0 if nothing that a threshold keeps is smaller than what it drops, else 1. Ties may make its count inexact."""
    keep, score = torch.as_tensor(result).flatten(), i.score.float().flatten()
    return float(bool(score[keep].min() < score[~keep].max()))


def _by_groups(result: Any, i: Inputs) -> float:
    """The same in each group, of which it keeps n."""
    n, m = map(int, i.options["pattern"].split(":"))
    groups, keep = i.score.float().view(-1, m), torch.as_tensor(result).view(-1, m)
    smallest = groups.masked_fill(~keep, float("inf")).amin(1)
    largest = groups.masked_fill(keep, float("-inf")).amax(1)
    return float(bool((keep.sum(1) != n).any() or (smallest < largest).any()))


def _exact(result: Any, i: Inputs) -> float:
    """0 if the mask is the reference's to the bit, else 1."""
    with fastlm.backend.use("reference"):
        return float(not torch.equal(result, fastlm.ops.prune_mask(i.score, **i.options)))


def _case(name: str, options: dict[str, Any], kind: str, dtype: str, device: str, goals: tuple[Goal, ...],
          shape: tuple[int, int] = (SIZE, SIZE), smoke: bool = False, timed: bool = True) -> Case:  # fmt: skip
    rows, columns = shape

    def inputs(seed: int) -> Inputs:
        score = _scores(kind, rows, columns, dtype, seed).to(device)
        return Inputs(score, options, torch.empty(0, dtype=torch.uint8, device=device))

    others = []
    if "sparsity" in options:
        others = [Contender("topk", _topk, "baseline", check=_by_size)]
        if device == "cpu":
            others.append(Contender("np.partition", _partition, "baseline", check=_by_size))
    elif options["pattern"] != "2:4t":
        others = [Contender("reshape and topk", _groups, "baseline", check=_by_groups)]
    nbytes = rows * columns * DTYPES[dtype].itemsize + rows * ((columns + 7) // 8)
    return Case(
        "prune_mask", f"{rows}x{columns} {dtype} {name}", inputs, (Contender("fastlm", _ours, "ours"), *others), nbytes, 0,
        dtype, device, {"shape": [rows, columns], **options, "scores": kind}, "alone", _exact, 0.0, goals, smoke, timed,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """One matrix of a large model; small ones for the smoke pass."""
    yield _case("50%", {"sparsity": 0.5}, "normal", "float32", device, (), (64, 72), smoke=True, timed=False)
    yield _case("2:4", {"pattern": "2:4"}, "normal", "bfloat16", device, (), (64, 72), smoke=True, timed=False)
    for name, sparsity in (("50%", 0.5), ("90%", 0.9)):
        cpu = (Goal("np.partition", 12.0), Goal("topk", 30.0))
        half = cpu if device == "cpu" else (Goal("topk", 10.0),)
        yield _case(name, {"sparsity": sparsity}, "normal", "float32", device, half)
    for kind in ("all-equal", "two-valued", "sorted"):
        yield _case(f"50% {kind}", {"sparsity": 0.5}, kind, "float32", device, ())
    for pattern in ("2:4", "1:4", "4:8"):
        ours = (Goal("reshape and topk", 60.0),) if pattern == "2:4" and device == "cpu" else ()
        yield _case(pattern, {"pattern": pattern}, "normal", "float32", device, ours)
    yield _case("2:4t", {"pattern": "2:4t"}, "normal", "float32", device, ())


# By kind: the odd shapes for the sanitizer, the real one for the profiler, the same for Triton's interpreter.
SHORT = {"odd": [(65, 83), (17, 128)], "profile": [(SIZE, SIZE)],
         "interpreted odd": [(5, 83)], "interpreted profile": [(16, 128)]}  # fmt: skip


def short(device: str, dtype: torch.dtype, kind: str) -> Iterator[Callable[[], Tensor]]:
    """Calls, each returning a number that is finite, for the sanitizer and the profiler (fastlm.bench.short)."""
    for shape in SHORT[kind]:
        score = torch.randn(shape, device=device).to(dtype)
        for options in ({"sparsity": 0.5}, {"pattern": "2:4"}):

            def call(score: Tensor = score, options: dict[str, Any] = options) -> Tensor:
                mask = fastlm.ops.prune_mask(score, magnitude=True, **options)
                return fastlm.ops.mask_count(mask).double()

            yield call


test_bench = pytest_cases(cases)
