"""What is counted of a corpus, in memory that does not grow with it; the counts of its parts add up to those of the whole."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data.card import bias, terms
from fastlm.data.card.terms import GROUP_OF, GROUPS, STOP

SOURCES = 4096  # sources that are told apart; the rest is counted together
VOCABULARY = 1 << 17  # words that are counted; beyond it the rarest are forgotten
SENTENCES = 400  # of the corpus, drawn by their hash, for counterfactual pairs
WINDOW = 5  # words on each side of a term
OTHERS = "(others)"
SHORT = 40  # letters below which no language is told
_WORD = re.compile(r"[^\W\d_]+")
_PLACE = re.compile(r":\d+\+\d+$")  # what `fastlm data clean` writes behind a file's name
_LETTER = re.compile(r"[^\W\d_]")


def trimmed(counts: Counter[str], most: int) -> Counter[str]:
    """At most `most` of the counts, the largest; of equal ones those that come first in the alphabet."""
    if len(counts) <= most:
        return counts
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]))


def bucket(words: int) -> int:
    """Which of four steps per doubling a length falls into."""
    return int(4 * math.log2(max(words, 1)))


@dataclass
class Facts:
    """Counts of a corpus or of a part of one.

    `sums` holds documents, bytes, words, pieces of documents cut at 8 MiB, and documents with personal data. `lengths` has
    the documents by `bucket` of their words. `near` holds, by group, the words within WINDOW of one of its terms.
    """

    sums: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    shortest: int = -1
    lengths: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    language_bytes: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    source_bytes: Counter[str] = field(default_factory=Counter)
    personal: Counter[str] = field(default_factory=Counter)
    mentions: Counter[str] = field(default_factory=Counter)
    mentioning: Counter[str] = field(default_factory=Counter)
    vocabulary: Counter[str] = field(default_factory=Counter)
    near: dict[str, Counter[str]] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    harmful: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, source: str, whole: bool) -> None:
        """Counts one document, or one piece of a document above 8 MiB."""
        from fastlm.data.clean import pii
        from fastlm.data.clean.rules import language

        size, plain = len(text.encode("utf-8", "surrogatepass")), _WORD.findall(text.lower())
        self.sums.update({"documents": 1, "bytes": size, "words": len(plain), "cut": int(not whole)})
        self.longest = max(self.longest, len(plain))
        self.shortest = len(plain) if self.shortest < 0 else min(self.shortest, len(plain))
        self.lengths[str(bucket(len(plain)))] += 1
        code = language(text) if len(_LETTER.findall(text[:4000])) >= SHORT else "und"
        self.languages[code] += 1
        self.language_bytes[code] += size
        name = _PLACE.sub("", source)
        name = name if name in self.sources or len(self.sources) < SOURCES else OTHERS
        self.sources[name] += 1
        self.source_bytes[name] += size
        found = pii.find(text)
        self.personal.update(kind for *_, kind in found)
        self.sums["personal"] += bool(found)
        self._identity(plain)
        self._draw(text)

    def _identity(self, plain: list[str]) -> None:
        self.vocabulary.update(w for w in plain if w not in STOP and len(w) > 2)
        if len(self.vocabulary) > 2 * VOCABULARY:
            self.vocabulary = trimmed(self.vocabulary, VOCABULARY)
        met = set[str]()
        for at, word in enumerate(plain):
            if (group := GROUP_OF.get(word)) is None:
                continue
            self.mentions[word] += 1
            met.add(group)
            around = plain[max(at - WINDOW, 0) : at] + plain[at + 1 : at + 1 + WINDOW]
            counts = self.near.setdefault(group, Counter())
            counts.update(w for w in around if w not in STOP and len(w) > 2 and GROUP_OF.get(w) != group)
            if len(counts) > VOCABULARY:
                self.near[group] = trimmed(counts, VOCABULARY // 2)
        self.mentioning.update(met)

    def _draw(self, text: str) -> None:
        """Keeps the sentences of lowest hash that have a counterfactual: a draw that no order of reading changes."""
        for sentence in bias.candidates(text):
            self.sentences[hashlib.blake2b(sentence.encode(), digest_size=8).hexdigest()] = sentence
        if len(self.sentences) > 4 * SENTENCES:
            self.sentences = dict(sorted(self.sentences.items())[:SENTENCES])

    def merge(self, other: Facts) -> None:
        """Adds the counts of another part."""
        self.longest = max(self.longest, other.longest)
        self.shortest = min((n for n in (self.shortest, other.shortest) if n >= 0), default=-1)
        for name in (
            "sums",
            "lengths",
            "languages",
            "language_bytes",
            "personal",
            "harmful",
            "mentions",
            "mentioning",
            "vocabulary",
        ):
            getattr(self, name).update(getattr(other, name))
        for name, count in other.sources.items():
            own = name if name in self.sources or len(self.sources) < SOURCES else OTHERS
            self.sources[own] += count
            self.source_bytes[own] += other.source_bytes[name]
        for group, counts in other.near.items():
            self.near[group] = trimmed(self.near.setdefault(group, Counter()) + counts, VOCABULARY // 2)
        self.vocabulary = trimmed(self.vocabulary, VOCABULARY)
        self.sentences = dict(sorted((self.sentences | other.sentences).items())[:SENTENCES])

    def save(self, path: Path) -> None:
        self.vocabulary = trimmed(self.vocabulary, VOCABULARY)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(self.__dict__))
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Facts:
        given: dict[str, Any] = json.loads(path.read_text())
        made = cls()
        for name, value in given.items():
            if name == "near":
                value = {group: Counter(counts) for group, counts in value.items()}
            setattr(made, name, Counter(value) if isinstance(getattr(made, name), Counter) else value)
        return made

    # --------------------------------------------------------------------------------------------------------- questions

    def quantile(self, share: float) -> int:
        """Words of a document that this share of the documents does not exceed, to within a fifth."""
        wanted, seen = share * self.sums["documents"], 0
        for step in sorted(map(int, self.lengths)):
            seen += self.lengths[str(step)]
            if seen >= wanted:
                return max(min(round(2 ** ((step + 0.5) / 4)), self.longest), self.shortest, 0)
        return self.longest

    def groups(self) -> dict[str, list[tuple[str, int, int]]]:
        """By axis: (group, mentions, documents that mention it)."""
        return {
            axis: [(group, sum(self.mentions[t] for t in own), self.mentioning[group]) for group, own in found.items()]
            for axis, found in GROUPS.items()
        }

    def neighbours(self, group: str, most: int = 12, least: int = 5) -> list[tuple[str, int, float]]:
        """(word, times, times as often as by chance) of the words that stand around a group's terms more than elsewhere.

        Ordered by the log-likelihood ratio (Dunning 1993) of the word near the group against the word anywhere.
        """
        own, total = self.near.get(group, Counter()), self.vocabulary.total()
        here, out = own.total(), []
        for word, count in own.items():
            every = max(self.vocabulary[word], count)
            expected = here * every / max(total, 1)
            if count < least or count <= expected:
                continue
            out.append((_ratio(count, every, here, max(total, here)), word, count, count / expected))
        return [(w, n, times) for _, w, n, times in sorted(out, key=lambda row: (-row[0], row[1]))[:most]]

    def counted(self) -> dict[str, int]:
        """The terms that were found, the commonest first."""
        return dict(sorted(self.mentions.items(), key=lambda item: (-item[1], item[0])))


def _ratio(both: int, word: int, here: int, total: int) -> float:
    """Twice the log-likelihood ratio of a two-by-two table."""
    cells = ((both, word, here), (word - both, word, total - here), (here - both, total - word, here),
             (total - word - here + both, total - word, total - here))  # fmt: skip
    return 2 * sum(n * math.log(n * total / (a * b)) for n, a, b in cells if n > 0 and a > 0 and b > 0)


def terms_of(group: str) -> tuple[str, ...]:
    """The terms of a group."""
    return next(own[group] for own in terms.GROUPS.values() if group in own)
