"""Rows to fine-tune on, as tokens and which of them are trained.

    sft:  {"prompt", "completion"}, texts that are joined as they are, or both lists of messages; {"messages": [...]}
    dpo:  {"prompt", "chosen", "rejected"}, texts or lists of messages

The completion, or each answer of the assistant, is trained on, with the token that ends it. A prompt is encoded as generation
will encode it, alone, and an answer as what follows. The first token of a sequence is an input alone: the end-of-text token by
which every document is read, or what the chat template begins with. A row longer than the context is cut at its end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm.data import chat
from fastlm.data.chat import ASSISTANT, Span
from fastlm.data.errors import InputError
from fastlm.data.readers import to_bytes
from fastlm.data.tokenizer import Tokenizer

KEYS = {"sft": (("prompt", "completion"), ("messages",)), "dpo": (("prompt", "chosen", "rejected"),)}


@dataclass(frozen=True)
class Sequenced:
    """Tokens [n + 1] of one sequence, whether each is trained on (the first, an input alone, never is), the bytes of text that
    the trained ones stand for, and whether the context cut it."""

    tokens: np.ndarray
    trained: np.ndarray
    size: int
    cut: bool


@dataclass(frozen=True)
class Rendering:
    """How rows become sequences. `kind`: sft or dpo. `template`: a specification of `chat.resolve`. `context`: the most
    targets of a sequence."""

    kind: str
    template: str
    context: int

    def sequences(self, text: bytes, tokenizer: Tokenizer) -> list[Sequenced]:
        """The sequences of a row: one, or of a pair the chosen and the rejected one. Raises InputError for a row that is none
        of the kind, or of which no token would be trained."""
        return [self._sequence(spans, tokenizer) for spans in self._answers(json.loads(text), tokenizer)]

    def texts(self, text: bytes) -> Iterator[bytes]:
        """What a tokenizer learns from of a row."""
        for spans in self._answers(json.loads(text), None):
            yield to_bytes("".join(span.text for span in spans))

    # ------------------------------------------------------------------------------------------------ a row to its text

    def _answers(self, row: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[list[Span]]:
        keys = next((keys for keys in KEYS[self.kind] if all(key in row for key in keys)), None)
        others = [
            name for name, of in KEYS.items() if name != self.kind and any(set(keys) <= row.keys() for keys in of)
        ]
        if keys is None or (self.kind == "sft" and {"chosen", "rejected"} <= row.keys()):
            wanted = " or ".join(", ".join(keys) for keys in KEYS[self.kind])
            hint = f"; it is a row for --{others[0]}" if others else ""
            raise InputError(f"a row for --{self.kind} has {wanted}, and this one {', '.join(row) or 'nothing'}{hint}")
        specials = chat.specials_of(tokenizer) if tokenizer is not None else {}
        if keys == ("messages",):
            return [self._conversation(_messages(row["messages"], "messages"), 0, specials)]
        prompt, answers = row["prompt"], [(name, row[name]) for name in keys[1:]]
        if self.kind == "dpo" and answers[0][1] == answers[1][1]:
            raise InputError("chosen and rejected are the same, so the pair prefers nothing: remove it")
        if isinstance(prompt, list):
            before = _messages(prompt, "prompt", empty=True)
            return [
                self._conversation([*before, *_messages(answer, name)], len(before), specials)
                for name, answer in answers
            ]
        start = Span(_text(prompt, "prompt"))
        return [[start, Span(_full(_text(answer, name), name), True, True)] for name, answer in answers]

    def _conversation(self, messages: list[dict[str, Any]], start: int, specials: Mapping[str, str]) -> list[Span]:
        said = [m for m in messages[start:] if m["role"] == ASSISTANT]
        if not said:
            raise InputError("it has no message of the role assistant, so no token would be trained")
        for message in said:
            _full(message["content"], "an answer of the assistant")
        return chat.load(self.template).spans(messages, start, specials)

    # ------------------------------------------------------------------------------------------------ its text to tokens

    def _sequence(self, spans: Sequence[Span], tokenizer: Tokenizer) -> Sequenced:
        tokens, trained = encode(spans, tokenizer, chat.load(self.template).bos)
        size = sum(_size(span.text, tokenizer) for span in spans if span.trained)
        short = self.context + 1
        cut = len(tokens) > short
        if cut:
            if not any(trained[:short]):
                raise InputError(
                    f"its prompt fills the context of {self.context} tokens, so no token of the answer is left for "
                    f"--{self.kind} to train on: raise --context, or shorten the row"
                )
            tokens, trained = tokens[:short], trained[:short]
            size = len(tokenizer.decode([t for t, own in zip(tokens, trained) if own]))
        assert any(trained)
        return Sequenced(np.array(tokens, dtype=tokenizer.dtype), np.array(trained, dtype=np.uint8), size, cut)


def _size(text: str, tokenizer: Tokenizer) -> int:
    """Bytes of a text without the special tokens that a template wrote into it, as a stop token has none."""
    for name in chat.specials_of(tokenizer).values():
        text = text.replace(name, "")
    return len(to_bytes(text))


def encode(spans: Sequence[Span], tokenizer: Tokenizer, bos: str = "") -> tuple[list[int], list[bool]]:
    """Tokens of the spans behind the token that a sequence begins with, and whether each is trained.

    A span is encoded with the text before it where that leaves the tokens before it as they were, so that its border changes
    nothing, and alone where it would not: generation has encoded the prompt already when the answer begins.
    """
    tokens, trained = [tokenizer.eot], [False]
    text, held = "", list[int]()  # since the last stop
    for span in spans:
        if span.text:
            whole = tokenizer.encode(to_bytes(text + span.text)).tolist()
            if whole[: len(held)] == held:
                text, new = text + span.text, whole[len(held) :]
            else:
                text, new = span.text, tokenizer.encode(to_bytes(span.text)).tolist()
                held = []
            held = held + new
            tokens += new
            trained += [span.trained] * len(new)
        if span.stop:
            tokens.append(tokenizer.eot)
            trained.append(span.trained)
            text, held = "", []
    if bos and len(tokens) > 1 and spans[0].text.startswith(chat.specials_of(tokenizer).get(bos, bos)):
        return tokens[1:], [False, *trained[2:]]  # the template has a beginning of its own
    return tokens, trained


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, or all of the row lists of messages; it is a {type(value).__name__}")
    if "\0" in value:
        raise InputError(f"{name} holds the byte 0, which no text does: remove it, or the row")
    return value


def _full(text: str, name: str) -> str:
    if not text:
        raise InputError(f"{name} is empty, so no token of text would be trained")
    return text


def _messages(value: Any, name: str, empty: bool = False) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not (value or empty):
        raise InputError(f"{name} must be a list of messages, each with role and content; it is {_kind(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(
                f"{name}: message {number} must be an object with role and content; it is {_kind(message)}"
            )
        _text(message["content"], f"{name}: the content of message {number}")
    return value


def _kind(value: Any) -> str:
    return "empty" if value in ([], {}) else f"a {type(value).__name__}"
