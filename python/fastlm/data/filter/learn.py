"""Learns a filter from labelled texts (scikit-learn), attacks it, and says how good it is on texts that were held out.

A tenth of the texts, by their groups' marks, chooses the thresholds; another tenth gives the figures. With `attack` the rest
is learnt beside copies that were rewritten: harmful ones stay harmful, harmless ones harmless, so that a typing error alone
is no offence. For each family of attacks a filter that never saw it is learnt and tried on it.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastlm.data.augment.text import needed
from fastlm.data.errors import InputError
from fastlm.data.filter import attacks, features, identity, policy
from fastlm.data.filter.labelled import FEW, Row
from fastlm.data.filter.model import Filter, Linear, scorer_hash

ANY = "any"
HELD_OUT = 0.1  # of the texts, for the thresholds, and again for the figures
COPIES = 3  # attacked ones of a text
TRIED = 1000  # held-out harmful texts that each family rewrites
ALPHA, EPOCHS = 1e-4, 6  # of the regression
SMOOTH = 0.1  # added to the weight of each feature in both classes
TELLING = 1.0  # log-odds from which a word gives a harmful text away
IDENTITY = 0.2  # weight of the sentences of `identity`, against the labelled texts
Note = Callable[[str], None]


def telling(texts: Sequence[str], bad: Sequence[bool]) -> set[str]:
    """The words, lower case, that are much likelier in harmful texts than in harmless ones: what an attacker rewrites."""
    counts = (Counter[str](), Counter[str]())
    for text, harmful in zip(texts, bad):
        counts[bool(harmful)].update({w.lower() for w in attacks.WORD.findall(text) if len(w) > 2})
    total = max(sum(map(bool, bad)), 1), max(len(bad) - sum(map(bool, bad)), 1)
    odds = lambda word, n: math.log((n + 0.5) / total[0]) - math.log((counts[0][word] + 0.5) / total[1])
    return {word for word, n in counts[1].items() if n >= 5 and odds(word, n) > TELLING}


def matrix(texts: Sequence[str]) -> Any:
    """Features of texts, a sparse matrix [texts, SIZE] whose values are counts over the root of a text's count."""
    from scipy.sparse import csr_matrix

    indices, ends, values = [], [0], []
    for text in texts:
        places = features.places(text)
        indices.append(places)
        values.append(np.full(len(places), 1 / math.sqrt(max(len(places), 1)), np.float32))
        ends.append(ends[-1] + len(places))
    made = csr_matrix((np.concatenate(values), np.concatenate(indices), ends), shape=(len(texts), features.SIZE))
    made.sum_duplicates()
    return made


@dataclass
class Family:
    """Recall on one family of attacks: of the filter, and of one that was learnt without the family."""

    name: str
    texts: int
    known: float
    unseen: float


@dataclass
class Figures:
    """What was found on held-out texts: of each category (texts, precision, recall, F1, false alarms), and under attack.

    `missed` says of a category why it has no threshold. False alarms are of all texts that are not of the category.
    """

    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    families: list[Family] = field(default_factory=list)
    alarms_attacked: float = math.nan
    identity: float = math.nan


def judged(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Precision, recall, F1 and false alarms of what was found, of texts of which `truth` tells what is to be found."""
    hit, right, wrong = int((found & truth).sum()), int(truth.sum()), int((~truth).sum())
    return {
        "texts": right, "precision": hit / max(int(found.sum()), 1), "recall": hit / max(right, 1),
        "f1": 2 * hit / max(int(found.sum()) + right, 1), "false_alarms": (int(found.sum()) - hit) / max(wrong, 1),
    }  # fmt: skip


def threshold(scores: np.ndarray, truth: np.ndarray, wanted: float) -> float | None:
    """Just below the lowest score above 0 from which on the wanted share of what scores as high is of the category.

    None if there is none that finds a twentieth of the category.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(truth[order])
    good = hits / np.arange(1, len(order) + 1) >= wanted
    good[:-1] &= ranked[:-1] != ranked[1:]  # of equal scores all are found, or none
    good &= ranked > 0  # a threshold of 0 would take every text
    places = np.flatnonzero(good & (hits >= max(truth.sum() / 20, 1)))
    if not len(places):
        return None
    lowest, *after = map(float, ranked[places[-1] : places[-1] + 2])
    half = (lowest + after[0]) / 2 if after else lowest  # halfway to the next lower one
    return half if not after or half > after[0] else lowest


class Sets:
    """Texts that are learnt from, as features, with their labels, weights and the family that rewrote them."""

    def __init__(self, rows: list[Row], attack: bool, seed: int, targets: set[str], note: Note) -> None:
        draw = random.Random(seed)
        texts, self.rows, families = [r.text for r in rows], [*rows], [""] * len(rows)
        bad = sum(bool(r.categories) for r in rows)
        rare = bad < len(rows) / 2  # the rarer class gets twice as many copies
        for row in rows if attack else ():
            twice = bool(row.categories) == rare
            for family in draw.sample(list(attacks.FAMILIES), COPIES * (1 + twice)):
                texts.append(attacks.rewrite(row.text, family, targets if row.categories else (), draw))
                self.rows.append(row)
                families.append(family)
        extra = identity.sentences(seed)
        extra = draw.sample(extra, min(len(extra), max(len(texts), 1000)))
        weight = min(1.0, IDENTITY * len(texts) / len(extra))
        note(f"features of {len(texts):,} texts and {len(extra):,} harmless sentences that name a group")
        self.matrix = matrix([*texts, *extra])
        self.families = np.array([*families, *[""] * len(extra)])
        self.weights = np.array([1.0] * len(texts) + [weight] * len(extra))
        self.extra, self.seed = len(extra), seed

    def fit(self, category: str, without: str = "") -> tuple[np.ndarray, float]:
        """Weights and bias of a category, learnt without the texts of one family.

        Features are scaled by how much likelier they are in one class than in the other, in logarithms (Wang and Manning 2012,
        Baselines and Bigrams), which the weights then take up.
        """
        linear_model = needed("sklearn.linear_model", "learning a filter", "safety")
        keep = self.families != without if without else np.ones(len(self.families), bool)
        truth = np.array([_is(row, category) for row in self.rows] + [False] * self.extra)
        model = linear_model.SGDClassifier(
            "log_loss", alpha=ALPHA, average=True, max_iter=EPOCHS, tol=None, random_state=self.seed % 2**32
        )
        x, y, weights = self.matrix[keep], truth[keep], self.weights[keep]
        odds = _odds(x, y, weights)
        x.data *= odds[x.indices]
        model.fit(x, y, sample_weight=weights)
        return (model.coef_[0] * odds).astype(np.float32), float(model.intercept_[0])


def _odds(x: Any, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Log-odds of each feature between the classes, float32 [SIZE]."""
    sums = [x.T @ np.where(y == of, weights, 0.0) + SMOOTH for of in (True, False)]
    return np.log((sums[0] / sums[0].sum()) / (sums[1] / sums[1].sum())).astype(np.float32)


def _is(row: Row, category: str) -> bool:
    return bool(row.categories) if category == ANY else category in row.categories


def categories_of(rows: list[Row]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The categories that are learnt, and of those that are not why. Of two and more there is one of all, `any`."""
    counts = Counter(c for row in rows for c in row.categories)
    if ANY in counts and len(counts) > 1:
        raise InputError(
            f"a label is named {ANY!r}, which is what all categories together are called: name it otherwise"
        )
    few = {name: f"{n} texts, {FEW} are needed" for name, n in counts.items() if n < FEW}
    own = tuple(sorted(counts.keys() - few.keys()))
    return (own if len(counts) == 1 else (*own, ANY)), few


def _quiet(said: str) -> None:
    pass


def learn(rows: list[Row], attack: bool = False, precision: float = 0.98, seed: int = 1,
          note: Note = _quiet) -> tuple[Filter, str, Figures]:  # fmt: skip
    """A filter of labelled texts, the text of its policy.toml, and its figures on held-out texts.

    Raises InputError where no category reaches the wanted precision, and where a part has texts of one class alone.
    """
    needed("sklearn", "fastlm data filter", "safety")
    order = sorted(rows, key=lambda r: (r.mark, r.text))
    parts = [[r for r in order if low <= r.mark < high]
             for low, high in ((0, HELD_OUT), (HELD_OUT, 2 * HELD_OUT), (2 * HELD_OUT, 2.0))]  # fmt: skip
    chosen, tried, own = parts
    for part in parts:
        if not 0 < sum(bool(r.categories) for r in part) < len(part):
            raise InputError(f"{len(rows):,} labelled texts are too few: a tenth of them, by hash, has one class alone")
    names, left_out = categories_of(own)
    if not names:
        few = "; ".join(f"{name} has {why}" for name, why in left_out.items())
        raise InputError(f"{len(rows):,} labelled texts are too few: of the four fifths to learn from, {few}")
    targets = telling([r.text for r in own], [bool(r.categories) for r in own])
    sets = Sets(own, attack, seed, targets, note)
    fitted = [sets.fit(name) for name in names]
    scorer = Linear(np.stack([w for w, _ in fitted]), np.array([b for _, b in fitted]))
    made = Filter(scorer, names, policy.Policy((), ""), {})
    figures = Figures(missed=left_out)
    found = []
    first, second = (np.array([made.scores(r.text) for r in part]) for part in (chosen, tried))
    for at, name in enumerate(names):
        own_threshold = threshold(first[:, at], np.array([_is(r, name) for r in chosen]), precision)
        if own_threshold is None:
            figures.missed[name] = f"a precision of {precision} is reached by next to none"
            continue
        said = judged(second[:, at] >= own_threshold, np.array([_is(r, name) for r in tried]))
        figures.categories[name] = said | {"threshold": own_threshold}
        about = f"precision {said['precision']:.3f}, recall {said['recall']:.3f} on {len(tried):,} held-out texts"
        found.append(policy.Category(name, own_threshold, about=about))
    if not found:
        raise InputError(
            f"no category reaches a precision of {precision} on {len(chosen):,} held-out texts: lower --precision"
        )
    made.policy = policy.Policy(tuple(found), policy.digest(tuple(found), scorer_hash(scorer)))
    everything = names[-1]
    if attack and everything in figures.categories:
        limit = figures.categories[everything]["threshold"]
        _attacked(figures, sets, made, tried, chosen, everything, limit, targets, precision, note)
    made.about = {
        "precision": precision,
        "seed": seed,
        "attack": attack,
        "texts": len(rows),
        "figures": figures.categories,
    }
    return made, policy.text(tuple(found), figures.missed), figures


def _attacked(figures: Figures, sets: Sets, made: Filter, tried: list[Row], chosen: list[Row], name: str, limit: float,
              targets: set[str], precision: float, note: Note) -> None:  # fmt: skip
    """Recall on each family, of the filter and of one that was learnt without it, each at its own threshold."""
    draw = random.Random(sets.seed + 1)
    at = made.categories.index(name)
    bad = [r.text for r in tried if _is(r, name)][:TRIED]
    for family in attacks.FAMILIES:
        texts = [new for text in bad if (new := attacks.rewrite(text, family, targets, draw)) != text]
        if not texts:
            continue
        known = sum(made.scores(text)[at] >= limit for text in texts) / len(texts)
        note(f"learning without {family}")
        weights, bias = sets.fit(name, without=family)
        other = Filter(Linear(weights[None], np.array([bias])), (name,), made.policy, {})
        scores = np.array([other.scores(r.text)[0] for r in chosen])
        own = threshold(scores, np.array([_is(r, name) for r in chosen]), precision)
        unseen = sum(other.scores(t)[0] >= own for t in texts) / len(texts) if own is not None else 0.0
        figures.families.append(Family(family, len(texts), known, unseen))
    names = list(attacks.FAMILIES)
    good = [attacks.rewrite(r.text, draw.choice(names), (), draw) for r in tried if not r.categories]
    figures.alarms_attacked = sum(made.scores(text)[at] >= limit for text in good) / len(good)


def lines(figures: Figures) -> Iterator[str]:
    """The figures as text."""
    yield f"{'category':<20} {'texts':>7} {'precision':>9} {'recall':>7} {'F1':>7} {'false alarms':>12} {'threshold':>9}"
    for name, said in figures.categories.items():
        yield (
            f"{name:<20} {said['texts']:>7,.0f} {said['precision']:>9.3f} {said['recall']:>7.3f} {said['f1']:>7.3f} "
            f"{said['false_alarms']:>12.3f} {said['threshold']:>9.4g}"
        )
    for name, why in figures.missed.items():
        yield f"{name:<20} is not looked for: {why}"
    if not figures.families:
        return
    yield ""
    yield f"{'family of attacks':<20} {'texts':>7} {'recall, trained on':>18} {'recall, held out':>16}"
    for one in figures.families:
        yield f"{one.name:<20} {one.texts:>7,} {one.known:>18.3f} {one.unseen:>16.3f}"
    known, unseen = (sum(getattr(f, k) for f in figures.families) / len(figures.families) for k in ("known", "unseen"))
    yield f"{'mean':<20} {'':>7} {known:>18.3f} {unseen:>16.3f}"
    yield f"false alarms on harmless texts that were rewritten alike: {figures.alarms_attacked:.3f}"
