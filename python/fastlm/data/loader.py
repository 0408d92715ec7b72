"""Loading ahead in a thread: the plan says which samples each micro-batch holds, the thread has them ready.

A source of samples is anything with `batch(ids) -> tuple of tensors`, `content` (a name of the data for checkpoints).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastlm.data.errors import InputError
from fastlm.data.pack import Rows
from fastlm.data.prepare import Prepared
from fastlm.data.sample import ROUND, Windows, key, mixture, permute, shares


class Source(Protocol):
    content: str

    def batch(self, ids: np.ndarray) -> tuple[Tensor, ...]: ...


class TokenSource:
    """Inputs and targets [n, context] of sample numbers, from one or several prepared corpora mixed by weight.

    From packed corpora a third tensor, int32 [n, context], says which document of its row each token belongs to.
    """

    def __init__(self, corpora: Sequence[Prepared], context: int, seed: int, weights: Sequence[float] = ()) -> None:
        self.weights = list(weights) or [1.0] * len(corpora)
        self.seed = seed
        self.content = str(key([c.content for c in corpora], self.weights, context))
        self.parts: list[Windows | Rows] = []
        for corpus in corpora:
            if corpus.pack not in (0, context) or corpus.pack != corpora[0].pack:
                raise InputError(
                    f"the shards in {corpus.folder} hold documents packed into contexts of {corpus.pack}, "
                    f"this model's context is {context}"
                )
            part = corpus.rows("train", seed) if corpus.pack else Windows(corpus.train, context, seed, corpus.content)
            if not part.size:
                raise InputError(
                    f"the training text has {corpus.manifest['train']['tokens']} tokens, shorter than one context of "
                    f"{context}: give more text or a smaller --context"
                )
            self.parts.append(part)
        for number, count in enumerate(shares(self.weights)):
            if not count:
                raise InputError(
                    f"--weights: {self.weights[number]} of corpus {number + 1} among a sum of {sum(self.weights)} gives it "
                    f"no sample of {ROUND}: it must be at least {sum(self.weights) / ROUND}"
                )

    def batch(self, ids: np.ndarray) -> tuple[Tensor, ...]:
        if len(self.parts) == 1:
            columns = self.parts[0].batch(ids)
        else:
            source, number = mixture(ids, self.weights, self.seed)
            found = {int(s): self.parts[s].batch(number[source == s]) for s in np.unique(source)}
            columns = tuple(np.empty((len(ids), *c.shape[1:]), c.dtype) for c in next(iter(found.values())))
            for s, part in found.items():
                for column, values in zip(columns, part):
                    column[source == s] = values
        return tuple(torch.from_numpy(np.ascontiguousarray(_flat(c))) for c in columns)


def _flat(column: np.ndarray) -> np.ndarray:
    """Both contexts of each sample of pairs, one after the other."""
    return column.reshape(-1, column.shape[-1])


class DatasetSource:
    """One's own map-style dataset: items are tensors or tuples of them, stacked; each epoch in its own order."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed, self.content = dataset, seed, f"{type(dataset).__qualname__} of {len(dataset)}"

    def batch(self, ids: np.ndarray) -> tuple[Tensor, ...]:
        size = len(self.dataset)
        items = []
        for n in ids:
            at = permute(np.array([n % size]), size, key(self.seed, "dataset", int(n // size)))[0]
            item = self.dataset[int(at)]
            items.append(item if isinstance(item, tuple) else (item,))
        return tuple(torch.stack(list(map(torch.as_tensor, column))) for column in zip(*items))


class Prefetch:
    """Iterates over (ids, tensors) of a plan of id arrays, `depth` ahead; `stalled` counts the seconds waited for."""

    def __init__(self, source: Source, plan: Iterator[np.ndarray], depth: int = 8, pin: bool = False) -> None:
        self.stalled = 0.0
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(source, plan, pin), daemon=True, name="fastlm-load")
        self._thread.start()

    def _work(self, source: Source, plan: Iterator[np.ndarray], pin: bool) -> None:
        try:
            for ids in plan:
                tensors = source.batch(ids) if len(ids) else ()
                if pin:
                    tensors = tuple(t.pin_memory() for t in tensors)
                if not self._put((ids, tensors)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001  handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> tuple[np.ndarray, tuple[Tensor, ...]]:
        start = time.perf_counter()
        item = self._queue.get()
        self.stalled += time.perf_counter() - start
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def __iter__(self) -> Prefetch:
        return self

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def corpus_batches(corpus: Prepared, context: int, rows: int, limit: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Batches of `rows` samples that predict the validation side of a corpus, as it is packed, each token once.

    `limit` > 0 takes about that many tokens, spread evenly over the whole.
    """
    if not corpus.pack:
        yield from validation_batches(corpus.val, context, rows, limit)
        return
    packed = corpus.rows("val")
    every = max(packed.size * packed.answers * context // limit, 1) if limit else 1
    numbers = np.arange(0, packed.size, every)
    for at in range(0, len(numbers), rows):
        yield tuple(torch.from_numpy(_flat(c)) for c in packed.at(numbers[at : at + rows]))


def validation_batches(shards: Sequence[np.ndarray], context: int, rows: int, limit: int = 0) -> Iterator[Any]:
    """(inputs, targets) [<= rows, context] that predict every token but each shard's first, once; -100 pads the end.

    `limit` > 0 takes about that many tokens, spread evenly over the whole.
    """
    total = sum(max(len(s) - 1, 0) for s in shards)
    every = max(total // limit, 1) if limit else 1
    for shard in shards:
        starts = np.arange(0, len(shard) - 1, context * every)
        for at in range(0, len(starts), rows):
            index = starts[at : at + rows, None] + np.arange(context + 1)
            tokens = torch.from_numpy(shard[np.minimum(index, len(shard) - 1)].astype(np.int64))
            targets = tokens[:, 1:].clone()
            targets[torch.from_numpy(index[:, 1:] >= len(shard))] = -100
            yield tokens[:, :-1].contiguous(), targets
