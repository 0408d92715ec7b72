"""What came of a series of runs: lines, result.json and report.html in its folder."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data import pages
from fastlm.train import power_law, report
from fastlm.train.files import read_metrics, shown, write_text

AHEAD = (1.0, 2.0, 4.0)  # parts of the training text for which the law is asked


@dataclass(frozen=True)
class Part:
    """One run at its best weights: `val` and `train` in `unit`, of what it holds out and of what it trained on.

    `part` is the value of --fold or --fraction. `size` and `tokens` are of the text that it trained on; `seen` the tokens that
    its steps read.
    """

    name: str
    part: str
    step: int
    val: float
    train: float
    unit: str
    size: int
    tokens: int
    seen: int

    @property
    def gap(self) -> float:
        return self.val - self.train


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def learning_curve(parts: Sequence[Part]) -> dict[str, Any]:
    """The law of all parts, and how far the law of all but the largest is off there. Needs three parts."""
    n, y = [p.size for p in parts], [p.val for p in parts]
    without = power_law.fit(n[:-1], y[:-1])
    law, whole = power_law.fit(n, y), n[-1] / float(parts[-1].part)
    return {
        "law": dataclasses.asdict(law),
        "held_back": {"part": float(parts[-1].part), "predicted": without(n[-1]), "measured": y[-1],
                      "error": without(n[-1]) / y[-1] - 1},
        "predicted": {f"{part:g}": law(part * whole) for part in AHEAD if part > float(parts[-1].part)},
    }  # fmt: skip


def _rows(kind: str, parts: Sequence[Part]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = (kind, "best step", "validation", "training", "gap")
    rows: list[tuple[str, ...]] = [
        (p.part, f"{p.step:,}", f"{p.val:.4f}", f"{p.train:.4f}", f"{p.gap:+.4f}") for p in parts
    ]
    if kind == "fold":
        columns = [[p.val for p in parts], [p.train for p in parts], [p.gap for p in parts]]
        rows.append(("mean ± sd", "", *map(spread, columns)))
        return head, rows
    return (*head, "training bytes"), [(*row, f"{p.size:,}") for row, p in zip(rows, parts, strict=True)]


def _sentences(kind: str, parts: Sequence[Part]) -> list[str]:
    unit = parts[0].unit
    if kind == "fold":
        held = spread([p.val for p in parts])
        return [f"{held} {unit} over {len(parts)} folds, each at its best step and on what it holds out"]
    found = learning_curve(parts)
    law, back = power_law.Law(**found["law"]), found["held_back"]
    out = [
        f"law of all {len(parts)}: {unit} = {law}, n bytes of training text",
        f"held back: without the part {back['part']:g} the law says {back['predicted']:.4f} there; measured "
        f"{back['measured']:.4f} ({back['error']:+.2%})",
        "more data: " + ", ".join(f"{value:.4f} at {part} of the text" for part, value in found["predicted"].items()),
    ]
    last = parts[-1]
    if last.seen < last.tokens:
        times = math.ceil(10 * last.tokens / last.seen) / 10
        out.append(
            f"{last.name} reads {last.seen:,} of its {last.tokens:,} tokens, so that more text cannot tell: it takes {times:g} "
            f"times as many --steps to read all"
        )
    return out


def lines(kind: str, parts: Sequence[Part]) -> list[str]:
    """The table, and what it says."""
    head, rows = _rows(kind, parts)
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    text = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
    return [f"{parts[0].unit}, at the best step of each:", *(line.rstrip() for line in text), *_sentences(kind, parts)]


def write(folder: Path, kind: str, parts: Sequence[Part], count: int) -> None:
    """result.json and report.html, of so many parts as have ended."""
    result: dict[str, Any] = {
        "kind": kind,
        "of": count,
        "parts": [dataclasses.asdict(p) | {"gap": p.gap} for p in parts],
    }
    whole = len(parts) == count
    if whole and kind == "fold":
        values = [p.val for p in parts]
        result |= {"mean": statistics.mean(values), "sd": statistics.stdev(values), "unit": parts[0].unit}
        result["gap"] = {"mean": statistics.mean(p.gap for p in parts), "sd": statistics.stdev(p.gap for p in parts)}
    elif whole:
        result |= learning_curve(parts)
    write_text(folder / "result.json", json.dumps(result, indent=1))
    write_text(folder / "report.html", shown(_page(folder, kind, parts, count)))


def _page(folder: Path, kind: str, parts: Sequence[Part], count: int) -> str:
    head, rows = _rows(kind, parts)
    link = {p.part: f'<a href="{html.escape(p.name)}/report.html">{html.escape(p.part)}</a>' for p in parts}
    cells = [(link.get(row[0], html.escape(row[0])), *map(html.escape, row[1:])) for row in rows]
    state = f"{len(parts)} of {count} runs have ended" if len(parts) < count else f"{count} runs"
    said = _sentences(kind, parts) if len(parts) == count else []
    body = [
        f"<h1>{html.escape(folder.name)}</h1>",
        f'<p class="sub">{state}; {html.escape(parts[0].unit)}, at the best step of each</p>',
        *(f'<p class="stop">{html.escape(line)}</p>' for line in said),
        '<h2>Runs</h2><div class="card">' + pages.table(head, cells, frozenset(range(1, len(head)))) + "</div>",
        '<h2>Curves</h2><div class="card">'
        + report.svg({p.name: read_metrics(folder / p.name) for p in parts})
        + "</div>",
    ]
    return pages.document(folder.name, "\n".join(body))
