"""Prose in paragraphs and sentences, and what of it no augmentation may touch: names, numbers, code and quotations."""

from __future__ import annotations

import functools
import importlib
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastlm.data.errors import InputError

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
TOKEN = re.compile(r"\S+")
QUOTED = re.compile(
    r"""``[^`\n]+``|`[^`'\s]+'(?!\w)|`[^`\n]+`|"[^"]+"|“[^”]+”|«[^»]+»|‘[^’]+’|(?<!\w)'[^'\n]+'(?!\w)"""
)
_BLANK = re.compile(r"(\n[ \t]*\n\s*)")
_LEAVE = re.compile(r"^\s*(>>>|\.\.\.|\.\. |[|+#$%@<{}\[\]]|[-=~*^]{3,}|\S+\s*::?=)|[|]\s|\s{3,}\S|::\s*$")
_EDGES = "()[]{}.,;:!?\"'`“”‘’«»…–—-"  # punctuation around a word
_CODE = re.compile(r"[\d_()\[\]{}<>=/\\@#$%^&*|~+`]|\w[.:]\w|[^\W\d_][A-Z]")


def needed(package: str, what: str, extra: str = "augment") -> Any:
    """A package of an extra, imported where it is used. Raises InputError with the line that brings it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = (error.name or package).replace("_", "-")
        raise InputError(f"{what} needs the package {name}: pip install -c constraints.txt 'fastlm[{extra}]'") from None


@functools.cache
def _segmenter(language: str) -> Any:
    pysbd = needed("pysbd", "cutting text into sentences")
    try:
        return pysbd.Segmenter(language=language, clean=False)
    except ValueError:
        known = ", ".join(sorted(pysbd.languages.LANGUAGE_CODES))
        raise InputError(f"--lang must be one of {known}; it is {language!r}") from None


@functools.lru_cache(maxsize=4096)
def sentences(text: str, language: str = "en") -> tuple[str, ...]:
    """The sentences of a paragraph on one line, without the blanks between them; those that share a quotation are one."""
    found = [s.strip() for s in _segmenter(language).segment(text)]
    found = [s for s in found if s]
    if " ".join(found).split() != text.split():
        return (text,)  # a segmenter that loses text is not followed
    return tuple(_whole_quotations(found))


def _whole_quotations(found: list[str]) -> Iterator[str]:
    """Sentences, joined where a quotation goes from one into the next: none of its words may change or move away."""
    joined, held, at = " ".join(found), list[str](), 0
    quoted = [m.span() for m in QUOTED.finditer(joined)]
    for sentence in found:
        held.append(sentence)
        at += len(sentence)
        if not any(start < at < end for start, end in quoted):
            yield " ".join(held)
            held = []
        at += 1
    if held:
        yield " ".join(held)


@dataclass
class Paragraph:
    """A paragraph of prose: its sentences, and how its lines were indented and how long."""

    sentences: list[str]
    source: str
    indent: str
    first: str
    width: int  # 0: it was one line

    def text(self) -> str:
        joined, end = " ".join(self.sentences), "\n" if self.source.endswith("\n") else ""
        if not self.width:
            return self.first + joined + end
        return textwrap.fill(joined, max(self.width, len(self.first) + 20), initial_indent=self.first,
                             subsequent_indent=self.indent, break_long_words=False, break_on_hyphens=False) + end  # fmt: skip


def paragraphs(text: str, language: str = "en") -> Iterator[str | Paragraph]:
    """What a text is made of, in order: paragraphs of prose, and strings that stay as they are."""
    for part in _BLANK.split(text):
        yield _prose(part, language) or part


def _prose(part: str, language: str) -> Paragraph | None:
    """The paragraph, where it is one: lines of one indentation, four words or more, mostly letters, no code or table."""
    body = part.removesuffix("\n")
    lines = body.split("\n")
    if len(body) > 20_000 or len(WORD.findall(body)) < 4 or any(_LEAVE.search(line.lstrip()) for line in lines):
        return None
    dense = [c for c in body if not c.isspace()]
    if sum(c.isalpha() or c in ".,;:'’-" for c in dense) < 0.9 * len(dense):
        return None
    indents = [re.match(r"[ \t]*", line).group() for line in lines]  # type: ignore[union-attr]
    bullet = re.match(r"[ \t]*([*•-] |\d+\. )", lines[0])
    if len(set(indents[1:])) > 1 or (not bullet and len(set(indents)) > 1):
        return None
    first = bullet.group() if bullet else indents[0]
    joined = " ".join(body[len(first) :].split())
    width = max(map(len, lines)) if len(lines) > 1 else 0
    return Paragraph(list(sentences(joined, language)), part, indents[-1] if len(lines) > 1 else first, first, width)


def is_code(token: str) -> bool:
    """Whether a token is code or a number: digits, underscores, operators, calls, dotted names, capitals inside."""
    return "()" in token or bool(_CODE.search(token.strip(_EDGES)))


def names(found: list[str]) -> set[str]:
    """The words of a document's sentences that are capitalised inside one: names, also where they begin another."""
    out = set()
    for sentence in found:
        for i, match in enumerate(TOKEN.finditer(sentence)):
            word = match.group().strip(_EDGES)
            if (
                i
                and word[:1].isupper()
                and not sentence[: match.start()].rstrip().endswith((":", ".", "!", "?", '"', "“"))
            ):
                out.add(word)
    return out


def kept(sentence: str, known: set[str] = frozenset()) -> list[tuple[int, int, str]]:  # type: ignore[assignment]
    """(start, end, word) of the tokens of a sentence that must survive: names, numbers, code, and quotations as they stand."""
    quoted = [m.span() for m in QUOTED.finditer(sentence)]
    out = []
    for i, match in enumerate(TOKEN.finditer(sentence)):
        word = match.group().strip(_EDGES)
        inside = any(a < match.end() and match.start() < b for a, b in quoted)
        name = word[:1].isupper() and (i > 0 or word in known or word.isupper()) and word != "I"
        if word and (inside or name or is_code(match.group())):
            out.append((*match.span(), word))
    return out


def protected(sentence: str, known: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """The words of the tokens that must survive."""
    return [word for *_, word in kept(sentence, known)]
