"""Result files: read, compare, print, and the state of GPU evidence. The schema stands in bench/results/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastlm import backend
from fastlm.bench import sources

SCHEMA = 1
GPU_BACKENDS = ("triton", "cuda")


def load(path: str | Path) -> dict[str, Any]:
    """A result file. Raises ValueError, naming the file and what it lacks, if it is not one."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result file of schema {SCHEMA}")
    for key, kind in (("machine", dict), ("cases", list)):
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{path} is not a whole result file: it has no {key!r}")
    for number, case in enumerate(data["cases"]):
        lacking = [k for k in ("op", "name", "contenders") if not isinstance(case, dict) or k not in case]
        if lacking:
            raise ValueError(f"{path} is not a whole result file: its case {number} has no {lacking[0]!r}")
    return data


def write(path: Path, text: str) -> None:
    """Writes beside ``path`` and renames into place, so that an interrupted run keeps the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def save(path: Path, data: dict[str, Any]) -> None:
    """Writes a result file."""
    write(path, json.dumps(data, indent=1) + "\n")


def merged(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``earlier`` with the suites that ``new`` ran in their place: a rerun of one op keeps the figures of the others.

    Raises ValueError if the two are not of the same machine, threads, instruction set and versions.
    """
    for key in ("device", "kind", "threads", "instruction_set", "instruction_set_reason", "versions"):
        was, now = earlier["machine"].get(key), new["machine"].get(key)
        if was != now:
            raise ValueError(f"--publish: that file is of {key} {was}, this run of {now}; give another name")
    kept = [case for case in earlier["cases"] if case["op"] not in new["runs"]]
    have = {case["op"] for case in kept}
    ran = [c for c in new["cases"] if c["op"] in new["runs"] or c["op"] not in have]  # not rows of a suite never begun
    profiles = {name: one for name, one in earlier.get("profiles", {}).items() if name not in new["runs"]}
    quality = new.get("time_to_quality", [])
    if not any(row["loop"] == "fastlm" for row in quality):  # its rows say of which sources they are
        quality = earlier.get("time_to_quality", [])
    not_run = [c for c in earlier.get("not_run", []) if c.split()[0] not in new["runs"]]
    not_run += [c for c in new.get("not_run", []) if c.split()[0] not in have and c not in not_run]
    return {
        **earlier, **new,
        "runs": {**earlier["runs"], **new["runs"]},
        "cases": sorted(kept + ran, key=lambda case: case["op"]),
        "profiles": {**profiles, **new.get("profiles", {})},
        **({"time_to_quality": quality} if quality else {}),
        "not_run": not_run,
    }  # fmt: skip


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def ours_of(case: dict[str, Any]) -> dict[str, Any] | None:
    """fastlm's own contender of a case, if it ran."""
    return next((c for c in case["contenders"] if c["kind"] == "ours" and c["status"] == "ok"), None)


def bound_of(case: dict[str, Any]) -> str:
    """What bounds the case on this machine: "bytes", "flops", or "" where it states neither. Without ceilings, flops."""
    limits = case["ceilings"]
    if case["bytes"] and case["flops"] and limits.get("copy") and limits.get("matmul"):
        return "bytes" if case["bytes"] / limits["copy"] >= case["flops"] / limits["matmul"] else "flops"
    return "flops" if case["flops"] else "bytes" if case["bytes"] else ""


def rate_of(case: dict[str, Any], seconds: float) -> str:
    """GB/s or TFLOP/s, by what bounds the case."""
    bound = bound_of(case)
    if bound == "bytes":
        return f"{case['bytes'] / seconds / 1e9:.1f} GB/s"
    return f"{case['flops'] / seconds / 1e12:.3g} TFLOP/s" if bound else ""


def lines(case: dict[str, Any]) -> list[list[str]]:
    """Table rows of one case: contender, time, spread, rate, fraction of the ceiling, ours against it."""
    ours, out = ours_of(case), []
    for contender in case["contenders"]:
        if contender["status"] != "ok":
            out.append([contender["name"], contender["status"], "", "", "", contender.get("reason", "")])
            continue
        median = contender["median_s"]
        low, high = contender["quartiles_s"]
        rate = rate_of(case, median)
        fraction = f"{case['floor_s'] / median:.2f}" if case["floor_s"] else ""
        ratio = f"{median / ours['median_s']:.2f}x" if ours and contender is not ours else ""
        out.append([contender["name"], _seconds(median), f"±{(high - low) / 2 / median:.0%}", rate, fraction, ratio])
    return out


HEADER = ["", "time", "spread", "rate", "of ceiling", "fastlm is faster by"]


def print_case(case: dict[str, Any]) -> None:
    """One case as a table on standard output."""
    print(f"\n{case['op']} {case['name']}")
    rows = [HEADER, *lines(case)]
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    for r in rows:
        print("  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=False)) + "  " + r[5])
    for goal in case["goals"]:
        state = {True: "reached", False: "MISSED", None: "not measured"}[reached(goal)]
        found = "" if goal["reached"] is None else f"{goal['reached']:.2f}x, "
        print(f"  goal: {goal['ratio']:g}x {goal['versus']}: {found}{state}")


def reached(goal: dict[str, Any]) -> bool | None:
    """Whether a goal is reached; None where nothing measured it."""
    return None if goal["reached"] is None else bool(goal["reached"] >= goal["ratio"])


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> int:
    """Prints what became faster or slower beyond the noise, and cases that only one of the files has.

    Returns how many are slower by more than ``threshold``, those counted where fastlm ran earlier and does not now. Raises
    ValueError if no case of fastlm's is in both files.

    fastlm's ratio is taken to the case's first baseline where both files have it, which cancels a machine that was slower as
    a whole. A change counts when the quartiles of the two do not overlap.
    """
    begun = lambda data: {(c["op"], c["name"]): c for c in data["cases"]
                          if any(one["status"] != "not run" for one in c["contenders"])}  # fmt: skip
    before, after = begun(old), begun(new)
    if not any(ours_of(before[key]) for key in before.keys() & after.keys()):
        raise ValueError("--compare: the two files have no case in common that fastlm ran in the first")
    regressions = 0
    for op, name in before.keys() - after.keys():
        print(f"{'removed':<10} {op} {name}: only the first file has it")
    for key, case in after.items():
        earlier = before.get(key)
        if earlier is None:
            print(f"{'added':<10} {case['op']} {case['name']}: only the second file has it")
            continue
        a, b = ours_of(earlier), ours_of(case)
        if a is None or b is None:
            if a is not None:
                regressions += 1
                print(
                    f"{'REGRESSION':<10} {case['op']} {case['name']}: fastlm ran in the first file, not in the second"
                )
            elif b is not None:
                print(f"{'added':<10} {case['op']} {case['name']}: fastlm ran in the second file alone")
            continue
        scale = 1.0
        for contender in case["contenders"]:
            twin = next((c for c in earlier["contenders"] if c["name"] == contender["name"]), None)
            if contender["kind"] == "baseline" and contender["status"] == "ok" and twin and twin["status"] == "ok":
                scale = contender["median_s"] / twin["median_s"]
                break
        change = b["median_s"] / (a["median_s"] * scale) - 1
        apart = b["quartiles_s"][0] > a["quartiles_s"][1] * scale or b["quartiles_s"][1] < a["quartiles_s"][0] * scale
        if not apart or abs(change) < 0.01:
            continue
        slower = change > threshold
        regressions += slower
        word = "REGRESSION" if slower else ("slower" if change > 0 else "faster")
        print(f"{word:<10} {case['op']} {case['name']}: {_seconds(a['median_s'])} -> {_seconds(b['median_s'])} "
              f"({change:+.1%} against the baseline of the same run)")  # fmt: skip
    if not regressions:
        print(f"no regression beyond {threshold:.0%}")
    return regressions


def gpu_files(root: Path | None = None) -> list[Path]:
    """Committed GPU result files."""
    return sorted(((root or sources.checkout()) / "bench/results").glob("gpu-*.json"))


def proven(data: dict[str, Any]) -> dict[str, Any]:
    """A GPU file's cases of which every (op, backend) that the timed call ran on passed all of its tests in that run.

    Which those were stands in the row of fastlm's contender; a row that does not say so proves nothing.
    """
    tests = data.get("gpu_tests", {})

    def good(case: dict[str, Any]) -> bool:
        served = next((c.get("backends") for c in case["contenders"] if c["kind"] == "ours"), None)
        entries = [tests.get(op, {}).get(name) for op, name in served or () if name in GPU_BACKENDS]
        return bool(entries) and all(entry is not None and not unproven(entry) for entry in entries)

    cases = [case for case in data["cases"] if good(case)]
    kept = {case["op"] for case in cases}
    runs = {name: run for name, run in data.get("runs", {}).items() if name in kept}
    return data | {"cases": cases, "runs": runs}


def unproven(entry: dict[str, Any]) -> str:
    """Why one backend's GPU tests of an op prove nothing; "" if they do."""
    if entry["failed"] or entry["skipped"] or not entry["passed"]:
        return f"{entry['passed']} passed, {entry['failed']} failed, {entry['skipped']} skipped"
    return f"compute-sanitizer found errors ({', '.join(entry['sanitizer'])})" if entry.get("sanitizer") else ""


def status(root: Path | None = None) -> list[tuple[str, str, str]]:
    """(op, backend, state) for each op's GPU backends: verified on which device at which hash, stale, or never run.

    An op whose GPU tests failed, were skipped, or were not run is not verified; nor is one that compute-sanitizer complains of.
    """
    root = root or sources.checkout()
    runs = [load(path) for path in gpu_files(root)]
    out = []
    for op in backend.ops():
        for name in GPU_BACKENDS:
            if not _has_sources(op, name, root):
                out.append((op, name, "no kernel yet"))
                continue
            digest = sources.source_hash(op, name, root)
            out.append((op, name, _state(runs, op, name, digest)))
    return out


def hashes(suite: str, kind: str, root: Path) -> dict[str, str]:
    """By backend, the hash of what a suite times on a kind of machine, "cpu" or "gpu"; of step, train, loading: "all"."""
    if suite not in backend.ops():
        return {"all": sources.suite_hash(suite, kind, root)}
    names = ("cpu",) if kind == "cpu" else GPU_BACKENDS
    return {n: sources.source_hash(suite, n, root) for n in names if _has_sources(suite, n, root)}


def changed(data: dict[str, Any], suite: str, root: Path) -> bool:
    """Whether the sources of a suite differ from those that this file's figures of it were measured with."""
    kind = "cpu" if data["machine"]["kind"] == "cpu" else "gpu"
    return bool(data["runs"][suite]["sources"] != hashes(suite, kind, root))


def cpu_status(root: Path) -> list[tuple[str, str]]:
    """(suite, state) of the committed CPU figures: measured at these sources, stale, or never measured."""
    files = [(p.name, load(p)) for p in sorted((root / "bench/results").glob("cpu-*.json"))]
    out = []
    for suite in sorted(p.stem.removeprefix("bench_") for p in (root / "bench").glob("bench_*.py")):
        states = []
        for name, data in files:
            if suite in data["runs"]:
                run = data["runs"][suite]
                state = "stale: the sources have changed since; measured" if changed(data, suite, root) else "measured"
                digest = ", ".join(run["sources"].values())
                states.append(f"{state} on {data['machine']['device']}, {run['date'][:10]}, source {digest} ({name})")
        out.append((suite, "; ".join(states) or "no committed figures"))
    return out


def _has_sources(op: str, name: str, root: Path) -> bool:
    folder = root / "kernels" if name == "triton" else root / "python/fastlm" / name
    return (folder / f"{op}.py").is_file()


def _state(runs: list[dict[str, Any]], op: str, name: str, digest: str) -> str:
    best = "never run on a GPU"
    for run in runs:
        entry = run.get("gpu_tests", {}).get(op, {}).get(name)
        if not entry:
            continue
        where = f"{run['machine']['device']}, {run['date'][:10]}, source {entry['hash']}"
        if why := unproven(entry):
            best = f"not verified: {why} on {where}"
        elif entry["hash"] == digest:
            return f"verified on {where}"
        else:
            best = f"stale: verified on {where}; the sources are {digest} now"
    return best
