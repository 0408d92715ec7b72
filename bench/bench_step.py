"""The whole training step, ``--kernels fused`` beside ``--kernels torch``, and where the time goes.

One step is forward, backward, gradient clipping and AdamW of the same model on the same batch; both sides use fused AdamW
and the same allocator setting, so that only the kernels differ.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import fastlm
import torch
from fastlm import _processor
from fastlm.bench import joules
from fastlm.bench.harness import DTYPES, Case, Contender, Goal, Prepared, pytest_cases
from fastlm.models.gpt import GPT, GPTConfig

CPU_MODEL = GPTConfig(layers=6, heads=6, width=384, context=256, dropout=0.2)
SMALL_MODEL = GPTConfig(layers=2, heads=2, width=64, context=64, dropout=0.2)
GPU_MODEL = GPTConfig(layers=12, heads=12, width=768, context=1024, vocab=50304)


def _step(config: GPTConfig, fused: bool, dtype: str, device: str, compiled: bool = False, lr: float = 1e-4):
    def prepare(tokens: torch.Tensor) -> Prepared:
        torch.manual_seed(0)
        model = GPT(config).to(device)
        if fused:
            fastlm.swap(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        ids = torch.arange(tokens.shape[0])
        forward = torch.compile(model) if compiled else model
        count = [0]

        def step() -> torch.Tensor:
            if fused:
                fastlm.rng.set(model, 0, count[0], ids)
            count[0] += 1
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = forward(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    return prepare


def _wrong_by(
    config: GPTConfig, fused: bool, dtype: str, device: str, compiled: bool, result: Any, tokens: torch.Tensor
) -> float:
    """How far the losses of four steps, without dropout, are from PyTorch's in float32, as a fraction of what was learned.

    Forward, backward, clipping and optimizer all go into them; a learning rate ten times the timed one moves the loss.
    A compiled step is compiled anew for it, since its model has no dropout, with one layer in place of several like it.
    PyTorch itself in bfloat16 is off by 1e-4 to 3e-4 of it here, and two orders of summation in float32 by less than 1e-6.
    """
    if not result.isfinite():
        return float("inf")
    calm, few = replace(config, dropout=0.0, layers=1 if compiled else config.layers), tokens[:2]
    curves = []
    for use, kind, through in ((fused, dtype, compiled), (False, "float32", False)):
        step = _step(calm, use, kind, device, through, lr=1e-3)(few)
        curves.append([step().item() for _ in range(4)])
    learned = curves[1][0] - curves[1][-1]
    return max(abs(a - b) for a, b in zip(*curves)) / learned if learned > 0 else float("inf")


def _flops(config: GPTConfig, tokens: int) -> int:
    """6 per parameter and token, and 12 * layers * width * context / 2 per token for causal attention."""
    parameters = sum(p.numel() for p in GPT(config).parameters())
    return tokens * (6 * parameters + 6 * config.layers * config.width * config.context)


def _case(config: GPTConfig, batch: int, dtype: str, device: str, goals: tuple[Goal, ...], smoke: bool = False,
          compiled: bool = True) -> Case:  # fmt: skip
    def inputs(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, config.vocab, (batch, config.context + 1), generator=generator).to(device)

    def contender(name: str, fused: bool, kind: str = "baseline", compiled: bool = False) -> Contender:
        check = functools.partial(_wrong_by, config, fused, dtype, device, compiled)
        return Contender(name, _step(config, fused, dtype, device, compiled), kind, check=check)

    contenders = [contender("fused", True, "ours"), contender("torch", False)]
    if compiled:
        contenders.append(contender("torch compiled", False, compiled=True))
    if (
        compiled and device != "cpu"
    ):  # Inductor's C++ takes a minute or two for such a model, as much as all other cases
        contenders.append(contender("fused compiled", True, "self", compiled=True))
    tokens = batch * config.context
    parameters = sum(p.numel() for p in GPT(config).parameters())  # AdamW: four float32 tensors in, three out
    name = f"{config.layers}x{config.width} context {config.context} batch {batch} dropout {config.dropout:g} {dtype}"
    return Case(
        "step", name, inputs, tuple(contenders), 28 * parameters, _flops(config, tokens), dtype, device,
        {"tokens": tokens}, "step", goals=goals, smoke=smoke, tolerance=1e-4 if dtype == "float32" else 1e-2,
        longer=5.0,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """Goals: the fused step in at most 0.77 of torch's time in float32, 0.7 in bfloat16 (bench_train: beside float32)."""
    yield _case(SMALL_MODEL, 4, "float32", device, (), smoke=True, compiled=False)
    if device == "cpu":
        yield _case(CPU_MODEL, 16, "float32", device, (Goal("torch", 1 / 0.77),))
        yield _case(CPU_MODEL, 16, "bfloat16", device, (Goal("torch", 1 / 0.7),))
        return
    for dropout in (0.0, 0.1):
        yield _case(replace(GPU_MODEL, dropout=dropout), 32, "bfloat16", device, (Goal("torch compiled", 1.15),))


def profile(device: str, small: bool = False) -> dict[str, Any]:
    """Where the time of one step goes, by kind of op, in fractions, and what each fused op takes within it.

    ``small``: of the smoke pass's model, which shows that it runs.
    """
    out: dict[str, Any] = {}
    config, batch = (SMALL_MODEL, 4) if small else (CPU_MODEL, 16) if device == "cpu" else (GPU_MODEL, 32)
    tokens = torch.randint(0, config.vocab, (batch, config.context + 1)).to(device)
    variants = [("torch", False, "bfloat16"), ("fused", True, "bfloat16")]
    if device == "cpu":
        variants = [("torch float32", False, "float32"), ("fused float32", True, "float32")] + [
            (f"{name} bfloat16", fused, dtype) for name, fused, dtype in variants
        ]
    for name, fused, dtype in variants:
        if device == "cpu" and not small and (slow := _processor.slow(DTYPES[dtype])):
            print(f"\nno profile of a step, {name}: {slow}")
            continue
        step = _step(config, fused, dtype, device)(tokens)
        step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device != "cpu":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as prof:
            step()
        shares: dict[str, float] = {}
        ops: dict[str, dict[str, float]] = {}
        total_of = lambda event: event.cpu_time_total if device == "cpu" else event.device_time_total
        for event in prof.key_averages():
            time = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
            shares[_kind(event.key)] = shares.get(_kind(event.key), 0.0) + time
            if event.key.startswith("fastlm::") and event.key.endswith(("_forward", "_backward")):
                ops[event.key.removeprefix("fastlm::")] = {"calls": event.count, "seconds": total_of(event) / 1e6}
        total = sum(shares.values())
        parts = {k: v / total for k, v in sorted(shares.items(), key=lambda kv: -kv[1])}
        out[name] = {"shares": parts, "ops": ops}
        print(f"\nprofile of a step, {name}: " + ", ".join(f"{k} {v:.0%}" for k, v in parts.items() if v >= 0.005))
    return out


def energy(device: str, small: bool = False) -> list[joules.Row]:
    """J/token by dtype and batch, PyTorch's kernels and fastlm's, where a counter measures."""
    if small:
        config, batches = SMALL_MODEL, (4, 8)
    else:
        config, batches = (CPU_MODEL, (4, 16)) if device == "cpu" else (GPU_MODEL, (8, 32))

    def cases() -> Iterator[tuple[str, str, int, int, Callable[[], Callable[[], Any]]]]:
        for dtype, batch, (name, fused) in itertools.product(
            ("float32", "bfloat16"), batches, (("torch", False), ("fused", True))
        ):
            if device == "cpu" and _processor.slow(DTYPES[dtype]):
                continue
            inputs = torch.randint(0, config.vocab, (batch, config.context + 1)).to(device)
            make = functools.partial(_step(config, fused, dtype, device), inputs)
            yield name, dtype, batch, batch * config.context, make

    return joules.of_steps(cases(), device, 0.0 if small else 3.0)


_KINDS = (
    ("fastlm::attention", "attention"), ("fastlm::dropout_add_norm", "dropout_add_norm"),
    ("scaled_dot_product", "attention"), ("flash_attention", "attention"), ("efficient_attention", "attention"),
    ("bmm", "attention"), ("softmax", "softmax and loss"), ("nll", "softmax and loss"), ("mm", "matmul"),
    ("linear", "matmul"), ("bernoulli", "random numbers"), ("dropout", "random numbers"), ("layer_norm", "norm"),
    ("gelu", "gelu"), ("adam", "optimizer"), ("norm", "clipping"), ("embedding", "embedding"),
)  # fmt: skip


def _kind(key: str) -> str:
    return next((kind for part, kind in _KINDS if part in key.lower()), "other")


test_bench = pytest_cases(cases)
