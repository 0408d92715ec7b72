"""Dawid-Skene against majority on real crowd labels with known truth: ``python bench/quality_annotate.py FOLDER``.

FOLDER holds ``crowd_NAME_answers.csv`` (question, worker, answer) and ``crowd_NAME_truth.csv``, as github's
zhydhkcws/crowd_truth_infer has them in ``datasets/``. Then 30% of the annotators are spammers more, who answer at random.
"""

from __future__ import annotations

import csv
import random
import sys
import time
from collections import Counter
from pathlib import Path

from fastlm.bench.quality import Quality, spread
from fastlm.data.annotate import merge

Labels = list[tuple[str, str, str]]
SEEDS = (1, 2, 3)


def read(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))[1:]


def majority(labels: Labels, seed: int) -> dict[str, str]:
    """The most frequent label of each item; ties are drawn."""
    votes: dict[str, Counter[str]] = {}
    for key, _, label in labels:
        votes.setdefault(key, Counter())[label] += 1
    rng = random.Random(seed)
    return {k: rng.choice(sorted(x for x in v if v[x] == max(v.values()))) for k, v in votes.items()}


def spammed(labels: Labels, seed: int) -> Labels:
    """With spammers, 30% of all annotators, each of whom labels as many items as the others do on average."""
    rng, workers = random.Random(seed), sorted({w for _, w, _ in labels})
    items, kinds = sorted({k for k, _, _ in labels}), sorted({a for _, _, a in labels})
    each = max(1, len(labels) // len(workers))
    more = [(k, f"spam{i}", rng.choice(kinds)) for i in range(round(len(workers) * 3 / 7))
            for k in rng.sample(items, min(each, len(items)))]  # fmt: skip
    return labels + more


def main() -> None:
    folder = Path(sys.argv[1])
    evidence = Quality(__file__, of=["fastlm.data.annotate"])
    lines = []
    for path in sorted(folder.glob("crowd_*_answers.csv")):
        begin, name = time.perf_counter(), path.name.split("_")[1]
        truth = {k: v for k, v in read(folder / f"crowd_{name}_truth.csv")}  # noqa: C416
        labels = [(k, w, a) for k, w, a in read(path)]
        shares: dict[str, list[float]] = {}
        alpha = 0.0
        for seed in SEEDS:
            for kind, said in (("", labels), (", spammers", spammed(labels, seed))):
                merged = merge(said, {})
                alpha = alpha if kind else merged.alpha
                for how, found in (
                    ("majority", majority(said, seed)),
                    ("DS", {k: v[0] for k, v in merged.merged.items()}),
                ):
                    right = [found[k] == v for k, v in truth.items() if k in found]
                    shares.setdefault(how + kind, []).append(sum(right) / len(right))
        s = {k: spread(v) for k, v in shares.items()}
        took = time.perf_counter() - begin
        what = f"share of {name} labels that are right, majority and Dawid-Skene"
        evidence.row("crowds", what, s["majority"], s["DS"], took / 2, SEEDS)
        evidence.row("crowds", what + ", 30% spammers", s["majority, spammers"], s["DS, spammers"], took / 2, SEEDS)
        lines.append([name, f"{len(labels):,}", f"{alpha:.3f}", *(s[k] for k in s)])
    evidence.table("Real crowds", ["set", "labels", "alpha", *s], lines)
    evidence.save()


if __name__ == "__main__":
    main()
