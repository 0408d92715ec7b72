"""When to run: at once, at the best single start, with pauses, or as well as can be, for the least sum under a curve.

A plan is a list of (start, end) in seconds since 1970. Its cost is the curve's integral over them: what a constant power
emits, or costs. `planned` is what `fastlm train --when` follows; it weighs each pause's restart against what it saves.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from fastlm.energy.curve import Curve, moment, shown
from fastlm.energy.errors import EnergyError

CELLS = 480  # at least, into which the time to the deadline is cut
Plan = list[tuple[float, float]]


UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def deadline(text: str, now: float) -> float:
    """Seconds since 1970 of a deadline: 24h, 90m, 2d or 45s from `now` on, or a time. EnergyError for what is neither."""
    if found := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smhd])\s*", text):
        when = now + float(found[1]) * UNITS[found[2]]
    else:
        try:
            when = moment(text) if re.search(r"\d{4}-\d", text) else math.nan  # 24 alone may be hours or anything
        except (ValueError, OverflowError):
            when = math.nan
    if not math.isfinite(when) or when > 1e11:
        raise EnergyError(
            f"--deadline must be a span such as 24h, 90m or 2d, or a time such as 2026-11-30T18:00Z; it is {text!r}"
        )
    if when <= now:
        raise EnergyError(f"--deadline {text} is over at {shown(now)}: it must be later")
    return when


def cost(curve: Curve, plan: Plan) -> float:
    return math.fsum(curve.cost(a, b) for a, b in plan)


def at_once(work: float, now: float) -> Plan:
    return [(now, now + work)]


def single(curve: Curve, work: float, now: float, deadline: float) -> Plan:
    """The best start of `work` seconds in one piece; of several equal ones the first. Exact: of the continuous optimum the
    start or the end lies on an edge of the curve."""
    last = deadline - work
    starts = np.concatenate(([now, last], curve.edges, curve.edges - work))
    starts = np.unique(starts[(starts >= now) & (starts <= last)])
    if not len(starts):
        return at_once(work, now)
    costs = curve.until(starts + work) - curve.until(starts)
    best = starts[int(np.flatnonzero(costs <= costs.min() + 1e-12 * abs(costs.min()))[0])]
    return [(float(best), float(best + work))]


def possible(curve: Curve, work: float, now: float, deadline: float) -> Plan:
    """The least that any plan can cost, were pauses free: the cheapest time there is, earlier of equals."""
    edges = np.unique(np.concatenate(([now, deadline], curve.edges[(curve.edges > now) & (curve.edges < deadline)])))
    spans = [(curve.at((a + b) / 2), a, b) for a, b in itertools.pairwise(edges)]
    found, left = [], work
    for _, a, b in sorted(spans):
        if left <= 0:
            break
        found.append((float(a), float(min(b, a + left))))
        left -= min(b - a, left)
    return _joined(found)


def planned(
    curve: Curve, work: float, now: float, deadline: float, restart: float = 0.0, running: bool = False
) -> Plan:
    """The cheapest plan where each start costs `restart` seconds more, of those that start and end on a fine grid.

    `running`: whether it runs now, and going on is no start. Nothing is planned beyond the curve's end; work that does not fit
    before that is done at once.
    """
    end = min(deadline, curve.end)
    pieces = max(round((end - now) / curve.step), 1)
    cells = pieces * -(-CELLS // pieces)
    size = (end - now) / cells
    plan, starts, known, local = at_once(work, now), 0, 0, curve.since(now)
    for pauses in range(8):  # each start takes time as well: as many as the plan turns out to have
        need = math.ceil(round((work + pauses * restart) / size, 6)) if size > 0 else cells + 1
        if need > cells or not curve.covers(now):
            return at_once(work, now)
        if need == known:
            break
        known = need
        sums = np.diff(local.until(size * np.arange(cells + 1)))
        chosen = cheapest(sums, sums * (restart / size), need, running)
        plan = _joined([(now + i * size, now + (i + 1) * size) for i in np.flatnonzero(chosen)])
        starts = len(plan) - (running and plan[0][0] == now)
        if starts <= pauses:
            break
    return _trimmed(curve, plan, need * size - work - starts * restart, fixed=running and plan[0][0] == now)


def _trimmed(curve: Curve, plan: Plan, surplus: float, fixed: bool) -> Plan:
    """The plan without so many seconds at the dearest ends of its pieces. `fixed`: the first begins now, and stays so."""
    pieces = [list(piece) for piece in plan]
    while surplus > 1e-9 and pieces:
        inside = [(a + min(b - a, 1e-6), b - min(b - a, 1e-6)) for a, b in pieces]
        ends = [(curve.at(last), i, 1) for i, (_, last) in enumerate(inside)]
        ends += [(curve.at(first), i, 0) for i, (first, _) in enumerate(inside) if i or not fixed]
        _, i, side = max(ends)
        a, b = pieces[i]
        edges = curve.edges[(curve.edges > a) & (curve.edges < b)]
        reach = min(surplus, b - a, (b - edges[-1] if side else edges[0] - a) if len(edges) else b - a)
        pieces[i][side] += -reach if side else reach
        surplus -= reach
        pieces = [piece for piece in pieces if piece[1] - piece[0] > 1e-9]
    return [(float(a), float(b)) for a, b in pieces]


def cheapest(costs: np.ndarray, starts: np.ndarray, need: int, running: bool = False) -> np.ndarray:
    """Which `need` of the cells to run in, for the least sum of `costs` of those and of `starts` of each that follows one
    that does not run. Exact, by dynamic programming over (cell, what is left, whether it runs); ties run earlier.

    Args:
        costs: [cells] float64, what running in a cell costs.
        starts: [cells] float64, what starting in it costs besides.
        running: whether it runs before the first cell.
    """
    cells, never = len(costs), 1e300
    go = np.full(need + 1, never)  # the least cost from a cell on, where the one before it runs; and where it does not
    go[0] = 0.0
    wait, work = go.copy(), np.full(need + 1, never)
    runs = np.zeros((2, cells, need + 1), dtype=bool)
    tie = 1e-10 * float(np.abs(costs).sum() + np.abs(starts).sum())
    for i in range(cells - 1, -1, -1):
        np.add(go[:-1], costs[i], out=work[1:])
        begin = work + starts[i]
        level = wait + tie
        np.less_equal(work, level, out=runs[1, i])
        np.less_equal(begin, level, out=runs[0, i])
        go, wait = np.minimum(work, wait), np.minimum(begin, wait)
    runs[:, :, 0] = False
    chosen, left, state = np.zeros(cells, dtype=bool), need, int(running)
    for i in range(cells):
        state = int(left > 0 and runs[state, i, left])
        chosen[i] = bool(state)
        left -= state
    return chosen


def _joined(spans: Sequence[tuple[float, float]]) -> Plan:
    """Spans in order of time, those that touch made one."""
    plan: Plan = []
    for a, b in sorted(spans):
        if plan and a - plan[-1][1] <= 1e-6 * max(b - a, 1e-9):
            plan[-1] = (plan[-1][0], b)
        else:
            plan.append((float(a), float(b)))
    return plan
