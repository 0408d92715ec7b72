"""The blocks of `fastlm data clean`, of datatrove's kind: each keeps, changes or drops a document, and says why.

What datatrove has is used; Gopher's rules are its own with faster arithmetic (its filters are the oracle of the tests).
"""

from __future__ import annotations

import json
import re
import unicodedata
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

LINE = re.compile(r"[^\n]*\n|[^\n]+")
PUNCTUATION = frozenset(PUNCTUATION_SET)
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


# A line in which nothing matches is one that ftfy leaves as it is: what it takes for badly decoded has two characters beyond
# ASCII in a row or one of four letters, what it removes or unescapes is named here, and NFC is asked of Unicode's own table.
SUSPECT = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\r&\x80-\U0010ffff](?:"
    r"(?<=[\x00-\x1f\x7f-\x9f\u0152\u0153\u00c2\u00c3\u2028\u2029\u206a-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff])"
    r"|(?<=&)#?[0-9A-Za-z]|(?<=[^\x00-\x7f])[^\x00-\x7f])"
)


class Repair(Rule):
    """Mends text that was decoded wrongly, line by line as ftfy does; quotation marks and ligatures stay as they are."""

    name = "repair"

    def judge(self, document: Document) -> None:
        text = document.text
        if not SUSPECT.search(text) and unicodedata.is_normalized("NFC", text):
            return
        import ftfy

        tag, at, lines = text.find("<"), 0, LINE.findall(text)
        for i, line in enumerate(lines):
            at += len(line)
            if SUSPECT.search(line) or not unicodedata.is_normalized("NFC", line):
                # ftfy unescapes HTML up to the first line that holds a tag
                lines[i] = ftfy.fix_text(
                    line, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False,
                    unescape_html="auto" if tag < 0 or at <= tag else False,
                )  # fmt: skip
        document.text = "".join(lines)


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
        found = words.of(text)
        lettered, marks = found.lettered_and_marks(PUNCTUATION)
        plain = len(found) - int(marks.sum())
        if plain < max(self.min_words, 1):
            return "gopher_short_doc", f"{plain} words, at least {self.min_words} are wanted"
        if plain > 100_000:
            return "gopher_long_doc", f"{plain} words, at most 100000 are wanted"
        mean = int(found.lengths[~marks].sum()) / plain
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
        letters = int(lettered.sum())
        if letters < 0.8 * len(found):
            return "gopher_below_alpha_threshold", f"{letters} of {len(found)} words have a letter, 80% are wanted"
        if found.holds(tuple(STOP_WORDS)) < 2 and language(text) == "en":
            return "gopher_enough_stop_words", f"fewer than 2 of: {' '.join(STOP_WORDS)}"
        return None


TOP = ((2, 0.2), (3, 0.18), (4, 0.16))
AGAIN = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
PARAGRAPHS, LINES = re.compile(r"\n\n+"), re.compile(r"\n\n*")


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
        found = words.of(text)
        ids, ends = found.numbers, np.concatenate([[0], np.cumsum(found.lengths)])
        for n, share in TOP:
            top = _top(words.runs(ids, n), ends, n, share * len(text))
            if top > share * len(text):
                return f"top_{n}_gram", f"the commonest run of {n} words takes {top / len(text):.0%}"
        least = AGAIN[-1][1] * len(text)
        for n, share in AGAIN:
            again, most = _again(words.runs(ids, n), ends, n, share * len(text))
            if again > share * len(text):
                return f"duplicated_{n}_n_grams", f"repeated runs of {n} words take {again / len(text):.0%}"
            if most <= least:  # a longer run that comes again is made of shorter ones that do
                break
        return None


def _top(grams: np.ndarray, ends: np.ndarray, n: int, enough: float) -> int:
    """Characters of the commonest run of words, with its blanks, times how often it comes. 0 where they cannot be `enough`."""
    if not len(grams):
        return 0
    longest = int((ends[n:] - ends[:-n]).max()) + n - 1
    ordered = np.sort(grams)
    often = int(enough / longest)  # some run must come more often than this
    if not (ordered[often:] == ordered[: len(ordered) - often]).any():
        return 0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    most = int(counts.max())
    at = int(first[counts == most].min())
    return most * int(ends[at + n] - ends[at] + n - 1)


def _again(grams: np.ndarray, ends: np.ndarray, n: int, enough: float) -> tuple[int, int]:
    """Characters in runs of words that came before, none counted twice (0 if not `enough`), and a bound of them."""
    ordered = np.sort(grams)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0, 0
    again = np.ones(len(grams), bool)
    again[np.unique(grams, return_index=True)[1]] = False
    covered = np.zeros(len(ends) - 1, bool)
    for i in range(n):
        covered[i : i + len(grams)] |= again
    most = int(np.diff(ends)[covered].sum())
    if most <= enough:
        return 0, most
    seen, total, at, listed = set[int](), 0, 0, grams.tolist()
    while at < len(listed):
        if listed[at] in seen:
            total += int(ends[at + n] - ends[at])
            at += n
        else:
            seen.add(listed[at])
            at += 1
    return total, most


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
        return text.split()

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
