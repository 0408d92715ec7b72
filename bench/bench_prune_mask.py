"""prune_mask beside what people write: np.partition, torch.topk, reshape and topk for n:m; and a read of the same bytes.

Bytes: the scores read once and the mask written once; of apply_mask_ the weight read and written and the mask read; of
masked AdamW four tensors read, three written, and the mask read. A selection must read the scores at least twice where
they fit in no cache: once to find the threshold, once to compare. "read" is a loop that reads the scores and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fastlm
import numpy as np
import torch
from fastlm import _native
from fastlm.bench.harness import DTYPES, Case, Contender, Goal, Missing, Prepared, pytest_cases
from torch import Tensor
from torch.optim.adamw import adamw

SIZE = 4096
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


class Inputs(NamedTuple):
    score: Tensor  # [R, C], what is compared: no negative ones
    options: dict[str, Any]


class Held(NamedTuple):
    """A weight that is pruned, as it trains."""

    weight: Tensor  # [R, C]
    grad: Tensor
    moments: tuple[Tensor, Tensor]
    mask: Tensor

    def state(self) -> list[Tensor]:
        """Weight, gradient, moments and steps of one contender's own."""
        return [self.weight.clone(), self.grad.clone(), *(m.clone() for m in self.moments), self.weight.new_zeros(())]


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


def _read(i: Inputs) -> Prepared:
    """Reads what the scores are, by as many threads."""
    if i.score.device.type != "cpu":
        raise Missing("the read loop is one of the CPU's core")
    if _native.missing():
        raise Missing(_native.missing())
    address, size = i.score.data_ptr(), i.score.numel() * i.score.element_size()
    threads = torch.get_num_threads()
    return functools.partial(_native._C.read_cpu, address, size, threads)


def _apply(i: Held) -> Prepared:
    weight = i.weight.clone()
    return lambda: fastlm.ops.apply_mask_(weight, i.mask)


def _by_multiplication(i: Held) -> Prepared:
    """As torch.nn.utils.prune does at each forward, but in place: a mask of the weight's dtype."""
    weight, mask = i.weight.clone(), fastlm.ops.mask_to_bool(i.mask, i.weight.shape[1]).to(i.weight.dtype)
    return lambda: weight.mul_(mask)


def _read_and_write(i: Held) -> Prepared:
    """PyTorch's own read and write of each element."""
    weight = i.weight.clone()
    return lambda: weight.mul_(1.0)


def _masked_adamw(i: Held) -> Prepared:
    w, g, m, v, step = i.state()

    def run() -> Tensor:
        fastlm.ops.masked_adamw_([w], [g], [m], [v], [step], [i.mask], **ADAMW)
        return w

    return run


def _fused_adamw(masked: bool, i: Held) -> Prepared:
    """PyTorch's fused AdamW, and what people write behind it: a multiplication by a bool mask."""
    w, g, m, v, step = i.state()
    keep = fastlm.ops.mask_to_bool(i.mask, w.shape[1])
    options = {k: x for k, x in ADAMW.items() if k != "betas"} | dict(zip(("beta1", "beta2"), ADAMW["betas"]))

    def run() -> Tensor:
        adamw([w], [g], [m], [v], [], [step], fused=True, amsgrad=False, maximize=False, **options)
        return w.mul_(keep) if masked else w

    return run


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
    if keep.all() or not keep.any():  # of equal scores a threshold keeps none
        return float(bool(score.min() < score.max()))
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


def _held(result: Any, i: Held) -> float:
    """0 if the result is i's weight with the mask applied, else 1: to the bit where nothing else changes it."""
    return float(not torch.equal(result, fastlm.ops.apply_mask_(i.weight.clone(), i.mask)))


def _stepped(result: Any, i: Held) -> float:
    """The largest difference from a first step in float64, of the weights that stay; a pruned one must be 0."""
    keep = fastlm.ops.mask_to_bool(i.mask, i.weight.shape[1])
    w, g, (m, v) = i.weight.double(), i.grad.double(), (x.double() for x in i.moments)
    (b1, b2), lr = ADAMW["betas"], ADAMW["lr"]
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    w = w * (1 - lr * ADAMW["weight_decay"]) - lr * m / (1 - b1) / ((v / (1 - b2)).sqrt() + ADAMW["eps"])
    if result[~keep].any():
        return 1.0
    return float((result.double() - w)[keep].abs().max())


def _held_cases(shape: tuple[int, int], dtype: str, device: str, smoke: bool) -> Iterator[Case]:
    """apply_mask_ and masked AdamW on a weight of which a half is pruned."""
    rows, columns = shape
    item, mask_bytes, count = DTYPES[dtype].itemsize, rows * ((columns + 7) // 8), rows * columns

    def inputs(seed: int) -> Held:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(rows, columns, generator=generator).to(DTYPES[dtype]).to(device) for _ in range(4)]
        mask = fastlm.ops.prune_mask(drawn[0], sparsity=0.5, magnitude=True)
        return Held(fastlm.ops.apply_mask_(drawn[0], mask), drawn[1], (drawn[2], drawn[3].abs()), mask)

    name = f"{rows}x{columns} {dtype}"
    yield Case(
        "prune_mask", f"{name} apply_mask_", inputs,
        (Contender("fastlm", _apply, "ours"), Contender("mul_ by a float mask", _by_multiplication, "baseline"),
         Contender("read and write", _read_and_write, "ceiling", checked=False)),
        2 * count * item + mask_bytes, 0, dtype, device, {"shape": [rows, columns], "work": "apply_mask_"}, "alone", _held,
        0.0, () if smoke else (Goal("read and write", 1 / 1.3),), smoke, not smoke,
    )  # fmt: skip
    yield Case(
        "prune_mask", f"{name} masked AdamW", inputs,
        (Contender("fastlm", _masked_adamw, "ours"),
         Contender("fused AdamW and mul_", functools.partial(_fused_adamw, True), "baseline"),
         Contender("fused AdamW alone", functools.partial(_fused_adamw, False), "ceiling", checked=False)),
        7 * count * item + mask_bytes, 0, dtype, device, {"shape": [rows, columns], "work": "masked_adamw_"}, "alone",
        _stepped, 1e-5, () if smoke else (Goal("fused AdamW alone", 1 / 1.05),), smoke, not smoke,
    )  # fmt: skip


def _of_normal(i: Inputs) -> Prepared:
    """The same selection over normal scores: what theirs may take in the worst case, as a multiple of it."""
    rows, columns = i.score.shape
    score = _scores("normal", rows, columns, str(i.score.dtype).removeprefix("torch."), 1).to(i.score.device)
    return lambda: fastlm.ops.prune_mask(score, **i.options)


def _copy(i: Inputs) -> Prepared:
    """A copy that reads and writes as many bytes as the case does together."""
    count = i.score.numel() * i.score.element_size() + i.score.numel() // 8
    source = torch.empty(count // 2, dtype=torch.uint8, device=i.score.device)
    return functools.partial(torch.empty_like(source).copy_, source)


def _case(name: str, options: dict[str, Any], kind: str, dtype: str, device: str, goals: tuple[Goal, ...],
          shape: tuple[int, int] = (SIZE, SIZE), smoke: bool = False, timed: bool = True) -> Case:  # fmt: skip
    rows, columns = shape

    def inputs(seed: int) -> Inputs:
        score = _scores(kind, rows, columns, dtype, seed).to(device)
        return Inputs(score, options)

    others = []
    if "sparsity" in options:
        others = [Contender("topk", _topk, "baseline", check=_by_size)]
        if device == "cpu":
            others.append(Contender("np.partition", _partition, "baseline", check=_by_size))
    elif options["pattern"] != "2:4t":
        others = [Contender("reshape and topk", _groups, "baseline", check=_by_groups)]
    if device == "cpu":
        others.append(Contender("read", _read, "ceiling", checked=False))
    else:
        others.append(Contender("copy of as many bytes", _copy, "ceiling", checked=False))
    if kind != "normal":
        others.append(Contender("normal scores", _of_normal, "ceiling", checked=False))
    nbytes = rows * columns * DTYPES[dtype].itemsize + rows * ((columns + 7) // 8)
    return Case(
        "prune_mask", f"{rows}x{columns} {dtype} {name}", inputs, (Contender("fastlm", _ours, "ours"), *others), nbytes, 0,
        dtype, device, {"shape": [rows, columns], **options, "scores": kind}, "alone", _exact, 0.0, goals, smoke, timed,
    )  # fmt: skip


def _by_isa(device: str, avx2: float, avx512: float) -> float | None:
    """What is asked of a CPU of this class; None where there is no kernel of it."""
    if device != "cpu" or _native.missing():
        return None
    return avx512 if _native._C.cpu_isa() == "avx512" else avx2


def _reads(device: str, avx2: float, avx512: float) -> tuple[Goal, ...]:
    """At most so many times what reading the scores costs."""
    most = _by_isa(device, avx2, avx512)
    return () if most is None else (Goal("read", 1 / most),)


def _times(device: str, than: str, avx2: float, avx512: float) -> tuple[Goal, ...]:
    """At least so many times as fast as another contender."""
    least = _by_isa(device, avx2, avx512)
    return () if least is None else (Goal(than, least),)


def cases(device: str) -> Iterator[Case]:
    """One matrix of a large model; small ones for the smoke pass."""
    yield _case("50%", {"sparsity": 0.5}, "normal", "float32", device, (), (64, 72), smoke=True, timed=False)
    yield _case("2:4", {"pattern": "2:4"}, "normal", "bfloat16", device, (), (64, 72), smoke=True, timed=False)
    yield from _held_cases((64, 72), "float32", device, smoke=True)
    yield from _held_cases((SIZE, SIZE), "float32", device, smoke=False)
    for name, sparsity in (("50%", 0.5), ("90%", 0.9)):
        goals = (
            *_times(device, "np.partition", 12, 15), *_times(device, "topk", 30, 45), *_reads(device, 6, 4)
        )  # fmt: skip
        yield _case(name, {"sparsity": sparsity}, "normal", "float32", device, goals)
    for kind in ("all-equal", "two-valued", "sorted"):
        slow = (Goal("normal scores", 1 / 3),) if device == "cpu" else ()
        yield _case(f"50% {kind}", {"sparsity": 0.5}, kind, "float32", device, slow)
    for pattern in ("2:4", "1:4", "4:8"):
        goals = (*_times(device, "reshape and topk", 60, 80), *_reads(device, 1.8, 1.3)) if pattern == "2:4" else ()
        yield _case(pattern, {"pattern": pattern}, "normal", "float32", device, goals)
    if device != "cpu":
        large, part = (2 * SIZE, 2 * SIZE), (Goal("topk", 10.0),)
        yield _case("50%", {"sparsity": 0.5}, "normal", "float32", device, part, large)
        copy = (Goal("copy of as many bytes", 0.85),)
        yield _case("2:4", {"pattern": "2:4"}, "normal", "float32", device, copy, large)
    yield _case("2:4t", {"pattern": "2:4t"}, "normal", "float32", device, _reads(device, 10, 5))


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
