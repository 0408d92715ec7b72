"""`fastlm generate --chat`: a conversation on the terminal, each message from a line of standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastlm import console
from fastlm.data import chat
from fastlm.data.errors import InputError
from fastlm.data.tokenizer import Tokenizer
from fastlm.models.gpt import GPT
from fastlm.train import outputs

Message = dict[str, str]
Draw = Callable[[Callable[[str], object]], None]  # draws a text, and shows it as it comes
LEAST = 16  # tokens that an answer must have room for


def lines() -> Iterator[str]:
    """The lines of standard input that say something; a terminal asks for each."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            sys.stdout.write("\n> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class Conversation:
    """What was said so far, and a model that answers.

    Args:
        template: Specification of `chat.resolve`.
        count: The most tokens of an answer.
        choose: Logits to tokens, as `outputs.answer` takes it.
        shown: Called with what draws an answer; returns whether the answer was shown, and shows it.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, template: str, system: str, count: int, choose: outputs.Choose,
        shown: Callable[[Draw], bool],
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.template, self.count = model, tokenizer, template, count
        self.choose, self.shown, self.said = choose, shown, list[Message]()
        self.first: list[Message] = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> None:
        """Answer a message. What was withheld is forgotten, as if it had not been asked.

        Raises InputError for a message that leaves no room for an answer.
        """
        self.said.append({"role": "user", "content": text})
        try:
            ids = self._opened()
        except InputError:
            self.said.pop()
            raise
        room = min(self.count, self.model.config.context - len(ids))
        answers = list[str]()

        def draw(show: Callable[[str], object]) -> None:
            answers.append(outputs.answer(self.model, self.tokenizer, ids, room, self.choose, show).text)

        if self.shown(draw):
            self.said.append({"role": "assistant", "content": answers[-1]})
        else:
            self.said.pop()

    def _opened(self) -> Sequence[int]:
        """The tokens behind which the answer begins; the oldest messages leave where the context is full."""
        room, left = min(self.count, LEAST), 0
        while True:
            ids = outputs.opened([*self.first, *self.said], self.tokenizer, self.template)
            if len(ids) + room <= self.model.config.context:
                break
            if len(self.said) < 3:
                raise InputError(
                    f"the message leaves no room for an answer: with its template it has {len(ids):,} tokens, and the "
                    f"context is {self.model.config.context}"
                )
            left, self.said = left + 2, self.said[2:]
        if left:
            console.warn(f"({left} older messages no longer fit the context and are forgotten)")
        return ids


def begin(
    folder: Path, model: GPT, tokenizer: Tokenizer, system: str, count: int, choose: outputs.Choose,
    shown: Callable[[Draw], bool],
) -> Conversation:  # fmt: skip
    """A conversation by the chat template of a model's folder; where it has none by the plain one, and that is said."""
    template = chat.of_folder(folder)
    if not template:
        console.warn(f"{folder} was not trained on conversations (--sft): it is asked by the plain chat template")
    return Conversation(model, tokenizer, template or chat.PLAIN, system, count, choose, shown)


def converse(one: Conversation, messages: Iterator[str]) -> None:
    """Answer each message; one that is too long is refused and the conversation goes on."""
    for text in messages:
        try:
            one.say(text)
        except InputError as error:
            console.warn(f"fastlm generate: {error}")
