"""`fastlm energy CURVE --hours 8 --deadline 24h`: what waiting and pausing would save under a curve of carbon or price."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import tyro

from fastlm.cli import flags
from fastlm.data.bounds import Range, check
from fastlm.data.errors import InputError
from fastlm.energy import EnergyError, curve, picture, schedule

EXAMPLES = """
fastlm energy carbon.csv --hours 8 --deadline 24h
fastlm energy prices.csv --hours 24 --deadline 3d --picture plan.svg
"""


def energy(
    curve_file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="CURVE", metavar="CURVE")],
    hours: float,
    deadline: str,
    start: str = "",
    restart: float = 60.0,
    picture_file: Annotated[str, tyro.conf.arg(name="picture")] = "energy.svg",
) -> int:
    """When to run so many hours of training before a deadline, for the least carbon or cost.

    Prints the run at once, the best single start, the run with pauses as fastlm train --when would make them, and the least
    that any plan can reach; and draws them. Power is taken as constant; the curve is believed as it is.

    Args:
        curve_file: CSV of times (ISO 8601, UTC where there is no zone, or seconds since 1970) and values.
        hours: Hours of training.
        deadline: When it must be done: 24h, 90m, 2d from the start on, or a time.
        start: From when on; without it now, or the curve's begin where that does not hold now.
        restart: Seconds that going on after a pause takes.
        picture_file: SVG to draw into; "" for none.
    """
    check("hours", hours, Range(above=0, high=1e6))
    check("restart", restart, Range(0, 1e6))
    try:
        found = curve.read(curve_file)
        now = _start(found, start, curve_file)
        end = schedule.deadline(deadline, now)
        if hours * 3600 > (end - now) * (1 + 1e-9):
            raise InputError(f"--deadline {deadline} leaves {(end - now) / 3600:.4g} h, and --hours is {hours:g}")
        if end > found.end:
            raise InputError(
                f"{curve_file} ends at {curve.shown(found.end)}, before the deadline at {curve.shown(end)}"
            )
        plans = _plans(found, hours * 3600, now, end, restart)
        if picture_file:
            picture.draw(found, plans, now, end, Path(picture_file))
    except EnergyError as error:
        raise InputError(str(error)) from None
    _print(found, plans, hours * 3600)
    if picture_file:
        print(f"picture: {picture_file}")
    return 0


def _start(found: curve.Curve, given: str, path: str) -> float:
    if not given:
        return now if found.covers(now := time.time()) else found.start
    try:
        when = curve.moment(given)
    except (ValueError, OverflowError):
        raise InputError(f"--start must be a time such as 2026-11-30T18:00Z; it is {given!r}") from None
    if not found.covers(when):
        span = f"{curve.shown(found.start)} to {curve.shown(found.end)}"
        raise InputError(f"--start {given} is outside {path}, which tells of {span}")
    return when


def _plans(found: curve.Curve, work: float, now: float, end: float, restart: float) -> dict[str, schedule.Plan]:
    """The four ways by name. With pauses is never worse than the best single start, which it may be as well."""
    one = schedule.single(found, work, now, end)
    paused = schedule.planned(found, work, now, end, restart)
    if schedule.cost(found, paused) > schedule.cost(found, one):
        paused = one
    return {
        "now": schedule.at_once(work, now),
        "best single start": one,
        "with pauses": paused,
        "best possible": schedule.possible(found, work, now, end),
    }


def _print(found: curve.Curve, plans: dict[str, schedule.Plan], work: float) -> None:
    first = schedule.cost(found, plans["now"])
    rows = [("", "start", "end", "pauses", f"mean {found.name}", "saved")]
    for name, plan in plans.items():
        total = schedule.cost(found, plan)
        saved = f"{1 - total / first:.1%}" if first > 0 else "-"
        times = (curve.shown(round(plan[0][0])), curve.shown(round(plan[-1][1])))
        rows.append((name, *times, str(len(plan) - 1), f"{total / work:.4g}", saved))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, wide))).rstrip())


def main(argv: list[str]) -> int:
    return flags.call(energy, "fastlm energy", argv, EXAMPLES)
