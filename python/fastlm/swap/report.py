"""What ``fastlm.swap`` did, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from fastlm.compress.quantize import Converted
from fastlm.swap.seen import Seen, SeenRow, SeenTable


class Row(NamedTuple):
    """One swapped module: its path, class before, what serves now, on which backend, and why that one."""

    module: str
    was: str
    now: str
    backend: str
    why: str


@dataclass
class Report:
    """``rows``: what was swapped; ``left``: (module, class, reason) of what was not; ``converted``: the layers that are int8,
    with the seconds of a call of ``rows_timed`` rows before and after. ``print(report)`` shows a table.

    ``seen`` can be asked after a forward, and again after each further one.
    """

    rows: list[Row] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    seens: list[Seen] = field(default_factory=list, repr=False)
    converted: list[Converted] = field(default_factory=list)
    rows_timed: int = 0

    @property
    def seen(self) -> SeenTable:
        """Per swapped module how often the op ran, how often there was nothing to do, and why not. Prints as a table."""
        return SeenTable(SeenRow(s.path, s.now, s.ran, s.idle, tuple(s.why.items())) for s in self.seens)

    def __str__(self) -> str:
        if not self.rows and not self.left and not self.converted:
            return "nothing to swap: no norm, dropout, attention or residual block of a known structure"
        lines = []
        if self.rows:
            grouped: dict[tuple[str, str, str, str], list[str]] = {}
            for row in self.rows:
                grouped.setdefault((_star(row.module), row.was, row.now, row.backend), []).append(row.module)
            table = [("module", "was", "is", "backend")]
            for (path, was, now, backend), members in grouped.items():
                where = f"{path} ({len(members)})" if len(members) > 1 else members[0] or "(model)"
                table.append((where, was, now, backend))
            widths = [max(len(line[i]) for line in table) for i in range(4)]
            lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
            lines.insert(1, "  ".join("-" * width for width in widths))
            for why in dict.fromkeys(f"{row.backend}: {row.why}" for row in self.rows):
                lines.append(why)
        lines += self._conversions()
        if self.left:
            lines.append("not swapped:" if self.rows or self.converted else "nothing swapped:")
            reasons: dict[tuple[str, str, str], list[str]] = {}
            for path, name, why in self.left:
                reasons.setdefault((_star(path), name, why), []).append(path)
            for (path, name, why), members in reasons.items():
                where = f"{path} ({len(members)})" if len(members) > 1 else members[0] or "(model)"
                lines.append(f"  {where} {name}: {why}")
        return "\n".join(lines)

    def _conversions(self) -> list[str]:
        """The layers that are int8: a conversion, which swap is not, and named so."""
        if not self.converted:
            return []
        training = all(c.now == "Int8TrainingLinear" for c in self.converted)
        what = "parameters stay float" if training else "parameters changed; unswap gives dequantised values"
        lines = [f"converted to int8 ({what}):"]
        grouped: dict[tuple[str, str, str, str], int] = {}
        for c in self.converted:
            times = "not timed"
            if c.float_s is not None and c.int8_s is not None:
                times = f"{1e3 * c.float_s:.3g} ms in float, {1e3 * c.int8_s:.3g} ms now, {self.rows_timed} rows"
            key = (_star(c.module), c.was, c.now, times)
            grouped[key] = grouped.get(key, 0) + 1
        for (path, was, now, times), count in grouped.items():
            where = f"{path} ({count})" if count > 1 else path or "(model)"
            lines.append(f"  {where} {was}: {now} ({times})")
        return lines


def _star(path: str) -> str:
    """The path with its numbers replaced, so that the layers of a model share a line."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
