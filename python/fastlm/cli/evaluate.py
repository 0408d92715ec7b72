"""`fastlm eval [RUN] [TEXT ...]`: loss, perplexity and bits per byte on the run's validation split or on any text.

It reads and measures as the run does: under its --dtype, with packed documents apart; a text is prepared like a further
validation set.
"""

from __future__ import annotations

import json
import math
from typing import Annotated

import torch
import tyro

from fastlm.cli import flags
from fastlm.cli.data import SpecialTokens, reading, special_tokens_of
from fastlm.data import prepare
from fastlm.train import job, reference
from fastlm.train.config import Config
from fastlm.train.folders import has_data
from fastlm.train.machine import autocast
from fastlm.train.ranks import SingleProcess

EXAMPLES = """
fastlm eval                      # the last run on its validation split
fastlm eval myrun other.txt --json
"""


def evaluate(
    run: tyro.conf.Positional[str] = "",
    text: tyro.conf.Positional[tuple[str, ...]] = (),
    special_tokens: SpecialTokens = "run",
    device: str = "auto",
    out: str = "runs",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Loss, perplexity and bits per byte of a trained model.

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run.
        text: Files, folders or globs; without any, the run's own validation split.
        special_tokens: text: what looks like a special token in a TEXT is text. read: it becomes that token. run: as the run
            was trained.
        device: auto, cpu, cuda or mps.
        out: Folder of runs.
        as_json: Print one JSON object.
    """
    folder = job.find_run(run, out)
    model, tokenizer = job.load(folder, device, special_tokens_of(special_tokens))
    place = next(model.parameters()).device
    own = not has_data(folder)
    if own and not text:
        raise job.InputError(f"{folder} is a model without a run's data: name a TEXT to evaluate on")
    config, corpus = (Config(), ()) if own else job.read_config(folder)
    context = model.config.context
    with reading() as note:
        if text:
            options = job.options_of(config.data, context)
            data = [prepare(text, options, tokenizer=tokenizer, whole=True, note=note)]
        else:
            data = job.read_data(corpus, config.data, context, note, tokenizer)
    pairs = any(one.kind == "dpo" for one in data)
    if pairs:
        if not (folder / reference.FILE).is_file():
            raise job.InputError(
                f"{folder} holds no reference log-probabilities, which a loss of pairs is taken against"
            )
        known = reference.read(folder / reference.FILE)
        reference.attach(data, None, "", known, SingleProcess(), place, config.run.dtype)
    with torch.no_grad(), autocast(place, config.run.dtype):
        measured = job.validation(data, config, context, place)(model, True)
    if pairs:
        nats, share, count = (measured[f"val_{name}"] for name in ("loss", "accuracy", "pairs"))
        said = f"loss {nats:.4f} nats per pair, {share:.1%} of {int(count):,} pairs the right way round"
        told = {"run": str(folder), "pairs": int(count), "loss": nats, "accuracy": share}
        print(json.dumps(told) if as_json else f"{folder}: {said}")
        return 0
    nats, count = measured["val_loss"], int(measured["val_tokens"])
    size = sum(d.manifest["val"]["target_bytes" if d.kind else "bytes"] for d in data)
    found = {
        "run": str(folder),
        "tokens": count,
        "bytes": size,
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": measured["val_bpb"],
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
    return flags.call(evaluate, "fastlm eval", argv, EXAMPLES)
