"""Runs that are taken together, as an ensemble or a soup: read, and refused where they cannot be.

Their tokenizers must be one, since a token's number must mean the same text to each of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fastlm.data import InputError
from fastlm.data.tokenizer import Tokenizer
from fastlm.models.ensemble import Ensemble
from fastlm.models.gpt import GPT
from fastlm.train import job
from fastlm.train.folders import find_run, has_data

EACH_ONCE = "fastlm {what} needs two runs or more; it was given {count}"


def split_words(words: Sequence[str], out: str) -> tuple[list[Path], tuple[str, ...]]:
    """(folders of runs, texts) of words that begin with runs. InputError for a word that is neither."""
    folders: list[Path] = []
    for at, word in enumerate(words):
        try:
            folders.append(find_run(word, out))
        except InputError as error:
            if not Path(word).exists() and not any(sign in word for sign in "*?["):
                raise InputError(f"{error}, and no text of that name") from None
            return folders, tuple(words[at:])
    return folders, ()


def need_several(folders: Sequence[Path], what: str) -> None:
    """InputError unless there are two or more, each once."""
    if len(folders) < 2:
        raise InputError(EACH_ONCE.format(what=what, count=len(folders)))
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"fastlm {what} takes each run once; {folder} is given {places.count(place)} times")


def told(tokenizer: Tokenizer) -> str:
    """A tokenizer in words."""
    kind = tokenizer.spec()["kind"]
    return kind if kind == "bytes" else f"{kind} of {tokenizer.vocab:,} tokens, {tokenizer.hash}"


def check_tokenizers(folders: Sequence[Path], found: Sequence[Tokenizer]) -> None:
    """InputError, naming both runs and both tokenizers, unless all are one."""
    for folder, other in zip(folders[1:], found[1:], strict=True):
        if other.hash != found[0].hash:
            raise InputError(
                f"{folders[0]} and {folder} have different tokenizers ({told(found[0])}; {told(other)}): a token is not the "
                f"same text to both"
            )


def load(folders: Sequence[Path], device: str, special_tokens: str = "") -> tuple[GPT | Ensemble, Tokenizer]:
    """The model of one folder, or the ensemble of several, in eval mode; and the tokenizer.

    Raises InputError where the tokenizers differ, before any but the first two models are read.
    """
    models: list[GPT] = []
    read: list[Tokenizer] = []
    for folder in folders:
        model, tokenizer = job.load(folder, device, special_tokens)
        models.append(model)
        read.append(tokenizer)
        check_tokenizers(folders[: len(read)], read)
    if len(models) == 1:
        return models[0], read[0]
    return Ensemble(models, read[0].vocab).eval(), read[0]


def strangers(folders: Sequence[Path]) -> list[Path]:
    """Of several runs those that were split otherwise than the first: they may have trained on what it holds out."""
    if not has_data(folders[0]):
        return []
    first = _content(folders[0])
    return [folder for folder in folders[1:] if not has_data(folder) or _content(folder) != first]


def _content(folder: Path) -> list[str]:
    try:
        body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return [str(one["content"]) for one in body.get("data", ())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None
