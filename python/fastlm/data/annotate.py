"""Texts to Label Studio's tasks, and several annotators' exports to one label each, by Dawid and Skene (1979)."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data import corpus, groups
from fastlm.data import filter as filters
from fastlm.data.augment.text import needed
from fastlm.data.errors import InputError
from fastlm.data.review import results
from fastlm.data.review.store import is_store


def tasks(names: tuple[str, ...], count: int, seed: int, field: str = "text", filter: str = "") -> list[dict[str, Any]]:
    """`count` documents, drawn by the seed, in Label Studio's import format; with the folder of a filter those whose scores
    are nearest to a threshold of its policy, the nearest first. Raises InputError if there is none."""
    worst = filters.load(filter).worst if filter else None
    found = []
    for path in corpus.expand(names):
        for piece in corpus.documents(path, field):
            text = piece.text.decode("utf-8", "replace")
            group = piece.group or groups.group_of(piece.text)
            found.append({"data": {"text": text, "group": group, "source": path.name}})
    if not found:
        raise InputError(f"{' '.join(names)} holds no text to label")
    if worst is not None:
        unsure = [abs(worst(one["data"]["text"])) for one in found]
        nearest = sorted(range(len(found)), key=unsure.__getitem__)[:count]
        return [{"id": i + 1, **found[at]} for i, at in enumerate(nearest)]
    chosen = sorted(random.Random(seed).sample(range(len(found)), min(count, len(found))))
    return [{"id": i + 1, **found[at]} for i, at in enumerate(chosen)]


@dataclass
class Merged:
    """Labels (key, annotator, label), the data of each key, and of each key the merged label and its confidence."""

    labels: list[tuple[str, str, str]]
    data: dict[str, dict[str, Any]]
    merged: dict[str, tuple[str, float]]
    alpha: float  # Krippendorff's, nominal; NaN where all labels are one, or no item has two

    def accuracy(self) -> dict[str, tuple[float, int]]:
        """Of each annotator the share of labels that the merged ones agree with, and their number."""
        out: dict[str, list[bool]] = {}
        for key, who, label in self.labels:
            out.setdefault(who, []).append(label == self.merged[key][0])
        return {who: (sum(right) / len(right), len(right)) for who, right in sorted(out.items())}

    def rows(self) -> Iterable[dict[str, Any]]:
        """A row for each item, with its data, label, confidence and what each annotator said."""
        said: dict[str, dict[str, str]] = {}
        for key, who, label in self.labels:
            said.setdefault(key, {})[who] = label
        for key, (label, confidence) in self.merged.items():
            yield {**self.data[key], "label": label, "confidence": round(confidence, 6), "annotations": said[key]}

    def disputed(self, below: float) -> list[dict[str, Any]]:
        """New tasks of the items whose confidence is below, the least sure first."""
        unsure = sorted((c, key) for key, (_, c) in self.merged.items() if c < below)
        return [{"id": i + 1, "data": self.data[key]} for i, (_, key) in enumerate(unsure)]


def read(paths: Iterable[Path]) -> tuple[list[tuple[str, str, str]], dict[str, dict[str, Any]]]:
    """(key, annotator, label) of each annotation of Label Studio's exports or databases of `fastlm review`, the later of two by
    one annotator, and the data of each key. Raises InputError, naming the file and the task, for what is no export."""
    found: dict[tuple[str, str], str] = {}
    data: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            items = results.read_export(path) if is_store(path) else json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(items, list):
                raise ValueError("not a list of tasks")
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no export of Label Studio in its JSON format: {error}") from None
        for number, item in enumerate(items, 1):
            try:
                key = hashlib.sha256(json.dumps(item["data"], sort_keys=True).encode()).hexdigest()[:16]
                data[key] = item["data"]
                for one in item.get("annotations", []):
                    choices = [r["value"]["choices"] for r in one["result"] if "choices" in r.get("value", {})]
                    if choices and not one.get("was_cancelled"):
                        found[key, _who(one.get("completed_by"), path)] = "|".join(sorted(choices[0]))
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise InputError(f"{path}, task {number}: not as Label Studio exports it ({error!r})") from None
    return [(key, who, label) for (key, who), label in found.items()], data


def _who(by: Any, path: Path) -> str:
    """An annotator's name; where the export tells none, the file's; of a number, which another export may give to another
    person, both: FILE:number."""
    if isinstance(by, dict):
        by = by.get("email") or by.get("id")
    if isinstance(by, int):
        return f"{path.stem}:{by}"
    return path.stem if by is None else str(by)


def merge(labels: list[tuple[str, str, str]], data: dict[str, dict[str, Any]]) -> Merged:
    """One label for each item. Raises InputError where nothing is labelled."""
    if not labels:
        raise InputError("the exports hold no annotation with a choice")
    krippendorff = needed("krippendorff", "agreement", "annotate")
    needed("crowdkit", "merging labels", "annotate")
    import numpy as np
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    keys, kinds = (list(dict.fromkeys(row[at] for row in labels)) for at in (0, 2))
    counts = np.zeros((len(keys), len(kinds)), dtype=int)
    places, names = {k: i for i, k in enumerate(keys)}, {k: i for i, k in enumerate(kinds)}
    for key, _, label in labels:
        counts[places[key], names[label]] += 1
    paired = counts[counts.sum(1) > 1]
    varied = len(paired) and (paired.sum(0) > 0).sum() > 1
    alpha = krippendorff.alpha(value_counts=paired, level_of_measurement="nominal") if varied else float("nan")
    # by number: pandas takes no name that is not UTF-8 throughout, and a file's may be any bytes
    who, kinds = sorted({row[1] for row in labels}), sorted(kinds)
    numbered = [(key, who.index(name), kinds.index(label)) for key, name, label in labels]
    model = DawidSkene(n_iter=100).fit(pd.DataFrame(numbered, columns=["task", "worker", "label"]))
    sure: Any = model.probas_
    merged = {key: (kinds[int(sure.loc[key].idxmax())], float(sure.loc[key].max())) for key in keys}
    return Merged(labels, data, merged, float(alpha))
