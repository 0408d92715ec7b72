"""A filter: a scorer of passages, and the policy that says what happens to a text. It lies in a folder of three files.

filter.json (what it is and how good it was), weights.safetensors or words.txt, and policy.toml. Nothing of it is a pickle,
and using it needs numpy alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastlm.data.errors import InputError
from fastlm.data.filter import features, lists, policy
from fastlm.data.filter.fold import fold

FORMAT = 1
MASK = "[FILTERED]"
LONG = 240  # characters of a passage, and the rest of its last word
# The rest of a line, else up to the last end of a sentence, else of a word. The first is captured and called back so that it
# is tried at its full length alone: a shorter one would read a long run of blanks again.
PASSAGE = re.compile(
    rf"(?=(\S[^\n]{{0,{LONG}}}))\1(?=[^\S\n]*(?:\n|\Z))|\S[^\n]{{0,{LONG}}}[.!?][\"')\]’”]*(?=\s)|\S[^\n]{{0,{LONG}}}\S*"
)


class Scorer(Protocol):
    """Scores a text in each category, 0 to 1."""

    def scores(self, text: str) -> tuple[float, ...]: ...


class Linear:
    """A logistic regression over hashed features (`features`), for each category.

    Args:
        weights: float32 [categories, SIZE].
        bias: float32 [categories].
    """

    def __init__(self, weights: np.ndarray, bias: np.ndarray) -> None:
        self.weights, self.bias = np.ascontiguousarray(weights, np.float32), np.asarray(bias, np.float32)
        self._rows = [memoryview(row) for row in self.weights]
        self._of_word = functools.lru_cache(maxsize=features.HELD)(self._word)

    def _word(self, word: str) -> tuple[float, ...]:
        places = features.of_word(word)
        return (float(len(places)), *(float(x) for x in self.weights[:, places].sum(axis=1, dtype=np.float64)))

    def scores(self, text: str) -> tuple[float, ...]:
        words = fold(text)
        if not words:
            return (0.0,) * len(self.bias)  # nothing is said
        pairs = [place for pair in itertools.pairwise(words) for place in features.of_pair(*pair)]
        count, *sums = (math.fsum(column) for column in zip(*(self._of_word(w[: features.READ]) for w in words)))
        length = math.sqrt(count + len(pairs))
        return tuple(
            _logistic((total + math.fsum([row[at] for at in pairs])) / length + float(b))
            for total, row, b in zip(sums, self._rows, self.bias)
        )


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-min(max(value, -60.0), 60.0)))


@dataclass(frozen=True)
class Verdict:
    """What the policy says of a text: the category, the share of the text in passages above its threshold, and the spans."""

    action: str
    category: str
    score: float
    share: float
    spans: tuple[tuple[int, int], ...]

    def why(self) -> str:
        return f"{self.category} {self.score:.2f} in {self.share:.0%} of the text"


class Filter:
    """A scorer with its policy.

    Args:
        scorer: Scores a passage in each of `categories`.
        about: What filter.json holds besides: figures, how it was made.
        policy: What happens.
    """

    def __init__(
        self, scorer: Scorer, categories: tuple[str, ...], rules: policy.Policy, about: dict[str, Any]
    ) -> None:
        self.scorer, self.categories, self.policy, self.about = scorer, categories, rules, about

    @property
    def hash(self) -> str:
        """Of policy and scorer: what a run or a card names."""
        return self.policy.hash

    def scores(self, text: str) -> tuple[float, ...]:
        """The highest score of a passage of the text, in each category."""
        found = [self.scorer.scores(m[0]) for m in PASSAGE.finditer(text)]
        return tuple(map(max, zip(*found))) if found else (0.0,) * len(self.categories)

    def worst(self, text: str) -> float:
        """The highest of the scores that the policy asks for, each less its threshold: at least 0 where a passage counts."""
        found = self.scores(text)
        return max(found[self.categories.index(c.name)] - c.threshold for c in self.policy.categories)

    def judge(self, text: str, whole: bool = False) -> Verdict | None:
        """What the policy does with a text, or None; with `whole` one passage is enough, whatever the policy's share."""
        return next(iter(self.verdicts(text, whole)), None)

    def verdicts(self, text: str, whole: bool = False) -> list[Verdict]:
        """Of all categories that apply, the one that is followed first."""
        spans = [m.span() for m in PASSAGE.finditer(text)]
        found = [self.scorer.scores(text[a:b]) for a, b in spans]
        total = sum(b - a for a, b in spans)
        out: list[Verdict] = []
        for one in self.policy.categories:
            at = self.categories.index(one.name)
            over = [(span, scores[at]) for span, scores in zip(spans, found) if scores[at] >= one.threshold]
            share = sum(b - a for (a, b), _ in over) / max(total, 1)
            if over and (whole or one.action == "mask" or share >= one.share):
                out.append(
                    Verdict(one.action, one.name, max(s for _, s in over), share, tuple(span for span, _ in over))
                )
        return sorted(out, key=lambda v: policy.ACTIONS.index(v.action))

    def masked(self, text: str) -> str:
        """The text with every passage that a category with the action mask names in the place of which MASK stands."""
        names = {c.name: c.threshold for c in self.policy.categories if c.action == "mask"}
        places = {self.categories.index(name): threshold for name, threshold in names.items()}

        def put(match: re.Match[str]) -> str:
            scores = self.scorer.scores(match[0])
            return MASK if any(scores[at] >= threshold for at, threshold in places.items()) else match[0]

        return PASSAGE.sub(put, text)

    def save(self, folder: Path, policy_text: str) -> None:
        """Writes the three files; filter.json last, so that a folder with it is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "filter.json").unlink(missing_ok=True)
        if isinstance(self.scorer, Linear):
            from safetensors.numpy import save

            data = save({"weights": self.scorer.weights, "bias": self.scorer.bias})
            (folder / "weights.safetensors").write_bytes(data)
        elif isinstance(self.scorer, lists.WordList):
            (folder / "words.txt").write_text("\n".join(self.scorer.words) + "\n", encoding="utf-8")
        (folder / policy.NAME).write_text(policy_text, encoding="utf-8")
        said = {"format": FORMAT, "kind": "linear" if isinstance(self.scorer, Linear) else "words",
                "categories": list(self.categories), **self.about, "policy": self.policy.hash}  # fmt: skip
        (folder / "filter.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def scorer_hash(scorer: Scorer) -> str:
    """Of the weights or the words."""
    if isinstance(scorer, Linear):
        data = scorer.weights.tobytes() + scorer.bias.tobytes()
    else:
        assert isinstance(scorer, lists.WordList)
        data = "\n".join(scorer.words).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def load(folder: str | Path, flag: str = "--filter") -> Filter:
    """The filter of a folder. Raises InputError that says what of the folder cannot be used."""
    folder = Path(folder).expanduser()
    if not (folder / policy.NAME).is_file():
        raise InputError(f"{flag} {folder} is no filter's folder: it has no policy.toml; fastlm data filter makes one")
    try:
        about = dict(json.loads((folder / "filter.json").read_text(encoding="utf-8")))
        form, kind, categories = about.pop("format"), about.pop("kind"), tuple(about.pop("categories"))
        if not all(isinstance(name, str) for name in categories):
            raise TypeError("categories must be names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{flag} {folder}: filter.json cannot be read ({error!r})") from None
    if form != FORMAT:
        raise InputError(f"{flag} {folder} is of another version: its format is {form!r}, and this one reads {FORMAT}")
    scorer: Scorer
    if kind == "words":
        scorer = lists.WordList(lists.read(str(folder / "words.txt"), f"{flag} {folder}: words.txt"))
    else:
        scorer = _weights(folder, flag, len(categories))
    return Filter(scorer, categories, policy.read(folder / policy.NAME, categories, scorer_hash(scorer)), about)


def _weights(folder: Path, flag: str, count: int) -> Linear:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(str(folder / "weights.safetensors"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{flag} {folder}: weights.safetensors cannot be read ({error})") from None
    shapes = {name: value.shape for name, value in found.items()}
    if shapes != {"weights": (count, features.SIZE), "bias": (count,)}:
        raise InputError(f"{flag} {folder}: weights.safetensors is not of these categories; it holds {shapes}")
    if not all(value.dtype == np.float32 and np.isfinite(value).all() for value in found.values()):
        raise InputError(
            f"{flag} {folder}: weights.safetensors must hold finite numbers in float32: it would find nothing"
        )
    return Linear(found["weights"], found["bias"])
