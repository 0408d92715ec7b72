"""Pictures of a result file: time beside each baseline, time against size, and the roofline. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlm.bench.results import ours_of

_INK, _SOFT, _OURS = "#222222", "#b8bcc4", "#d9480f"


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Writes one bar chart per op, and a roofline where the cases have ceilings, as PNG. Returns their paths."""
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
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    paths += _roofline(data, folder, plt)
    return paths


def _roofline(data: dict[str, Any], folder: Path, plt: Any) -> list[Path]:
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
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return [path]
