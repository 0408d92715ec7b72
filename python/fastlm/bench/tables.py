"""The tables of README.md and docs/benchmarks.md, made from bench/results/*.json between marked lines.

``fastlm bench --tables`` writes them; a test fails where text and JSON differ, so no number there is typed by hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastlm.bench import results

TARGETS = ("README.md", "docs/benchmarks.md")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} µs"


def _machine(data: dict[str, Any]) -> str:
    m = data["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v)
    isa = f", {m['instruction_set']}" if m["kind"] == "cpu" and m["instruction_set"] else ""
    threads = f", {m['threads']} threads" if m["kind"] == "cpu" else ""
    return f"Measured {data['date'][:10]} on {m['device']}{threads}{isa}; {versions}."


def _best(case: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any] | None:
    ran = [c for c in case["contenders"] if c["kind"] in kinds and c["status"] == "ok"]
    return min(ran, key=lambda c: c["median_s"]) if ran else None


def case_table(data: dict[str, Any], op: str | None = None) -> str:
    """Markdown: each case with fastlm's time, its fraction of the ceiling, each baseline's ratio, and the goals."""
    lines = ["| case | fastlm | of ceiling | beside | goal |", "| --- | ---: | ---: | --- | --- |"]
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
        lines.append(f"| {name} | {_time(ours['median_s'])} | {fraction} | {', '.join(beside)} | {'; '.join(goals)} |")
    return "\n".join(lines)


def missing_peers(data: dict[str, Any]) -> str:
    """One line for each contender that did not run, with its reason."""
    reasons: dict[str, str] = {}
    for case in data["cases"]:
        for contender in case["contenders"]:
            if contender["status"] != "ok":
                reasons.setdefault(contender["name"], contender.get("reason", contender["status"]))
    return "\n".join(f"- {name}: {why}" for name, why in sorted(reasons.items()))


def memory_table(data: dict[str, Any]) -> str:
    """Markdown: peak memory of each contender of the cases that were measured with --memory."""
    rows = [c for c in data["cases"] if c.get("peak_memory_bytes")]
    if not rows:
        return "Not measured."
    lines = ["| case | peak memory above the inputs |", "| --- | --- |"]
    for case in rows:
        cells = [f"{k} {v / 2**20:.0f} MiB" for k, v in case["peak_memory_bytes"].items() if isinstance(v, int)]
        lines.append(f"| {case['op']} {case['name']} | {', '.join(cells)} |")
    return "\n".join(lines)


def profile_table(data: dict[str, Any]) -> str:
    """Markdown: where the time of a training step goes."""
    profile = data.get("profiles", {}).get("step")
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


def sections(root: Path) -> dict[str, str]:
    """The generated text by marker."""
    status = results.status(root)
    state = "\n".join(
        ["| op | backend | state |", "| --- | --- | --- |"] + [f"| {o} | {b} | {s} |" for o, b, s in status]
    )
    gpu = [results.load(p) for p in results.gpu_files(root)]
    verified = gpu if any(s.startswith("verified") for _, _, s in status) else []
    text = {"gpu-status": state}
    if verified:
        text["gpu-table"] = "\n\n".join(f"{_machine(d)}\n\n{case_table(d)}" for d in verified)
    else:
        text["gpu-table"] = (
            "Not yet run on a GPU: the GPU kernels are compiled and interpreted in the tests, never timed."
        )
    cpu = [results.load(p) for p in sorted((root / "bench/results").glob("cpu-*.json"))]
    for op in ("dropout_add_norm", "attention", "step", "train", "loading"):
        parts = [f"{_machine(d)}\n\n{case_table(d, op)}" for d in cpu if any(c["op"] == op for c in d["cases"])]
        text[f"cpu-{op}"] = "\n\n".join(parts) or "Not measured."
    text["cpu-memory"] = "\n\n".join(memory_table(d) for d in cpu) or "Not measured."
    text["cpu-profile"] = "\n\n".join(profile_table(d) for d in cpu) or "Not measured."
    text["cpu-missing"] = "\n".join(missing_peers(d) for d in cpu) or "None."
    return text


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
    return changed


def stale(root: Path) -> list[str]:
    """Targets whose tables differ from what the committed results give."""
    generated = sections(root)
    texts = {name: (root / name).read_text(encoding="utf-8") for name in TARGETS}
    return [name for name, text in texts.items() if filled(text, generated) != text]
