"""What waiting and pausing save on a real year of carbon intensity, a real run that pauses, and what measuring costs:
``python bench/quality_energy.py CURVE.csv``.

CURVE.csv is ``data/gb_ci.csv`` of github's dos-group/lets-wait-awhile (Great Britain 2020, g CO2e a kWh), or any other curve
that ``fastlm energy`` reads. The run's curve is a part of it, a thousand times as fast: half an hour takes 1.8 s.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastlm.bench.quality import Quality, spread
from fastlm.energy import counters, curve, schedule
from fastlm.train.config import RunConfig
from fastlm.train.files import read_metrics
from fastlm.train.measuring import CLOCKS, Energy
from fastlm.train.ranks import SingleProcess

HOUR, FASTER = 3600.0, 1000.0
JOBS = ((8, 24), (24, 72), (48, 96))  # hours of work, hours to the deadline
OF = ["fastlm.energy.curve", "fastlm.energy.schedule", "fastlm.energy.meter", "fastlm.energy.counters",
      "fastlm.train.waiting", "fastlm.train.measuring"]  # fmt: skip
RUN = ["--layers", "2", "--heads", "2", "--width", "64", "--context", "64", "--batch", "16", "--threads", "1", "--dropout",
       "0.1", "--eval-every", "0", "--sample", "0", "--quiet", "--device", "cpu"]  # fmt: skip


def savings(found: curve.Curve, starts: int, seed: int) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Of each job, over random starts: the part saved by each plan, and how far the planned one is above the optimum."""
    out = {}
    for hours, span in JOBS:
        draw, kept = np.random.default_rng(seed), dict[str, list[float]]()
        for now in draw.uniform(found.start, found.end - span * HOUR, starts):
            work, end = hours * HOUR, now + span * HOUR
            first = schedule.cost(found, schedule.at_once(work, now))
            best = schedule.cost(found, schedule.possible(found, work, now, end))
            paused, free = (schedule.planned(found, work, now, end, r) for r in (60.0, 0.0))
            plans = {
                "single start": schedule.cost(found, schedule.single(found, work, now, end)),
                "with pauses": schedule.cost(found, paused),
                "best possible": best,
            }
            for name, value in plans.items():
                kept.setdefault(name, []).append(1 - value / first)
            kept.setdefault("above", []).append(schedule.cost(found, free) / best - 1)
            kept.setdefault("above with restarts", []).append(plans["with pauses"] / best - 1)
            kept.setdefault("pauses", []).append(float(len(paused) - 1))
        out[hours, span] = kept
    return out


def part(found: curve.Curve, seconds: float, work: float, restart: float, seed: int) -> tuple[float, int]:
    """A start in the year whose plan, a thousand times as fast, pauses most often; and how often. Of a thousand drawn."""
    best = (0.0, -1)
    for start in np.random.default_rng(seed).uniform(found.start, found.end - 2 * seconds * FASTER, 1000):
        fast = squeezed(found, float(start), seconds, 0.0)
        plan = schedule.planned(fast, work * 1.1 + restart * 1.5, 0.0, seconds, restart, True)
        if len(plan) - 1 > best[1]:
            best = (float(start), len(plan) - 1)
    return best


def squeezed(found: curve.Curve, start: float, seconds: float, now: float) -> curve.Curve:
    """What follows `start`, a thousand times as fast from `now` on, less its least value: a restart of seconds weighs a
    thousand times as much there as in the year, and would never pay beside what is always emitted."""
    keep = (found.edges[:-1] >= start - found.step) & (found.edges[:-1] < start + 2 * seconds * FASTER)
    low = int(np.flatnonzero(keep)[0])
    edges, values = found.edges[low : low + keep.sum() + 1], found.values[low : low + keep.sum()]
    return curve.Curve(now + (edges - start) / FASTER, values - values.min() + 1.0, found.name)


def train(words: list[str], folder: Path) -> tuple[float, list[tuple[float, str]]]:
    """Seconds of a run, and its lines with the second at which each came."""
    begin, lines = time.perf_counter(), []
    env = os.environ | {"FASTLM_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-m", "fastlm", "train", *words], cwd=folder, env=env, text=True,
                          stdout=subprocess.PIPE) as run:  # fmt: skip
        assert run.stdout is not None
        lines = [(time.perf_counter() - begin, line) for line in run.stdout]
    if run.returncode:
        raise SystemExit(f"the run failed with exit status {run.returncode}: {''.join(text for _, text in lines)}")
    return time.perf_counter() - begin, lines


def same(folder: Path, one: str, two: str, step: int) -> bool:
    """Whether two runs have the same weights, optimizer, random states and lines of metrics but for their clocks."""
    ends = [folder / "runs" / name / "checkpoints" / f"step-{step:08d}" for name in (one, two)]
    kinds = ("model", "optimizer", "random")
    equal = [(ends[0] / f"{k}.safetensors").read_bytes() == (ends[1] / f"{k}.safetensors").read_bytes() for k in kinds]
    clocks = CLOCKS | {"tokens_per_s", "stall", "seconds"}
    rows = [
        [{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(folder / "runs" / n)] for n in (one, two)
    ]
    return all(equal) and rows[0] == rows[1]


def paused_run(found: curve.Curve, steps: int, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """The same run at once, and under the curve; how often it paused, when it was done, and whether the bits are equal."""
    words = [*RUN, "--steps", str(steps)]
    whole, lines = train([*words, "--name", "whole"], folder)
    rows = read_metrics(folder / "runs/whole")
    work = sum(row["seconds"] for row in rows)
    begin, planned = part(found, seconds, work, max(whole - work, 1.0), seed)
    now = time.time()
    fast = squeezed(found, begin, seconds, now)
    text = "\n".join(f"{t:.3f},{v:.4f}" for t, v in zip(fast.edges, fast.values))
    (folder / "fast.csv").write_text(f"time,{found.name}\n{text}\n")
    took, lines = train([*words, "--name", "waits", "--when", "fast.csv", "--deadline", f"{seconds:.0f}s"], folder)
    pauses = [(at, re.search(r"at step (\d+)", line)) for at, line in lines if line.startswith("pausing at step")]
    return {
        "work": work, "restart": whole - work, "begin": begin, "planned": planned, "pauses": len(pauses), "took": took,
        "deadline": seconds, "equal": same(folder, "whole", "waits", steps), "steps": steps,
        "at": [int(m[1]) for _, m in pauses if m], "step": float(np.median([row["seconds"] for row in rows])),
    }  # fmt: skip


def overhead(folder: Path, calls: int = 400) -> dict[str, float]:
    """Seconds that measuring takes of each step: by an estimate, and by the counters of two packages with their memory."""
    root = folder / "powercap" / "intel-rapl"
    for zone, name in (("0", "package-0"), ("0:0", "dram"), ("1", "package-1"), ("1:0", "dram")):
        place = root / f"intel-rapl:{zone[0]}" / (f"intel-rapl:{zone}" if len(zone) > 1 else "")
        place.mkdir(parents=True, exist_ok=True)
        for file, text in (("name", name), ("max_energy_range_uj", "262143328850"), ("energy_uj", "1000000")):
            (place / file).write_text(text + "\n")
    import torch

    out, roots = {}, counters.ROOTS
    for label, at in (("estimated", folder / "none"), ("measured", root)):
        counters.ROOTS = (at, at)
        one = Energy(torch.device("cpu"), RunConfig(watts=100.0), SingleProcess())
        if one.meter.label != label:
            raise SystemExit(f"a tree of files gave {one.meter.label}, not {label}")
        one.begin()
        times = []
        for _ in range(calls):
            begin = time.perf_counter()
            json.dumps(list(one.lines(1, 512)))
            times.append(time.perf_counter() - begin)
        one.close()
        out[label] = float(np.median(times))
    counters.ROOTS = roots
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", help="CSV of time and carbon intensity over a year")
    parser.add_argument("--starts", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--deadline", type=float, default=165.0, help="seconds that the run under the curve has")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--provisional", default="", metavar="WHY", help="why times are not to be trusted")
    args = parser.parse_args()
    evidence = Quality(__file__, OF, provisional=args.provisional)
    found = curve.read(args.curve)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as beside:
        begin = time.perf_counter()
        ran = beside.submit(paused_run, found, args.steps, args.deadline, args.seed, Path(name))  # mostly waits
        saved = savings(found, args.starts, args.seed)
        spent = time.perf_counter() - begin
        run = ran.result()
        whole = time.perf_counter() - begin
        cost = overhead(Path(name))
    write(evidence, saved, run, cost, found, args, whole, spent)
    problems = []
    if max(max(kept["above"]) for kept in saved.values()) > 0.01:
        problems.append("a plan is more than 1% above the optimum")
    if not run["equal"] or run["took"] > run["deadline"] or run["pauses"] < 3:
        problems.append(f"the run: {run}")
    if max(cost.values()) > 0.005 * run["step"]:
        problems.append(f"measuring takes {cost} of a step of {run['step']} s")
    if problems:
        raise SystemExit("; ".join(problems))
    evidence.save()


def write(evidence: Quality, saved: dict[tuple[int, int], dict[str, list[float]]], run: dict[str, Any], cost: dict[str, float],
          found: curve.Curve, args: argparse.Namespace, ran: float, spent: float) -> None:  # fmt: skip
    table = []
    for (hours, span), kept in saved.items():
        percent = {k: [100 * v for v in values] for k, values in kept.items()}
        means = {k: float(np.mean(v)) for k, v in percent.items()}
        what = f"{found.name} of {hours} h of training within {span} h, saved by waiting and by pausing, means"
        evidence.row("scheduling", what, f"{means['single start']:.1f}%", f"{means['with pauses']:.1f}%", spent / len(saved),
                     (args.seed,), command=f"fastlm energy CURVE --hours {hours} --deadline {span}h",
                     note=f"At best {means['best possible']:.1f}%.")  # fmt: skip
        table.append([
            f"{hours} h in {span} h", *(spread(percent[k], 1) for k in ("single start", "with pauses", "best possible")),
            f"{np.mean(kept['pauses']):.1f}", f"{max(percent['above']):.3f}%", f"{max(percent['above with restarts']):.2f}%",
        ])  # fmt: skip
    evidence.table(f"Saved on a real year, {args.starts:,} random starts, in percent of a start at once",
                   ["job", "single start", "with pauses", "best possible", "pauses", "above the optimum at most",
                    "with restarts of 60 s"], table)  # fmt: skip
    seconds = f"{run['took']:.0f} s of {run['deadline']:.0f} s"
    evidence.row("scheduling", f"pauses of a real run under the curve, a thousandfold faster, and seconds taken; bits "
                 f"{'equal' if run['equal'] else 'differ'}", f"0; {run['work'] + run['restart']:.0f} s",
                 f"{run['pauses']}; {seconds}", ran, (args.seed,))  # fmt: skip
    evidence.table("The run that paused", ["steps", "paused at steps", "seconds of steps", "a restart, about", "taken"],
                   [[run["steps"], ", ".join(map(str, run["at"])), f"{run['work']:.1f}", f"{run['restart']:.1f}", seconds]],
                   f"The year's curve from {curve.shown(round(run['begin']))} on, less its least value.")  # fmt: skip
    for label, took in cost.items():
        evidence.row("data-centre", f"part of a step of {1e3 * run['step']:.0f} ms that measuring takes, {label}", "0",
                     f"{took / run['step']:.3%} ({1e6 * took:.0f} µs)", 0.1)  # fmt: skip


if __name__ == "__main__":
    main()
