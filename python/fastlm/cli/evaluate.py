"""`fastlm eval [RUN] [TEXT ...]`: loss, perplexity and bits per byte on the run's validation split or on any text.

`fastlm eval RUN RUN ... --ensemble` is of the mean of the runs' probabilities, on what the first of them holds out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastlm import console
from fastlm.cli import flags
from fastlm.cli.data import SpecialTokens, reading, special_tokens_of
from fastlm.models.ensemble import Ensemble
from fastlm.train import job, together
from fastlm.train.evaluating import Evaluation
from fastlm.train.folders import has_data

EXAMPLES = """
fastlm eval                      # the last run on its validation split
fastlm eval myrun other.txt --json
fastlm eval first second third --ensemble    # the mean of their probabilities
"""


def evaluate(
    run: tyro.conf.Positional[str] = "",
    text: tyro.conf.Positional[tuple[str, ...]] = (),
    ensemble: bool = False,
    special_tokens: SpecialTokens = "run",
    device: str = "auto",
    out: str = "runs",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Loss, perplexity and bits per byte of a trained model.

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run.
        text: Files, folders or globs; without any, the run's own validation split.
        ensemble: Take several runs, which stand before the texts, by the mean of their probabilities.
        special_tokens: text: what looks like a special token in a TEXT is text. read: it becomes that token. run: as the run
            was trained.
        device: auto, cpu, cuda or mps.
        out: Folder of runs.
        as_json: Print one JSON object.
    """
    folders = [] if ensemble else [job.find_run(run, out)]
    if ensemble:
        folders, text = together.split_words([run, *text] if run else [], out)
        together.need_several(folders, "eval --ensemble")
    for name in text:
        if has_data(Path(name)):
            raise job.InputError(f"{name} is a run, not a text: give --ensemble to take several runs together")
    model, tokenizer = together.load(folders, device, special_tokens_of(special_tokens))
    context = model.context if isinstance(model, Ensemble) else model.config.context
    place = next(model.parameters()).device
    with reading() as note:
        measure = Evaluation(folders[0], tokenizer, context, place, text, note)
    if isinstance(model, Ensemble):
        _check(measure, model, folders, text)
    measured = measure(model)
    found = _found(folders, measured, measure)
    if isinstance(model, Ensemble):
        found["members"] = _members(folders, model, measured)
    print(json.dumps(found) if as_json else _said(folders, found))
    return 0


def _check(measure: Evaluation, model: Ensemble, folders: list[Path], text: tuple[str, ...]) -> None:
    if measure.kind:
        raise job.InputError(
            f"{folders[0]} learned from pairs, and --ensemble is a mean of probabilities of tokens: name a TEXT"
        )
    others = [] if text else together.strangers(folders)
    if others:
        console.warn(
            f"{', '.join(map(str, others))}: other data than those of {folders[0]}, or another split, so what is held out "
            f"here may have been trained on there"
        )
    if len(set(model.contexts)) > 1:
        console.warn(f"the runs' contexts differ: each is given {model.context} tokens, the least, at once")


def _found(folders: list[Path], measured: dict[str, float], measure: Evaluation) -> dict[str, Any]:
    runs: dict[str, Any] = {"run": str(folders[0])} if len(folders) == 1 else {"runs": [str(f) for f in folders]}
    if measure.kind:
        nats, share, count = (measured[f"val_{name}"] for name in ("loss", "accuracy", "pairs"))
        return {**runs, "pairs": int(count), "loss": nats, "accuracy": share}
    nats = measured["val_loss"]
    return {
        **runs,
        "tokens": int(measured["val_tokens"]),
        "bytes": measure.bytes,
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": measured["val_bpb"],
    }


def _members(folders: list[Path], model: Ensemble, measured: dict[str, float]) -> list[dict[str, Any]]:
    """What each of an ensemble reached alone, by the same forwards."""
    nats = (model.losses / measured["val_tokens"]).tolist()
    bits = measured["val_bpb"] / measured["val_loss"] if measured["val_loss"] else 0.0
    return [{"run": str(f), "loss": n, "bits_per_byte": n * bits} for f, n in zip(folders, nats, strict=True)]


def _said(folders: list[Path], found: dict[str, Any]) -> str:
    if "pairs" in found:
        return (
            f"{folders[0]}: loss {found['loss']:.4f} nats per pair, {found['accuracy']:.1%} of {found['pairs']:,} pairs the "
            f"right way round"
        )
    lines = [
        f"{one['run']}: loss {one['loss']:.4f} nats per token, {one['bits_per_byte']:.4f} bits per byte"
        for one in found.get("members", ())
    ]
    name = str(folders[0]) if len(folders) == 1 else f"the ensemble of {len(folders)}"
    line = (
        f"{name}: loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:.3f}, "
        f"{found['bits_per_byte']:.4f} bits per byte on {found['tokens']:,} tokens ({found['bytes']:,} bytes)"
    )
    return "\n".join([*lines, line])


def main(argv: list[str]) -> int:
    return flags.call(evaluate, "fastlm eval", argv, EXAMPLES)
