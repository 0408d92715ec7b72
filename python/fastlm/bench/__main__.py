"""``fastlm bench`` and ``python -m fastlm.bench``: runs bench/bench_*.py, prints, writes, compares, reports.

fastlm bench                          everything, a few minutes; the table, JSON and pictures in runs/bench/
fastlm bench attention --seconds 5    one op, longer
fastlm bench step                     the training step, fused beside torch, and where the time goes
fastlm bench --smoke                  one short round each, values checked, nothing asserted about time
fastlm bench --compare A.json B.json  what became faster or slower beyond the noise; exit 1 on a regression
fastlm bench --status                 what was verified on which GPU at which state of the sources
fastlm bench --tune                   on a GPU: time the Triton kernels' configurations, rewrite kernels/table.json
fastlm bench --memory --publish NAME  all of it as evidence: bench/results/cpu-NAME.json, tables and pictures; with an
                                      op's name only that op's part of the file is made anew
fastlm bench --tables                 the README's and docs' tables and pictures from bench/results/
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastlm import _processor
from fastlm.bench import ceilings, harness, memory, peers, results, sources
from fastlm.bench.clock import DTYPES
from fastlm.bench.suites import load_suite, suites
from fastlm.data.bounds import Range, check


def run(
    names: Iterable[str],
    device: str,
    seconds: float,
    match: str,
    with_memory: bool,
    out: Path | None,
    budget: float = float("inf"),
) -> dict[str, Any]:
    """Runs the suites, printing each case as it ends and saving after each. ``seconds`` 0 is the smoke pass.

    Once ``budget`` seconds are spent no case is begun; those left out are listed under ``not_run``.
    """
    root, begin = sources.checkout(), time.monotonic()
    known = suites(root)
    allocator = harness.raise_malloc_thresholds()
    data: dict[str, Any] = {
        "schema": results.SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": ceilings.machine(device) | {"allocator": allocator},
        "peers": peers.table(),
        "runs": {},
        "cases": [],
    }
    kind = "cpu" if torch.device(device).type == "cpu" else "gpu"
    for name in names:
        module = load_suite(known[name])
        cap = f"FASTLM_CPU_ISA={os.environ['FASTLM_CPU_ISA']} " if os.environ.get("FASTLM_CPU_ISA") else ""
        made = {
            "date": data["date"],
            "command": f"{cap}fastlm bench " + " ".join(w for w in sys.argv[1:] if w != "bench"),
        }
        made["sources"] = results.hashes(name, kind, root)
        for case in module.cases(device):
            if match not in case.name or not (case.timed if seconds else case.smoke):
                continue
            if time.monotonic() - begin > budget:
                data.setdefault("not_run", []).append(f"{case.op} {case.name}")
                data["cases"].append(harness.row(case, harness.not_run(case, f"--budget {budget:g} was spent"), {}))
                continue
            if seconds and (slow := _hopeless(case)):
                data["cases"].append(harness.row(case, harness.not_run(case, slow), {}))
                results.print_case(data["cases"][-1])
                continue
            timings = harness.measure(case, seconds=seconds * case.longer)
            limits = ceilings.for_case(case.bytes, case.flops, case.dtype, device) if seconds else {}
            entry = harness.row(case, timings, limits)
            entry["clocks"] = ceilings.clocks(device) if seconds else None
            if with_memory and seconds and memory.wanted(case):
                ran = [t.name for t in timings if t.status == "ok"]
                entry["peak_memory_bytes"] = memory.of_case(known[name], case, device, ran)
            data["cases"].append(entry)
            data["runs"][name] = made
            results.print_case(entry)
            sys.stdout.flush()
            if out is not None:
                results.save(out, data)
        if not hasattr(module, "profile") or match:
            continue
        if time.monotonic() - begin > budget:
            data.setdefault("not_run", []).append(f"{name} profile")
        else:
            profile = module.profile(device, small=not seconds)
            if seconds:
                data.setdefault("profiles", {})[name] = profile
        if hasattr(module, "energy") and time.monotonic() - begin <= budget:
            found = module.energy(device, small=not seconds)
            if seconds and found:
                data.setdefault("profiles", {})[f"{name} energy"] = found
    if data.get("not_run"):
        print(f"\nno time left (--budget {budget:g}) for: " + "; ".join(data["not_run"]))
    return data


def _hopeless(case: harness.Case) -> str:
    """Why a case tells nothing here: PyTorch's matmuls around an op, in a dtype without instructions, take minutes."""
    if torch.device(case.device).type != "cpu" or case.setting == "alone":
        return ""
    return _processor.slow(DTYPES[case.dtype])


def draw(data: dict[str, Any], folder: Path) -> None:
    """The pictures, or one line that says why there are none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"no pictures in {folder}: matplotlib is not installed (pip install matplotlib)")
        return
    from fastlm.bench import pictures

    pictures.draw(data, folder)


RANGES = {"seconds": Range(above=0), "budget": Range(above=0), "threads": Range(0, 65536), "threshold": Range(0)}


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser("fastlm bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", nargs="*", help="an op, or step, train, loading; default: all")
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="time for each case (default 3); five times that for calls of seconds",
    )
    parser.add_argument("--budget", type=float, default=600.0, help="no case is begun after this many seconds (600)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for result.json and pictures (runs/bench/<date>)"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also the peak memory of each contender, in a child process"
    )
    parser.add_argument(
        "--publish", default="", metavar="NAME", help="also write bench/results/, the tables and pictures"
    )
    parser.add_argument("--smoke", action="store_true", help="one short round of each case, values checked")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"))
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="regression that --compare fails on (default 0.05)"
    )
    parser.add_argument("--status", action="store_true", help="what was verified on a GPU, per op and backend")
    parser.add_argument(
        "--tune", action="store_true", help="time configurations on this GPU and rewrite kernels/table.json"
    )
    parser.add_argument("--table", type=Path, default=None, help="of --tune: the table to write (kernels/table.json)")
    parser.add_argument(
        "--long", action="store_true", help="of train: also the time to quality (about an hour on two cores)"
    )
    parser.add_argument("--tables", action="store_true", help="write the README's and docs' tables from bench/results/")
    args = parser.parse_args(argv)
    try:
        for name, allowed in RANGES.items():
            check(name, getattr(args, name), allowed)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
            raise ValueError(f"--device must be cpu, cuda or cuda:<number>; it is {args.device!r}")
        if args.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"--device {args.device}: PyTorch finds no CUDA device here")
        if args.publish and not re.fullmatch(r"[a-z0-9][a-z0-9-]*", args.publish):
            raise ValueError(f"--publish names a file: small letters, digits and '-'; it is {args.publish!r}")
        if args.publish and args.case:
            raise ValueError(f"--publish takes whole suites; --case {args.case!r} leaves some of their cases out")
        if args.compare:
            old, new = (results.load(path) for path in args.compare)
            return int(results.compare(old, new, args.threshold) > 0)
        root = sources.checkout()
        if args.status:
            for op, name, state in results.status(root):
                print(f"{op:<20} {name:<8} {state}")
            for suite, state in results.cpu_status(root):
                print(f"{suite:<20} {'cpu':<8} {state}")
            return 0
        if args.tables:
            from fastlm.bench import tables

            tables.write(root)
            return 0
        if args.tune:
            from fastlm.bench import tune

            return tune.main(args.suite, args.budget, args.table or root / "kernels/table.json")
        known = suites(root)
        for name in args.suite:
            if name not in known:
                raise ValueError(f"suite is {name!r}; it must be one of {', '.join(known)}")
        if args.case and not args.long:
            there = [c.name for name in args.suite or known for c in load_suite(known[name]).cases(args.device)]
            if not any(args.case in name for name in there):
                raise ValueError(f"--case must be part of a case's name, such as {there[0]!r}; it is {args.case!r}")
        if args.threads:
            torch.set_num_threads(args.threads)
        published = None
        if args.publish:
            kind = "cpu" if torch.device(args.device).type == "cpu" else "gpu"
            published = root / "bench/results" / f"{kind}-{args.publish}.json"
            if published.exists():  # what cannot be merged is said before minutes are spent
                here = {"machine": ceilings.machine(args.device), "runs": {}, "cases": []}
                results.merged(results.load(published), here)
    except (ValueError, sources.NoCheckout) as error:
        print(f"fastlm bench: {error}", file=sys.stderr)
        return 2
    names = args.suite or list(known)
    if args.smoke:
        data = run(names, args.device, 0.0, args.case, False, None)
        each = [(c, t) for c in data["cases"] for t in c["contenders"]]
        bad = [
            f"{c['op']} {c['name']}, {t['name']}: {t['status']}, {t['reason']}" for c, t in each if harness.broken(t)
        ]
        if bad:
            print("\nfastlm bench: a contender did not run or gave wrong values: " + "; ".join(bad), file=sys.stderr)
            return 1
        ran = [t for _, t in each if t["status"] == "ok" and t["kind"] != "ceiling"]
        checked = sum("error" in t for t in ran)
        print(
            f"\n{len(data['cases'])} cases ran; {checked} of their {len(ran)} contenders were checked and gave right values"
        )
        return 0
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = args.out or root / "runs/bench" / stamp
    out = folder / "result.json"
    data = run(names, args.device, args.seconds, args.case, args.memory, out, args.budget)
    results.save(out, data)
    if args.long:
        source = results.hashes("train", "cpu", root)["all"]
        data["time_to_quality"] = load_suite(known["train"]).long(
            folder / "quality.jsonl", args.budget, args.case, source
        )
        results.save(out, data)
    draw(data, folder)
    if published is not None:
        from fastlm.bench import tables

        results.save(published, results.merged(results.load(published), data) if published.exists() else data)
        changed = tables.write(root)
        print(f"\nwrote {published.relative_to(root)}, " + ", ".join(str(p.relative_to(root)) for p in changed))
    states = [results.reached(goal) for case in data["cases"] for goal in case["goals"]]
    unknown = f", {states.count(None)} not measured" if None in states else ""
    print(f"\n{states.count(True)} of {len(states)} goals reached{unknown}; results in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
