"""Corpora that weights mix: each prepared alone, by one tokenizer and one split."""

from __future__ import annotations

from fastlm.data.prepare import (
    Note,
    Options,
    Prepared,
    fold_bounds,
    joint_limit,
    joint_tokenizer,
    prepare,
    silent,
)
from fastlm.data.split import Held
from fastlm.data.tokenizer import Tokenizer


def prepare_each(
    corpus: tuple[str, ...], options: Options, kept: Tokenizer | None, without: Held | None, note: Note = silent
) -> list[Prepared]:
    """A prepared corpus for each name. `kept` takes the place of the tokenizer that would be learnt on all of them; what
    `without` holds is on neither side. A copy in one corpus falls on the side of its source in another."""
    alone: list[tuple[str, ...]] = [(name,) for name in corpus]
    tokenizer = kept or joint_tokenizer(alone, options, note=note)
    least = joint_limit(alone, options, note=note)
    bounds = fold_bounds(alone, options, note=note) if options.fold else None
    return [
        prepare(one, options, tokenizer=tokenizer, without=without, least=least, bounds=bounds, note=note)
        for one in alone
    ]
