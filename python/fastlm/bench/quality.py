"""What a ``bench/quality_*.py`` script measured, as ``bench/results/quality-*.json``: the rows of docs/remedies.md.

evidence = Quality(__file__, of=["fastlm.data.augment"])
evidence.row("replacement", "validation bits per byte", before="2.91", after="2.88 ± 0.01", seconds=240, seeds=(1, 2, 3))
evidence.table("Filters", ["method", "kept", "dropped"], [["replacement", 312, 4]])
evidence.save()
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlm.bench import ceilings, remedies, results, sources
from fastlm.bench.quality_results import SCHEMA, load, source_hash


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation of a figure over seeds; of one seed the figure alone."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


class Quality:
    """The evidence of one script.

    Args:
        script: The script's ``__file__``, ``bench/quality_NAME.py``; its result is ``bench/results/quality-NAME.json``.
        of: Modules that the figures depend on, such as ``fastlm.data.augment``; their sources and the script's are hashed.
        provisional: Why the times are not to be trusted, such as "other programs ran"; "" where they are.
    """

    def __init__(self, script: str | Path, of: Iterable[str], provisional: str = "") -> None:
        self.root = sources.checkout()
        path = Path(script).resolve()
        self.path = self.root / "bench/results" / f"{path.stem.replace('_', '-')}.json"
        self.files = sorted({str(path.relative_to(self.root)), *(self._file(name) for name in of)})
        self.begin = time.monotonic()
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "command": shlex.join(["python", str(path.relative_to(self.root)), *_shown(sys.argv[1:])]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": ceilings.machine("cpu") | {"cores": len(os.sched_getaffinity(0))},
            "provisional": provisional,
            "files": self.files,
            "sources": source_hash(self.files, self.root),
            "rows": [],
            "tables": [],
            "examples": [],
        }

    def _file(self, module: str) -> str:
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise ValueError(f"of: {module!r} is no module with a source")
        return str(Path(found.origin).resolve().relative_to(self.root))

    def row(self, remedy: str, measured: str, before: str, after: str, seconds: float,
            seeds: Sequence[int] = (), command: str = "", note: str = "") -> None:  # fmt: skip
        """A line of docs/remedies.md.

        Args:
            remedy: A key of ``remedies.ROWS``.
            measured: What was measured, with its unit.
            before, after: The figure without the remedy and with it; "-" where there is none without it.
            seconds: What measuring it took.
            seeds: Seeds that the figures are the medians or means of; none where nothing is drawn.
            command: The user's command that applies the remedy, where it is not that of ``remedies.ROWS``.
            note: A sentence beside the figures, such as "no gain here".
        """
        if remedy not in remedies.known():
            raise ValueError(f"remedy must be one of {', '.join(sorted(remedies.known()))}; it is {remedy!r}")
        for name, value in (("measured", measured), ("before", before), ("after", after)):
            if not value.strip():
                raise ValueError(f"{name} of {remedy} is empty")
        row = {"remedy": remedy, "measured": measured, "before": before, "after": after, "seconds": round(seconds, 2)}
        self.data["rows"].append(row | {"seeds": list(seeds), "command": command, "note": note})

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> None:
        """A table that stands below the rows on the page, with a sentence under it."""
        self.data["tables"].append(
            {"title": title, "header": list(header), "rows": [[str(c) for c in row] for row in rows], "note": note}
        )

    def examples(self, title: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Texts before and after, shown one under the other."""
        self.data["examples"].append({"title": title, "pairs": [list(pair) for pair in pairs]})

    def save(self, part: bool = False) -> Path:
        """Writes the result and makes docs/remedies.md anew; of a part, what is there of other parts stays.

        Raises ValueError if nothing was measured, and where a part is of other sources than the rest.
        """
        if part:
            self._into_the_rest()
        if not self.data["rows"]:
            raise ValueError(f"{self.path.name} would hold no row")
        self.data["seconds"] = round(time.monotonic() - self.begin, 1)
        results.write(self.path, json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
        remedies.write(self.root)
        print(f"wrote {self.path.relative_to(self.root)} and {remedies.PAGE} ({self.data['seconds']} s)")
        return self.path

    def _into_the_rest(self) -> None:
        """The result on disk with what was measured here in the place of what has the same names."""
        rest = load(self.root).get(self.path.stem)
        when = ", ".join(filter(None, [f"Measured {self.data['date'][:10]}", self.data["provisional"]]))
        for table in self.data["tables"]:
            table["note"] = f"{table['note']} {when}.".strip()
        self.data["command"] = shlex.join(self.data["command"].split()[:2])  # of which this was a part
        if rest is None:
            return
        if rest["sources"] != self.data["sources"]:
            raise ValueError(f"{self.path.name} is of other sources: delete it, or run the whole script")
        names = {"rows": ("remedy", "measured"), "tables": ("title",), "examples": ("title",)}
        for kind, by in names.items():
            new = {tuple(one[k] for k in by): one for one in self.data[kind]}
            old = [new.pop(tuple(one[k] for k in by), one) for one in rest[kind]]
            rest[kind] = [*old, *new.values()]
        self.begin -= rest["seconds"]
        self.data = rest


def _shown(words: Sequence[str]) -> list[str]:
    """Arguments of a command as others may repeat it: of a path outside the checkout only its last name."""
    return [os.path.basename(w.rstrip("/")) if os.path.isabs(w) else w for w in words]
