"""Labelled texts: rows of .jsonl, .json, .csv or .tsv with a text and a label."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data import groups
from fastlm.data.errors import InputError

HARMLESS = frozenset({"harmless", "neither", "none", "clean", "ok", "okay", "safe", "normal", "neutral", "benign", "good",
                      "non-toxic", "nontoxic", "not toxic", "not_toxic", "non_toxic"})  # fmt: skip
YES, NO = frozenset({"1", "true", "yes"}), frozenset({"0", "false", "no"})  # of a labelling that knows no other label
FEW = 20  # texts of a category, and of harmless ones, below which nothing is learnt of it


@dataclass(frozen=True)
class Row:
    """A text, its harmful categories (none: harmless), and the mark by which it is held out (`groups.mark`)."""

    text: str
    categories: frozenset[str]
    mark: float


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a file. Raises InputError that names file and line."""
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv"):
        raise InputError(f"{path}: labelled texts are rows of .jsonl, .json, .csv or .tsv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if kind in (".csv", ".tsv"):
                csv.field_size_limit(sys.maxsize)
                table = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
                yield from ((f"{path}, line {table.line_num}", row) for row in table)
            elif kind == ".json":
                found = json.load(file)
                if not isinstance(found, list):
                    raise InputError(f"{path} must hold a list of rows")
                yield from ((f"{path}, row {at}", row) for at, row in enumerate(found, 1))
            else:
                for at, line in enumerate(file, 1):
                    if line.strip():
                        try:
                            yield f"{path}, line {at}", json.loads(line)
                        except (ValueError, RecursionError) as error:
                            raise InputError(f"{path}, line {at} is not JSON: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _names(value: Any) -> frozenset[str] | None:
    whole = lambda part: int(part) if isinstance(part, float) and part.is_integer() else part  # 1.0: a column with gaps
    value = whole(value)
    if isinstance(value, (list, tuple)):
        parts: Iterable[Any] = map(whole, value)
    elif isinstance(value, (bool, int, str)):
        parts = str(value).split("|")
    else:
        return None
    return frozenset(name for part in parts if (name := str(part).strip()))


def _harmless(labels: Collection[str]) -> frozenset[str]:
    """The labels that say so of themselves; none where 0, false or no stands beside other labels than its opposite.

    Numbered classes need not begin with the harmless one: in the set of Davidson et al. (2017) 0 is hate speech.
    """
    no, yes = ({label for label in labels if label.lower() in words} for words in (NO, YES))
    if no:
        return frozenset(no if no | yes == {*labels} else ())
    return frozenset(label for label in labels if label.lower() in HARMLESS)


def read(
    names: tuple[str, ...], field: str = "text", label_field: str = "label", harmless: tuple[str, ...] = ()
) -> list[Row]:
    """The labelled texts of files.

    A label is a name, several with | between them or as a list, or 0 and 1. `harmless` are the labels that mean no harm; by
    default those that say so (neither, none, clean ...), and 0 where the only other label is 1. Raises InputError for a row
    without text or label, where nothing says which label is harmless, and where all texts are of one class.
    """
    found: list[tuple[str, frozenset[str], str | None]] = []
    for name in names:
        for place, row in _rows(Path(name).expanduser()):
            text, labels = (row.get(field), _names(row.get(label_field))) if isinstance(row, dict) else (None, None)
            if not isinstance(text, str):
                raise InputError(f"{place} has no text in the field {field!r} (--field names it)")
            if any("\ud800" <= c <= "\udfff" for label in labels or () for c in label):
                raise InputError(f"{place}: the label {'|'.join(sorted(labels or ()))!a} holds half a surrogate pair")
            if not labels:
                raise InputError(f"{place} has no label in the field {label_field!r} (--label names it)")
            found.append((text, labels, row.get("group")))
    counts = Counter(label for _, labels, _ in found for label in labels)
    safe = frozenset(harmless) or _harmless(counts)
    where = " ".join(names)
    if not found:
        raise InputError(f"{where} holds no labelled text")
    if unknown := sorted(safe - counts.keys()):
        raise InputError(f"--harmless {unknown[0]}: no text has this label; there are {', '.join(sorted(counts))}")
    if len(counts) == 1:
        raise InputError(f"{where}: all {len(found):,} texts are labelled {next(iter(counts))!r}; a filter needs harmful and "
                         f"harmless ones")  # fmt: skip
    if not safe:
        raise InputError(f"{where}: which of the labels {', '.join(sorted(counts))} means that a text is harmless? "
                         f"--harmless NAME")  # fmt: skip
    rows = [Row(text, labels - safe, _mark(text, group)) for text, labels, group in found]
    bad = sum(bool(row.categories) for row in rows)
    if min(bad, len(rows) - bad) < FEW:
        raise InputError(
            f"{where}: {bad:,} harmful and {len(rows) - bad:,} harmless texts; at least {FEW} of each are needed"
        )
    return [Row(r.text, frozenset("toxic" if c.lower() in YES else c for c in r.categories), r.mark) for r in rows]


def _mark(text: str, group: Any) -> float:
    return groups.mark(
        group if isinstance(group, str) and group else groups.group_of(text.encode("utf-8", "surrogatepass"))
    )
