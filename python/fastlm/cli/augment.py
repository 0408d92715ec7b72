"""`fastlm data augment IN... --out FILE`: copies of texts in other words, for `fastlm train IN FILE --weights 1 0.3`."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastlm.cli import flags
from fastlm.cli.data import reading
from fastlm.data.augment import Augment, job
from fastlm.data.augment.thesaurus import Score
from fastlm.data.errors import InputError
from fastlm.train import job as runs


def scorer(run: str, device: str = "cpu", whole: bool = False) -> Score:
    """The loss of each text, in nats of the whole text, by a run's model; of one longer than the context that of its end,
    or NaN where only `whole` texts count."""
    model, tokenizer = runs.load(runs.find_run(run), device)
    model.eval()
    place = next(model.parameters()).device

    @torch.no_grad()
    def score(texts: list[str]) -> list[float]:
        out = []
        for text in texts:
            ids = [tokenizer.eot, *tokenizer.encode(text.encode()).tolist()]
            if whole and len(ids) > model.config.context + 1:
                out.append(math.nan)
                continue
            ids = ids[-model.config.context - 1 :]
            tokens = torch.as_tensor(ids, device=place)[None].long()
            logits = model(tokens[:, :-1])
            logits = logits[0] if isinstance(logits, tuple) else logits
            out.append(float(F.cross_entropy(logits[0].float(), tokens[0, 1:], reduction="sum")))
        return out

    return score


EXAMPLES = """
fastlm data augment book/ --replace 0.1 --shuffle 3 --out aug.jsonl
fastlm data augment book/ --backtranslate apertium:eng-cat --out aug.jsonl
"""


def augment(
    corpus: flags.Corpus,
    out: str,
    how: Augment = Augment(),  # noqa: B008
    model: str = "",
) -> int:
    """Write copies of texts in other words, each with the group of its source.

    Of several methods each copy gets all, in the order back-translation, replacement, shuffling. Train on
    them beside the source: fastlm train IN FILE --weights 1 0.3.

    Args:
        corpus: Files, folders and globs, as `fastlm train` takes them.
        out: The .jsonl file to write; one that was broken off is gone on with.
        model: Run whose model chooses among synonyms: the one of least loss in its sentence.
    """
    how.check()
    if not corpus:
        raise InputError("name a corpus: files, folders or globs of prose")
    with reading() as note:
        begin = time.perf_counter()
        try:
            report = job.run(corpus, Path(out), how, scorer(model) if model else None, model, note)
        except job.Interrupted as stop:
            print(f"fastlm data augment: interrupted; {stop}", file=sys.stderr)
            return 130
        seconds = time.perf_counter() - begin
    print("\n".join(report.lines()))
    print(f"{seconds:.1f} s; {out}")
    return 0


def main(argv: list[str]) -> int:
    return flags.call(augment, "fastlm data augment", argv, EXAMPLES)
