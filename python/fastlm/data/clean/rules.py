"""The blocks of `fastlm data clean`, of datatrove's kind: each keeps, changes or drops a document, and says why.

What datatrove has is used; Gopher's rules are its own with faster arithmetic (its filters are the oracle of the tests).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.c4_filters import POLICY_SUBSTRINGS, C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS
from datatrove.pipeline.filters.gopher_repetition_filter import find_duplicates
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.text import PUNCTUATION_SET
from datatrove.utils.word_tokenizers import WordTokenizer

from fastlm.data.clean import pii, words

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f&\r]")
SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def size_of(document: Document) -> int:
    return len(document.text.encode("utf-8", "surrogatepass"))


class Dropped(DiskWriter):
    """Writes what a rule dropped to RULE/RANK.jsonl, with its reason."""

    name = "dropped"
    default_output_filename = "${filter_reason}/${rank}.jsonl"

    def _write(self, document: dict[str, Any], file_handler: IO[str], _filename: str) -> None:
        about = document.get("metadata", {})
        row = {"text": document["text"], "source": about.get("source", ""), "why": about.get("why", "")}
        file_handler.write(json.dumps(row) + "\n")


class Rule(BaseFilter):
    """A filter that counts documents and bytes per reason, and leaves the counts in a file of the task."""

    reasons: tuple[str, ...] = ()

    def __init__(self, tally: Path, dropped: Path) -> None:
        super().__init__(Dropped(str(dropped)))
        self.tally, self.counts = tally, Counter[str]()

    def judge(self, document: Document) -> tuple[str, str] | None:
        """(rule, reason) where the document is dropped; it may change its text."""
        raise NotImplementedError

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        before = size_of(doc)
        found = self.judge(doc)
        if found is None:
            self.counts["bytes_changed"] += before - size_of(doc)
            return True
        rule, doc.metadata["why"] = found
        self.counts[f"documents:{rule}"] += 1
        self.counts[f"bytes:{rule}"] += before
        return False, rule

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.counts.clear()
        yield from super().run(data, rank, world_size)
        self.tally.mkdir(parents=True, exist_ok=True)
        (self.tally / f"{rank:05d}-{type(self).__name__}.json").write_text(json.dumps(self.counts))


class Repair(Rule):
    """Mends text that was decoded wrongly; quotation marks and ligatures stay as they are."""

    name = "repair"

    def judge(self, document: Document) -> None:
        text = document.text
        if text.isascii() and not CONTROL.search(text):
            return
        import ftfy

        document.text = ftfy.fix_text(text, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False)


class Html(Rule):
    """HTML becomes its main text."""

    name = "html"

    def judge(self, document: Document) -> tuple[str, str] | None:
        head = document.text[:2048].lstrip("\ufeff \t\r\n").lower()
        if head.startswith("<?xml"):
            head = head.partition("?>")[2].lstrip()
        if not head.startswith(("<!doctype html", "<html")):
            return None
        import trafilatura

        found = trafilatura.extract(document.text, include_comments=False)
        if not found:
            return "html_no_text", "no main text is in the HTML"
        document.text = found + "\n"
        return None


def language(text: str) -> str:
    """The code of the language of three samples of a text."""
    import py3langid

    step = max(len(text) // 3, 1)
    return str(py3langid.classify(" ".join(text[i * step : i * step + 400] for i in range(3)))[0])


class Language(Rule):
    name = "language"

    def __init__(self, tally: Path, dropped: Path, keep: tuple[str, ...]) -> None:
        super().__init__(tally, dropped)
        self.keep = keep

    def judge(self, document: Document) -> tuple[str, str] | None:
        found = language(document.text)
        return None if found in self.keep else ("language", f"it is {found}, and --lang is {' '.join(self.keep)}")


class Quality(Rule):
    """Gopher's quality rules (Rae et al. 2021, section A.1.1), by datatrove's reading of them.

    The rule of stop words is for English: a text that fails it is dropped only if its language is English.
    """

    name = "gopher quality"

    def __init__(self, tally: Path, dropped: Path, min_words: int) -> None:
        super().__init__(tally, dropped)
        self.min_words = min_words

    def judge(self, document: Document) -> tuple[str, str] | None:
        text = document.text
        found = words.split(text)
        plain = [w for w in found if not PUNCTUATION_SET.issuperset(w)]
        if len(plain) < max(self.min_words, 1):
            return "gopher_short_doc", f"{len(plain)} words, at least {self.min_words} are wanted"
        if len(plain) > 100_000:
            return "gopher_long_doc", f"{len(plain)} words, at most 100000 are wanted"
        mean = sum(map(len, plain)) / len(plain)
        if mean < 3:
            return "gopher_below_avg_threshold", f"words have {mean:.1f} letters on average, at least 3 are wanted"
        if mean > 10:
            return "gopher_above_avg_threshold", f"words have {mean:.1f} letters on average, at most 10 are wanted"
        if text.count("#") / len(found) > 0.1:
            return "gopher_too_many_hashes", f"{text.count('#')} # in {len(found)} words"
        if (text.count("...") + text.count("…")) / len(found) > 0.1:
            return "gopher_too_many_ellipsis", f"more than one ellipsis in ten words of {len(found)}"
        lines = [line.strip() for line in text.splitlines()]
        if sum(line.startswith(("•", "-")) for line in lines) > 0.9 * len(lines):
            return "gopher_too_many_bullets", "more than 90% of the lines begin with a bullet"
        if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
            return "gopher_too_many_end_ellipsis", "more than 30% of the lines end with an ellipsis"
        letters = sum(w.isalpha() or any(c.isalpha() for c in w) for w in found)
        if letters < 0.8 * len(found):
            return "gopher_below_alpha_threshold", f"{letters} of {len(found)} words have a letter, 80% are wanted"
        if len(set(STOP_WORDS).intersection(found)) < 2 and language(text) == "en":
            return "gopher_enough_stop_words", f"fewer than 2 of: {' '.join(STOP_WORDS)}"
        return None


TOP = ((2, 0.2), (3, 0.18), (4, 0.16))
AGAIN = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
PARAGRAPHS, LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")


class Repetition(Rule):
    """Gopher's rules of repetition (Rae et al. 2021, table A1), by datatrove's reading of them."""

    name = "gopher repetition"

    def judge(self, document: Document) -> tuple[str, str] | None:
        text = document.text
        if not text.strip():
            return "empty", "no text is left"
        for parts, unit in ((PARAGRAPHS.split(text.strip()), "para"), (LINES.split(text), "line")):
            count, letters = find_duplicates(parts)
            if count > 0.3 * len(parts):
                return f"dup_{unit}_frac", f"{count} of {len(parts)} are repeated"
            if letters > 0.2 * len(text):
                return f"dup_{unit}_char_frac", f"{letters} of {len(text)} characters are in repeated ones"
        found = words.split(text)
        ids = words.numbers(found)
        ends = np.concatenate([[0], np.cumsum([len(w) for w in found])])
        for n, share in TOP:
            top = _top(words.runs(ids, n), ends, n)
            if top > share * len(text):
                return f"top_{n}_gram", f"the commonest run of {n} words takes {top / len(text):.0%}"
        for n, share in AGAIN:
            again = _again(words.runs(ids, n), ends, n, share * len(text))
            if again > share * len(text):
                return f"duplicated_{n}_n_grams", f"repeated runs of {n} words take {again / len(text):.0%}"
        return None


def _top(grams: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Characters of the commonest run of words, with its blanks, times how often it comes."""
    if not len(grams):
        return 0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    most = counts.max()
    at = int(first[counts == most].min())
    return int(most) * int(ends[at + n] - ends[at] + n - 1)


def _again(grams: np.ndarray, ends: np.ndarray, n: int, enough: float) -> int:
    """Characters in runs of words that came before; a run is not counted twice. 0 where they cannot be `enough`."""
    _, first = np.unique(grams, return_index=True)
    if len(first) == len(grams):
        return 0
    again = np.ones(len(grams), bool)
    again[first] = False
    covered = np.zeros(len(ends) - 1, bool)
    for i in range(n):
        covered[i : i + len(grams)] |= again
    if int(np.diff(ends)[covered].sum()) <= enough:
        return 0
    seen, total, at, listed = set[int](), 0, 0, grams.tolist()
    while at < len(listed):
        if listed[at] in seen:
            total += int(ends[at + n] - ends[at])
            at += n
        else:
            seen.add(listed[at])
            at += 1
    return total


class Cookies(Rule):
    """Of C4's rules (Raffel et al. 2020, section 2.2) those that hurt no document: lorem ipsum, and cookie notices."""

    name = "c4"

    def judge(self, document: Document) -> tuple[str, str] | None:
        low = document.text.lower()
        if "lorem ipsum" in low:
            return "lorem_ipsum", "it holds lorem ipsum"
        if any(phrase in low for phrase in POLICY_SUBSTRINGS):
            kept = [li for li in document.text.split("\n") if not _notice(li.lower())]
            document.text = "\n".join(kept)
            if not document.text.strip():
                return "c4_policy", "nothing but cookie notices and terms of use"
        return None


def _notice(line: str) -> bool:
    return len(line) < 300 and any(phrase in line for phrase in POLICY_SUBSTRINGS)


class Sentences(WordTokenizer):
    """Words and sentences by rules, for datatrove's blocks: its own tokenizers would need spaCy or a download."""

    def word_tokenize(self, text: str) -> list[str]:
        return words.split(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [s for s in SENTENCE.split(text) if s.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [m.span() for m in words.WORD.finditer(text)]


class C4(Rule):
    """All of C4's rules, by datatrove's block: lines that end without punctuation go too."""

    name = "c4"

    def __init__(self, tally: Path, dropped: Path) -> None:
        super().__init__(tally, dropped)
        self.block = C4QualityFilter(language=Sentences())

    def judge(self, document: Document) -> tuple[str, str] | None:
        found = self.block.filter(document)
        return None if found is True else (f"c4_{found[1]}", "a rule of C4")


class Personal(Rule):
    """Personal data, masked or dropped."""

    name = "personal data"

    def __init__(self, tally: Path, dropped: Path, action: str, kinds: tuple[str, ...]) -> None:
        super().__init__(tally, dropped)
        self.action, self.kinds = action, kinds

    def judge(self, document: Document) -> tuple[str, str] | None:
        found = pii.find(document.text, self.kinds)
        for _, _, kind in found:
            self.counts[f"masked:{kind}" if self.action == "mask" else f"found:{kind}"] += 1
        if found and self.action == "drop":
            return "personal_data", ", ".join(sorted({kind for *_, kind in found}))
        if found:
            document.text = pii.mask(document.text, found)
        return None
