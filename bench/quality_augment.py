"""What augmentation brings on 200 KB of prose: ``python bench/quality_augment.py`` (up to ten minutes on two cores).

The prose is Python's own documentation: pydoc's topics and the docstrings of the standard library, by document. One part is
held out. A small model is trained on the rest, without copies, with those of each method, of all, and on twice the real text,
each with three seeds, as many steps each; the best of its evaluations on the held-out text counts.
Needs apertium, apertium-eng-cat and mythes-en-us (apt), and the extra ``augment``.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastlm.bench.quality import Quality, spread
from fastlm.data import TokenSource, corpus, groups
from fastlm.data.augment import Augment, run
from fastlm.data.augment import text as prose
from fastlm.data.prepare import Options, Prepared, prepare
from fastlm.models.gpt import GPT, GPTConfig

METHODS = {
    "backtranslation": Augment(backtranslate=("apertium:eng-cat",)),
    "replacement": Augment(replace=0.1),
    "shuffling": Augment(shuffle=3),
    "all": Augment(backtranslate=("apertium:eng-cat",), replace=0.1, shuffle=3),
}
SIZE, HELD = 200_000, 60_000  # bytes of training text, of held-out text
SEEDS = (1, 2, 3)
CONTEXT, BATCH, WEIGHTS = 128, 16, (1.0, 0.3)


def documents() -> list[str]:
    """Pydoc's topics, and docstrings of 300 characters or more, in an order of their own."""
    import inspect
    import pydoc_data.topics

    found = list(pydoc_data.topics.topics.values())
    for file in corpus.stdlib_files():
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                doc = ast.get_docstring(node, clean=False)
                if doc and len(doc) >= 300:
                    found.append(inspect.cleandoc(doc))
    found = [text for text in dict.fromkeys(found) if len(text) <= 8_000]
    random.Random(0).shuffle(found)
    return found


def write(path: Path, texts: list[str]) -> tuple[str, ...]:
    path.write_text("".join(json.dumps({"text": t, "group": groups.group_of(t.encode())}) + "\n" for t in texts))
    return (str(path),)


def take(found: list[str], size: int) -> list[str]:
    """Documents from the front of a list, which loses them, of so many bytes."""
    out, have = [], 0
    while found and have < size:
        out.append(found.pop())
        have += len(out[-1].encode())
    return out


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


def train(
    data: list[Prepared], weights: tuple[float, ...], held: Prepared, own: Prepared, steps: int, seed: int
) -> Any:
    """(bits per byte of the held-out text at the best evaluation, of the real training text then)."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab=held.tokenizer.vocab, layers=2, heads=4, width=96, context=CONTEXT, dropout=0.0)
    model, source = GPT(config), TokenSource(data, CONTEXT, seed, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    best = (math.inf, math.inf)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        batch = source.batch(np.arange(step * BATCH, (step + 1) * BATCH))
        inputs, targets = (torch.as_tensor(t).long() for t in batch[:2])
        loss = model(inputs, targets) / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 8) == 0:
            best = min(best, (bits(model, held), bits(model, own)))
    return best


@torch.no_grad()
def bits(model: GPT, data: Prepared, limit: int = 30_000) -> float:
    """Bits per byte of a whole text, in contexts side by side (a token is a byte)."""
    tokens = torch.as_tensor(np.concatenate([np.asarray(s[:limit]) for s in data.val])[:limit].astype(np.int64))
    rows = (len(tokens) - 1) // CONTEXT
    inputs, targets = tokens[: rows * CONTEXT].view(rows, CONTEXT), tokens[1 : rows * CONTEXT + 1].view(rows, CONTEXT)
    total = sum(float(model(i, t)) for i, t in zip(inputs.split(64), targets.split(64)))
    return total / math.log(2) / targets.numel()


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
    parser.add_argument("--only", choices=["speed"], help="measure words a second alone, into the result that is there")
    args = parser.parse_args()
    evidence = Quality(__file__, of=[f"fastlm.data.augment.{m}" for m in ("job", "text", "thesaurus", "translate")],
                       provisional=args.provisional)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fastlm-augment-") as name:
        if args.only != "speed":
            measure(evidence, Path(name), args.steps)
        speed(evidence, Path(name))
    evidence.save(part=args.only is not None)


def speed(evidence: Quality, folder: Path) -> None:
    """Words a second of each method, on the same text."""
    found = documents()
    take(found, HELD)
    own = take(found, SIZE)
    path, words = write(folder / "speed.jsonl", own), sum(len(t.split()) for t in own)
    lines = []
    for name, method in METHODS.items():
        prose.sentences.cache_clear()
        begin = time.perf_counter()
        run(path, folder / f"speed-{name}.jsonl", method)
        seconds = time.perf_counter() - begin
        lines.append([name, f"{seconds:.1f}", f"{words / seconds:,.0f}"])
        print(*lines[-1], flush=True)
    evidence.table("Speed", ["method", "seconds", "words/s"], lines, f"{words:,} words, one process.")


def measure(evidence: Quality, folder: Path, steps: int) -> None:
    found = documents()
    # A fiftieth is held out by preparation too, by group: the same documents and copies in each set.
    held, own, more = take(found, HELD), take(found, SIZE), take(found, SIZE)
    options, cache = Options(val_fraction=0.02), folder / "cache"
    whole = lambda path: prepare(path, options, whole=True, cache=cache)
    held_data, own_path = whole(write(folder / "held.jsonl", held)), write(folder / "own.jsonl", own)
    own_data, own_train = whole(own_path), prepare(own_path, options, cache=cache)
    source = {groups.group_of(t.encode()): t for t in own}
    text_grams = set().union(*map(grams, own))
    sets: dict[str, tuple[list[Prepared], tuple[float, ...]]] = {"none": ([own_train], (1.0,))}
    made: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    lines = []
    for name, method in METHODS.items():
        out = folder / f"{name}.jsonl"
        begin = time.perf_counter()
        report = run(own_path, out, method)
        seconds = time.perf_counter() - begin
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        made[name] = (seconds, rows)
        new = set().union(*(grams(r["text"]) for r in rows)) - text_grams
        kept, of = map(sum, zip(*(survived(source[r["group"]], r["text"]) for r in rows)))
        c = report.counts
        dropped = ", ".join(f"{k} {v}" for k, v in report.drops.items()) or "-"
        share = f"{c['kept']} of {c['sent']}" if c["sent"] else "-"
        lines.append([name, len(rows), share, dropped, c["replaced"] or "-", c["moved"] or "-", f"{len(new):,}",
                      f"{kept / of:.2%}", f"{kept:,} of {of:,}"])  # fmt: skip
        sets[name] = ([own_train, prepare((str(out),), options, cache=cache)], WEIGHTS)
        print(" ".join(map(str, lines[-1])), flush=True)
    sets["twice the real text"] = ([prepare(write(folder / "more.jsonl", own + more), options, cache=cache)], (1.0,))
    results: dict[str, tuple[list[float], list[float], float]] = {}
    for name, (data, weights) in sets.items():
        begin = time.perf_counter()
        got = [train(data, weights, held_data, own_data, steps, seed) for seed in SEEDS]
        results[name] = ([g[0] for g in got], [g[0] - g[1] for g in got], time.perf_counter() - begin)
        print(
            name,
            spread(results[name][0], 4),
            "gap",
            spread(results[name][1], 4),
            f"{results[name][2]:.0f} s",
            flush=True,
        )
    rows_of(evidence, results, made)
    evidence.table(
        "Copies of 200 KB of prose",
        ["method", "copies", "sentences kept", "dropped", "words replaced", "sentences moved", "new 3-grams",
         "names, numbers, code, quotations kept", "as counts"],
        lines,
        f"The source has {len(text_grams):,} different 3-grams of words.",
    )  # fmt: skip
    evidence.table(
        f"Bits per byte of the held-out text after {steps} steps, best of eight evaluations, mean ± sd of three seeds",
        ["trained on", "bits per byte", "held-out minus training text"],
        [[name, spread(a, 4), spread(b, 4)] for name, (a, b, _) in results.items()],
    )
    for name, (_, rows) in itertools.islice(made.items(), 3):
        evidence.examples(f"Five examples: {name}", examples(rows, source))


def rows_of(evidence: Quality, results: dict[str, Any], made: dict[str, Any]) -> None:
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
        evidence.row(key, what, spread(base, 3), spread(after, 3), seconds + took + (made[name][0] if name in made else 0),
                     SEEDS, note=note)  # fmt: skip
        if key in ("augmented", "more-data"):
            evidence.row(
                key, "held-out minus training text, bits per byte", spread(gap, 3), spread(own_gap, 3), took, SEEDS
            )


if __name__ == "__main__":
    main()
