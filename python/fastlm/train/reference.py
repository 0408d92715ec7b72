"""What the model that --dpo starts from gives the answers of each pair: computed once, and kept.

The log-probabilities are in the cache, by a hash of the weights (with shape and type of the run) and one of the pair's tokens.
So the next run finds them, on any mesh, and rows that are added cost their own forward alone. A copy lies in the run's folder:
a run that goes on needs neither the cache nor the model that it began with. No second model is ever held.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlm.console import warn
from fastlm.data import InputError, Prepared
from fastlm.data.prepare import SIDES, cache_folder
from fastlm.models.gpt import GPT
from fastlm.train.machine import autocast
from fastlm.train.ranks import Ranks

FILE = "reference.npy"
RECORD = np.dtype([("pair", "S32"), ("scores", "<f4", 2)])
Known = dict[bytes, np.ndarray]


def weights_hash(tensors: Mapping[str, Tensor], shape: object, dtype: str) -> str:
    """A name of the function that the tensors compute in a model of this shape under autocast to `dtype`."""
    digest = hashlib.sha256(repr((shape, dtype)).encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, tuple(t.shape), str(t.dtype))).encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def place(weights: str) -> Path:
    """The folder of the cache for weights of this hash."""
    return cache_folder() / "references" / weights


def keys(corpus: Prepared, side: str) -> list[bytes]:
    """A hash of each pair of a side, in the order of its index."""
    rows, found = corpus.rows(side), list[bytes]()
    for item in range(corpus.pairs(side)):
        digest = hashlib.blake2b(digest_size=16)
        for answer in range(2):
            for part in rows.sequence(item, answer):
                digest.update(np.int64(len(part)).tobytes() + part.astype("<i8").tobytes())
        found.append(digest.hexdigest().encode())
    return found


def read(path: Path) -> Known:
    """What a file holds. Raises InputError, naming it, for one that is damaged."""
    try:
        found = np.load(path, allow_pickle=False)
        if found.dtype != RECORD or not np.isfinite(found["scores"]).all():
            raise ValueError("it holds something else")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the reference log-probabilities {path} cannot be read ({error}): delete that file") from None
    return dict(zip(found["pair"].tolist(), found["scores"]))


def write(path: Path, known: Mapping[bytes, np.ndarray]) -> None:
    """All of `known`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = np.array([(key, tuple(scores)) for key, scores in sorted(known.items())], dtype=RECORD)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "wb") as file:
        np.save(file, records, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def cached(weights: str) -> Known:
    """All that the cache has of these weights, from every run that added some."""
    found: Known = {}
    for path in sorted(place(weights).glob("*.npy")):
        found |= read(path)
    return found


@torch.no_grad()
def _compute(
    model: GPT, wanted: Iterable[tuple[Prepared, str, list[int], list[bytes]]], device: torch.device, dtype: str
) -> Known:
    """The scores of pairs, each in the packed context that it is trained in."""
    found: Known = {}
    training = model.training
    model.to(device).eval()
    for corpus, side, contexts, names in wanted:
        rows = corpus.rows(side)
        ends = rows.columns[2]
        each = max(16384 // (2 * rows.context), 1)
        for at in range(0, len(contexts), each):
            numbers = np.array(contexts[at : at + each])
            batch = (torch.from_numpy(c.reshape(-1, c.shape[-1])).to(device) for c in rows.at(numbers)[:3])
            with autocast(device, dtype):
                scores = model(*batch, scores=True).float().cpu().numpy().reshape(len(numbers), 2, -1)
            first, past = ends.take(numbers), ends.take(numbers + 1)
            for n, (a, b) in enumerate(zip(first.tolist(), past.tolist())):
                found |= {names[a + j]: scores[n, :, j].copy() for j in range(b - a)}
    model.train(training)
    return found


def attach(
    data: list[Prepared], model: GPT | None, weights: str, known: Known, ranks: Ranks, device: torch.device, dtype: str
) -> tuple[Known, int]:
    """Give every corpus of pairs its references; returns those of its pairs, and how many were computed now.

    `known` are those that a run brings. `model` is whole on every rank, which each computes a share of what is missing; without
    one nothing may be missing. Raises InputError where something is.
    """
    named = [(corpus, side, keys(corpus, side)) for corpus in data if corpus.kind == "dpo" for side in SIDES]
    every = {key for *_, names in named for key in names}
    known = dict(known)
    if not every <= known.keys():
        known = (
            ranks.share(ranks.in_turn(lambda: cached(weights) if ranks.first else {})) | known
        )  # it may grow meanwhile
    missing = every - known.keys()
    if missing and model is None:
        raise InputError(
            f"{len(missing)} pairs are not among those that the run began with, whose reference it keeps; it can neither train "
            f"nor be measured on others. A new run by --init has a reference of its own"
        )
    if missing and model is not None:
        wanted, turn = [], 0
        for corpus, side, names in named:
            ends = corpus.rows(side).columns[2]
            bounds = ends.take(np.arange(len(ends))).tolist() if len(ends) else []
            lacking = [c for c, (a, b) in enumerate(itertools.pairwise(bounds)) if missing & set(names[a:b])]
            wanted.append(
                (corpus, side, [c for i, c in enumerate(lacking, turn) if i % ranks.size == ranks.rank], names)
            )
            turn += len(lacking)
        for own in ranks.gather({k: v for k, v in _compute(model, wanted, device, dtype).items() if k in missing}):
            known |= own
        ranks.in_turn(lambda: _keep(weights, {key: known[key] for key in missing}) if ranks.first else None)
    for corpus, side, names in named:
        corpus.references[side] = np.array([known[key] for key in names], dtype=np.float32).reshape(-1, 2)
    return {key: known[key] for key in every}, len(missing)


def _keep(weights: str, added: Known) -> None:
    name = hashlib.sha256(b"".join(sorted(added))).hexdigest()[:16]
    try:
        write(place(weights) / f"{name}.npy", added)
    except OSError as error:  # they are in the run's folder too
        warn(f"cannot keep the reference log-probabilities in {place(weights)}: {error.strerror}")
