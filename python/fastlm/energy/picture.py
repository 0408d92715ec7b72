"""A curve and the plans under it as an SVG: each plan a row of bars below, the curve above."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np

from fastlm.energy.curve import Curve
from fastlm.energy.errors import EnergyError
from fastlm.energy.schedule import Plan


def draw(curve: Curve, plans: dict[str, Plan], now: float, deadline: float, path: Path | str) -> None:
    """`plans` by name, in the order in which they stand from above. Raises EnergyError where `path` cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import dates
    from matplotlib import pyplot as plt

    when = lambda seconds: dates.date2num(datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc))
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 4.2), layout="constrained", height_ratios=(3, 0.45 * len(plans))
    )
    inside = np.flatnonzero((curve.edges[1:] > now) & (curve.edges[:-1] < deadline))
    edges = [when(min(max(float(curve.edges[i]), now), deadline)) for i in (*inside, inside[-1] + 1)]
    above.stairs(curve.values[inside], edges, color="#44546a", linewidth=1.4, baseline=None)
    above.set_ylabel(curve.name)
    above.grid(alpha=0.3)
    for row, plan in enumerate(plans.values()):
        spans = [(when(a), when(b) - when(a)) for a, b in plan]
        below.broken_barh(spans, (row - 0.32, 0.64), color=f"C{row}")
    below.set_yticks(range(len(plans)), list(plans))
    below.invert_yaxis()
    below.set_xlim(when(now), when(deadline))
    below.xaxis.set_major_locator(locator := dates.AutoDateLocator())
    below.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    below.set_xlabel("UTC")
    below.grid(axis="x", alpha=0.3)
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlm"}):
            figure.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise EnergyError(f"--picture {path} cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)
