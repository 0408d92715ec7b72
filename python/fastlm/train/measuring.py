"""The energy of a run: each rank's meter, summed over ranks at each line of metrics, and what the report says of it.

A machine's processors are counted by the first of its ranks, a GPU by the rank that has it. What evaluations take stands
apart from what steps take (`joules_aside`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlm import energy
from fastlm.data.bounds import flag
from fastlm.train.config import RunConfig
from fastlm.train.ranks import Ranks

CLOCKS = {"joules", "joules_aside", "joules_per_token", "idle"}  # fields of a line that differ from run to run
KWH = 3.6e6  # joules


class Energy:
    """What the steps and evaluations since the last line took, over all ranks. Every rank calls the same methods."""

    def __init__(self, device: torch.device, run: RunConfig, ranks: Ranks) -> None:
        hosts = ranks.gather(own := energy.host())
        first, here = hosts.index(own) == ranks.rank, hosts.count(own)
        index = device.index if device.index is not None else 0
        if device.type == "cuda" and device.index is None:
            index = torch.cuda.current_device()
        self.run, self.ranks = run, ranks
        self.meter = energy.find(device.type, index, first=first, processes=here, watts=run.watts)
        self._steps = self._aside = energy.NOTHING

    def begin(self) -> None:
        self.meter.begin()
        self.meter.lap()
        self._steps = self._aside = energy.NOTHING

    def close(self) -> None:
        self.meter.close()

    def steps_end(self) -> None:
        """What was used until here is the steps'."""
        self._steps += self.meter.lap()

    def aside_ends(self) -> None:
        """What was used since `steps_end` is an evaluation's."""
        self._aside += self.meter.lap()

    def lines(self, count: int, tokens: float) -> Iterator[dict[str, Any]]:
        """What each of `count` steps' lines says; of an evaluation's energy the last one. `tokens` are all the steps'."""
        self.steps_end()
        steps, aside = self._sum()
        for i in range(count):
            line: dict[str, Any] = {"energy": steps.label}
            if steps.label != energy.UNAVAILABLE:
                line |= {"joules": _short(steps.joules / count), "joules_per_token": _short(steps.joules / tokens)}
            if not math.isnan(steps.busy) and steps.capacity:
                line["idle"] = round(min(max(1 - steps.busy / steps.capacity, 0.0), 1.0), 4)
            if aside.seconds and i == count - 1 and steps.label != energy.UNAVAILABLE and not math.isnan(aside.joules):
                line["joules_aside"] = _short(aside.joules)
            yield line

    def _sum(self) -> tuple[energy.Lap, energy.Lap]:
        """Both laps over all ranks, in one exchange."""
        laps, self._steps, self._aside = (self._steps, self._aside), energy.NOTHING, energy.NOTHING
        if self.ranks.size == 1:
            return laps
        found = self.ranks.total([v for lap in laps for v in (lap.joules, lap.estimated, lap.busy, lap.capacity)])
        return tuple(  # type: ignore[return-value]
            energy.Lap(joules, bool(estimated), lap.seconds, busy, capacity)
            for lap, (joules, estimated, busy, capacity) in zip(laps, (found[:4], found[4:]))
        )

    def facts(self) -> dict[str, Any]:
        """How the energy of this run is known, of the first rank's machine, and what a kWh emits."""
        grams = energy.carbon_intensity(self.run.carbon) if self.run.carbon else None
        return {"label": self.meter.label, "what": self.meter.what, "grams": grams}

    def notes(self) -> list[str]:
        """A sentence for each flag that is of no effect on this machine."""
        unknown, label = RunConfig(), self.meter.label
        wanted = {"watts": label != energy.MEASURED, **dict.fromkeys(("pue", "carbon"), label != energy.UNAVAILABLE)}
        given = [name for name in wanted if getattr(self.run, name) != getattr(unknown, name)]
        return [
            f"{flag(name)} is of no effect here: energy is {label} ({self.meter.what})"
            for name in given
            if not wanted[name]
        ]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


@dataclass(frozen=True)
class Used:
    """A run's energy by its lines. `joules` are of the `counted` steps whose energy is known, evaluations included."""

    label: str
    joules: float
    aside: float
    steps: int
    counted: int
    tokens: float
    idle: float | None
    labels: dict[str, int]

    @property
    def kwh(self) -> float:
        return self.joules / KWH


def used(rows: Sequence[dict[str, Any]], tokens_per_sample: int) -> Used | None:
    """The energy of the steps of metrics.jsonl, or None for a run from before it was counted. A run is `measured` if each
    of its steps is, `unavailable` if one is not known, and else `estimated`."""
    rows = [row for row in rows if "energy" in row]
    if not rows:
        return None
    labels = Counter(str(row["energy"]) for row in rows)
    order = (energy.UNAVAILABLE, energy.ESTIMATED, energy.MEASURED)
    known = [row for row in rows if "joules" in row]
    aside = math.fsum(row.get("joules_aside", 0.0) for row in known)
    timed = [row for row in rows if "idle" in row]
    seconds = math.fsum(row["seconds"] for row in timed)
    return Used(
        label=next(label for label in order if labels[label]),
        joules=math.fsum(row["joules"] for row in known) + aside,
        aside=aside,
        steps=len(rows),
        counted=len(known),
        tokens=sum(row["samples"] for row in known) * tokens_per_sample,
        idle=math.fsum(row["idle"] * row["seconds"] for row in timed) / seconds if seconds else None,
        labels={label: labels[label] for label in order if labels[label]},
    )


def table(found: Used, run: RunConfig, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the report: what, and how much."""
    how = f"{found.label} ({facts['what']})" if facts.get("what") else found.label
    rows = [("energy is", how)]
    if len(found.labels) > 1:
        rows.append(("steps by how their energy is known", ", ".join(f"{n:,} {k}" for k, n in found.labels.items())))
    if found.counted:
        of = "" if found.counted == found.steps else f", of {found.counted:,} steps of {found.steps:,}"
        rows += [
            (f"energy in steps and evaluations{of}", f"{found.kwh:.4g} kWh ({found.joules:,.4g} J)"),
            ("of it in evaluations", f"{found.aside / found.joules:.1%}" if found.joules else "–"),
            ("joules a step", f"{(found.joules - found.aside) / found.counted:.4g}"),
            ("joules a token", f"{(found.joules - found.aside) / found.tokens:.4g}" if found.tokens else "–"),
        ]
        whole = found.kwh * run.pue
        if run.pue != 1:
            rows.append((f"with the data centre's share (PUE {run.pue:g})", f"{whole:.4g} kWh"))
        if (grams := facts.get("grams")) is not None:
            name = f"CO2e at {grams:g} g/kWh" + ("" if run.carbon == f"{grams:g}" else f" ({run.carbon})")
            rows.append((name, f"{whole * grams / 1000:.4g} kg"))
    if found.idle is not None:
        rows.append(("idle share of the device's time", f"{found.idle:.1%}"))
    return rows
