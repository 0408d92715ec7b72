"""The trainer beside loops written here: its own cost, the fused step beside a plain loop, saves, and time to quality.

The bare loop has the trainer's model, kernels, optimizer and batches, already loaded, and nothing else: what the trainer
adds is its cost. The plain loop is PyTorch as nanoGPT writes it: the model unswapped, whole logits, ``F.cross_entropy``,
``clip_grad_norm_``, fused AdamW, float32. Both sides run under one allocator setting; what that gives is a row of its own.

``fastlm bench train --long`` also runs both to quality (see ``long``), which takes an hour or more.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastlm
import numpy as np
import torch
import torch.nn.functional as F
from fastlm import _processor
from fastlm.bench.harness import DTYPES, Case, Contender, Goal, Prepared, pytest_cases, raise_malloc_thresholds
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.train import Config, ModelConfig, OptimConfig, RunConfig, Trainer
from fastlm.train import optim as optimizers
from fastlm.train.parallel import Layout, Ranks
from torch import Tensor

MANY = 10**6  # steps that no case reaches
LARGE = GPTConfig(layers=6, heads=6, width=384, context=256, dropout=0.2)  # 10.75 M parameters
NANO = GPTConfig(layers=4, heads=4, width=128, context=64)  # 0.8 M
TINY = GPTConfig(layers=2, heads=2, width=64, context=32, dropout=0.1)  # the smoke pass


class Windows:
    """Random windows of a token file, as the trainer's sources serve them."""

    content = "random tokens"

    def __init__(self, config: GPTConfig, different: int = MANY) -> None:
        self.context, self.different = config.context, different
        self.tokens = np.random.default_rng(0).integers(0, config.vocab, 1 << 20, dtype=np.uint16)

    def batch(self, ids: np.ndarray) -> tuple[Tensor, ...]:
        starts = ids % self.different * 7919 % (len(self.tokens) - self.context - 1)
        rows = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Stepped(Trainer):
    """A trainer that is moved step by step: what ``fit`` does around its steps, evaluation and checkpoints apart."""

    def begin(self) -> Stepped:
        for callback in self.callbacks:
            callback.ready(self)
            callback.start(self)
        self.load_ahead()
        self._clock = time.perf_counter()
        return self

    def one(self) -> None:
        self.train_step()
        self.flush()

    def close(self) -> None:
        self.saver.wait()
        self.loader.close()
        for callback in self.callbacks:
            callback.end(self)


class Inputs:
    """A folder for the trainer's run and the source of its batches, of so many ``different`` samples."""

    def __init__(self, config: GPTConfig, seed: int, different: int = MANY) -> None:
        self.source, self.seed = Windows(config, different), seed
        self.folder = tempfile.TemporaryDirectory(prefix="fastlm-bench-", ignore_cleanup_errors=True)


def trainer(
    i: Inputs, config: GPTConfig, batch: int, dtype: str, device: str, kernels: str = "fused", lr: float = 1e-4
) -> Stepped:
    torch.manual_seed(0)
    settings = Config(
        optim=OptimConfig(steps=MANY, batch=batch, lr=lr, warmup=1, schedule="constant"),
        run=RunConfig(kernels=kernels, dtype=dtype, device=device, quiet=True),  # type: ignore[arg-type]
    )
    return Stepped(settings, GPT(config), i.source, i.folder.name).begin()


class Loop:
    """A prepared contender: a call makes a step of its model."""

    def __init__(
        self, model: torch.nn.Module, step: Callable[[], Any], close: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.step, self.close = model, step, close

    def __call__(self) -> Any:
        return self.step()


def _trained(config: GPTConfig, batch: int, dtype: str, device: str, lr: float = 1e-4) -> Any:
    def prepare(i: Inputs) -> Prepared:
        run = trainer(i, config, batch, dtype, device, lr=lr)
        return Loop(run.model, run.one, run.close)

    return prepare


def _bare(config: GPTConfig, batch: int, dtype: str, device: str, lr: float = 1e-4) -> Any:
    """The trainer's model, kernels, optimizer and batches in the fewest lines that train."""

    def prepare(i: Inputs) -> Prepared:
        torch.manual_seed(0)
        model = GPT(config).to(device)
        fastlm.swap(model)
        optimizer = optimizers.make(model, OptimConfig(lr=lr), Layout(model, Ranks()))
        ids = [np.arange(k * batch, (k + 1) * batch) for k in range(8)]
        loaded = [tuple(t.to(device) for t in i.source.batch(n)) for n in ids]
        count = [0]

        def step() -> None:
            k = count[0] % 8
            fastlm.rng.set(model, 1, count[0], torch.as_tensor(ids[k]))
            tokens, targets = loaded[k]
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(tokens, targets) / targets.numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            count[0] += 1

        return Loop(model, step)

    return prepare


def plain_step(model: GPT, optimizer: torch.optim.Optimizer, batch: Iterable[Tensor], dtype: str) -> Tensor:
    """A step as nanoGPT writes it."""
    tokens, targets = batch
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(tokens)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def plain_optimizer(model: GPT, lr: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == decay], "weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def _plain(config: GPTConfig, batch: int, dtype: str, device: str, lr: float = 1e-4) -> Any:
    def prepare(i: Inputs) -> Prepared:
        torch.manual_seed(0)
        model = GPT(config).to(device)
        optimizer = plain_optimizer(model, lr)
        count = [0]

        def step() -> Tensor:
            ids = np.arange(count[0] * batch, (count[0] + 1) * batch)
            count[0] += 1
            return plain_step(model, optimizer, (t.to(device) for t in i.source.batch(ids)), dtype)

        return Loop(model, step)

    return prepare


def _wrong_by(make: Any, config: GPTConfig, dtype: str, device: str, result: Any, inputs: Inputs) -> float:
    """How far four steps of a loop on the same two samples, without dropout, lead from where the plain float32 loop gets.

    As a fraction of what that loop learned, at a learning rate ten times the timed one. Forward, backward, clipping,
    optimizer and the loop's own arithmetic all go into it.
    """
    calm = replace(config, dropout=0.0)
    tokens, targets = (t.to(device) for t in Windows(calm).batch(np.arange(2)))

    def loss_of(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten()).item()

    losses = []
    for loop, kind in ((make, dtype), (_plain, "float32")):
        step = loop(calm, 2, kind, device, lr=1e-3)(Inputs(calm, 0, different=2))
        before = loss_of(step.model)
        for _ in range(4):
            step()
        losses.append(loss_of(step.model))
        step.close()
    learned = before - losses[1]
    return abs(losses[0] - losses[1]) / learned if learned > 0 else float("inf")


def _contender(
    name: str, make: Any, config: GPTConfig, batch: int, dtype: str, device: str, kind: str = "baseline"
) -> Contender:
    check = functools.partial(_wrong_by, make, config, dtype, device)
    return Contender(name, make(config, batch, dtype, device), kind, check=check)


def _flops(config: GPTConfig, batch: int) -> int:
    """6 per parameter of the matrices and token, and 6 * layers * width * context a token for causal attention."""
    parameters = sum(p.numel() for n, p in GPT(config).named_parameters() if p.ndim == 2 and n != "place.weight")
    return batch * config.context * (6 * parameters + 6 * config.layers * config.width * config.context)


def _case(config: GPTConfig, batch: int, dtype: str, device: str, *contenders: Contender, goals: tuple[Goal, ...],
          smoke: bool = False) -> Case:  # fmt: skip
    parameters = sum(p.numel() for p in GPT(config).parameters())  # AdamW: four float32 tensors in, three out
    shape = f"{config.layers}x{config.width} context {config.context} batch {batch} dropout {config.dropout:g} {dtype}"
    return Case(
        "train", f"step {shape}", lambda seed: Inputs(config, seed), contenders, 28 * parameters,
        _flops(config, batch), dtype, device,
        {"tokens": batch * config.context}, "trainer", goals=goals, smoke=smoke,
        tolerance=1e-4 if dtype == "float32" else 1e-2, longer=5.0,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """Goals: the trainer in 1.03 of a bare loop; its step in 0.77 (bfloat16: 0.47) of the plain float32 loop's."""
    for config, batch in ((TINY, 2), (NANO, 12), (LARGE, 16)):
        contenders = [
            _contender("fastlm train", _trained, config, batch, "float32", device, "ours"),
            _contender("bare loop", _bare, config, batch, "float32", device),
            _contender("plain loop", _plain, config, batch, "float32", device),
        ]
        goals: tuple[Goal, ...] = (Goal("bare loop", 1 / 1.03),) if config is not TINY else ()
        goals += (Goal("plain loop", 1 / 0.77),) if config is LARGE else ()
        yield _case(config, batch, "float32", device, *contenders, goals=goals, smoke=config is TINY)
    yield _case(
        LARGE, 16, "bfloat16", device,
        _contender("fastlm train", _trained, LARGE, 16, "bfloat16", device, "ours"),
        _contender("bare loop", _bare, LARGE, 16, "bfloat16", device),
        _contender("plain loop float32", _plain, LARGE, 16, "float32", device),
        _contender("plain loop bfloat16", _plain, LARGE, 16, "bfloat16", device),
        goals=(Goal("bare loop", 1 / 1.03), Goal("plain loop float32", 1 / 0.47)),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- saves, evaluation, the allocator


def profile(device: str, small: bool = False) -> dict[str, Any]:
    """What stands beside the steps: a save, an evaluation, and what the allocator setting gives.

    ``small``: of the smoke pass's model and without the allocator's child processes, which shows that it runs.
    """
    config = TINY if small else LARGE
    saved = sum(p.numel() for p in GPT(config).parameters()) / 1e6
    cost = save_cost(config, 2, 1, 1, device) if small else save_cost(config, 4, 3, 7, device)
    out: dict[str, Any] = {f"save of {saved:.4g}M parameters": cost}
    with torch.no_grad():
        model, source = GPT(config).to(device).eval(), Windows(config)
        tokens, targets = (t.to(device) for t in source.batch(np.arange(16)))
        took = statistics.median(_timed(lambda: model(tokens, targets).item()) for _ in range(3))
    out["evaluation"] = {"tokens_per_s": tokens.numel() / took}
    if device == "cpu" and not small:
        times = {name: _child_step(name) for name in ("glibc's own", "raised")}
        out["allocator, plain loop"] = {f"{name} setting, s a step": s for name, s in times.items()}
    for name, values in out.items():
        print(f"train, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
    return out


def _timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def save_cost(config: GPTConfig, batch: int, steps: int, rounds: int, device: str) -> dict[str, float]:
    """Seconds that a save takes: the call, and the whole of call and slower steps beside it, over ``steps`` steps.

    Windows with a save and without alternate; the median of the pairs' differences is the whole cost.
    """
    inputs = Inputs(config, 0)
    run = trainer(inputs, config, batch, "float32", device)
    for _ in range(2):
        run.one()
    run.save()  # the first save takes the memory that later ones use again
    run.saver.wait()
    calls, wholes = [], []
    for _ in range(rounds):
        took = []
        for with_save in (False, True):
            begin = time.perf_counter()
            if with_save:
                run.save()
                calls.append(time.perf_counter() - begin)
            for _ in range(steps):
                run.one()
            took.append(time.perf_counter() - begin)
            run.saver.wait()
        wholes.append(took[1] - took[0])
    run.close()
    inputs.folder.cleanup()
    return {"call_s": statistics.median(calls), "whole_s": statistics.median(wholes), "steps": steps, "goal_s": 0.15}


def _child_step(allocator: str) -> float:
    """Median seconds of a plain step in a process of its own: glibc's thresholds cannot be lowered again in this one."""
    words = [sys.executable, __file__, allocator, str(torch.get_num_threads())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the plain loop in a child process failed: {done.stderr.strip()[-500:]}")
    return float(done.stdout.split()[-1])


def child(allocator: str, threads: str) -> None:
    """That process: prints the median of three steps."""
    if allocator == "raised":
        raise_malloc_thresholds()
    torch.set_num_threads(int(threads))
    step = _plain(LARGE, 16, "float32", "cpu")(Inputs(LARGE, 0))
    step()
    print(statistics.median(_timed(step) for _ in range(3)))


# ------------------------------------------------------------------------------------------------------ time to quality

RATES = (3e-4, 6e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3)
# Of each model: batch, steps of the plain loop, part of its time that fastlm may take, and fastlm's best settings.
QUALITY: dict[str, tuple[GPTConfig, int, int, float, dict[str, Any]]] = {
    "0.8M": (NANO, 12, 2000, 0.6, {"style": "llama", "optimizer": "muon", "lr": 3e-3, "dtype": "float32"}),
    "10.75M": (LARGE, 16, 300, 0.35, {"style": "llama", "optimizer": "muon", "lr": 2e-3, "dtype": "bfloat16"}),
}


def long(path: Path, budget: float, match: str = "", source: str = "") -> list[dict[str, Any]]:
    """Time to the plain loop's final loss: each run is a line of ``path``, and a run that has one of the same ``source``, the
    hash of what is timed, is not made again.

    The plain loop first runs at five learning rates with seed 1, then at the best with the other seeds; fastlm then trains
    with each seed for as many steps as fit into the part of the plain loop's time that the goal allows. A time is the steps
    by their median, so that what else the machine does in an hour counts on neither side. No run is begun after ``budget``
    seconds: the same command goes on later.
    """
    begin = time.monotonic()
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row.get("source") == source]
    path.parent.mkdir(parents=True, exist_ok=True)

    def once(key: dict[str, Any], make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any] | None:
        for row in rows:
            if all(row.get(k) == v for k, v in key.items()):
                return row
        if time.monotonic() - begin > budget:
            return None
        row = key | make(*arguments)
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("time to quality: " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "curve"), flush=True)
        return row

    for name, (config, batch, steps, part, best) in QUALITY.items():
        if match not in name:
            continue
        if slow := _processor.slow(DTYPES[best["dtype"]]):
            print(f"no time to quality of {name}: {slow}")
            continue
        text = Text(config)
        key = {"model": name, "loop": "plain", "steps": steps, "source": source}
        tried = []
        for lr in RATES:
            row = once(key | {"lr": lr, "seed": 1}, plain_run, text, config, batch, steps, lr, 1)
            if row is None:
                return rows
            tried.append(row)
        lr = min(tried, key=lambda row: row["loss"])["lr"]
        for seed in SEEDS:
            plain = once(key | {"lr": lr, "seed": seed}, plain_run, text, config, batch, steps, lr, seed)
            if plain is None:
                return rows
            mine = {"model": name, "loop": "fastlm", "seed": seed, "settings": best, "goal": part, "source": source}
            if once(mine, fast_run, text, config, batch, best, part, plain, seed) is None:
                return rows
    return rows


class Text:
    """The default corpus (the running Python's standard library) and its validation loss."""

    def __init__(self, config: GPTConfig) -> None:
        from fastlm.data import TokenSource
        from fastlm.train.config import DataConfig
        from fastlm.train.job import read_data, validation

        self.data = read_data((), DataConfig(), config.context)
        self.config, self.source_of = config, TokenSource
        self.vocab = self.data[0].tokenizer.vocab
        self.loss_of = validation(self.data, Config(), config.context, torch.device("cpu"))

    def source(self, seed: int) -> Any:
        return self.source_of(self.data, self.config.context, seed)

    def loss(self, model: torch.nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            found = self.loss_of(model, False)["val_loss"]
        model.train()
        return float(found)


def plain_run(text: Text, config: GPTConfig, batch: int, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """The plain loop with nanoGPT's schedule: warm-up over 5% of the steps, cosine to a tenth."""
    torch.manual_seed(seed)
    model, source = GPT(replace(config, vocab=text.vocab)), text.source(seed)
    optimizer, warmup, times = plain_optimizer(model, lr), max(1, steps // 20), []
    for step in range(steps):
        done = (step - warmup) / (steps - warmup)
        part = (step + 1) / warmup if step < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr * part
        begin = time.perf_counter()
        plain_step(model, optimizer, source.batch(np.arange(step * batch, (step + 1) * batch)), "float32")
        times.append(time.perf_counter() - begin)
    return {"seconds": steps * statistics.median(times), "loss": text.loss(model)}


def fast_run(
    text: Text, config: GPTConfig, batch: int, best: dict[str, Any], part: float, plain: dict[str, Any], seed: int
) -> dict[str, Any]:
    """fastlm with its best settings until the plain loop's loss, in at most ``part`` of its time; evaluation apart."""
    shape = ModelConfig(style=best["style"], layers=config.layers, heads=config.heads, width=config.width,
                        context=config.context, dropout=best.get("dropout", 0.0)).resolve(text.vocab)  # fmt: skip

    folder = tempfile.TemporaryDirectory(prefix="fastlm-bench-", ignore_cleanup_errors=True)

    def make(steps: int) -> Stepped:
        torch.manual_seed(seed)
        settings = Config(
            optim=OptimConfig(steps=steps, batch=batch, lr=best["lr"], optimizer=best["optimizer"],
                              warmup=max(1, steps // 20), min_lr=0.02, schedule=best.get("schedule", "linear")),
            run=RunConfig(dtype=best["dtype"], seed=seed, quiet=True, device="cpu"),
        )  # fmt: skip
        return Stepped(settings, GPT(shape), text.source(seed), folder.name).begin()

    trial = make(MANY)
    for _ in range(3):
        trial.one()
    one = statistics.median(_timed(trial.one) for _ in range(9))
    trial.close()
    steps = max(2, int(part * plain["seconds"] / one))
    run, times, curve = make(steps), [], []
    for step in range(1, steps + 1):
        times.append(_timed(run.one))
        if step == steps or (step > steps * 0.8 and step % max(1, steps // 50) == 0):
            curve.append([step * statistics.median(times), text.loss(run.model)])
            run._clock = time.perf_counter()
            if curve[-1][1] <= plain["loss"]:
                break
    run.close()
    folder.cleanup()
    reached = curve[-1][1] <= plain["loss"]
    ratio = curve[-1][0] / plain["seconds"] if reached else None
    return {"seconds": curve[-1][0], "loss": curve[-1][1], "target": plain["loss"], "ratio": ratio, "curve": curve}


test_bench = pytest_cases(cases)

if __name__ == "__main__":
    child(*sys.argv[1:3])
