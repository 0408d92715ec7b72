"""What augmentation brings on 200 KB of prose: ``python bench/quality_augment.py`` (up to ten minutes on two cores).

The prose is Python's own documentation: pydoc's topics and the docstrings of the standard library, by document. One part is
held out. A small model is trained on the rest, without copies, with those of each method, of all, and on twice the real text,
each with three seeds, as many steps each; the best of its evaluations on the held-out text counts.
Needs apertium, apertium-eng-cat and mythes-en-us (apt), and the extra ``augment``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fastlm.bench.quality import Quality, spread
from fastlm.bench.small import CONTEXT, SEEDS, documents, take, train
from fastlm.data import groups
from fastlm.data.augment import Augment, run
from fastlm.data.augment import text as prose
from fastlm.data.augment.job import Report
from fastlm.data.prepare import Options, Prepared, prepare

METHODS = {
    "backtranslation": Augment(backtranslate=("apertium:eng-cat",)),
    "replacement": Augment(replace=0.1),
    "shuffling": Augment(shuffle=3),
    "all": Augment(backtranslate=("apertium:eng-cat",), replace=0.1, shuffle=3),
}
PARTS = ("copies", "train", "speed")
SIZE, HELD = 200_000, 60_000  # bytes of training text, of held-out text
WEIGHTS = (1.0, 0.3)


def write(path: Path, texts: list[str]) -> tuple[str, ...]:
    path.write_text("".join(json.dumps({"text": t, "group": groups.group_of(t.encode())}) + "\n" for t in texts))
    return (str(path),)


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return set(zip(words, words[1:], words[2:]))


def survived(source: str, copy: str) -> tuple[int, int]:
    """(names, numbers, code and quotations of the prose that the copy has, those of the source)."""
    cut = [s for p in prose.paragraphs(source) if not isinstance(p, str) for s in p.sentences]
    known = prose.names(cut)
    wanted = Counter(token for s in cut for token in prose.protected(s, known))
    have = Counter(w.strip(prose._EDGES) for w in copy.split())
    quotations, flat = [q for s in cut for q in prose.QUOTED.findall(s)], " ".join(copy.split())
    whole = sum(quotation in flat for quotation in quotations)
    return sum(min(n, have[w]) for w, n in wanted.items()) + whole, sum(wanted.values()) + len(quotations)


def examples(rows: list[dict[str, Any]], source: dict[str, str], count: int = 5) -> list[tuple[str, str]]:
    """Sentences of sources and what became of them; of a method that moves sentences, paragraphs."""
    out = []
    for row in rows:
        pairs = zip(prose.paragraphs(source[row["group"]]), prose.paragraphs(row["text"]))
        for a, b in pairs:
            if isinstance(a, str) or isinstance(b, str) or a.sentences == b.sentences or len(a.source) > 400:
                continue
            same = len(a.sentences) == len(b.sentences) and set(a.sentences) != set(b.sentences)
            changed = [(x, y) for x, y in zip(a.sentences, b.sentences) if x != y]
            out.append(changed[0] if same else (" ".join(a.sentences), " ".join(b.sentences)))
            break
        if len(out) == count:
            break
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each run")
    parser.add_argument("--provisional", default="", metavar="WHY", help="why times are not to be trusted")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone, into the result that is there")
    args = parser.parse_args()
    evidence = Quality(__file__, of=[f"fastlm.data.augment.{m}" for m in ("job", "text", "thesaurus", "translate")],
                       provisional=args.provisional)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fastlm-augment-") as name:
        made = Copies(Path(name))
        if args.only in (None, "speed"):
            speed(evidence, made)
        if args.only in (None, "copies"):
            copies(evidence, made)
        if args.only in (None, "train"):
            trained(evidence, made, args.steps)
    evidence.save(part=args.only is not None)


class Copies:
    """The texts, and the copies of them that each method makes, once."""

    def __init__(self, folder: Path) -> None:
        self.folder, found = folder, documents()
        self.held, self.own, self.more = take(found, HELD), take(found, SIZE), take(found, SIZE)
        self.path = write(folder / "own.jsonl", self.own)
        self.source = {groups.group_of(text.encode()): text for text in self.own}
        self.words = sum(len(text.split()) for text in self.own)
        self._made: dict[str, tuple[Report, float]] = {}

    def of(self, name: str) -> tuple[list[dict[str, Any]], Report, float]:
        """Rows, what was done, and seconds."""
        out = self.folder / f"{name}.jsonl"
        if name not in self._made:
            prose.sentences.cache_clear()
            begin = time.perf_counter()
            report = run(self.path, out, METHODS[name])
            self._made[name] = report, time.perf_counter() - begin
        return [json.loads(line) for line in out.read_text().splitlines()], *self._made[name]


def speed(evidence: Quality, made: Copies) -> None:
    """Words a second of each method, on the same text."""
    lines = []
    for name in METHODS:
        _, _, seconds = made.of(name)
        lines.append([name, f"{seconds:.1f}", f"{made.words / seconds:,.0f}"])
        print(*lines[-1], flush=True)
    evidence.table("Speed", ["method", "seconds", "words/s"], lines, f"{made.words:,} words, one process.")


def copies(evidence: Quality, made: Copies) -> None:
    """What each method keeps, drops and brings, and what it must not lose."""
    text_grams = set().union(*map(grams, made.own))
    lines = []
    for name in METHODS:
        rows, report, seconds = made.of(name)
        new = set().union(*(grams(r["text"]) for r in rows)) - text_grams
        kept, of = map(sum, zip(*(survived(made.source[r["group"]], r["text"]) for r in rows)))
        c = report.counts
        dropped = ", ".join(f"{k} {v}" for k, v in report.drops.items()) or "-"
        share = f"{c['kept']} of {c['sent']}" if c["sent"] else "-"
        lines.append([name, len(rows), share, dropped, c["replaced"] or "-", c["moved"] or "-", f"{len(new):,}",
                      f"{kept / of:.2%}", f"{kept:,} of {of:,}"])  # fmt: skip
        print(" ".join(map(str, lines[-1])), flush=True)
        what = f"different 3-grams of words, {SIZE // 1000} KB of prose alone and with copies"
        evidence.row(
            "augmented" if name == "all" else name, what, f"{len(text_grams):,}", f"{len(text_grams) + len(new):,}", seconds,
            note=f"names, numbers, code and quotations kept: {kept / of:.2%} of {of:,}",
        )  # fmt: skip
        if name != "all":
            evidence.examples(f"Five examples: {name}", examples(rows, made.source))
    evidence.table(
        "Copies of 200 KB of prose",
        ["method", "copies", "sentences kept", "dropped", "words replaced", "sentences moved", "new 3-grams",
         "names, numbers, code, quotations kept", "as counts"],
        lines,
        f"The source has {len(text_grams):,} different 3-grams of words.",
    )  # fmt: skip


def trained(evidence: Quality, made: Copies, steps: int) -> None:
    """Bits per byte of held-out prose without copies, with those of each method, of all, and with twice the real text."""
    # A fiftieth is held out by preparation too, by group: the same documents and copies in each set.
    options, cache = Options(val_fraction=0.02), made.folder / "cache"
    ready = lambda path, whole=False: prepare(path, options, whole=whole, cache=cache)
    held = ready(write(made.folder / "held.jsonl", made.held), True)
    own, real = ready(made.path, True), ready(made.path)
    sets: dict[str, tuple[list[Prepared], tuple[float, ...]]] = {"none": ([real], (1.0,))}
    for name in METHODS:
        made.of(name)
        sets[name] = ([real, ready((str(made.folder / f"{name}.jsonl"),))], WEIGHTS)
    sets["twice the real text"] = ([ready(write(made.folder / "more.jsonl", made.own + made.more))], (1.0,))
    results: dict[str, tuple[list[float], list[float], float]] = {}
    for name, (data, weights) in sets.items():
        begin = time.perf_counter()
        got = [train(data, weights, held, own, steps, seed) for seed in SEEDS]
        results[name] = ([g[0] for g in got], [g[0] - g[1] for g in got], time.perf_counter() - begin)
        print(
            name,
            spread(results[name][0], 4),
            "gap",
            spread(results[name][1], 4),
            f"{results[name][2]:.0f} s",
            flush=True,
        )
    rows_of(evidence, results, {name: made.of(name)[2] for name in METHODS})
    evidence.table(
        "Bits per byte of the held-out text, best of eight evaluations, mean ± sd of three seeds",
        ["trained on", "bits per byte", "held-out minus training text"],
        [[name, spread(a, 4), spread(b, 4)] for name, (a, b, _) in results.items()],
        f"{steps} steps of 16 contexts of {CONTEXT} bytes.",
    )


def rows_of(evidence: Quality, results: dict[str, Any], made: dict[str, float]) -> None:
    base, gap, seconds = results["none"]
    keys = {name: name for name in METHODS} | {"all": "augmented", "twice the real text": "more-data"}
    for name, key in keys.items():
        after, own_gap, took = results[name]
        gain = statistics.mean(base) - statistics.mean(after)
        noise = max(statistics.stdev(base), statistics.stdev(after))
        note = (
            ""
            if gain > noise
            else "No gain beyond the spread of the seeds."
            if gain > -noise
            else "Worse than without."
        )
        what = "bits per byte of held-out prose, 200 KB of training text"
        if key == "more-data":
            what = "bits per byte of held-out prose, 200 KB and 400 KB of real training text"
        evidence.row(key, what, spread(base, 3), spread(after, 3), seconds + took + made.get(name, 0.0),
                     SEEDS, note=note)  # fmt: skip
        if key in ("augmented", "more-data"):
            evidence.row(
                key, "held-out minus training text, bits per byte", spread(gap, 3), spread(own_gap, 3), took, SEEDS
            )


if __name__ == "__main__":
    main()
