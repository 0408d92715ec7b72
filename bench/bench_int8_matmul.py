"""int8_matmul as a linear layer uses it, activations quantised inside, beside PyTorch's float and quantised linears.

Work is rows x K x N. "from memory": the weights rotate through 1 GiB or twice the last cache, whichever is more, so that each
call reads them from memory; "read" sums the same bytes as integers. What is inexact on this processor is shown, not a bar.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fastlm
import torch
import torch.nn.functional as F
from fastlm import _native, _processor
from fastlm.bench.harness import Case, Contender, Goal, Missing, Prepared, pytest_cases, ratio_error
from torch import Tensor

TOLERANCE = 3e-2  # 8 bits: 39 dB on normal inputs


class Inputs(NamedTuple):
    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor
    rotating: bool


def last_cache() -> int:
    """Bytes of the last cache that the system reports; 0 where it reports none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes)


def _turns(weight: Tensor, i: Inputs) -> Callable[[], Tensor]:
    """The next copy of a weight at each call: one, or as many as the caches cannot hold."""
    size = weight.numel() * weight.itemsize
    count = -(-max(2 * last_cache(), 2**30) // size) if i.rotating else 1
    copies, turn = [weight, *(weight.clone() for _ in range(count - 1))], [0]

    def following() -> Tensor:
        turn[0] = (turn[0] + 1) % count
        return copies[turn[0]]

    return following


def _dynamic(i: Inputs) -> Prepared:
    q, scale = fastlm.ops.quantize_int8(i.weight)
    weight = _turns(q, i)

    def call() -> Tensor:
        a, a_scale = fastlm.ops.quantize_int8(i.x)
        return fastlm.ops.int8_matmul(a, weight().t(), a_scale, scale, bias=i.bias)

    return call


def _weight_only(group: int | None) -> Callable[[Inputs], Prepared]:
    def prepare(i: Inputs) -> Prepared:
        q, scale = fastlm.ops.quantize_int8(i.weight, group=group)
        weight, scale = _turns(q, i), scale.t() if group else scale
        return lambda: fastlm.ops.int8_matmul(i.x, weight().t(), b_scale=scale, bias=i.bias)

    return prepare


def _linear(dtype: torch.dtype) -> Callable[[Inputs], Prepared]:
    def prepare(i: Inputs) -> Prepared:
        if i.x.device.type == "cpu" and _processor.slow(dtype):
            raise Missing(_processor.slow(dtype))
        x, weight, bias = i.x.to(dtype), _turns(i.weight.to(dtype), i), i.bias.to(dtype)
        return lambda: F.linear(x, weight(), bias)

    return prepare


def _dequantise_first(i: Inputs) -> Prepared:
    q, scale = fastlm.ops.quantize_int8(i.weight)
    weight = _turns(q, i)
    return lambda: F.linear(i.x, weight().to(i.x.dtype) * scale.unsqueeze(1), i.bias)


def _int_mm(i: Inputs) -> Prepared:
    """torch._int_mm with compiled quantisation and scales: exact everywhere, by a scalar loop below AVX-512 VNNI."""
    q, scale = fastlm.ops.quantize_int8(i.weight)
    weight = _turns(q, i)

    def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
        s = x.abs().amax(-1, keepdim=True) / 127
        return (x / s).round().clamp(-127, 127).to(torch.int8), s

    before = torch.compile(quantised)
    after = torch.compile(lambda acc, s: acc.float() * s * scale + i.bias)

    def call() -> Tensor:
        a, s = before(i.x)
        return after(torch._int_mm(a, weight().t()), s)

    return call


def _quantize_dynamic(i: Inputs) -> Prepared:
    """PyTorch's dynamically quantised linear: one scale for all activations, 7 bits below AVX-512 VNNI."""
    if i.x.device.type != "cpu" or i.rotating:
        raise Missing(
            "packs its weight for a CPU" if i.x.device.type != "cpu" else "its packed weights do not rotate here"
        )
    layer = torch.nn.Linear(i.x.shape[1], i.weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(i.weight)
        layer.bias.copy_(i.bias)
    made = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, torch.qint8)
    return lambda: made(i.x)


def _torchao(i: Inputs) -> Prepared:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise Missing("torchao is not installed") from error
    if i.rotating:
        raise Missing("its weights do not rotate here")
    layer = torch.nn.Linear(i.x.shape[1], i.weight.shape[0], device=i.x.device)
    with torch.no_grad():
        layer.weight.copy_(i.weight)
        layer.bias.copy_(i.bias)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(layer)


def _read(i: Inputs) -> Prepared:
    weight = _turns(torch.ones(i.weight.shape, dtype=torch.int8, device=i.x.device), i)
    return lambda: weight().view(torch.int64).sum()


def _goals(work: str) -> tuple[Goal, ...]:
    """The bars of this processor's class."""
    isa = "" if _native._C is None else _native._C.cpu_isa()
    bars: dict[str, dict[str, tuple[Goal, ...]]] = {
        "wide": {
            "avx2": (Goal("float32", 1.25),),
            "avx512": (Goal("bfloat16", 1.6), Goal("float32", 3.5), Goal("_int_mm", 1.05), Goal("torchao", 1.05)),
            "amx": (Goal("bfloat16", 1.5), Goal("float32", 9.0), Goal("_int_mm", 1.1), Goal("torchao", 1.1)),
        },
        "few": {"avx2": (Goal("float32", 1.8),), "avx512": (Goal("bfloat16", 1.9),), "amx": (Goal("bfloat16", 2.0),)},
        "one": {
            "avx2": (Goal("read", 0.75), Goal("float32", 3.0)),
            "avx512": (Goal("read", 0.85), Goal("bfloat16", 1.8)),
            "amx": (Goal("read", 0.85), Goal("bfloat16", 1.8)),
        },
    }
    return bars.get(work, {}).get(isa, ())


def _error(result: Any, i: Inputs) -> float:
    return ratio_error(result, i.x.double() @ i.weight.double().t() + i.bias.double())


def _coarse(result: Any, i: Inputs) -> float:
    """One scale for all activations, and seven bits: held to eight times the tolerance."""
    return _error(result, i) / 8


def _case(shape: tuple[int, int, int], work: str, device: str, smoke: bool = False, rotating: bool = False) -> Case:
    rows, k, n = shape

    def inputs(seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        x, weight, bias = (torch.randn(*s, generator=g).to(device) for s in ((rows, k), (n, k), (n,)))
        return Inputs(x, weight, bias, rotating)

    contenders = [
        Contender("fastlm", _dynamic, "ours"), Contender("float32", _linear(torch.float32)),
        Contender("fastlm weight-only", _weight_only(None), "self"),
        Contender("fastlm weight-only, groups of 32", _weight_only(32), "self"),
        Contender("dequantise, then matmul", _dequantise_first),
    ]  # fmt: skip
    if not smoke:
        contenders += [
            Contender("bfloat16", _linear(torch.bfloat16)), Contender("_int_mm", _int_mm),
            Contender("quantize_dynamic", _quantize_dynamic, check=_coarse), Contender("torchao", _torchao, "peer"),
        ]  # fmt: skip
    if rotating:
        contenders.append(Contender("read", _read, "ceiling", checked=False))
    return Case(
        "int8_matmul", f"{rows}x{k}x{n}{' from memory' if rotating else ''}", inputs, tuple(contenders),
        4 * rows * (k + n) + n * k, 2 * rows * k * n, "float32", device, {"shape": list(shape)}, "alone", _error, TOLERANCE,
        _goals(work) if device == "cpu" and not smoke else (), smoke, not smoke,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """The issue's table: wide layers, few rows from memory, one row, and the widths of the default job."""
    yield _case((17, 65, 33), "", device, smoke=True)
    for rows in (2048, 512):
        yield _case((rows, 768, 3072), "wide", device)
    yield _case((16, 4096, 4096), "few", device, rotating=True)
    yield _case((1, 4096, 4096), "one", device, rotating=True)
    yield _case((1, 4096, 4096), "", device)
    yield _case((768, 128, 352), "", device)
    yield _case((768, 352, 128), "", device)


SHORT = {"odd": (17, 65, 33), "profile": (2048, 768, 3072), "interpreted odd": (5, 65, 17),
         "interpreted profile": (16, 64, 64)}  # fmt: skip


@functools.cache
def _weights(n: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    return fastlm.ops.quantize_int8(torch.randn(n, k, device=device))


def short(device: str, dtype: torch.dtype, kind: str) -> Iterator[Callable[[], Tensor]]:
    """Calls, each returning a number, for the sanitizer and the profiler (fastlm.bench.short)."""
    rows, k, n = SHORT[kind]
    x, (weight, scale) = torch.randn(rows, k, device=device).to(dtype), _weights(n, k, device)

    def dynamic() -> Tensor:
        a, a_scale = fastlm.ops.quantize_int8(x)
        return fastlm.ops.int8_matmul(a, weight.t(), a_scale, scale, activation="silu").square().sum()

    yield dynamic
    leaf = x.clone().requires_grad_()
    yield lambda: fastlm.ops.int8_matmul(leaf, weight.t(), b_scale=scale).float().square().sum()


test_bench = pytest_cases(cases)
