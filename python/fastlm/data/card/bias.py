"""How much likelier a model finds a sentence than the same sentence about another person: a figure of its bias.

A pair is one sentence in two forms that differ in a pronoun, a noun or a name alone. Its gap is the loss of the second form
minus the loss of the first, in nats of the whole sentence: above 0 the model expects the first. The figure is the mean gap
with an interval of 95% by a bootstrap (Efron and Tibshirani 1993, chapter 13) that draws whole units: jobs, names, or
sentences, since the pairs of one unit are not independent.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from fastlm.data.card.terms import (
    DOUBTFUL,
    MEN_TO_WOMEN,
    NAME_FRAMES,
    NAMES,
    OCCUPATIONS,
    ORIGINS,
    PRONOUN_FRAMES,
    WOMEN_TO_MEN,
)

Score = Callable[
    [list[str]], list[float]
]  # loss of each text in nats of the whole text; NaN: longer than the model takes
DRAWS = 2000
_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE = re.compile(r"(?<![^\s\"“(])[A-Z][^.!?\n]{15,200}(?:\n[^.!?\n]{1,200}){0,3}[.!?](?=\s|$)")
_GENDERED = re.compile(r"\b(?:" + "|".join((*MEN_TO_WOMEN, *WOMEN_TO_MEN)) + r")\b", re.I)


@dataclass(frozen=True)
class Pair:
    """A sentence in two forms. `unit` is what a bootstrap draws, `label` what a picture calls it."""

    kind: str
    unit: str
    first: str
    second: str


@dataclass
class Bias:
    """The mean gap of the pairs of one kind, in nats a sentence, its interval, and the gap of each unit."""

    kind: str
    forms: tuple[str, str]
    gap: float
    low: float
    high: float
    pairs: int
    too_long: int
    first_likelier: float
    units: dict[str, float] = field(default_factory=dict)


PRONOUNS, GIVEN, ORIGIN, OWN = "jobs", "names", "names by origin", "sentences of the corpus"
FORMS = {
    PRONOUNS: ("he", "she"), GIVEN: ("men's names", "women's names"),
    ORIGIN: ("white Americans' names", "black Americans' names"), OWN: ("about men", "about women"),
}  # fmt: skip


def fixed() -> Iterator[Pair]:
    """The pairs that do not depend on a corpus."""
    for job in OCCUPATIONS:
        for frame in PRONOUN_FRAMES:
            yield Pair(PRONOUNS, job.split(" ", 1)[1], frame.format(He="He", he="he", job=job),
                       frame.format(He="She", he="she", job=job))  # fmt: skip
    for kind, names in ((GIVEN, NAMES), (ORIGIN, ORIGINS)):
        for one, other in names:
            for frame in NAME_FRAMES:
                yield Pair(kind, f"{one} / {other}", frame.format(name=one), frame.format(name=other))


def candidates(text: str) -> Iterator[str]:
    """The sentences of a text that have a counterfactual."""
    if not _GENDERED.search(text):
        return
    for match in _SENTENCE.finditer(text):
        sentence = " ".join(match.group().split())
        if swapped(sentence) is not None:
            yield sentence


def swapped(sentence: str) -> tuple[str, str] | None:
    """(about men, about women), where every gendered word of the sentence has one counterpart and all are of one gender."""
    words = {w.lower() for w in _WORD.findall(sentence)}
    men, women = words & set(MEN_TO_WOMEN), words & set(WOMEN_TO_MEN)
    if bool(men) == bool(women) or words & DOUBTFUL:
        return None
    table = MEN_TO_WOMEN if men else WOMEN_TO_MEN
    other = _WORD.sub(lambda m: _as(m.group(), table.get(m.group().lower(), m.group())), sentence)
    return (sentence, other) if men else (other, sentence)


def _as(word: str, other: str) -> str:
    """The other word in the case of the first."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


def of_sentences(found: Iterable[str]) -> Iterator[Pair]:
    """The pairs of a corpus' own sentences."""
    for sentence in found:
        if (both := swapped(sentence)) is not None:
            yield Pair(OWN, sentence, *both)


def measure(pairs: Iterable[Pair], score: Score, seed: int = 1) -> list[Bias]:
    """The figure of each kind that has a pair which the model takes."""
    by_kind: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_kind[pair.kind].append(pair)
    out = []
    for kind, own in by_kind.items():
        losses = score([text for pair in own for text in (pair.first, pair.second)])
        gaps: dict[str, list[float]] = defaultdict(list)
        for pair, first, second in zip(own, losses[::2], losses[1::2]):
            if math.isfinite(first) and math.isfinite(second):
                gaps[pair.unit].append(second - first)
        every = [gap for found in gaps.values() for gap in found]
        if every:
            low, high = interval(list(gaps.values()), seed)
            out.append(Bias(
                kind, FORMS[kind], float(np.mean(every)), low, high, len(every), len(own) - len(every),
                float(np.mean([gap > 0 for gap in every])),
                {unit: float(np.mean(found)) for unit, found in gaps.items()} if kind != OWN else {},
            ))  # fmt: skip
    return out


def interval(units: list[list[float]], seed: int, share: float = 0.95) -> tuple[float, float]:
    """The interval of the mean over all values, by drawing units with replacement; of one unit (-inf, inf)."""
    if len(units) < 2:
        return -math.inf, math.inf
    sums, counts = np.array([sum(u) for u in units]), np.array([len(u) for u in units])
    drawn = np.random.RandomState(seed).randint(0, len(units), (DRAWS, len(units)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
