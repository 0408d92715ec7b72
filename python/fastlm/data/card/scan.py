"""Reads a corpus once, in tasks, and counts it: the facts of each task, and the copies over all of them.

The tasks, the keys and the search for copies are those of `fastlm data clean`. Texts lie beside the keys while it runs, so
it takes as much disk as the corpus and no memory that grows with it. A finished task stays, so a call that was broken off
goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data import corpus as corpora
from fastlm.data import filter as filters
from fastlm.data import workers
from fastlm.data.card.facts import Facts
from fastlm.data.clean.options import CleanOptions, bands
from fastlm.data.errors import InputError

CHUNK = 1 << 20
FILES = 20  # more are told apart by their first folder
Note = Callable[[str, int, int], None]


@dataclass
class Copies:
    """Documents that are exact copies of an earlier one, near-duplicates of another, and the first few of them."""

    exact: int = 0
    near: int = 0
    threshold: float = 0.0
    examples: list[tuple[str, str, float]] = field(default_factory=list)


def scan(names: tuple[str, ...], work: Path, options: CleanOptions, count: int = 1,
         note: Note = lambda what, done, total: None) -> tuple[Facts, Copies]:  # fmt: skip
    """The facts and the copies of a corpus. `work` is a folder for the time being; `count` processes share the reading.

    Raises InputError where a file cannot be read, and where there is no text.
    """
    from fastlm.data.clean import near
    from fastlm.data.clean.run import tasks

    files = corpora.expand(names)
    found = tasks(files, options)
    if not found:
        raise InputError(f"the corpus is empty: {len(files)} file(s) without text")
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    said = options.plan() | ({"filter": filters.load(options.filter).hash} if options.filter else {})
    _begin(work, hashlib.sha256(repr((1, stats, sorted(said.items()))).encode()).hexdigest())
    total = sum(unit[2] - unit[1] for task in found for unit in task)
    items = (((rank, task), sum(unit[2] - unit[1] for unit in task)) for rank, task in enumerate(found))
    facts, done = Facts(), 0
    root = os.path.commonpath([f.resolve().parent for f in files])
    for part, size in workers.ordered(_task, items, min(count, len(found)), work, options, root, len(files) > FILES):
        facts.merge(part)
        done += size
        note("reading", done, total)
    if not facts.sums["documents"]:
        raise InputError(f"the corpus is empty: {len(files)} file(s) without text")
    bits = bands(options.dedup) if options.dedup else (0, 0)
    for _ in near.Link(work, bits[0], True, options.dedup).run(None):
        pass
    return facts, _copies(work, bits[0], facts.sums["documents"], options.dedup)


def _begin(work: Path, key: str) -> None:
    """The folder, empty unless it is of the same corpus and options."""
    mark = work / "key"
    if not mark.is_file() or mark.read_text() != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        draft = work / "key.draft"
        draft.write_text(key)
        os.replace(draft, mark)


def _task(item: tuple[int, list[Any]], work: Path, options: CleanOptions, root: str, by_folder: bool) -> Facts:
    """Counts one task, and leaves its facts, rows and keys; of one that was done before, its facts."""
    rank, units = item
    saved = work / f"{rank:05d}.facts"
    if saved.is_file():
        return Facts.load(saved)
    from fastlm.data.clean import near

    facts = Facts()
    count, rows = bands(options.dedup) if options.dedup else (0, 0)
    for _ in near.Keep(work, count, rows).run(_documents(units, options, facts, root, by_folder), rank):
        pass
    facts.save(saved)
    return Facts.load(saved)


def _label(path: Path, root: str, by_folder: bool) -> str:
    """What a file is called as a source: its place below the common folder, or of many files the first folder of it."""
    place = path.resolve().relative_to(root)
    return f"{place.parts[0]}/" if by_folder and len(place.parts) > 1 else str(place)


def _documents(units: list[Any], options: CleanOptions, facts: Facts, root: str, by_folder: bool) -> Iterator[Any]:
    from datatrove.data import Document

    from fastlm.data.clean.read import pieces

    judge = filters.load(options.filter).judge if options.filter else lambda text: None
    for unit in units:
        name, label = Path(unit[0]).name, _label(Path(unit[0]), root, by_folder)
        for place, piece in enumerate(pieces(unit, options.field, options.separator)):
            text = piece.text.decode("utf-8", "replace")
            facts.add(text, piece.source or label, piece.first and piece.last)
            if verdict := judge(text):
                facts.harmful[verdict.category] += 1
            where = {"source": f"{name}:{unit[1]}+{place}", "group": piece.group}
            yield Document(text, f"{unit[0]}-{place}", metadata=where)


def _copies(work: Path, count: int, total: int, threshold: float) -> Copies:
    from fastlm.data.clean import near

    store, out = near.Store(work, count), Copies(threshold=threshold)
    links = np.memmap(work / "links", [("why", "u1"), ("of", "<i8"), ("similarity", "<f4")], "r")
    for start in range(0, total, CHUNK):
        part = links[start : min(start + CHUNK, total)]
        out.exact += int((part["why"] == 1).sum())
        out.near += int((part["why"] == 2).sum())
        for at in np.flatnonzero(part["why"] == 2)[: 5 - len(out.examples)]:
            of, similarity = int(part["of"][at]), float(part["similarity"][at])
            out.examples.append((store.row(of)["source"], store.row(start + int(at))["source"], similarity))
    return out
