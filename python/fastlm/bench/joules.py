"""Joules a token of a training step, by dtype and batch: columns that `fastlm bench step` prints beside tokens/s.

They are printed only where a counter measures; where none does, one line says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fastlm import energy

Row = dict[str, Any]  # name, dtype, batch, tokens_per_s, joules_per_token, idle_share


def of_step(step: Callable[[], Any], tokens: int, meter: energy.Meter, device: str, seconds: float = 3.0) -> Row:
    """Tokens/s and joules a token of a step that is repeated for `seconds`, warmed up before. None where unknown."""

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    step()
    wait()
    meter.lap()
    begin, count = time.perf_counter(), 0
    while not count or time.perf_counter() - begin < seconds:
        step()
        wait()
        count += 1
    lap = meter.lap()
    return {
        "tokens_per_s": count * tokens / lap.seconds,
        "joules_per_token": None if math.isnan(lap.joules) else lap.joules / (count * tokens),
        "idle_share": None if math.isnan(lap.busy) else max(1 - lap.busy / lap.capacity, 0.0),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as text in columns."""
    head = ("step", "dtype", "batch", "tokens/s", "J/token", "idle")
    cells = [
        (r["name"], r["dtype"], str(r["batch"]), f"{r['tokens_per_s']:,.0f}", _or_dash(r["joules_per_token"], ".3g"),
         _or_dash(r["idle_share"], ".0%"))
        for r in rows
    ]  # fmt: skip
    wide = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide)))
                     for row in (head, *cells))  # fmt: skip


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def of_steps(cases: Iterable[tuple[str, str, int, int, Callable[[], Callable[[], Any]]]], device: str,
             seconds: float = 3.0) -> list[Row]:  # fmt: skip
    """Rows of `cases` (name, dtype, batch, tokens, what makes a step), printed; none where no counter measures.

    A case that does not fit the device's memory is left out by name.
    """
    meter = energy.find(torch.device(device).type, torch.device(device).index or 0)
    if meter.label != energy.MEASURED:
        print(f"\nJ/token: {meter.label}: {meter.what}")
        return []
    rows = []
    meter.begin()
    try:
        for name, dtype, batch, tokens, make in cases:
            try:
                found = of_step(make(), tokens, meter, device, seconds)
            except torch.OutOfMemoryError:
                print(f"J/token of {name} {dtype}, batch {batch}: not enough memory")
                continue
            rows.append({"name": name, "dtype": dtype, "batch": batch, **found})
    finally:
        meter.close()
    print(f"\nJ/token ({meter.label}: {meter.what})\n{table(rows)}")
    return rows
