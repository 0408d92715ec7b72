"""A curve of carbon intensity or price over time, from a CSV of anyone's: a column of times and one of values.

A time is ISO 8601 (UTC where it has no zone) or seconds since 1970. Each value holds until the next time. A first line of
words is a heading, whose second word names the values; further columns are left alone.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.energy.errors import EnergyError

LOOSE = 1.5  # times the longest regular interval; longer ones are gaps


@dataclass(frozen=True)
class Curve:
    """Values [n] that hold from edges[i] to edges[i + 1], in seconds since 1970, and what they are called."""

    edges: np.ndarray
    values: np.ndarray
    name: str

    @property
    def start(self) -> float:
        return float(self.edges[0])

    @property
    def end(self) -> float:
        return float(self.edges[-1])

    @property
    def step(self) -> float:
        """Seconds that a value usually holds."""
        return float(np.median(np.diff(self.edges)))

    def covers(self, when: float) -> bool:
        return self.start <= when < self.end

    def until(self, when: Any) -> Any:
        """The integral of the curve from its start to `when` (a number or an array), in values times seconds."""
        sums = np.concatenate(([0.0], np.cumsum(self.values * np.diff(self.edges))))
        return np.interp(when, self.edges, sums)

    def since(self, when: float) -> Curve:
        """The curve from `when` on, in seconds since then: with small numbers, equal values have equal costs."""
        first = min(max(int(np.searchsorted(self.edges, when, "right")) - 1, 0), len(self.values) - 1)
        edges = self.edges[first:] - when
        return Curve(np.concatenate(([min(edges[1], 0.0)], edges[1:])), self.values[first:], self.name)

    def cost(self, start: float, end: float) -> float:
        """The integral from `start` to `end`."""
        return float(self.until(end) - self.until(start))

    def at(self, when: float) -> float:
        return float(
            self.values[min(max(int(np.searchsorted(self.edges, when, "right")) - 1, 0), len(self.values) - 1)]
        )


def moment(text: str) -> float:
    """Seconds since 1970 of a time. Raises ValueError for what is none."""
    text = text.strip()
    try:
        value = float(text)
    except ValueError:
        when = datetime.datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in "Zz" else text)
        return (when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)).timestamp()
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def shown(when: float) -> str:
    """A time as people read it, in UTC."""
    text = datetime.datetime.fromtimestamp(when, datetime.timezone.utc)
    return text.strftime("%Y-%m-%d %H:%M" + (":%S" if text.second else "") + " UTC")


def read(path: Path | str) -> Curve:
    """The curve of a file. Raises EnergyError, with the line, for one that cannot be read, has a gap or no order."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [(i, row) for i, row in enumerate(csv.reader(file), 1) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EnergyError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    name = "value"
    if lines and not _is_time(lines[0][1][0]):
        name = lines[0][1][1].strip() if len(lines[0][1]) > 1 else name
        lines = lines[1:]
    if len(lines) < 2:
        raise EnergyError(f"{path} must have two lines of time and value at least; it has {len(lines)}")
    times, values = [], []
    for i, row in lines:
        if len(row) < 2:
            raise EnergyError(
                f"{path}, line {i}: a time and a value must stand there, with a comma between; it is {row[0]!r}"
            )
        try:
            times.append(moment(row[0]))
        except (ValueError, OverflowError):
            raise EnergyError(f"{path}, line {i}: {row[0]!r} is no time such as 2026-11-30T18:00Z") from None
        try:
            values.append(float(row[1]))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise EnergyError(f"{path}, line {i}: the value must be a finite number; it is {row[1]!r}")
        if len(times) > 1 and times[-1] <= times[-2]:
            raise EnergyError(f"{path}, line {i}: {row[0]} does not come after the line before it; times must rise")
    steps = [b - a for a, b in itertools.pairwise(times)]
    usual = _regular(steps)
    for (i, _), before, step in zip(lines[1:], times, steps):
        if step > LOOSE * usual:
            raise EnergyError(
                f"{path}, line {i}: there is a gap from {shown(before)} to {shown(before + step)}, where lines are "
                f"{usual / 60:g} minutes apart elsewhere"
            )
    return Curve(np.array([*times, times[-1] + steps[-1]]), np.array(values), name or "value")


def _is_time(text: str) -> bool:
    try:
        moment(text)
    except (ValueError, OverflowError):
        return False
    return True


def _regular(steps: list[float]) -> float:
    """The longest interval that is no gap: the most frequent one, or another of a fifth of all and three at least."""
    counted = Counter(round(step, 3) for step in steps)
    often = max(counted, key=lambda step: (counted[step], -step))
    return max([often, *(step for step, n in counted.items() if n >= max(3, len(steps) / 5))])
