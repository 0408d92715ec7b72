"""dropout_add_norm beside PyTorch's composition, torch.compile of it, Liger, and a copy of the same bytes.

Each case runs alone, one shape also followed by a matmul that reads the output; the README quotes that and the training
step. Bytes: what any implementation must move, x and residual in, z and y out; in the backward dy, dz, z in, dx (and
dresidual) out.

A result is checked as it was timed, dropout and compilation included: PyTorch and peers draw masks of their own, which can
be read from their z and dx (see ``_own_mask``). On a GPU fastlm runs as dispatched and, beside it, on each of its backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fastlm
import torch
import torch.nn.functional as F
from fastlm import _native
from fastlm.bench import peers
from fastlm.bench.harness import DTYPES, Case, Contender, Goal, Missing, Prepared, pytest_cases, ratio_error
from fastlm.bench.results import GPU_BACKENDS
from fastlm.reference.dropout_add_norm import dropout_mask
from fastlm.reference.philox import keep_scale
from torch import Tensor

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
FORWARD, BOTH = "forward", "forward+backward"
LARGE = 40e6  # elements past which a GPU's caches cannot help


class Inputs(NamedTuple):
    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    dz: Tensor
    seed: Tensor
    matrix: Tensor | None  # of the matmul behind the op


def _inputs(rows: int, columns: int, dtype: str, device: str, grad: bool, then: str) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

        found = Inputs(
            normal(rows, columns), normal(rows, columns), normal(columns), normal(columns), normal(rows, columns),
            normal(rows, columns), torch.tensor(seed + 1, device=device),
            normal(columns, columns) / columns**0.5 if then else None,
        )  # fmt: skip
        for leaf in (found.x, found.residual, found.weight, found.bias):
            leaf.requires_grad_(grad)
        return found

    return make


def _composed(i: Inputs, dropped: Tensor) -> tuple[Tensor, Tensor]:
    z = i.residual + dropped
    return F.layer_norm(z, z.shape[-1:], i.weight, i.bias), z


def _eager(i: Inputs, p: float) -> tuple[Tensor, Tensor]:
    return _composed(i, F.dropout(i.x, p))


def _ours(i: Inputs, p: float) -> tuple[Tensor, Tensor]:
    out = fastlm.ops.dropout_add_norm(i.x, i.residual, i.weight, i.bias, p=p, seed=i.seed)
    return out[0], out[1]


def _on_backend(name: str, p: float, part: str) -> Contender:
    """fastlm on one of its GPU backends, which the dispatch may not choose."""

    def prepare(i: Inputs) -> Prepared:
        example = fastlm.backend.example("dropout_add_norm", i.x.device.type)
        with fastlm.backend.use(name):
            try:
                fastlm.backend.which("dropout_add_norm", **example)
            except fastlm.backend.BackendError as why:
                raise Missing(str(why)) from None
        call = _calls(_ours, i, p, part)

        def run() -> Any:
            with fastlm.backend.use(name):
                return call()

        return run

    return Contender(f"fastlm {name}", prepare, "self")


def _liger(i: Inputs, p: float) -> tuple[Tensor, Tensor]:
    liger = peers.load("liger-kernel", "liger_kernel.ops.layer_norm")
    if i.x.device.type == "cpu":
        raise Missing("liger-kernel has no CPU kernels")
    z = i.residual + F.dropout(i.x, p)
    return liger.LigerLayerNormFunction.apply(z, i.weight, i.bias, 1e-5), z


def _calls(function: Any, i: Inputs, p: float, part: str) -> Prepared:
    """What is timed: y, z, and all gradients; in front of a matmul where inputs have its matrix."""
    leaves = (i.x, i.residual, i.weight, i.bias)

    def forward() -> Any:
        with torch.no_grad():
            y, z = function(i, p)
            return (y, z) if i.matrix is None else (y, z, y @ i.matrix)

    def both() -> Any:
        y, z = function(i, p)
        last = y if i.matrix is None else y @ i.matrix
        return y, z, *(() if i.matrix is None else (last,)), *torch.autograd.grad((last, z), leaves, (i.dy, i.dz))

    return forward if part == FORWARD else both


def _contender(name: str, function: Any, p: float, part: str, kind: str) -> Contender:
    def prepare(i: Inputs) -> Prepared:
        return _calls(torch.compile(function) if name == "torch.compile" else function, i, p, part)

    return Contender(name, prepare, kind, check=None if kind == "ours" else _error(p, part, own_mask=True))


def _own_mask(result: Any, i: Inputs, p: float, part: str, tolerance: float) -> Tensor | None:
    """Which elements a contender that draws its own mask kept, float64; None where its dropout is not one of ``p``.

    From z = residual + scaled and masked x, whichever of the two is nearer; with the backward, from dx, which is 0 where x
    was dropped. z and dx are then held to this mask, so that a wrong scale, or a backward with another mask, is an error.
    """
    z, x, residual = result[1].detach().double(), i.x.detach().double(), i.residual.detach().double()
    off = (z - residual).abs()
    if part == FORWARD:
        kept = (z - residual - x / (1 - p)).abs() < off
    else:  # a gradient may also be 0 by cancellation; and an x too small to be seen in z may have been kept or not
        kept = (result[-4] != 0) | (off > tolerance * z.abs().max())
    share = kept.double().mean().item()
    # 6 standard deviations, and a hundredth for elements too small to tell
    return kept.double() if abs(share - (1 - p)) < 0.01 + 6 * (p * (1 - p) / kept.numel()) ** 0.5 else None


def _error(p: float, part: str, own_mask: bool = False) -> Callable[[Any, Inputs], float]:
    """Largest error of all results, with fastlm's mask or, ``own_mask``, with the contender's own."""

    def error(result: Any, i: Inputs) -> float:
        wide = Inputs._make(t.detach().double() if t is not None and t.is_floating_point() else t for t in i)
        # PyTorch sums the gradients of weight and bias in bfloat16: 7 to 20% off where ours are half a percent off.
        slack = 20.0 if own_mask and i.x.dtype == torch.bfloat16 else 1.0
        scale: Any = 1.0
        if p > 0 and own_mask:
            kept = _own_mask(result, i, p, part, TOLERANCE[str(i.x.dtype).removeprefix("torch.")])
            if kept is None:
                return float("inf")
            scale = kept / (1 - p)
        elif p > 0:
            scale = dropout_mask(i.x.shape[0], i.x.shape[1], i.seed, None, p).double() * keep_scale(p)
        for leaf in (wide.x, wide.residual, wide.weight, wide.bias):
            leaf.requires_grad_()
        expected = _calls(lambda w, _: _composed(w, w.x * scale), wide, p, part)()
        errors = [ratio_error(got, want.detach()) for got, want in zip(result, expected, strict=True)]
        return max(e / slack if at >= len(errors) - 2 and part == BOTH else e for at, e in enumerate(errors))

    return error


def _copy(nbytes: int) -> Contender:
    """A ``copy_`` that reads and writes as many bytes, into an existing buffer."""

    def prepare(i: Inputs) -> Prepared:
        source = torch.empty(nbytes // 2, dtype=torch.int8, device=i.x.device).fill_(1)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Contender("copy_ of the same bytes", prepare, "ceiling", checked=False)


def _case(rows: int, columns: int, dtype: str, p: float, part: str, device: str, goals: dict[str, float],
          then: str = "", compiled: bool = True, smoke: bool = False, timed: bool = True) -> Case:  # fmt: skip
    item = DTYPES[dtype].itemsize
    tensors = 4 if part == FORWARD else 4 + 4 + (1 if p > 0 else 0)  # backward: dy, dz, z in; dx (and dresidual) out
    nbytes = tensors * rows * columns * item
    # About 12 an element forward and 20 backward (kernels/dropout_add_norm.py); the matmul behind it computes 2 * columns
    # an element forward and the same for its input's gradient, and its bytes are those of its matrix, y and the product.
    flops = (12 if part == FORWARD else 32) * rows * columns
    if then:
        flops += (2 if part == FORWARD else 4) * rows * columns**2
        nbytes += (1 if part == FORWARD else 2) * (2 * rows * columns + columns**2) * item
    contenders = [
        _contender("fastlm", _ours, p, part, "ours"),
        _contender("eager", _eager, p, part, "baseline"),
        _contender("liger-kernel", _liger, p, part, "peer"),
        *(() if then else (_copy(nbytes),)),
    ]
    if compiled:
        contenders.insert(2, _contender("torch.compile", _eager, p, part, "baseline"))
    if device != "cpu" and not then:
        contenders[1:1] = [_on_backend(name, p, part) for name in GPU_BACKENDS]
    suffix = " then matmul" if then else ""
    return Case(
        "dropout_add_norm", f"{rows}x{columns} {dtype} p={p:g} {part}{suffix}",
        _inputs(rows, columns, dtype, device, part != FORWARD, then), tuple(contenders), nbytes, flops, dtype, device,
        {"rows": rows, "columns": columns, "p": p, "part": part}, "before a matmul" if then else "alone",
        _error(p, part), TOLERANCE[dtype], tuple(Goal(k, v) for k, v in goals.items()), smoke, timed,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """The goals are those of the design's table for two AVX-512 cores, and for an H200-class GPU."""
    for part in (FORWARD, BOTH):  # the smoke pass: each kind once, on shapes that cost nothing
        for dtype, p, then, compiled in (("float32", 0.1, "", part == BOTH), ("bfloat16", 0.2, "", False),
                                         ("float32", 0.0, "", False), ("float32", 0.1, "matmul", False)):  # fmt: skip
            yield _case(37, 320, dtype, p, part, device, {}, then, compiled, smoke=True, timed=False)
    if device == "cpu":
        copy = "copy_ of the same bytes"
        # FASTLM_CPU_ISA=avx2 caps a better processor; there are goals for two cases then.
        capped = _native._C is not None and _native._C.cpu_isa() == "avx2"
        one, two = ({"eager": 10.0}, {"eager": 6.0}) if capped else ({"eager": 17.0, copy: 1 / 1.1}, {"eager": 10.0})
        others = lambda ratio: {} if capped else {"eager": ratio}
        yield _case(4096, 1024, "float32", 0.1, FORWARD, device, one)
        yield _case(4096, 1024, "float32", 0.1, BOTH, device, two)
        yield _case(4096, 1024, "bfloat16", 0.1, FORWARD, device, others(17))
        yield _case(4096, 1024, "bfloat16", 0.1, BOTH, device, others(9))
        yield _case(2048, 768, "float32", 0.1, FORWARD, device, others(17))
        yield _case(2048, 768, "float32", 0.1, BOTH, device, others(9))
        yield _case(4096, 1024, "float32", 0.0, FORWARD, device, others(1.4))
        yield _case(4096, 1024, "float32", 0.0, BOTH, device, others(1.2))
        yield _case(4096, 384, "float32", 0.2, FORWARD, device, {})
        yield _case(16, 64, "float32", 0.1, BOTH, device, {})  # what the call costs by itself
        yield _case(4096, 1024, "float32", 0.1, FORWARD, device, {}, "matmul")
        yield _case(4096, 1024, "float32", 0.1, BOTH, device, {}, "matmul")
        return
    for columns in (768, 1024, 2048, 4096, 8192, 16384):
        rows = max(8192, int(LARGE // columns))
        for part, fraction in ((FORWARD, 0.92), (BOTH, 0.85)):
            goals = {"eager": 3.0, "torch.compile": 1.0, "liger-kernel": 1.0, "copy_ of the same bytes": fraction}
            yield _case(rows, columns, "bfloat16", 0.1, part, device, goals)
    yield _case(16384, 4096, "float32", 0.1, FORWARD, device, {})
    yield _case(16384, 4096, "bfloat16", 0.1, BOTH, device, {}, "matmul")


# By kind: the odd shapes for the sanitizer, the real one for the profiler, the same for Triton's interpreter.
SHORT = {"odd": [(37, 96), (16, 1000), (5, 4096)], "profile": [(16384, 4096)],
         "interpreted odd": [(37, 96), (5, 1000)], "interpreted profile": [(16, 4096)]}  # fmt: skip


def short(device: str, dtype: torch.dtype, kind: str) -> Iterator[Callable[[], Tensor]]:
    """Calls, each returning a loss, for the sanitizer and the profiler (fastlm.bench.short)."""
    for shape in SHORT[kind]:
        leaves = [
            torch.randn(*s, device=device).to(dtype).requires_grad_() for s in (shape, shape, shape[1:], shape[1:])
        ]

        def call(leaves: list[Tensor] = leaves) -> Tensor:
            y, z = fastlm.ops.dropout_add_norm(*leaves, p=0.1, seed=1)
            return y.float().square().sum() + z.float().sum()

        yield call


test_bench = pytest_cases(cases)
