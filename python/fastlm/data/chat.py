"""Chat templates: a conversation as text, in parts that are trained on or not.

The plain template is ours and needs no special token. A Jinja template is a Hugging Face folder's own, rendered as transformers
does. Its special tokens are told from what a message holds: a message that spells one stays text. A template is saved with the
run as plain JSON, so a later run writes a conversation in the same way.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data.errors import InputError
from fastlm.data.tokenizer import Tokenizer

PLAIN = json.dumps({"kind": "plain"})
NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
ASSISTANT = "assistant"
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """A part of a conversation's text; `trained`: it is an answer. `stop`: the token that ends a document follows it."""

    text: str
    trained: bool = False
    stop: bool = False


class Template:
    """The plain one: a line that names who speaks, the message, an empty line. Each answer ends with the stop token."""

    bos = ""  # the special token by which every conversation begins, where the template has one

    def spans(self, messages: Sequence[Message], start: int, specials: Mapping[str, str]) -> list[Span]:
        """The parts of a conversation whose answers from message `start` on are trained on. `specials` are the special tokens
        of the tokenizer, each with the name by which it stands in the text of a part.

        Raises InputError for messages that the template does not know.
        """
        out: list[Span] = []
        for number, message in enumerate(messages):
            out.append(Span(("\n\n" if number else "") + f"{self._named(message)}:\n"))
            answer = message["role"] == ASSISTANT
            out.append(Span(message["content"], answer and number >= start, answer))
        return out

    def opening(self, messages: Sequence[Message], specials: Mapping[str, str]) -> list[Span]:
        """The text behind which an answer to the last message begins."""
        return [
            *self.spans(messages, len(messages), specials),
            Span("\n\nAssistant:\n" if messages else "Assistant:\n"),
        ]

    def _named(self, message: Message) -> str:
        role = message["role"]
        if role not in NAMES:
            raise InputError(f"the role {role!r} is none of {', '.join(NAMES)}, which the plain chat template knows")
        return NAMES[role]


class Jinja(Template):
    """A template of transformers; `tokens` are the special tokens that it names, such as bos_token."""

    def __init__(self, text: str, tokens: Mapping[str, str]) -> None:
        self.text, self.tokens, self.bos = text, dict(tokens), tokens.get("bos_token", "")
        self.marks = "{% generation" in text or "{%- generation" in text

    def spans(self, messages: Sequence[Message], start: int, specials: Mapping[str, str]) -> list[Span]:
        held = [_held(message, specials) for message in messages]
        whole, found = self._render(held, indices=self.marks)
        ends = found if self.marks else self._answers(held, start, whole)
        if self.marks and start:
            prompt = self._render(held[:start])[0]
            if not whole.startswith(prompt):
                raise InputError(
                    f"the chat template writes message {start} in another way within the conversation than where it is the "
                    f"last, so there is no telling where the completion begins: give one row of messages for each answer"
                )
            ends = [(a, b) for a, b in ends if a >= len(prompt)]
        out, at = [], 0
        for a, b in ends:
            stops = whole[a:b].rstrip().endswith(self._stops(specials))
            if not stops:  # it may stand behind what the template marks
                b += max((len(s) for s in self._stops(specials) if whole.startswith(s, b)), default=0)
                stops = whole[a:b].endswith(self._stops(specials))
            out += [Span(_freed(whole[at:a], specials)), Span(_freed(whole[a:b], specials), True, not stops)]
            at = b
        return [*out, Span(_freed(whole[at:], specials))]

    def opening(self, messages: Sequence[Message], specials: Mapping[str, str]) -> list[Span]:
        return [Span(_freed(self._render([_held(m, specials) for m in messages], opened=True)[0], specials))]

    def _stops(self, specials: Mapping[str, str]) -> tuple[str, ...]:
        """What may end an answer."""
        return tuple({*specials, self.tokens.get("eos_token", "")} - {""})

    def _answers(self, messages: list[dict[str, Any]], start: int, whole: str) -> list[tuple[int, int]]:
        """Where the answers lie in the text: between what asks for one and what follows it."""
        found = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT or i < start:
                continue
            before, past = self._render(messages[:i], opened=True)[0], self._render(messages[: i + 1])[0]
            if not (whole.startswith(past) and past.startswith(before)):
                raise InputError(
                    f"the chat template writes message {i + 1} in another way within the conversation than where it is the "
                    f"last, so there is no telling where the answer lies: mark it by {{% generation %}} in the template "
                    f"(--chat-template), or give one row for each answer"
                )
            found.append((len(before), len(past)))
        return found

    def _render(
        self, messages: list[dict[str, Any]], opened: bool = False, indices: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            from transformers.utils import chat_template_utils
        except ImportError:
            raise InputError("a Jinja chat template needs the package transformers: pip install transformers") from None
        render: Any = chat_template_utils.render_jinja_template
        try:
            texts, found = render(
                conversations=[messages],
                chat_template=self.text,
                return_assistant_tokens_mask=indices,
                add_generation_prompt=opened,
                **self.tokens,
            )
        except Exception as error:  # noqa: BLE001  (what a template raises is its own)
            said = " ".join(str(error).split())
            raise InputError(f"the chat template refuses the conversation ({type(error).__name__}: {said})") from None
        return texts[0], found[0] if indices else []


# What a message spells like a special token is held apart while the template is rendered, by a character that no text holds.


def _held(message: Message, specials: Mapping[str, str]) -> dict[str, Any]:
    content = message["content"]
    for number, special in enumerate(specials):
        content = content.replace(special, f"\0t{number}\0")
    return {**message, "content": content}


def _freed(text: str, specials: Mapping[str, str]) -> str:
    for special, name in specials.items():
        text = text.replace(special, name)
    for number, special in enumerate(specials):
        text = text.replace(f"\0t{number}\0", special)
    return text


# ------------------------------------------------------------------------------------------------------- which template


@functools.lru_cache(maxsize=8)
def load(spec: str) -> Template:
    """The template of a specification as `resolve` gives it."""
    found = json.loads(spec or PLAIN)
    return Template() if found["kind"] == "plain" else Jinja(found["template"], found["tokens"])


def resolve(given: str, init: Path | None = None) -> str:
    """The specification of --chat-template, which is one already, "plain", a Jinja file, or a folder of transformers; without
    it that of the run or folder `init`, else the plain one. Raises InputError where it names nothing that can be read."""
    if given.startswith("{"):
        return given
    if given == "plain":
        return PLAIN
    run, kept = (None, "") if init is None else _kept(init)
    tokens = {} if run is None else _tokens(run) or json.loads(kept or PLAIN).get("tokens", {})
    if given:
        path = Path(given).expanduser()
        if path.is_dir():
            found, tokens = _folder(path), _tokens(path)
        else:
            found = _read(path)
        if not found:
            raise InputError(f"--chat-template {given} is a folder without a chat template (chat_template.jinja)")
        return _spec(found, tokens)
    return (of_folder(init) if init is not None else "") or PLAIN


def of_folder(folder: Path) -> str:
    """The specification of the template that a run, checkpoint or exported folder has; "" for one of no conversations."""
    run, kept = _kept(folder)
    if kept:
        return kept
    found = _folder(run)
    return _spec(found, _tokens(run)) if found else ""


def _kept(init: Path) -> tuple[Path, str]:
    """The folder of a run, of a checkpoint of it, or of transformers; and the specification that it keeps."""
    run = init.parent.parent if (init / "state.json").is_file() else init
    own = _json(run / "config.json")
    return run, str(own.get("chat_template") or own.get("config", {}).get("data", {}).get("chat_template", ""))


def _spec(template: str, tokens: Mapping[str, str]) -> str:
    return json.dumps({"kind": "jinja", "template": template, "tokens": tokens}, sort_keys=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--chat-template {path} cannot be read: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _folder(folder: Path) -> str:
    """The chat template of a folder of transformers; "" where it has none."""
    if (folder / "chat_template.jinja").is_file():
        return _read(folder / "chat_template.jinja")
    found = _json(folder / "tokenizer_config.json").get("chat_template", "")
    if isinstance(found, list):  # several by name
        named = {str(one["name"]): str(one["template"]) for one in found}
        return named.get("default", "")
    return str(found)


def _tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a template may name, of tokenizer_config.json and special_tokens_map.json."""
    both = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    told = {name: both[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if both.get(name)}
    return {name: str(v["content"] if isinstance(v, dict) else v) for name, v in told.items()}


def specials_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that a template may write, each with the name under which the tokenizer finds it."""
    return getattr(tokenizer, "specials", {})
