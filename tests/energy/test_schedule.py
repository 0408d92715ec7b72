"""Curves that cannot be are one sentence; plans are the optimum, by brute force on small cases."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from fastlm.energy import EnergyError, curve, schedule

HOUR = 3600.0


def day(values: list[float], step: float = HOUR, start: float = 0.0) -> curve.Curve:
    return curve.Curve(start + step * np.arange(len(values) + 1), np.array(values), "g")


def test_files_from_anyone_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("Time,Carbon Intensity,zone\n2020-01-01 00:00:00,120.5,GB\n2020-01-01T00:30Z,100,GB\n\n")
    found = curve.read(path)
    assert (found.name, found.values.tolist(), found.step) == ("Carbon Intensity", [120.5, 100.0], 1800.0)
    assert found.end - found.start == 3600.0
    assert curve.shown(found.start) == "2020-01-01 00:00 UTC"
    path.write_text("\ufeff1577836800,-5\n1577838600.0,7\n")
    other = curve.read(path)
    assert (other.start, other.values.tolist(), other.name) == (found.start, [-5.0, 7.0], "value")
    halves = [f"2020-01-01T0{1 + i // 2}:{30 * (i % 2):02d}+01:00,{i + 1}" for i in range(6)]
    quarters = [f"2020-01-01T0{2 + i // 4}:{15 * (i % 4):02d}+00:00,9" for i in range(3, 9)]
    path.write_text("\n".join(["t,v", *halves, *quarters]))
    found = curve.read(path)  # quarters of an hour after half hours: no gap
    assert curve.shown(found.start) == "2020-01-01 00:00 UTC"
    assert found.cost(found.start, found.start + 2700) == pytest.approx(1800 * 1 + 900 * 2)


LINES = [f"2020-01-01T{h:02d}:00,{h}" for h in range(24)]


@pytest.mark.parametrize(("lines", "said"), [
    ([*LINES[:9], *LINES[10:]], "line 10: there is a gap from 2020-01-01 08:00 UTC to 2020-01-01 10:00 UTC"),
    ([LINES[1], LINES[0], *LINES[2:]], "line 2: 2020-01-01T00:00 does not come after"),
    ([LINES[0], LINES[0]], "line 2: 2020-01-01T00:00 does not come after"),
    ([line.split(",")[0] for line in LINES], "line 1: a time and a value"),
    ([*LINES[:3], "2020-01-01T03:00,nan"], "line 4: the value must be a finite number; it is 'nan'"),
    ([*LINES[:3], "2020-01-01T03:00,"], "line 4: the value must be a finite number; it is ''"),
    ([*LINES[:3], "noon,5"], "line 4: 'noon' is no time"), ([*LINES[:3], "1e999,5"], "line 4: '1e999' is no time"),
    ([], "two lines"), (["time,value"], "two lines"), (LINES[:1], "two lines"),
])  # fmt: skip
def test_a_curve_that_cannot_be_is_one_sentence(tmp_path: Path, lines: list[str], said: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(EnergyError) as error:
        curve.read(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "c.csv", tmp_path / "none.csv", tmp_path):
        with pytest.raises(EnergyError, match="cannot be read"):
            curve.read(path)


def brute(costs: list[float], starts: list[float], need: int, running: bool) -> float:
    """The least sum over every choice of cells."""
    best = math.inf
    for chosen in itertools.combinations(range(len(costs)), need):
        begun = [i for i in chosen if i - 1 not in chosen and not (running and i == 0)]
        best = min(best, sum(costs[i] for i in chosen) + sum(starts[i] for i in begun))
    return best


@pytest.mark.parametrize("running", [False, True])
def test_the_plan_with_restarts_is_that_of_brute_force(running: bool) -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        cells = int(draw.integers(1, 11))
        need = int(draw.integers(1, cells + 1))
        costs = np.round(draw.normal(5, 4, cells), 1)  # prices below 0 too, and ties
        starts = np.round(np.abs(costs) * draw.choice([0.0, 0.1, 1.0, 10.0]), 2)
        chosen = schedule.cheapest(costs, starts, need, running)
        assert chosen.sum() == need
        begun = [i for i in np.flatnonzero(chosen) if not (i and chosen[i - 1]) and not (running and i == 0)]
        found = costs[chosen].sum() + starts[begun].sum()
        assert found == pytest.approx(brute(costs.tolist(), starts.tolist(), need, running), abs=1e-6), (costs, starts)


def test_plans_on_a_curve_are_those_of_brute_force() -> None:
    """Whole hours of ten: every single start, every choice of hours."""
    draw = np.random.default_rng(0)
    for _ in range(40):
        values = draw.integers(1, 9, 10).astype(float).tolist()
        found, hours = day(values, start=1000.0), int(draw.integers(1, 10))
        work, end = hours * HOUR, 1000.0 + 10 * HOUR
        one = schedule.cost(found, schedule.single(found, work, 1000.0, end))
        assert one == pytest.approx(HOUR * min(sum(values[i : i + hours]) for i in range(11 - hours)))
        best = HOUR * sum(sorted(values)[:hours])
        for plan in (schedule.possible(found, work, 1000.0, end), schedule.planned(found, work, 1000.0, end)):
            assert schedule.cost(found, plan) == pytest.approx(best)
            assert sum(b - a for a, b in plan) == pytest.approx(work)
            assert all(a < b for a, b in plan)
            assert all(b < c for (_, b), (c, _) in itertools.pairwise(plan))


def test_a_start_at_any_instant_is_near_the_optimum() -> None:
    """Between the curve's edges and with work of any length the grid costs less than 1%."""
    draw = np.random.default_rng(0)
    for _ in range(30):
        values = 200 + 100 * np.sin(np.arange(96) / 96 * 4 * np.pi + draw.uniform(0, 6)) + draw.normal(0, 10, 96)
        found = day(values.tolist(), 1800.0)
        now, work = float(draw.uniform(0, 86400)), float(draw.uniform(1000, 40000))
        end = now + 86000.0
        best = schedule.cost(found, schedule.possible(found, work, now, end))
        plan = schedule.planned(found, work, now, end)
        assert schedule.cost(found, plan) <= 1.01 * best
        assert sum(b - a for a, b in plan) == pytest.approx(work)
        assert plan[-1][1] <= end + 1e-6


def test_a_restart_that_costs_more_than_it_saves_is_not_made() -> None:
    found = day([5.0, 4.0] * 12)
    free = schedule.planned(found, 6 * HOUR, 0.0, 24 * HOUR, running=True)
    assert len(free) == 6
    dear = schedule.planned(found, 6 * HOUR, 0.0, 24 * HOUR, restart=HOUR, running=True)
    assert dear == [(0.0, 6 * HOUR)]
    late = day([3.3] * 24, start=1.8e9 + 0.123)
    assert schedule.planned(late, 6 * HOUR, 1.8e9 + 77.7, 1.8e9 + 20 * HOUR)[0][0] == 1.8e9 + 77.7
    flat = day([3.0] * 24)
    assert schedule.planned(flat, 6 * HOUR, 0.0, 24 * HOUR) == [(0.0, 6 * HOUR)]  # nothing to wait for: at once
    assert schedule.single(flat, 6 * HOUR, 0.0, 24 * HOUR) == [(0.0, 6 * HOUR)]


def test_time_for_restarts_is_in_the_plan_and_doubt_runs_at_once() -> None:
    found = day([9.0, 1.0, 9.0, 1.0, 9.0, 9.0])
    plan = schedule.planned(found, 2 * HOUR, 0.0, 6 * HOUR, restart=300.0)
    assert sum(b - a for a, b in plan) == pytest.approx(2 * HOUR + 2 * 300, rel=0.01)
    for work, end, now in ((5 * HOUR, 4 * HOUR, 0.0), (HOUR, 9 * HOUR, 7 * HOUR), (4 * HOUR, 9 * HOUR, 3 * HOUR)):
        assert schedule.planned(found, work, now, end) == [
            (now, now + work)
        ]  # too short; past the curve; curve too short


@pytest.mark.parametrize(("text", "seconds"), [
    ("24h", 86400.0), ("1.5 h", 5400.0), ("90m", 5400.0), ("2d", 172800.0), ("45s", 45.0), ("1970-01-01T03:00Z", 9800.0),
])  # fmt: skip
def test_a_deadline_is_a_span_or_a_time(text: str, seconds: float) -> None:
    assert schedule.deadline(text, 1000.0) - 1000.0 == seconds


@pytest.mark.parametrize(
    "text", ["24", "", "-3h", "nan", "infh", "tomorrow", "1e999h", "1970-01-01T00:10Z", "0h", "9" * 40 + "d"]
)
def test_a_deadline_that_cannot_be_is_one_sentence(text: str) -> None:
    with pytest.raises(EnergyError, match="--deadline"):
        schedule.deadline(text, 1000.0)
