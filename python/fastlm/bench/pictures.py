"""Pictures of a result file: times beside each baseline, time against size, the roofline and the ceilings.

Needs matplotlib. Colours are Okabe and Ito's, which the colour-blind tell apart and which differ in grey as well. The
roofline is drawn under this run's own ceilings.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fastlm.bench.results import ours_of

_INK, _GRID, _OURS = "#222222", "#c8ccd4", "#D55E00"
_OTHERS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#000000")
_MARKERS = "osD^vP"
_IN_SECONDS = ("step", "train")  # suites of few cases, each with an axis of its own in milliseconds
_COLUMNS = 4


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the PNG files that ``names`` lists. Returns their paths."""
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for op in sorted({c["op"] for c in data["cases"]}):
        cases = [c for c in data["cases"] if c["op"] == op and ours_of(c)]
        if cases:
            paths.append(folder / f"{op}.png")
            figure = (_times if op in _IN_SECONDS else _ratios)(op, cases, data, plt)
            save(figure, paths[-1], data)
            plt.close(figure)
            paths += _against_size(op, cases, data, folder, plt)
    return paths + _roofline(data, folder, plt) + _ceilings(data, folder, plt)


_KEY = "fastlm-data"  # of the PNG's text that holds the hash of the data that it shows


def digest(data: dict[str, Any]) -> str:
    """The hash of what the pictures of a result show."""
    shown = [data["machine"]["device"], data["machine"]["threads"], data["cases"]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def stale(data: dict[str, Any], folder: Path) -> list[str]:
    """Names of the pictures that are not there, or are of other data."""
    return [name for name in names(data) if not is_of(folder / name, digest(data))]


def is_of(path: Path, digest: str) -> bool:
    """Whether a picture is there and of the data with this hash."""
    # a tEXt chunk of a PNG: keyword, a null byte, text; matplotlib writes it before the image
    return path.is_file() and re.search(b"tEXt%s\0%s" % (_KEY.encode(), digest.encode()), path.read_bytes()) is not None


def save(figure: Any, path: Path, data: dict[str, Any]) -> None:
    """Writes a figure as a PNG that says which data it is of."""
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


# ---------------------------------------------------------------------------------------------------------------- bars


def bars(axis: Any, rows: Sequence[tuple[str, dict[str, Any], bool]]) -> None:
    """Horizontal bars of medians in milliseconds, from (name, contender, whether it is fastlm), quartiles as whiskers."""
    others = iter(_OTHERS * len(rows))
    times = [contender["median_s"] * 1e3 for _, contender, _ in rows]
    spread = [
        [time - min(c["quartiles_s"][0] * 1e3, time) for time, (_, c, _) in zip(times, rows, strict=True)],
        [max(c["quartiles_s"][1] * 1e3, time) - time for time, (_, c, _) in zip(times, rows, strict=True)],
    ]
    colors = [_OURS if ours else next(others) for _, _, ours in rows]
    drawn = axis.barh([name for name, _, _ in rows], times, xerr=spread, color=colors, height=0.65, ecolor=_INK)
    labels = [f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms" for time in times]
    axis.bar_label(drawn, labels, padding=5, fontsize=10, color=_INK)
    axis.set_xlim(0, max(max(t + s for t, s in zip(times, spread[1], strict=True)), max(times)) * 1.32)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds (shorter is better)")
    axis.spines[["top", "right"]].set_visible(False)


def _baselines(cases: Iterable[dict[str, Any]]) -> list[str]:
    """Names of what is held beside fastlm in any of the cases: baselines first, then peers and its own variants."""
    kinds = {c["name"]: c["kind"] for case in cases for c in case["contenders"] if c["status"] == "ok"}
    order = ("baseline", "peer", "self")
    return sorted((name for name, kind in kinds.items() if kind in order), key=lambda name: order.index(kinds[name]))


def _times(op: str, cases: list[dict[str, Any]], data: dict[str, Any], plt: Any) -> Any:
    """A panel for each case, with a bar for each contender."""
    rows = math.ceil(len(cases) / 2)
    columns = min(len(cases), 2)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.2 * columns, 2.3 * rows + 0.6), layout="constrained", squeeze=False
    )
    for axis, case in zip(axes.flat, cases, strict=False):
        ran = sorted((c for c in case["contenders"] if c["status"] == "ok"), key=lambda c: c["kind"] == "ours")
        bars(axis, [(c["name"], c, c["kind"] == "ours") for c in ran])
        axis.set_title(case["name"], fontsize=9)
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_visible(False)
    figure.suptitle(f"{_title(op, cases)}\n{_machine(data)}", fontsize=11)
    return figure


def _ratios(op: str, cases: list[dict[str, Any]], data: dict[str, Any], plt: Any) -> Any:
    """A group of bars for each case: how many times as long as fastlm each contender takes."""
    others = _baselines(cases)
    height = 0.8 / max(len(others), 1)
    size = (10, max(0.12 * len(cases) * max(len(others), 2), 1) + 1.6)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    for number, name in enumerate(others):
        places, values = [], []
        for place, case in enumerate(cases):
            ours = ours_of(case)
            assert ours is not None
            for contender in case["contenders"]:
                if contender["name"] == name and contender["status"] == "ok":
                    places.append(place + (number - (len(others) - 1) / 2) * height)
                    values.append(contender["median_s"] / ours["median_s"])
        axis.barh(places, [v - 1 for v in values], left=1, height=height * 0.9, label=name, color=_OTHERS[number % 6])
    axis.axvline(1, color=_OURS, lw=2, label="fastlm")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}×" if f"{value:e}"[0] in "25" else "")
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.set_yticks(range(len(cases)), [c["name"] for c in cases], fontsize=8)
    axis.set_ylim(len(cases) - 0.4, -0.6)
    axis.set_xlabel("time as a multiple of fastlm's, logarithmic (right of the line fastlm is faster)")
    figure.suptitle(f"{_title(op, cases)}\n{_machine(data)}", fontsize=10)
    axis.grid(axis="x", color=_GRID, lw=0.4)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(others) + 1, frameon=False)
    return figure


def _title(op: str, cases: list[dict[str, Any]]) -> str:
    """What the pictures of an op show: of how many cases fastlm is faster than its best baseline, and by how much."""
    ratios = []
    for case in cases:
        ours = ours_of(case)
        baselines = [c["median_s"] for c in case["contenders"] if c["kind"] == "baseline" and c["status"] == "ok"]
        if ours and baselines:
            ratios.append(min(baselines) / ours["median_s"])
    if not ratios:
        return op
    faster = sum(ratio > 1.05 for ratio in ratios)
    return (
        f"{op}: faster than the best baseline in {faster} of {len(ratios)} cases; "
        f"{median(ratios):.2g}× at the median, {min(ratios):.2g}× at worst"
    )


def _machine(data: dict[str, Any]) -> str:
    return f"{data['machine']['device']}, {data['machine']['threads']} threads"


# -------------------------------------------------------------------------------------------------------- against size


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
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(3.6 * columns, 6.5), 3.2 * rows + 0.9), layout="constrained", squeeze=False
    )
    others = _baselines(cases)
    color = {name: _OTHERS[number % len(_OTHERS)] for number, name in enumerate(others)}
    for axis, (title, members) in zip(axes.flat, panels.items(), strict=False):
        for name in dict.fromkeys(c["name"] for case in members for c in case["contenders"] if c["status"] == "ok"):
            points = [(size_of(case), c["median_s"] * 1e3) for case in members for c in case["contenders"]
                      if c["name"] == name and c["status"] == "ok"]  # fmt: skip
            ours = name not in color
            axis.plot(*zip(*points, strict=True), "o-", ms=4, label=name, zorder=3 if ours else 2, lw=2.5 if ours else 1.2,
                      color=color.get(name, _OURS))  # fmt: skip
        floors = [(size_of(c), c["floor_s"] * 1e3) for c in members if c["floor_s"]]
        if floors:
            axis.plot(*zip(*floors, strict=True), ":", color=_INK, lw=1.2, label="this machine's floor")
        _logarithmic(axis, plt)
        axis.set_title(title.replace(" alone", "").replace("=True", "").replace("part=", ""), fontsize=8)
        axis.set_xlabel("MB to move" if members[0]["bytes"] else "GFLOP", fontsize=8)
        axis.set_ylabel("time, ms", fontsize=8)
        scale = 1e6 if members[0]["bytes"] else 1e9
        axis.xaxis.set_major_formatter(lambda value, _, scale=scale: f"{value / scale:.3g}")
        axis.set_xticks(sorted({size_of(c) for c in members}))
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    labels = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(labels), 5)
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(f"{op}: time against size\n{_machine(data)}", fontsize=10)
    path = folder / f"{op}-size.png"
    save(figure, path, data)
    plt.close(figure)
    return [path]


def _logarithmic(axis: Any, plt: Any) -> None:
    """Both axes logarithmic, with plain numbers at the ticks and none at the minor ones, which would overlap."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.tick_params(labelsize=7)
    axis.grid(color=_GRID, lw=0.4)


# ------------------------------------------------------------------------------------------------------------ ceilings


def _roofline(data: dict[str, Any], folder: Path, plt: Any) -> list[Path]:
    """Flops a second over flops per byte, of the cases that state both, under the roof of each dtype's ceilings."""
    points = []
    for case in data["cases"]:
        ours = ours_of(case)
        if ours and case["bytes"] and case["flops"] and case["ceilings"].get("copy") and case["ceilings"].get("matmul"):
            points.append((case["flops"] / case["bytes"], case["flops"] / ours["median_s"] / 1e12, case))
    if not points:
        return []
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    low, high = min(p[0] for p in points) / 4, max(p[0] for p in points) * 4
    ops = sorted({p[2]["op"] for p in points})
    for number, dtype in enumerate(sorted({p[2]["dtype"] for p in points})):
        own = [p for p in points if p[2]["dtype"] == dtype]
        copy, matmul = (max(p[2]["ceilings"][k] for p in own) / 1e12 for k in ("copy", "matmul"))
        color = (_OTHERS[0], _OURS, _OTHERS[2])[number % 3]
        roof = [low, matmul / copy, max(high, matmul / copy)]
        axis.plot(roof, [low * copy, matmul, matmul], color=color, lw=1.5, label=f"{dtype}: this machine's roof")
        for op in ops:
            mine = [p for p in own if p[2]["op"] == op]
            if mine:
                marker = _MARKERS[ops.index(op) % len(_MARKERS)]
                axis.plot(*zip(*(p[:2] for p in mine), strict=True), marker, ms=6, color=color, mec="white", mew=0.5,
                          label=f"{dtype}: {op}")  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("flops per byte that must move")
    axis.set_ylabel("TFLOP/s")
    roofs = [min(p[0] * p[2]["ceilings"]["copy"], p[2]["ceilings"]["matmul"]) / 1e12 for p in points]
    half = sum(point[1] >= roof / 2 for point, roof in zip(points, roofs, strict=True))
    axis.set_title(
        f"{half} of {len(points)} cases reach half of this machine's roof or more\n{_machine(data)}", fontsize=10
    )
    axis.grid(color=_GRID, lw=0.4)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path = folder / "roofline.png"
    save(figure, path, data)
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
    values = [value for value, _ in rows]
    figure, axis = plt.subplots(figsize=(10, 0.24 * len(rows) + 1.6), layout="constrained")
    axis.barh([name for _, name in rows], values, color=_OTHERS[0], height=0.65)
    axis.axvline(1, color=_INK, lw=1)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("fraction of this machine's ceiling: bytes over copy bandwidth, or flops over matmul rate")
    half = sum(value >= 0.5 for value in values)
    axis.set_title(
        f"{half} of {len(values)} cases reach half of this machine's ceiling or more\n{_machine(data)}", fontsize=10
    )
    axis.spines[["top", "right"]].set_visible(False)
    path = folder / "ceilings.png"
    save(figure, path, data)
    plt.close(figure)
    return [path]
