"""Tokens as people can read them: each alone, with what a page would hide or turn around made visible."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from fastlm.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Piece:
    """A token's text as shown; whether it is a special token; whether a line ends with it."""

    text: str
    special: bool = False
    ends_line: bool = False


def visible(text: bytes | str) -> str:
    """Text with control characters, those that turn the direction of text, and bytes that are no UTF-8 spelled out."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return "".join(_MARKS.get(c, c) if c == " " or c in _MARKS else _shown(c) for c in text)


def _shown(c: str) -> str:
    kind = unicodedata.category(c)
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    if kind[0] == "C" or kind in ("Zl", "Zp"):
        return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"
    return "\u25cc" + c if kind == "Mn" else c


def _piece(text: bytes | str) -> Piece:
    end = b"\n" if isinstance(text, bytes) else "\n"
    return Piece(visible(text), ends_line=text.endswith(end))  # type: ignore[arg-type]


def reader(tokenizer: Tokenizer) -> Callable[[int], Piece]:
    """What turns a token's number into its piece. A number that the tokenizer does not have is shown as a number."""
    if isinstance(tokenizer, ByteTokenizer):
        return lambda t: _number(t, t < 256) or (Piece("end", special=True) if t == 0 else _piece(bytes([t])))
    if isinstance(tokenizer, CharTokenizer):
        names = ("end", "unknown")
        return lambda t: (
            _number(t, t < tokenizer.vocab)
            or (Piece(names[t], special=True) if t < 2 else _piece(tokenizer.characters[t - 2]))
        )
    assert isinstance(tokenizer, BPETokenizer)
    return _bpe(json.loads(tokenizer.content))


def _number(token: int, known: bool) -> Piece | None:
    return None if known else Piece(f"#{token}", special=True)


def _bpe(body: dict) -> Callable[[int], Piece]:
    vocab = body["model"]["vocab"]
    names = (
        {i: piece for i, (piece, _) in enumerate(vocab)}
        if isinstance(vocab, list)
        else {i: p for p, i in vocab.items()}
    )
    added = {token["id"]: token for token in body.get("added_tokens", [])}
    letters = _letters() if '"ByteLevel"' in json.dumps(body.get("decoder")) else {}

    def read(token: int) -> Piece:
        if token in added:
            given = added[token]["content"]
            return Piece(visible(given), special=True) if added[token]["special"] else _piece(given)
        name = names.get(token)
        if name is None:
            return Piece(f"#{token}", special=True)
        if letters:
            return _piece(bytes(letters[c] for c in name) if all(c in letters for c in name) else name)
        byte = _BYTE.fullmatch(name)
        return _piece(bytes([int(byte[1], 16)]) if byte else name.replace("▁", " "))

    return read


def _letters() -> dict[str, int]:
    """The byte that each printable letter of a byte-level vocabulary stands for (Radford et al. 2019)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return {chr(b if b in plain else next(rest)): b for b in range(256)}
