"""The tables of README.md and docs/benchmarks.md, made from bench/results/*.json between marked lines.

``fastlm bench --tables`` writes them; a test fails where text and JSON differ, so no number there is typed by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastlm import backend
from fastlm.bench import front, results, sources

TARGETS = ("README.md", "docs/benchmarks.md")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} µs"


def _machine(data: dict[str, Any], suites: Iterable[str], with_commands: bool = True) -> str:
    """What, when and how: one sentence for the machine, and one for each command.

    Nothing here depends on the sources as they are now: `fastlm bench --status` says which figures are older than they.
    """
    m = data["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v)
    why = f" ({m['instruction_set_reason']})" if m.get("instruction_set_reason") else ""
    isa = f", {m['instruction_set']}{why}" if m["kind"] == "cpu" and m["instruction_set"] else ""
    threads = f", {m['threads']} threads" if m["kind"] == "cpu" else ""
    runs = {name: data["runs"][name] for name in suites if name in data["runs"]}
    dates = sorted({run["date"][:10] for run in runs.values()}) or [data["date"][:10]]
    commands = "".join(
        f" By `{c}`." for c in sorted({run["command"].strip() for run in runs.values()}) if with_commands
    )
    return f"Measured {' and '.join(dates)} on {m['device']}{threads}{isa}; {versions}.{commands}"


_GOAL = {True: "✓", False: "**missed**", None: "not measured:"}


def case_table(data: dict[str, Any], op: str | None = None) -> str:
    """Markdown: each case with fastlm's time, rate, fraction of the ceiling, each baseline's ratio, and the goals."""
    lines = ["| case | fastlm | rate | of ceiling | beside | goal |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for case in data["cases"]:
        ours = results.ours_of(case)
        if op is not None and case["op"] != op:
            continue
        goals = [f"{_GOAL[results.reached(g)]} {g['ratio']:.3g}× {g['versus']}" for g in case["goals"]]
        name = f"{case['op']} {case['name']}" if op is None else case["name"]
        if ours is None:
            status = next((c["status"] for c in case["contenders"] if c["kind"] == "ours"), "missing")
            lines.append(f"| {name} | {status} | | | | {'; '.join(goals)} |")
            continue
        fraction = f"{case['floor_s'] / ours['median_s']:.2f}" if case["floor_s"] else ""
        beside = []
        for contender in case["contenders"]:
            if contender is ours:
                continue
            if contender["status"] == "ok":
                beside.append(f"{contender['name']} {contender['median_s'] / ours['median_s']:.2f}×")
            elif (
                contender["kind"] != "peer" or contender["status"] != "missing"
            ):  # a peer not installed: listed once, below
                beside.append(f"{contender['name']}: {contender['status']}")
        time, rate = _time(ours["median_s"]), results.rate_of(case, ours["median_s"])
        lines.append(f"| {name} | {time} | {rate} | {fraction} | {', '.join(beside)} | {'; '.join(goals)} |")
    return "\n".join(lines)


def behind_table(data: dict[str, Any]) -> str:
    """Markdown: the cases in which an op is not alone: a matmul reads what it gives, or a whole training step is timed."""
    cases = [case for case in data["cases"] if case["setting"] not in ("alone", "trainer")]
    return case_table(data | {"cases": cases}) if cases else "Not measured."


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
    """A line for each op's contender and reason why it did not run, each peer beside nothing, and cases without time."""
    lines = {f"- {name}: {text}" for name, text in data.get("peers", {}).items() if "beside nothing" in text}
    for case in data["cases"]:
        for contender in case["contenders"]:
            if contender["status"] == "not run" and contender["reason"].startswith("--budget"):
                continue  # listed below
            if contender["status"] != "ok":
                why = contender.get("reason", "no reason given")
                word = "" if contender["status"] == "missing" else f"{contender['status']}: "
                of = f"{case['op']} {case['name']}" if contender["status"] == "not run" else case["op"]
                lines.add(f"- {of}, {contender['name']}: {word}{why}")
    if data.get("not_run"):
        lines.add("- cases that time ran out on: " + "; ".join(data["not_run"]))
    return "\n".join(sorted(lines))


def ceilings_table(data: dict[str, Any]) -> str:
    """Markdown: the copy bandwidth by size, in steps of four, and the matmul rate by dtype, as measured beside the cases."""
    copies: dict[int, set[float]] = {}
    rates: dict[str, set[float]] = {}
    for case in data["cases"]:
        if case["ceilings"].get("copy"):
            copies.setdefault(_step_of_four(case["bytes"]), set()).add(case["ceilings"]["copy"] / 1e9)
        if case["ceilings"].get("matmul"):
            rates.setdefault(case["dtype"], set()).add(case["ceilings"]["matmul"] / 1e12)
    lines = ["| ceiling | measured |", "| --- | ---: |"]
    for low, found in sorted(copies.items()):
        size = f"{low / 2**20:.3g} to {low * 4 / 2**20:.3g} MiB"
        lines.append(f"| copy, {size} read and written | {_range(found, '.3g')} GB/s |")
    for dtype, found in sorted(rates.items()):
        taken = " (float32's)" if dtype != "float32" and found <= rates.get("float32", set()) else ""
        lines.append(f"| matmul, {dtype}{taken} | {_range(found, '.3g')} TFLOP/s |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def _step_of_four(nbytes: int) -> int:
    low = 1
    while low * 4 <= nbytes:
        low *= 4
    return low


def _range(values: set[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}–{high}"


def memory_table(data: dict[str, Any]) -> str:
    """Markdown: peak memory of each contender of the cases that were measured with --memory."""
    rows = [c for c in data["cases"] if c.get("peak_memory_bytes")]
    if not rows:
        return "Not measured."
    lines = ["| case | peak memory above the inputs |", "| --- | --- |"]
    for case in rows:
        cells = [f"{k} {v / 2**20:.0f} MiB" if isinstance(v, int) else f"{k}: {v}"
                 for k, v in case["peak_memory_bytes"].items()]  # fmt: skip
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


def _noted(data: dict[str, Any], suite: str) -> list[str]:
    """The lines of a table of what a suite measures beside its cases, its head included."""
    lines = ["| what | measured |", "| --- | --- |"]
    for name, values in data.get("profiles", {}).get(suite, {}).items():
        lines.append(f"| {name} | " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()) + " |")
    return lines


def preparation_table(data: dict[str, Any]) -> str:
    """Markdown: megabytes of text prepared a second, and the cores used meanwhile."""
    lines = _noted(data, "loading")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def trainer_table(data: dict[str, Any]) -> str:
    """Markdown: what stands beside the trainer's steps (saves, evaluation, the allocator), and the time to quality."""
    lines = _noted(data, "train")
    rest = data["runs"].get("train", {}).get("sources", {}).get("all")
    for row in data.get("time_to_quality", []):
        if row["loop"] == "fastlm":
            what = f"{row['model']}, seed {row['seed']}: time to the plain loop's loss of {row['target']:.4f}"
            took = f"{row['ratio']:.2f} of its time" if row["ratio"] else f"not reached (loss {row['loss']:.4f})"
            aged = "" if row.get("source") == rest else "; **at other sources than the rest**"
            lines.append(f"| {what} | {took}; goal {row['goal']}{aged} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def sections(root: Path) -> dict[str, str]:
    """The generated text by marker."""
    status = results.status(root)
    state = "\n".join(
        ["| op | backend | state |", "| --- | --- | --- |"] + [f"| {o} | {b} | {s} |" for o, b, s in status]
    )
    gpu = {p.stem: results.proven(results.load(p)) for p in results.gpu_files(root)}
    verified = {stem: data for stem, data in gpu.items() if data["cases"]}
    text = {"gpu-status": state}
    if verified:
        text["gpu-table"] = "\n\n".join(f"{_machine(d, d['runs'])}\n\n{case_table(d)}" for d in verified.values())
    else:
        text["gpu-table"] = (
            "Not yet run on a GPU: the GPU kernels are compiled and interpreted in the tests, never timed."
        )
    files = {p.stem: results.load(p) for p in sorted((root / "bench/results").glob("cpu-*.json"))}
    cpu = list(files.values())

    for op in (*backend.ops(), *sources.COMPOSED):
        parts = [f"{_machine(d, [op])}\n\n{case_table(d, op)}" for d in cpu if any(c["op"] == op for c in d["cases"])]
        text[f"cpu-{op}"] = "\n\n".join(parts) or "Not measured."
    text["front"] = front.text(cpu)
    # Which suites each table is made of, and so which runs its head names.
    for name, table, suites in (
        ("behind", behind_table, [*backend.ops(), "step"]),
        ("losses", losses_table, None), ("memory", memory_table, None), ("ceilings", ceilings_table, None),
        ("profile", profile_table, ["step"]), ("within-step", within_step_table, ["step"]),
        ("trainer", trainer_table, ["train"]), ("preparation", preparation_table, ["loading"]),
    ):  # fmt: skip
        text[f"cpu-{name}"] = _of_each(table, cpu, suites)
    text["gpu-ceilings"] = _of_each(ceilings_table, list(verified.values()), None)
    text["cpu-pictures"] = _pictures(files)
    text["gpu-pictures"] = _pictures(verified)
    text["cpu-missing"] = "\n".join(dict.fromkeys("\n".join(missing_peers(d) for d in cpu).splitlines())) or "None."
    return text


def _of_each(table: Callable[[dict[str, Any]], str], files: list[dict[str, Any]], suites: list[str] | None) -> str:
    """A table for each file that has something to say, under the machine and the suites (None: all) that it is of."""
    filled = [(data, table(data)) for data in files]
    parts = [f"{_machine(d, d['runs'] if suites is None else suites, False)}\n\n{text}"
             for d, text in filled if text != "Not measured."]  # fmt: skip
    return "\n\n".join(parts) or "Not measured."


def _pictures(runs: dict[str, dict[str, Any]]) -> str:
    """Links to the pictures that ``write`` draws under docs/, by result file."""
    from fastlm.bench import pictures

    names = [(stem, name) for stem, data in runs.items() for name in pictures.names(data)]
    links = [f"![{name.removesuffix('.png')}](bench-{stem}/{name})" for stem, name in names]
    return "\n".join(links) or "No pictures yet."


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

    for folder, data in _drawn(root):
        if pictures.stale(data, folder):
            changed += pictures.draw(data, folder)
    cpu = _cpu_results(root)
    shown = front.chosen(cpu)
    if shown is not None and front.stale(cpu, root):
        changed.append(front.draw(shown, root / front.PICTURE))
    return changed


def _cpu_results(root: Path) -> list[dict[str, Any]]:
    return [results.load(path) for path in sorted((root / "bench/results").glob("cpu-*.json"))]


def _drawn(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The folders of pictures under docs/, each with the committed result that they are of."""
    found = []
    for kind in ("cpu", "gpu"):
        for file in sorted((root / "bench/results").glob(f"{kind}-*.json")):
            data = results.load(file)
            found.append((root / "docs" / f"bench-{file.stem}", data if kind == "cpu" else results.proven(data)))
    return found


def stale(root: Path) -> list[str]:
    """Targets whose tables, and pictures whose data, differ from what the committed results give."""
    generated = sections(root)
    texts = {name: (root / name).read_text(encoding="utf-8") for name in TARGETS}
    old = [name for name, text in texts.items() if filled(text, generated) != text]
    from fastlm.bench import pictures

    old += [front.PICTURE] if front.stale(_cpu_results(root), root) else []
    return old + [str((folder / name).relative_to(root)) for folder, data in _drawn(root)
                  for name in pictures.stale(data, folder)]  # fmt: skip
