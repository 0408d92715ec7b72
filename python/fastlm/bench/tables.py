"""The tables of README.md and docs/benchmarks.md, made from bench/results/*.json between marked lines.

``fastlm bench --tables`` writes them; a test fails where text and JSON differ, so no number there is typed by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastlm import backend
from fastlm.bench import results

TARGETS = ("README.md", "docs/benchmarks.md")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} µs"


def _machine(data: dict[str, Any], suites: Iterable[str], root: Path) -> str:
    """What, when and how: one sentence for the machine, one for each command, and which figures are stale."""
    m = data["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v)
    isa = f", {m['instruction_set']}" if m["kind"] == "cpu" and m["instruction_set"] else ""
    threads = f", {m['threads']} threads" if m["kind"] == "cpu" else ""
    runs = {name: data["runs"][name] for name in suites if name in data["runs"]}
    dates = sorted({run["date"][:10] for run in runs.values()}) or [data["date"][:10]]
    commands = "".join(f" By `{c}`." for c in sorted({run["command"].strip() for run in runs.values()}))
    # Of step, train and loading, which any file of the package is part of, `fastlm bench --status` alone says it.
    old = [name for name in runs if name in backend.ops() and results.changed(data, name, root)]
    stale = f" **Stale: the sources of {', '.join(old)} have changed since.**" if old else ""
    return f"Measured {' and '.join(dates)} on {m['device']}{threads}{isa}; {versions}.{commands}{stale}"


def _best(case: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any] | None:
    ran = [c for c in case["contenders"] if c["kind"] in kinds and c["status"] == "ok"]
    return min(ran, key=lambda c: c["median_s"]) if ran else None


def case_table(data: dict[str, Any], op: str | None = None) -> str:
    """Markdown: each case with fastlm's time, rate, fraction of the ceiling, each baseline's ratio, and the goals."""
    lines = ["| case | fastlm | rate | of ceiling | beside | goal |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for case in data["cases"]:
        ours = results.ours_of(case)
        if ours is None or (op is not None and case["op"] != op):
            continue
        fraction = f"{case['floor_s'] / ours['median_s']:.2f}" if case["floor_s"] else ""
        beside = []
        for contender in case["contenders"]:
            if contender is ours:
                continue
            if contender["status"] == "ok":
                beside.append(f"{contender['name']} {contender['median_s'] / ours['median_s']:.2f}×")
            elif contender["kind"] != "peer":
                beside.append(f"{contender['name']}: {contender['status']}")
        goals = [
            f"{'✓' if g['reached'] >= g['ratio'] else '**missed**'} {g['ratio']:.3g}× {g['versus']}"
            for g in case["goals"]
        ]
        name = f"{case['op']} {case['name']}" if op is None else case["name"]
        time, rate = _time(ours["median_s"]), results.rate_of(case, ours["median_s"])
        lines.append(f"| {name} | {time} | {rate} | {fraction} | {', '.join(beside)} | {'; '.join(goals)} |")
    return "\n".join(lines)


def losses_table(data: dict[str, Any]) -> str:
    """Markdown: each goal that is missed, and each case where a baseline or a peer is faster by more than 5%.

    Beside what was reached stands what the machine allows at most: the baseline's time over the floor (bytes over copy
    bandwidth or flops over matmul rate), where there is one.
    """
    lines = [
        "| case | beside | goal | reached | of ceiling | at the floor |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in data["cases"]:
        ours = results.ours_of(case)
        if ours is None:
            continue
        goals = {g["versus"]: g["ratio"] for g in case["goals"]}
        fraction = f"{case['floor_s'] / ours['median_s']:.2f}" if case["floor_s"] else ""
        for other in case["contenders"]:
            if other["status"] != "ok" or other is ours:
                continue
            reached, goal = other["median_s"] / ours["median_s"], goals.get(other["name"])
            slower = other["kind"] in ("baseline", "peer") and reached < 0.95
            if slower or (goal is not None and reached < goal):
                most = f"{other['median_s'] / case['floor_s']:.2f}×" if case["floor_s"] else ""
                wanted = "" if goal is None else f"{goal:.3g}×"
                name = f"{case['op']} {case['name']}"
                lines.append(f"| {name} | {other['name']} | {wanted} | {reached:.2f}× | {fraction} | {most} |")
    return "\n".join(lines) if len(lines) > 2 else "None in this run."


def missing_peers(data: dict[str, Any]) -> str:
    """One line for each contender that did not run, with its reason, for each peer, and for cases that time ran out on."""
    reasons: dict[str, str] = {name: text for name, text in data.get("peers", {}).items() if "beside nothing" in text}
    for case in data["cases"]:
        for contender in case["contenders"]:
            if contender["status"] != "ok":
                reasons.setdefault(contender["name"], contender.get("reason", contender["status"]))
    if data.get("not_run"):
        reasons["cases that time ran out on"] = "; ".join(data["not_run"])
    return "\n".join(f"- {name}: {why}" for name, why in sorted(reasons.items()))


def memory_table(data: dict[str, Any]) -> str:
    """Markdown: peak memory of each contender of the cases that were measured with --memory."""
    rows = [c for c in data["cases"] if c.get("peak_memory_bytes")]
    if not rows:
        return "Not measured."
    lines = ["| case | peak memory above the inputs |", "| --- | --- |"]
    for case in rows:
        cells = [f"{k} {v / 2**20:.0f} MiB" for k, v in case["peak_memory_bytes"].items() if isinstance(v, int)]
        if not cells:
            continue
        lines.append(f"| {case['op']} {case['name']} | {', '.join(cells)} |")
    return "\n".join(lines)


def profile_table(data: dict[str, Any]) -> str:
    """Markdown: where the time of a training step goes."""
    profile = {name: one["shares"] for name, one in data.get("profiles", {}).get("step", {}).items()}
    if not profile:
        return "Not measured."
    kinds = sorted(
        {k for shares in profile.values() for k in shares}, key=lambda k: -max(s.get(k, 0) for s in profile.values())
    )
    lines = ["| share of the step | " + " | ".join(profile) + " |", "| --- |" + " ---: |" * len(profile)]
    for kind in kinds:
        shares = [s.get(kind, 0.0) for s in profile.values()]
        if max(shares) >= 0.005:
            lines.append(f"| {kind} | " + " | ".join(f"{s:.0%}" for s in shares) + " |")
    return "\n".join(lines)


def within_step_table(data: dict[str, Any]) -> str:
    """Markdown: each op of fastlm's within a training step: calls, time of them all, time of one."""
    lines = ["| op within the step | step | calls | time | one call |", "| --- | --- | ---: | ---: | ---: |"]
    for name, one in data.get("profiles", {}).get("step", {}).items():
        for op, cost in one["ops"].items():
            each = cost["seconds"] / cost["calls"]
            lines.append(f"| {op} | {name} | {cost['calls']} | {_time(cost['seconds'])} | {_time(each)} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def trainer_table(data: dict[str, Any]) -> str:
    """Markdown: what stands beside the trainer's steps (saves, evaluation, the allocator), and the time to quality."""
    lines = ["| what | measured |", "| --- | --- |"]
    for name, values in data.get("profiles", {}).get("train", {}).items():
        lines.append(f"| {name} | " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()) + " |")
    for row in data.get("time_to_quality", []):
        if row["loop"] == "fastlm":
            what = f"{row['model']}, seed {row['seed']}: time to the plain loop's loss of {row['target']:.4f}"
            took = f"{row['ratio']:.2f} of its time" if row["ratio"] else f"not reached (loss {row['loss']:.4f})"
            lines.append(f"| {what} | {took}; goal {row['goal']} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def sections(root: Path) -> dict[str, str]:
    """The generated text by marker."""
    status = results.status(root)
    state = "\n".join(
        ["| op | backend | state |", "| --- | --- | --- |"] + [f"| {o} | {b} | {s} |" for o, b, s in status]
    )
    gpu = [results.proven(results.load(p)) for p in results.gpu_files(root)]
    verified = [data for data in gpu if data["cases"]]
    text = {"gpu-status": state}
    if verified:
        text["gpu-table"] = "\n\n".join(f"{_machine(d, d['runs'], root)}\n\n{case_table(d)}" for d in verified)
    else:
        text["gpu-table"] = (
            "Not yet run on a GPU: the GPU kernels are compiled and interpreted in the tests, never timed."
        )
    cpu = [results.load(p) for p in sorted((root / "bench/results").glob("cpu-*.json"))]
    for op in (*backend.ops(), "step", "train", "loading"):
        parts = [
            f"{_machine(d, [op], root)}\n\n{case_table(d, op)}" for d in cpu if any(c["op"] == op for c in d["cases"])
        ]
        text[f"cpu-{op}"] = "\n\n".join(parts) or "Not measured."
    text["cpu-losses"] = "\n\n".join(f"{_machine(d, [], root)}\n\n{losses_table(d)}" for d in cpu) or "Not measured."
    text["cpu-memory"] = "\n\n".join(memory_table(d) for d in cpu) or "Not measured."
    text["cpu-profile"] = "\n\n".join(profile_table(d) for d in cpu) or "Not measured."
    text["cpu-within-step"] = "\n\n".join(within_step_table(d) for d in cpu) or "Not measured."
    text["cpu-trainer"] = "\n\n".join(trainer_table(d) for d in cpu) or "Not measured."
    text["cpu-pictures"] = _pictures("cpu", cpu)
    text["gpu-pictures"] = _pictures("gpu", verified)
    text["cpu-missing"] = "\n".join(missing_peers(d) for d in cpu) or "None."
    return text


def _pictures(kind: str, runs: list[dict[str, Any]]) -> str:
    """Links to the pictures that ``write`` draws beside docs/benchmarks.md."""
    from fastlm.bench import pictures

    names = [name for data in runs for name in pictures.names(data)]
    return (
        "\n".join(f"![{name.removesuffix('.png')}]({folder_of(kind)}/{name})" for name in names) or "No pictures yet."
    )


def folder_of(kind: str) -> str:
    """The folder under docs/ of the pictures of a kind of machine."""
    return f"bench-{kind}"


def filled(text: str, generated: dict[str, str]) -> str:
    """``text`` with each ``<!-- name -->`` ... ``<!-- /name -->`` filled. Raises KeyError for an unknown name."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{generated[match[1]]}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ([a-z_-]+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def write(root: Path) -> list[Path]:
    """Fills the tables of every target, and draws the pictures of the committed results. Returns what changed."""
    generated, changed = sections(root), []
    for name in TARGETS:
        path = root / name
        text = path.read_text(encoding="utf-8")
        new = filled(text, generated)
        if new != text:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    from fastlm.bench import pictures

    for kind in ("cpu", "gpu"):
        for file in sorted((root / "bench/results").glob(f"{kind}-*.json")):
            data = results.load(file)
            changed += pictures.draw(data if kind == "cpu" else results.proven(data), root / "docs" / folder_of(kind))
    return changed


def stale(root: Path) -> list[str]:
    """Targets whose tables differ from what the committed results give."""
    generated = sections(root)
    texts = {name: (root / name).read_text(encoding="utf-8") for name in TARGETS}
    return [name for name, text in texts.items() if filled(text, generated) != text]
