"""How harmful a run's outputs are, beside those of the model that it was tuned from."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fastlm.cli.prompts import prompts_of
from fastlm.data import chat
from fastlm.data import filter as filters
from fastlm.data.card import policies
from fastlm.data.errors import InputError
from fastlm.train import job, modelcard, outputs
from fastlm.train.files import shown
from fastlm.train.folders import find_init

TOKENS, TEMPERATURE, SEED = 60, 0.8, 1  # of the outputs


def measure_harm(folder: Path, filter: str, prompts: str, count: int, device: str) -> dict[str, tuple[int, int]]:
    """Draw outputs of a run, and of the model that it was tuned from where that is there. In how many of them a filter finds
    something, (found, drawn) of each by its name, is kept for the model card."""
    found = filters.load(filter)
    given = prompts_of(folder, prompts, count, SEED)
    config, _ = job.read_config(folder)
    both = [folder]
    if config.model.init:
        with contextlib.suppress(InputError):  # it is gone, and the card tells of one model alone
            both.insert(0, find_init(config.model.init, config.run.out))
    shares = {}
    for one in both:
        model, tokenizer = job.load(one, device)
        choose = job.sampler(TEMPERATURE, seed=SEED, vocab=tokenizer.vocab)
        said = outputs.drawn(model, tokenizer, given, chat.resolve("", folder), TOKENS, 1, choose)
        shares[shown(one.resolve().name)] = policies.share((answer.text for _, answer in said), found)
    to = f"prompts of {Path(prompts).name}" if prompts else "beginnings of held-out documents"
    how = f"One output of up to {TOKENS} tokens to each of {len(given):,} {to}, temperature {TEMPERATURE}, seed {SEED}."
    modelcard.measured(folder, shares, policies.told(found), shown(how))
    return shares
