"""Packing of documents into contexts, decided when shards are written and stored as an index beside the tokens.

A document is read as  end-of-text, t0, t1 ...  and predicts  t0, t1 ... end-of-text,  so each of its tokens is a target
exactly once and the first one is predicted from the mark that generation starts with, never from another document. One
longer than a context is cut into contexts; what is left of it and the short ones are put together, best fit first
(Ding et al. 2024), among up to BUFFER of them at a time. A row of the index is a list of spans (first token, length).

A row to fine-tune on is never cut here; its first token is an input alone, and tokens that are not trained on are no targets.
A pair of answers is an item of two spans: contexts come in pairs, the chosen answers in one and the rejected in the other.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastlm.data.sample import key, permute
from fastlm.data.shards import Column, ShardWriter

BUFFER = 1 << 16
INT64 = np.dtype(np.int64)


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Rows of indices into `lengths` (each at most `room`): longest first, each where it leaves least."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by what is left in them
    lefts: list[int] = []  # the keys of open_rows, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(lefts, lengths[i])
        if at == len(lefts):
            row, left = len(rows), room
            rows.append([])
        else:
            left = lefts[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], lefts[at]
        rows[row].append(i)
        left -= lengths[i]
        if left:
            if left not in open_rows:
                bisect.insort(lefts, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return rows


class Packer:
    """Writes the index of one side: `add` (or `example`) is told of its tokens in the order in which they are appended.

    `rows` counts the contexts, or pairs of them.
    """

    def __init__(self, folder: Path, side: str, context: int, tokenizer: str) -> None:
        self.context, self.rows, self.items = context, 0, 0
        self._spans = ShardWriter(folder, f"{side}-spans", INT64, tokenizer)
        self._ends = ShardWriter(folder, f"{side}-rows", INT64, tokenizer)
        self._ends.append(np.zeros(1, INT64))
        self._at = self._start = self._written = 0
        self._begins = True
        # (2 * first token + whether a document begins, length) of each span of an item
        self._waiting: list[tuple[int, ...]] = []

    def add(self, count: int, begins: bool) -> None:
        """`count` more tokens; `begins`: they are the first of a document."""
        if begins:
            self._cut(0)
            self._begins = True
        self._at += count
        while self._at - self._start >= self.context:
            self._cut(self.context)

    def example(self, counts: Sequence[int]) -> None:
        """The tokens of a row's sequence, or of both answers of a pair: of each the first is an input alone."""
        item: list[int] = []
        for count in counts:
            item += [2 * (self._at + 1), count - 1]
            self._at += count
        self._start = self._at
        self._wait(tuple(item))

    def _cut(self, length: int) -> None:
        length = length or self._at - self._start
        if length:
            self._wait((2 * self._start + self._begins, length))
            self._start, self._begins = self._start + length, False

    def _wait(self, item: tuple[int, ...]) -> None:
        self._waiting.append(item)
        if len(self._waiting) >= BUFFER:
            self._pack()

    def _pack(self) -> None:
        if not self._waiting:
            return
        spans = np.array(self._waiting, dtype=INT64)
        rows = best_fit(spans[:, 1::2].max(1).tolist(), self.context)
        self._spans.append(spans[[i for row in rows for i in row]].reshape(-1))
        self._ends.append(self._written + np.cumsum([len(row) for row in rows], dtype=INT64))
        self._written += len(spans)
        self.rows, self.items = self.rows + len(rows), self.items + len(spans)
        self._waiting = []

    def close(self) -> tuple[list[str], list[str], list[str]]:
        """Names of the span files, of the row files, and hashes of both."""
        self._cut(0)
        self._pack()
        spans, rows = self._spans.close(), self._ends.close()
        return spans, rows, self._spans.content + self._ends.content


class Rows:
    """Packed samples: inputs and targets int64 [n, context], documents int32 [n, context] (numbers within the row).

    What is left of a row is a document of its own whose targets are -100, and so is the target of a token that `trained`
    leaves out. Of pairs (`answers` 2) each is [n, 2, context]: document j of both contexts are the answers of one pair. Where
    `reference` [pairs, 2] is set, a fourth array, float32, has that of document j at place j of its context.
    """

    reference: np.ndarray | None = None

    def __init__(
        self, tokens: Column, spans: Column, ends: Column, context: int, eot: int, seed: int = 0, name: str = "",
        trained: Column | None = None, answers: int = 1,
    ) -> None:  # fmt: skip
        self.columns, self.context, self.eot, self.seed, self.name = (tokens, spans, ends), context, eot, seed, name
        self.trained, self.answers = trained, answers
        self.size = max(len(ends) - 1, 0)

    def at(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """The rows of these numbers, as they were packed."""
        if self.answers == 1:
            return self._at(rows, 0)
        return tuple(np.stack(columns, 1) for columns in zip(*(self._at(rows, a) for a in range(self.answers))))

    def _at(self, rows: np.ndarray, answer: int) -> tuple[np.ndarray, ...]:
        tokens, spans, ends = self.columns
        first, counts = ends.take(rows), ends.take(rows + 1) - ends.take(rows)
        row = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the span within its row
        span = (first[row] + number) * self.answers + answer
        word, length = spans.take(2 * span), spans.take(2 * span + 1)
        before = np.cumsum(length) - length
        row_start = before[np.cumsum(counts) - counts]
        inner = np.arange(length.sum()) - np.repeat(before, length)
        source = np.repeat(word >> 1, length) + inner
        place = np.repeat(row * self.context + before - row_start[row], length) + inner
        inputs = np.full(len(rows) * self.context, self.eot, dtype=np.int64)
        targets = np.full_like(inputs, -100)
        documents = np.repeat(counts.astype(np.int32), self.context)
        starts = np.repeat(word & 1, length).astype(bool) & (inner == 0)
        inputs[place] = np.where(starts, self.eot, tokens.take(np.maximum(source - 1, 0)))
        own = tokens.take(source)
        targets[place] = own if self.trained is None else np.where(self.trained.take(source), own, -100)
        documents[place] = np.repeat(number, length)
        found = [inputs, targets, documents]
        if self.reference is not None:
            found.append(np.zeros(len(inputs), dtype=np.float32))
            found[-1][row * self.context + number] = self.reference[first[row] + number, answer]
        return tuple(a.reshape(len(rows), self.context) for a in found)

    def sequence(self, item: int, answer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, whether each is trained) of one sequence, in the order in which they were packed."""
        tokens, spans, _ = self.columns
        word, length = spans.take(2 * (item * self.answers + answer) + np.arange(2))
        place = (word >> 1) - 1 + np.arange(length + 1)
        assert self.trained is not None
        return tokens.take(place), self.trained.take(place)

    def batch(self, n: np.ndarray) -> tuple[np.ndarray, ...]:
        """Samples n: epoch e holds each row once, in its own order."""
        rows = np.empty(len(n), dtype=np.int64)
        for epoch in np.unique(n // self.size):
            here = n // self.size == epoch
            rows[here] = permute(n[here] % self.size, self.size, key(self.seed, self.name, int(epoch)))
        return self.at(rows)
