"""Pictures of a result file: time beside each baseline, time against size, and the roofline. Needs matplotlib.

The roofline is drawn against this run's own ceilings: flops a second over flops per byte for cases that state both, and
the fraction of the ceiling that bounds each case for all.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fastlm.bench.results import ours_of

_INK, _SOFT, _OURS = "#222222", "#b8bcc4", "#d9480f"


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Writes, as PNG, per op: ratios (<op>.png), time against size (<op>-size.png), and the ceilings. Returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for op in sorted({c["op"] for c in data["cases"]}):
        cases = [c for c in data["cases"] if c["op"] == op and ours_of(c)]
        if not cases:
            continue
        figure, axis = plt.subplots(figsize=(9, 0.42 * len(cases) + 1.3), layout="constrained")
        for i, case in enumerate(cases):
            ours = ours_of(case)
            assert ours is not None
            for contender in case["contenders"]:
                if contender["status"] == "ok" and contender["kind"] != "ours":
                    ceiling = contender["kind"] == "ceiling"
                    axis.plot(contender["median_s"] / ours["median_s"], i, "|" if ceiling else "o", color=_INK, ms=9)
                    axis.annotate(contender["name"], (contender["median_s"] / ours["median_s"], i), (3, 4),
                                  textcoords="offset points", fontsize=6, color=_INK)  # fmt: skip
        axis.axvline(1, color=_OURS)
        axis.set_xscale("log")
        axis.set_yticks(range(len(cases)), [c["name"] for c in cases], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("time, as a multiple of fastlm's (the line); right of it fastlm is faster")
        axis.set_title(f"{op}: {data['machine']['device']}, {data['machine']['threads']} threads", fontsize=9)
        axis.grid(axis="x", color=_SOFT, lw=0.4)
        paths.append(folder / f"{op}.png")
        _save(figure, paths[-1], data)
        plt.close(figure)
        paths += _against_size(op, cases, data, folder, plt)
    paths += _roofline(data, folder, plt) + _ceilings(data, folder, plt)
    return paths


_KEY = "fastlm-data"  # of the PNG's text that holds the hash of the data that it shows


def digest(data: dict[str, Any]) -> str:
    """The hash of what the pictures of a result show."""
    shown = [data["machine"]["device"], data["machine"]["threads"], data["cases"]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def stale(data: dict[str, Any], folder: Path) -> list[str]:
    """Names of the pictures that are not there, or are of other data."""
    return [name for name in names(data) if not _is_of(folder / name, digest(data))]


def _is_of(path: Path, digest: str) -> bool:
    # a tEXt chunk of a PNG: keyword, a null byte, text; matplotlib writes it before the image
    return path.is_file() and re.search(b"tEXt%s\0%s" % (_KEY.encode(), digest.encode()), path.read_bytes()) is not None


def _save(figure: Any, path: Path, data: dict[str, Any]) -> None:
    figure.savefig(path, dpi=130, metadata={_KEY: digest(data)})


def names(data: dict[str, Any]) -> list[str]:
    """The file names that ``draw`` writes for this result, without drawing."""
    found = []
    for op in sorted({c["op"] for c in data["cases"]}):
        cases = [c for c in data["cases"] if c["op"] == op and ours_of(c)]
        if cases:
            found.append(f"{op}.png")
            if families(cases):
                found.append(f"{op}-size.png")
    ran = [c for c in data["cases"] if ours_of(c)]
    if any(c["bytes"] and c["flops"] and {"copy", "matmul"} <= c["ceilings"].keys() for c in ran):
        found.append("roofline.png")
    if any(c["floor_s"] for c in ran):
        found.append("ceilings.png")
    return found


def size_of(case: dict[str, Any]) -> float:
    """What a case's time is drawn against: the bytes that it must move, else its flops."""
    return float(case["bytes"] or case["flops"])


def families(cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cases that differ in nothing but their size, where there are several sizes, smallest first."""
    sizes = ("rows", "columns", "b", "h", "l", "d", "tokens")
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        rest = [f"{k}={v}" for k, v in case["parameters"].items() if k not in sizes and v not in ("", 0, False)]
        found.setdefault(" ".join([case["dtype"], case["setting"], *rest]), []).append(case)
    several = {k: v for k, v in found.items() if len({size_of(c) for c in v} - {0.0}) > 1}
    return {k: sorted((c for c in v if size_of(c)), key=size_of) for k, v in several.items()}


def _against_size(op: str, cases: list[dict[str, Any]], data: dict[str, Any], folder: Path, plt: Any) -> list[Path]:
    """Time of each contender over the size of the case, a panel for each family of cases, with the floor below."""
    panels = families(cases)
    if not panels:
        return []
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (title, members) in zip(axes[0], panels.items(), strict=True):
        names = list(dict.fromkeys(c["name"] for case in members for c in case["contenders"] if c["status"] == "ok"))
        for name in names:
            points = [(size_of(case), c["median_s"], c["kind"]) for case in members for c in case["contenders"]
                      if c["name"] == name and c["status"] == "ok"]  # fmt: skip
            ours = points[0][2] == "ours"
            axis.plot([p[0] for p in points], [p[1] * 1e3 for p in points], "o-", ms=3, label=name, zorder=3 if ours else 2,
                      lw=2 if ours else 1, **({"color": _OURS} if ours else {}))  # fmt: skip
        floors = [(size_of(c), c["floor_s"] * 1e3) for c in members if c["floor_s"]]
        axis.plot([f[0] for f in floors], [f[1] for f in floors], ":", color=_INK, lw=1, label="this machine's floor")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(title, fontsize=7)
        axis.set_xlabel("bytes to move" if members[0]["bytes"] else "flops", fontsize=7)
        axis.set_ylabel("ms", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.grid(color=_SOFT, lw=0.4)
        axis.legend(fontsize=5)
    figure.suptitle(f"{op}: {data['machine']['device']}", fontsize=8)
    path = folder / f"{op}-size.png"
    _save(figure, path, data)
    plt.close(figure)
    return [path]


def _roofline(data: dict[str, Any], folder: Path, plt: Any) -> list[Path]:
    """Flops a second over flops per byte, of the cases that state both, under the roof of each dtype's ceilings."""
    points = []
    for case in data["cases"]:
        ours = ours_of(case)
        if ours and case["bytes"] and case["flops"] and case["ceilings"].get("copy") and case["ceilings"].get("matmul"):
            points.append((case["flops"] / case["bytes"], case["flops"] / ours["median_s"], case))
    if not points:
        return []
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    low, high = min(p[0] for p in points) / 4, max(p[0] for p in points) * 4
    for number, dtype in enumerate(sorted({p[2]["dtype"] for p in points})):
        own = [p for p in points if p[2]["dtype"] == dtype]
        copy, matmul = (max(p[2]["ceilings"][k] for p in own) for k in ("copy", "matmul"))
        color = plt.get_cmap("tab10")(number)
        axis.plot([low, matmul / copy, max(high, matmul / copy)], [low * copy, matmul, matmul], color=color, lw=1)
        axis.plot([p[0] for p in own], [p[1] for p in own], "o", ms=4, color=color, label=dtype)
    for x, y, case in points:
        axis.annotate(f"{case['op']} {case['name']}", (x, y), (3, -6), textcoords="offset points", fontsize=4)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("flops per byte that must move")
    axis.set_ylabel("flops a second")
    axis.set_title(f"roofline: {data['machine']['device']}, ceilings of this run", fontsize=9)
    axis.grid(color=_SOFT, lw=0.4)
    axis.legend(fontsize=7)
    path = folder / "roofline.png"
    _save(figure, path, data)
    plt.close(figure)
    return [path]


def _ceilings(data: dict[str, Any], folder: Path, plt: Any) -> list[Path]:
    """Fraction of the ceiling that bounds each case, sorted."""
    rows = []
    for case in data["cases"]:
        ours = ours_of(case)
        if ours and case["floor_s"]:
            rows.append((case["floor_s"] / ours["median_s"], f"{case['op']} {case['name']}"))
    if not rows:
        return []
    rows.sort()
    figure, axis = plt.subplots(figsize=(9, 0.28 * len(rows) + 1.2), layout="constrained")
    axis.barh([name for _, name in rows], [value for value, _ in rows], color=_OURS, height=0.6)
    axis.axvline(1, color=_INK)
    axis.tick_params(axis="y", labelsize=6)
    axis.set_xlabel("fraction of this machine's ceiling (bytes over copy bandwidth, or flops over matmul rate)")
    path = folder / "ceilings.png"
    _save(figure, path, data)
    plt.close(figure)
    return [path]
