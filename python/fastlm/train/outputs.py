"""What a trained model says to prompts: answers that end where the model ends them, one conversation or many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlm.data import InputError, Prepared, chat, tuning
from fastlm.data.readers import to_bytes
from fastlm.data.tokenizer import BPETokenizer, Tokenizer
from fastlm.models.gpt import GPT
from fastlm.train.generation import TextStream

OPENING, LETTERS = 16, 48  # tokens of a held-out document that a model goes on from; where a token is a letter
Show = Callable[[str], object]
Choose = Callable[[Tensor], Tensor]


class _Ended(Exception):
    """The model has ended its text."""


@dataclass(frozen=True)
class Answer:
    """`ended`: by the model, not by the limit. `surprise`: nats a token by which the model was surprised at its own choice, at
    temperature 1; 0 of no token."""

    text: str
    tokens: int
    ended: bool
    surprise: float


def stops(tokenizer: Tokenizer) -> set[int]:
    """The tokens at which an answer ends: the end of text, and each special token, of which an answer's text has none."""
    return {tokenizer.eot, *getattr(tokenizer, "special_ids", {})}


def answer(
    model: GPT, tokenizer: Tokenizer, ids: Sequence[int], count: int, choose: Choose, show: Show | None = None
) -> Answer:
    """What the model says behind the tokens `ids`: at most `count` tokens, to the first at which it ends.

    `choose` turns logits [1, V] into tokens [1]; `show` gets the text as it comes.
    """
    stream, ends, parts, losses = TextStream(tokenizer, ids), stops(tokenizer), list[str](), list[float]()

    def put(text: str) -> None:
        parts.append(text)
        if show is not None:
            show(text)

    def sample(logits: Tensor) -> Tensor:
        token = choose(logits)
        losses.append(-float(logits[0, : tokenizer.vocab].float().log_softmax(-1)[token[0]]))
        if int(token) in ends:
            raise _Ended
        put(stream.push(int(token)))
        return token

    ended = False
    try:
        model.generate(torch.as_tensor(ids, device=next(model.parameters()).device)[None], count, sample)
    except _Ended:
        ended = True
    put(stream.end())
    return Answer("".join(parts), len(losses) - ended, ended, sum(losses) / len(losses) if losses else 0.0)


# ---------------------------------------------------------------------------------------------------------------- prompts


def opened(prompt: Any, tokenizer: Tokenizer, template: str) -> list[int]:
    """The tokens behind which an answer to a prompt begins: a text as it stands, or messages by the chat template `template`, a
    specification of `chat.resolve`. Raises InputError for messages that the template does not know."""
    if isinstance(prompt, str):
        return tokenizer.encode(to_bytes(prompt)).tolist() if prompt else [tokenizer.eot]
    made = chat.load(template)
    return tuning.encode(made.opening(prompt, chat.specials_of(tokenizer)), tokenizer, made.bos)[0]


def read_prompts(path: Path) -> list[Any]:
    """The prompts of a file: its lines; of a .jsonl each row's `prompt`, or its `messages` before the last answer.

    Raises InputError, naming the line, for a row that has neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        found: list[Any] = [line for line in lines if line.strip()]
    else:
        found = [_prompt(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"--prompts {path} holds no prompt")
    return list({json.dumps(one): one for one in found}.values())


def _prompt(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise InputError(f"{where} is no row: {error}") from None
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    given = row.get("prompt", row.get("messages"))
    if not isinstance(given, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in given
    ):
        raise InputError(f"{where} has no prompt (a text or messages) and no messages, each with role and content")
    if "prompt" not in row:
        answers = [i for i, message in enumerate(given) if message["role"] == chat.ASSISTANT]
        given = given[: answers[-1]] if answers else given
    return given


def opening(tokenizer: Tokenizer, context: int) -> int:
    """The tokens of an opening: some words, and at most half of what a model reads."""
    return min(OPENING if isinstance(tokenizer, BPETokenizer) else LETTERS, max(context // 2, 1))


def openings(data: Sequence[Prepared], count: int, seed: int, length: int = OPENING) -> list[str]:
    """The beginnings, of `length` tokens, of `count` held-out documents, drawn by the seed; fewer where there are fewer.

    Raises InputError where a document is never longer than an opening.
    """
    found = []
    for one in data:
        for shard in one.val:
            starts = np.concatenate(([0], np.flatnonzero(shard == one.tokenizer.eot) + 1))
            ends = np.append(starts[1:] - 1, len(shard))
            found += [(one, shard, int(start)) for start in starts[ends - starts > length]]
    if not found:
        raise InputError(f"no held-out document has more than {length} tokens: --prompts FILE gives the prompts")
    order = np.random.default_rng(abs(seed)).permutation(len(found))
    texts = []
    for at in order:
        one, shard, start = found[at]
        text = one.tokenizer.decode(shard[start : start + length].tolist()).decode("utf-8", "ignore")
        if text.strip() and text not in texts:
            texts.append(text)
        if len(texts) == count:
            break
    return texts


def drawn(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Any], template: str, tokens: int, each: int, choose: Choose
) -> Iterator[tuple[Any, Answer]]:
    """`each` answers to every prompt, in order. A prompt that fills the context is refused by its beginning."""
    context = model.config.context
    for prompt in prompts:
        ids = opened(prompt, tokenizer, template)
        if len(ids) >= context:
            start = json.dumps(prompt, ensure_ascii=False)[:60]
            raise InputError(f"the prompt {start}... has {len(ids):,} tokens, and the model's context is {context}")
        for _ in range(each):
            yield prompt, answer(model, tokenizer, ids, tokens, choose)
