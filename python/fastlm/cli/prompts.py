"""What a run's outputs are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlm.data import tokenizer as tokenizers
from fastlm.data.errors import InputError
from fastlm.train import export as exporting
from fastlm.train import job, outputs
from fastlm.train.folders import has_data


def prompts_of(folder: Path, file: str, count: int, seed: int) -> list[Any]:
    """`count` prompts at most for a run: those of a file, else beginnings of its held-out documents, drawn by the seed.

    Raises InputError where the run cannot tell any.
    """
    if file:
        return outputs.read_prompts(Path(file).expanduser())[:count]
    if not has_data(folder):
        raise InputError(f"{folder} names no corpus: --prompts FILE gives the prompts")
    config, corpus = job.read_config(folder)
    if config.data.rows:
        raise InputError(
            f"{folder} was trained on rows: --prompts FILE gives the prompts, such as rows of the same kind (.jsonl)"
        )
    spec = exporting.read_tokenizer(folder)
    own = None if spec is None else tokenizers.load(spec)
    try:
        data = job.read_data(corpus, config.data, config.model.length(), kept=own)
    except InputError as error:
        raise InputError(f"{error}; --prompts FILE gives other prompts than the corpus") from None
    return [*outputs.openings(data, count, seed, outputs.opening(data[0].tokenizer, config.model.length()))]
