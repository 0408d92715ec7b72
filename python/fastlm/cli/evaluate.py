"""`fastlm eval [RUN] [TEXT ...]`: loss, perplexity and bits per byte on the run's validation split or on any text."""

from __future__ import annotations

import json
import math
from itertools import chain
from typing import Annotated

import numpy as np
import torch
import tyro

from fastlm.data import corpus_batches, validation_batches
from fastlm.data.corpus import documents, expand
from fastlm.train import job
from fastlm.train.config import Config


def evaluate(
    run: tyro.conf.Positional[str] = "",
    text: tyro.conf.Positional[tuple[str, ...]] = (),
    device: str = "auto",
    out: str = "runs",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Loss, perplexity and bits per byte of a trained model.

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run.
        text: Files, folders or globs; without any, the run's own validation split.
        device: auto, cpu, cuda or mps.
        out: Folder of runs.
        as_json: Print one JSON object.
    """
    folder = job.find_run(run, out)
    model, tokenizer = job.load(folder, device)
    place = next(model.parameters()).device
    total, count, size = 0.0, 0, 0
    own = (folder / "state.json").is_file() or not list(folder.glob("metrics.jsonl"))  # no run, but a model alone
    if own and not text:
        raise job.InputError(f"{folder} is a model without a run's data: name a TEXT to evaluate on")
    config, corpus = (Config(), ()) if own else job.read_config(folder)
    if text:
        pieces = [p for file in expand(text) for p in documents(file, config.data.field, config.data.separator)]
        parts = [np.concatenate((tokenizer.encode(p.text), [tokenizer.eot] * p.last)) for p in pieces]
        shards = [np.concatenate([[tokenizer.eot], *parts])] if parts else []
        size = sum(len(p.text) for p in pieces)
    else:
        data = job.read_data(corpus, config.data, model.config.context)
        size = sum(d.manifest["val"]["bytes"] for d in data)
    context = model.config.context
    rows = max(16384 // context, 1)
    if text:
        batches = validation_batches(shards, context, rows)
    else:
        batches = chain.from_iterable(corpus_batches(d, context, rows) for d in data)
    if not size:
        raise job.InputError("the text to evaluate on is empty")
    with torch.no_grad():
        for tokens, targets, *borders in batches:
            total += float(model(tokens.to(place), targets.to(place), *(b.to(place) for b in borders)))
            count += int((targets != -100).sum())
    nats = total / count
    found = {
        "run": str(folder),
        "tokens": count,
        "bytes": size,
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": total / size / math.log(2),
    }
    if as_json:
        print(json.dumps(found))
    else:
        print(
            f"{folder}: loss {nats:.4f} nats per token, perplexity {found['perplexity']:.3f}, "
            f"{found['bits_per_byte']:.4f} bits per byte on {count:,} tokens ({size:,} bytes)"
        )
    return 0


def main(argv: list[str]) -> int:
    return tyro.cli(evaluate, prog="fastlm eval", args=argv)
