"""``fastlm bench --tune``: the Triton kernels' configurations, timed on the GPU at hand and written into kernels/table.json.

Each kernel file's ``candidates()`` says what to try (kernels/table.py, ``Trial``). Every candidate's result is compared
with the reference before it is timed, all candidates of a trial run in turn under the benchmarks' own clock, and the
fastest goes above the rules that stand, with the device, date, versions and times under ``measured``; a rule measured
earlier for the same look-up goes. A candidate replaces the standing configuration only if it is faster by more than 1%.
The table is written after each trial, so that an interrupted run keeps what it had.
"""

from __future__ import annotations

import datetime
import importlib
import json
import pkgutil
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fastlm.bench import ceilings, results
from fastlm.bench.clock import Clock
from fastlm.bench.harness import ratio_error
from fastlm.kernels import table

TOLERANCE = {"f32": 1e-4, "bf16": 3e-2, "f16": 5e-3}
GAIN = 0.01  # less than this is noise, and the standing rule stays
ROUNDS = 9

Timer = Callable[[Callable[[], Any]], float]


def trials(names: Iterable[str]) -> list[table.Trial]:
    """The trials of every kernel file, or of the ops named. Raises ValueError for an op without any."""
    package = importlib.import_module("fastlm.kernels")
    found: list[table.Trial] = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        found += getattr(importlib.import_module(f"fastlm.kernels.{info.name}"), "candidates", list)()
    known = {trial.op for trial in found}
    for name in names:
        if name not in known:
            raise ValueError(
                f"--tune takes ops that have candidates, {', '.join(sorted(known))}; {name!r} is none of them"
            )
    return [trial for trial in found if not list(names) or trial.op in names]


def compare(
    trial: table.Trial, device: str, arch: int, timer: Timer
) -> tuple[list[tuple[float, dict[str, Any]]], list[str]]:
    """The candidates with their seconds, fastest first, the standing one among them; and why others were left out."""
    ours = getattr(importlib.import_module(f"fastlm.kernels.{trial.op}"), trial.direction)
    reference = getattr(importlib.import_module(f"fastlm.reference.{trial.op}"), trial.direction)
    arguments = trial.arguments(device)
    expected = reference(*arguments)
    standing = table.config(trial.kernel, arch=arch, dtype=trial.dtype, size=trial.size, features=trial.features)
    left_out, times, calls = [], [], []
    for config in [standing, *(c for c in trial.configs if c != standing)]:

        def call(config: dict[str, Any] = config) -> Any:
            with table.pinned({"config": config}, trial.kernel):
                return ours(*arguments)

        try:
            pairs = list(zip(call(), expected))[: trial.compared]
            results = [(got, want) for got, want in pairs if want.numel()]
            error = ratio_error([got for got, _ in results], [want for _, want in results])
        except Exception as failed:  # noqa: BLE001 - a configuration that the GPU refuses is left out with its reason
            left_out.append(
                f"{config}: {type(failed).__name__}: {str(failed).splitlines()[0][:160] if str(failed) else ''}"
            )
            continue
        if not error <= TOLERANCE[trial.dtype]:
            left_out.append(f"{config}: wrong by {error:.1e}, allowed {TOLERANCE[trial.dtype]:.0e}")
            continue
        calls.append((call, config))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS if calls else 0):
        for own, (call, _) in zip(samples, calls):
            own.append(timer(call))
    times = [(statistics.median(own), config) for own, (_, config) in zip(samples, calls)]
    return sorted(times, key=lambda pair: pair[0]), left_out


def with_rule(rules: list[dict[str, Any]], rule: dict[str, Any]) -> list[dict[str, Any]]:
    """``rules`` with a measured one: in its predecessor's place or above the planned ones, narrow sizes before wide."""
    look_up = lambda r: (r.get("arch"), r.get("dtype"), r.get("size"), sorted(r.get("features", ())))
    kept = [r for r in rules if not (r["measured"] and look_up(r) == look_up(rule))]
    measured = [r for r in kept if r["measured"]] + [rule]
    measured.sort(key=lambda r: (-r["arch"], r["dtype"], sorted(r["features"]), r["size"]))
    return measured + [r for r in kept if not r["measured"]]


def text_of(rules: dict[str, list[dict[str, Any]]]) -> str:
    """table.json, a rule on each line."""
    kernels = []
    for kernel, own in rules.items():
        lines = ",\n".join(f"    {json.dumps(rule)}" for rule in own)
        kernels.append(f'  "{kernel}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def tune(
    chosen: list[table.Trial], path: Path, device: str, arch: int, timer: Timer, on: dict[str, Any], budget: float
) -> dict[str, int]:
    """Runs the trials and rewrites the table at ``path`` after each. Returns how many changed, stayed, were not run."""
    begin = time.monotonic()
    counts = {"changed": 0, "stayed": 0, "not run": 0}
    for trial in chosen:
        if time.monotonic() - begin > budget:
            counts["not run"] += 1
            continue
        standing = table.config(trial.kernel, arch=arch, dtype=trial.dtype, size=trial.size, features=trial.features)
        times, left_out = compare(trial, device, arch, timer)
        for line in left_out:
            print(f"{trial.name}: left out {line}")
        if not times:
            counts["not run"] += 1
            continue
        seconds, config = times[0]
        before = next((s for s, c in times if c == standing), None)
        if before is not None and seconds > before * (1 - GAIN):
            seconds, config = before, standing
        rule = {
            "arch": arch, "dtype": [trial.dtype], "size": trial.size, "features": sorted(trial.features), "exact": True,
            "config": config, "measured": on | {"us": round(seconds * 1e6, 2)},
        }  # fmt: skip
        rate = f", {trial.bytes_moved / seconds / 1e9:.0f} GB/s" if trial.bytes_moved else ""
        rate += f", {trial.flops / seconds / 1e12:.1f} TFLOP/s" if trial.flops > 100 * trial.bytes_moved else ""
        was = f"; {standing} took {before * 1e6:.1f} us" if before is not None and config != standing else ""
        print(f"{trial.name}: {config} {seconds * 1e6:.1f} us{rate}{was}", flush=True)
        counts["changed" if config != standing else "stayed"] += 1
        rules = json.loads(path.read_text(encoding="utf-8"))
        rules[trial.kernel] = with_rule(rules[trial.kernel], rule)
        results.write(path, text_of(rules))
        table.forget()
    return counts


def main(names: list[str], budget: float, path: Path) -> int:
    """The command: writes the table at ``path``. Returns its exit status; without a GPU, 2 and one sentence."""
    if not torch.cuda.is_available():
        print("fastlm bench: --tune times kernels on a CUDA device, and PyTorch finds none here", file=sys.stderr)
        return 2
    from fastlm.kernels._common import arch_of

    if not path.exists():
        shutil.copy(table._PATH, path)
    machine, clock = ceilings.machine("cuda"), Clock("cuda")
    chosen = trials(names)
    on = {
        "device": machine["device"],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {k: machine["versions"][k] for k in ("torch", "triton")},
    }
    device = torch.device("cuda", torch.cuda.current_device())
    timer = lambda call: clock(call, 1)
    counts = tune(chosen, path, "cuda", arch_of(device), timer, on, budget)
    print(", ".join(f"{n} {what}" for what, n in counts.items()) + f" of {len(chosen)} look-ups; {path} is rewritten")
    print("now: python -m fastlm.bench.offline --write bench/results/offline.json, the tests, and commit both")
    return 0
