"""How long a linear layer's call takes in float and in int8, on this machine: measured once per shape, at conversion.

Calls alternate, so that a machine whose speed changes changes it for both; the least of each counts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlm import backend
from fastlm.nn import Int8Linear, Int8TrainingLinear

TURNS, LEAST = 7, 2e-3  # turns of each side; seconds that a turn takes at least, by repeating short calls


def seconds(
    shape: tuple[int, ...],
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    mode: str,
    group: int | None,
    rows: int,
) -> tuple[float, float]:
    """(float, int8) seconds of a call [rows, K] of a layer [N, K]; in mode "training" with its backward."""
    threads = torch.get_num_threads()
    return _seconds(shape, bias, dtype, device, mode, group, rows, threads, backend.forced())


@functools.cache
def _seconds(
    shape: tuple[int, int],
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    mode: str,
    group: int | None,
    rows: int,
    threads: int,
    forced: str | None,
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator).to(device, dtype)
    plain = nn.Linear(shape[1], shape[0], bias, device="meta")
    plain.weight = nn.Parameter(draw(*shape))
    if bias:
        plain.bias = nn.Parameter(draw(shape[0]))
    x = draw(rows, shape[1])
    if mode == "training":
        int8: nn.Module = Int8TrainingLinear(shape[1], shape[0], bias, device="meta")
        int8.load_state_dict(plain.state_dict(), assign=True)
        for layer in (plain, int8):
            layer.requires_grad_()
    else:
        int8 = Int8Linear.from_linear(plain, mode=mode, group=group)
    return alternate(_call(plain, x, mode), _call(int8, x, mode), device)


def _call(layer: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    if mode != "training":
        return torch.no_grad()(lambda: layer(x))
    x = x.detach().requires_grad_()
    gradient = torch.ones_like(layer(x))
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, gradient)


def alternate(one: Callable[[], object], two: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """The least seconds of a call of each, over turns that alternate."""
    both = (one, two)
    counts = [max(1, int(LEAST / max(_turn(call, 1, device), 1e-7))) for call in both]
    found = [[_turn(call, n, device) for call, n in zip(both, counts)] for _ in range(TURNS)]
    return min(a for a, _ in found), min(b for _, b in found)


def _turn(call: Callable[[], object], count: int, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - begin) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
