"""Copies: exact ones, near-duplicates by MinHash (every candidate checked by true Jaccard), and rows of one group.

`Keep` writes a task's documents and a record of keys for each; `Link` joins the records of all tasks into clusters, in
passes of bounded size; `Write` gives out what stays. Memory holds one pass and some texts, whatever the corpus' size.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fastlm.data.clean import words
from fastlm.data.clean.rules import Rule, size_of
from fastlm.data.groups import group_of
from fastlm.data.rows import dumps

PASS = 1 << 20  # records of one key that are sorted at once
HELD = 2048  # texts and shingles of candidates at hand


def record(count: int) -> np.dtype[Any]:
    return np.dtype([("at", "<u8"), ("exact", "<u8"), ("group", "<u8"), ("bands", "<u8", (count,))])


class Keep(PipelineStep):
    """Writes documents as rows, and the keys by which copies are found."""

    type = "fastlm"
    name = "keep"

    def __init__(self, folder: Path, count: int, rows: int) -> None:
        super().__init__()
        self.folder, self.count, self.rows = folder, count, rows

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.folder.mkdir(parents=True, exist_ok=True)
        at = 0
        empty = np.zeros(self.count, np.uint64)
        with (
            open(self.folder / f"{rank:05d}.jsonl", "wb") as rows,
            open(self.folder / f"{rank:05d}.keys", "wb") as keys,
        ):
            for document in data:
                text = document.text.encode("utf-8", "surrogatepass")
                own = group_of(text)
                group = document.metadata.get("group") or own
                bands = words.signature(words.shingles(document.text), self.count, self.rows) if self.count else empty
                one = np.zeros(1, record(self.count))
                one["at"], one["exact"], one["bands"] = at, int(own, 16), bands
                one["group"] = int(group_of(group.encode("utf-8", "surrogatepass")), 16)
                keys.write(one.tobytes())
                row = {"text": document.text, "group": group, "source": document.metadata["source"]}
                at += rows.write(json.dumps(row).encode() + b"\n")
                self.stat_update("kept")
        yield from ()


class Store:
    """Rows and keys of all tasks, by a document's number over all of them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.dtype = folder, record(count)
        self.files = sorted(folder.glob("*.keys"))
        sizes = [f.stat().st_size // self.dtype.itemsize for f in self.files]
        self.begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.total = int(self.begins[-1])
        self._shingles: OrderedDict[int, np.ndarray] = OrderedDict()

    def keys(self, task: int) -> np.ndarray:
        if self.begins[task] == self.begins[task + 1]:
            return np.empty(0, self.dtype)
        return np.memmap(self.files[task], self.dtype, "r")

    def row(self, number: int) -> dict[str, str]:
        task = int(np.searchsorted(self.begins, number, side="right")) - 1
        with open(self.files[task], "rb") as file:
            file.seek((number - int(self.begins[task])) * self.dtype.itemsize)
            at = int(np.frombuffer(file.read(8), "<u8")[0])
        with open(self.files[task].with_suffix(".jsonl"), "rb") as file:
            file.seek(at)
            return dict(json.loads(file.readline()))

    def shingles(self, number: int) -> np.ndarray:
        if number not in self._shingles:
            self._shingles[number] = words.shingles(self.row(number)["text"])
            if len(self._shingles) > HELD:
                self._shingles.popitem(last=False)
        self._shingles.move_to_end(number)
        return self._shingles[number]

    def equal(self, name: str, band: int | None = None) -> Iterator[np.ndarray]:
        """The numbers, in order, of documents that share a value of a key: each set of two and more."""
        passes = max(-(-self.total // PASS), 1)
        for turn in range(passes):
            values, numbers = [], []
            for task in range(len(self.files)):
                keys = self.keys(task)
                column = np.ascontiguousarray(keys[name] if band is None else keys[name][:, band])
                mine = np.flatnonzero(column % np.uint64(passes) == turn) if passes > 1 else np.arange(len(column))
                values.append(column[mine])
                numbers.append(mine + self.begins[task])
            if not values:
                return
            value, number = np.concatenate(values), np.concatenate(numbers)
            order = np.argsort(value, kind="stable")
            value, number = value[order], number[order]
            for part in np.split(number, np.flatnonzero(np.diff(value)) + 1):
                if len(part) > 1:
                    yield part


def mapped(path: Path, kind: Any, count: int) -> np.ndarray:
    """An array of zeros on disk. Its room is taken now: a full disk is an OSError here, and a fatal signal at a page later."""
    size = max(count, 1) * np.dtype(kind).itemsize
    with open(path, "wb") as file:
        for start in range(0, size, PASS):
            file.write(bytes(min(PASS, size - start)))
    return np.memmap(path, kind, "r+", shape=(max(count, 1),))


class Forest:
    """Clusters, each named by its first document; on disk, so that memory holds what is touched."""

    def __init__(self, path: Path, total: int) -> None:
        self.up: Any = mapped(path, np.int64, total)
        for start in range(0, total, PASS):
            self.up[start : start + PASS] = np.arange(start, min(start + PASS, total))

    def root(self, number: int) -> int:
        at = number
        while self.up[at] != at:
            at = int(self.up[at])
        while self.up[number] != at:
            number, self.up[number] = int(self.up[number]), at
        return at

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        self.up[b] = a


class Link(PipelineStep):
    """Finds the clusters of all documents: `why` 1 exact copy, 2 near-duplicate, of document `of` with `similarity`."""

    type = "fastlm"
    name = "link"

    def __init__(self, folder: Path, count: int, exact: bool, threshold: float) -> None:
        super().__init__()
        self.folder, self.count, self.exact, self.threshold = folder, count, exact, threshold

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        store = Store(self.folder, self.count)
        near, grouped = (Forest(self.folder / f"{name}.forest", store.total) for name in ("near", "group"))
        found: Any = mapped(self.folder / "links", [("why", "u1"), ("of", "<i8"), ("similarity", "<f4")], store.total)
        if self.exact:
            for same in store.equal("exact"):
                first = store.row(int(same[0]))["text"]
                for number in map(int, same[1:]):
                    if store.row(number)["text"] == first:
                        near.join(int(same[0]), number)
                        found[number] = (1, int(same[0]), 1.0)
        for band in range(self.count if self.threshold else 0):
            for same in store.equal("bands", band):
                self._check(store, near, found, [n for n in map(int, same) if found["why"][n] != 1])
        for number in range(store.total):
            if (root := near.root(number)) != number:
                grouped.join(root, number)
        for same in store.equal("group"):
            for number in map(int, same[1:]):
                grouped.join(int(same[0]), number)
        for number in range(store.total):
            grouped.root(number)
        for array in (found, near.up, grouped.up):
            array.flush()
        yield from ()

    def _check(self, store: Store, near: Forest, found: np.ndarray, same: list[int]) -> None:
        for at, number in enumerate(same):
            mine = store.shingles(number)
            if not len(mine):
                continue
            for other in same[:at]:
                if near.root(other) == near.root(number):
                    continue
                similarity = words.jaccard(store.shingles(other), mine)
                if similarity >= self.threshold:
                    near.join(other, number)
                    late, early = max(other, number), min(other, number)
                    target = late if not found["why"][late] else early
                    found[target] = (2, early if target == late else late, similarity)


class Rows(PipelineStep):
    """The rows of a task as documents, with what is known of their copies."""

    type = "fastlm"
    name = "rows"

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__()
        self.folder, self.count = folder, count

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        store = Store(self.folder, self.count)
        kind = [("why", "u1"), ("of", "<i8"), ("similarity", "<f4")]
        found = np.memmap(self.folder / "links", kind, "r")
        near, grouped = (np.memmap(self.folder / f"{name}.forest", np.int64, "r") for name in ("near", "group"))
        with open(self.folder / f"{rank:05d}.jsonl", "rb") as file:
            for number, line in enumerate(file, int(store.begins[rank])):
                row = json.loads(line)
                why, of, similarity = found[number].tolist()
                about = {"source": row["source"], "group": row["group"], "copy": 0}
                if int(near[number]) != number:
                    about["copy"] = 1 if why == 1 else 2
                    other = store.row(of if why else int(near[number]))["source"]
                    about["of"] = f"{other}, Jaccard {similarity:.2f}" if why else f"one in the cluster of {other}"
                root = int(grouped[number])
                if root != number:
                    about["group"] = store.row(root)["group"]
                yield Document(row["text"], str(number), metadata=about)


class Copies(Rule):
    """Drops what is a copy of an earlier document; near-duplicates stay where they are only grouped."""

    name = "copies"

    def __init__(self, tally: Path, dropped: Path, group_only: bool) -> None:
        super().__init__(tally, dropped)
        self.group_only = group_only

    def judge(self, document: Document) -> tuple[str, str] | None:
        copy = document.metadata["copy"]
        if not copy or (copy == 2 and self.group_only):
            return None
        return ("exact_copy" if copy == 1 else "near_duplicate"), f"a copy of {document.metadata['of']}"


class Write(PipelineStep):
    """Rows that `fastlm train` reads; a file appears when it is whole."""

    type = "fastlm"
    name = "write"

    def __init__(self, out: Path, tally: Path) -> None:
        super().__init__()
        self.out, self.tally = out, tally

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        draft, count, size = self.out / f".{rank:05d}.draft", 0, 0
        with open(draft, "w", encoding="utf-8") as file:
            for document in data:
                row = {
                    "text": document.text,
                    "group": document.metadata["group"],
                    "source": document.metadata["source"],
                }
                file.write(dumps(row) + "\n")
                count, size = count + 1, size + size_of(document)
        if count:
            os.replace(draft, self.out / f"{rank:05d}.jsonl")
        else:
            draft.unlink()
        self.tally.mkdir(parents=True, exist_ok=True)
        (self.tally / f"{rank:05d}-Write.json").write_text(json.dumps({"kept": count, "kept_bytes": size}))
        yield from ()
