"""What `fastlm data clean` finds, on documents whose origin is known: `python bench/quality_clean.py`.

Prose of the standard library's documentation; junk (base64, minified code); HTML; German and French; Debian's copyright
files as real near-duplicates, against brute force; personal data planted with faker; a small model trained on raw and on
cleaned text; speed and memory at 100 MB and 1 GB. `--only PART` measures one part into the result that is there.
Needs `pip install -c constraints.txt faker`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from datatrove.data import Document
from faker import Faker
from fastlm.bench import small
from fastlm.bench.quality import Quality, spread
from fastlm.data.clean import near as joined
from fastlm.data.clean import pii, run, words
from fastlm.data.clean.options import CleanOptions, bands
from fastlm.data.corpus import stdlib_files
from fastlm.data.prepare import Options, prepare

MODULES = ["run", "rules", "near", "words", "pii", "read", "options"]
PLANTED = 1000
WIDTH, BATCH = 64, 8  # of the small model
PARTS = ("find", "train", "speed")


def prose() -> list[str]:
    from pydoc_data.topics import topics

    return [text for text in topics.values() if len(text.split()) >= 120]


def rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def edited(text: str, draw: random.Random) -> str:
    """Three words in a hundred are others."""
    parts = text.split(" ")
    for at in draw.sample(range(len(parts)), max(len(parts) * 3 // 100, 1)):
        parts[at] = draw.choice(parts)
    return " ".join(parts)


def framed(text: str) -> str:
    """A web page around a text."""
    menu = "".join(f'<li><a href="/{n}">Menu entry {n}</a></li>' for n in range(20))
    parts = "".join(f"<p>{html.escape(p)}</p>" for p in text.split("\n\n") if p.strip())
    return (f"<!DOCTYPE html><html><head><title>A page</title><script>var x = 1;</script></head><body><nav><ul>{menu}</ul>"
            f"</nav><article>{parts}</article><footer>Imprint Contact Terms of use</footer></body></html>")  # fmt: skip


def origins(draw: random.Random) -> dict[str, list[str]]:
    """Documents by origin. Prose and HTML are to stay, the rest is to go."""
    clean, (german, french) = prose(), (Faker(name) for name in ("de_DE", "fr_FR"))
    for faker in (german, french):
        faker.seed_instance(1)
    texts = lambda faker: ["\n\n".join(faker.texts(10, max_nb_chars=400)) for _ in range(50)]
    code = [p.read_text(errors="replace") for p in stdlib_files()[:60]]
    half = len(clean) // 2
    return {
        "prose": clean[:half],
        "html": [framed(text) for text in clean[half:]],
        "copy": [draw.choice(clean[:half]) for _ in range(40)],
        "edited": [edited(draw.choice(clean[:half]), draw) for _ in range(40)],
        "german": texts(german),
        "french": texts(french),
        "base64": [base64.b64encode(draw.randbytes(4000)).decode() for _ in range(50)],
        "minified": ["".join(text.split()) for text in code if len(text) > 2000],
        "repeated": [(text[:200].strip() + "\n") * 20 for text in clean[:50]],
        "lorem": [f"{text[:500]} Lorem ipsum dolor sit amet. {text[500:900]}" for text in clean[:30]],
    }


OFF: dict[str, Any] = {
    "repair": False, "html": False, "quality": "off", "repetition": "off", "c4": "off", "exact": False, "dedup": 0.0,
    "pii": "off",
}  # fmt: skip
ALONE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "languages": ({"lang": ("en",)}, ("german", "french")),
    "Gopher's quality rules": ({"quality": "gopher"}, ("base64", "minified")),
    "Gopher's repetition rules": ({"repetition": "gopher"}, ("repeated",)),
    "C4's rules of documents": ({"c4": "documents"}, ("lorem",)),
    "exact copies": ({"exact": True}, ("copy",)),
    "near-duplicates": ({"exact": True, "dedup": 0.7}, ("copy", "edited")),
    "all": ({"lang": ("en",), "quality": "gopher", "repetition": "gopher", "c4": "documents", "exact": True, "dedup": 0.7,
             "html": True}, ("copy", "edited", "german", "french", "base64", "minified", "repeated", "lorem")),
}  # fmt: skip
STAYS = ("prose", "html")


def by_origin(paths: Iterable[Path]) -> Counter[str]:
    """Rows of files by the origin that their source names."""
    found: Counter[str] = Counter()
    for path in paths:
        with path.open() as file:
            found.update(json.loads(line)["source"].partition(".")[0][2:] for line in file)
    return found


def corpus(folder: Path, given: dict[str, list[str]]) -> tuple[str, ...]:
    folder.mkdir()
    for number, (name, texts) in enumerate(given.items()):
        rows(folder / f"{number:02d}{name}.jsonl", texts)
    return (str(folder),)


def junk(evidence: Quality, folder: Path, draw: random.Random) -> None:
    """Each step alone, then all together, on the same documents."""
    begin = time.monotonic()
    given = origins(draw)
    names, lines = corpus(folder / "in", given), []
    for number, (step, (on, targets)) in enumerate(ALONE.items()):
        out = folder / f"out{number}"
        run.clean(names, out, CleanOptions(workers=1, **OFF | on), note=lambda _: None)
        kept = by_origin(out.glob("*.jsonl"))
        taken = Counter({name: len(texts) - kept[name] for name, texts in given.items()})
        wanted, wrong = sum(len(given[t]) for t in targets), sum(taken[name] for name in STAYS)
        hit = sum(taken[t] for t in targets)
        other = ", ".join(f"{name} {n}" for name, n in taken.items() if n and name not in (*targets, *STAYS))
        lines.append([step, " ".join(targets) if step != "all" else "all but prose and html", wanted, f"{hit / wanted:.3f}",
                      wrong, f"{(taken.total() - wrong) / max(taken.total(), 1):.3f}", other or "-"])  # fmt: skip
        print(*lines[-1], flush=True)
    evidence.table(
        "Each step alone, and all, by the origin of what it took",
        ["step", "is to take", "given", "recall", "prose and html taken", "precision", "took beside"],
        lines,
        "Given: " + ", ".join(f"{name} {len(texts)}" for name, texts in given.items()) + ". Precision: of what a step took, "
        "the share that is not prose or html.",
    )  # fmt: skip
    total, good = sum(map(len, given.values())), sum(len(given[name]) for name in STAYS)
    left = sum(kept[name] for name in STAYS)
    evidence.row(
        "existing", "share of documents kept that are clean prose (and of the clean prose, how much is kept)",
        f"{good / total:.3f}", f"{left / max(kept.total(), 1):.3f} ({left / good:.3f})", time.monotonic() - begin,
        note="copies, edited copies, base64, minified code, German, French, repeated text and lorem ipsum mixed in",
    )  # fmt: skip
    pages(evidence, folder / f"out{number}", given["html"])


def pages(evidence: Quality, out: Path, given: list[str]) -> None:
    """How much of the text of web pages comes through, and how much of what stands around it."""
    rows_ = [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.open()]
    texts = [row["text"] for row in rows_ if "html" in row["source"]]
    wanted = prose()[-len(given) :]
    words_of = lambda text: set(re.findall(r"\w{4,}", text))
    best = [max(len(words_of(t) & words_of(w)) / len(words_of(w)) for w in wanted) for t in texts]
    menu = sum("Menu entry" in t or "Imprint" in t for t in texts)
    evidence.table(
        "Main text of web pages",
        ["pages kept", "words of their text found", "with a menu or footer left"],
        [[len(texts), f"{statistics.mean(best):.3f}", menu]],
        "Pages with a menu, a script and a footer around prose.",
    )


def near(evidence: Quality, folder: Path) -> None:
    """The clusters that cleaning makes, against the Jaccard similarity of every pair."""
    begin = time.monotonic()
    texts = {p.read_text(errors="replace") for p in sorted(Path("/usr/share/doc").glob("*/copyright"))}
    chosen = [text for text in sorted(texts) if len(text) < 200_000][:400]
    found = [words.shingles(text) for text in chosen]
    count, height = bands(0.7)
    marks = [words.signature(s, count, height) for s in found]
    documents = (Document(t, str(n), metadata={"source": str(n)}) for n, t in enumerate(chosen))
    for step in (joined.Keep(folder / "near", count, height), joined.Link(folder / "near", count, True, 0.7)):
        list(step.run(documents))
    clusters = np.fromfile(folder / "near/near.forest", np.int64)
    links = np.fromfile(folder / "near/links", [("why", "u1"), ("of", "<i8"), ("similarity", "<f4")])
    close = candidates = met = together = 0
    for a in range(len(found)):
        for b in range(a):
            true = words.jaccard(found[a], found[b]) >= 0.7
            candidate = bool((marks[a] == marks[b]).any())
            close, candidates, met = close + true, candidates + candidate, met + (true and candidate)
            together += true and clusters[a] == clusters[b]
    linked = [(n, int(row["of"])) for n, row in enumerate(links) if row["why"] == 2]
    right = sum(words.jaccard(found[a], found[b]) >= 0.7 for a, b in linked)
    evidence.table(
        "Near-duplicates against brute force (Debian's copyright files, Jaccard 0.7)",
        ["files", "true pairs", "candidates", "recall of candidates", "recall of clusters", "links", "precision of links"],
        [[len(found), close, candidates, f"{met / max(close, 1):.4f}", f"{together / max(close, 1):.4f}", len(linked),
          f"{right / max(len(linked), 1):.4f}"]],
        f"{count} bands of {height} hashes; exact copies are taken out before. {time.monotonic() - begin:.0f} s.",
    )  # fmt: skip


def trained(evidence: Quality, folder: Path, draw: random.Random, steps: int) -> None:
    """Bits per byte of held-out clean prose after equal tokens of raw and of cleaned text."""
    begin = time.monotonic()
    found = small.documents()
    held, own = small.take(found, 60_000), small.take(found, 300_000)
    german = Faker("de_DE")
    german.seed_instance(3)
    code = [p.read_text(errors="replace")[:6000] for p in stdlib_files()[::8]]
    size = sum(map(len, own))
    raw = own + draw.choices(own[:20], k=len(own) // 4)
    for make in (lambda: base64.b64encode(draw.randbytes(3000)).decode(), lambda: "".join(draw.choice(code).split()),
                 lambda: "\n".join(german.texts(10, max_nb_chars=400)),
                 lambda: (draw.choice(own)[:150].strip() + "\n") * 20):  # fmt: skip
        share = 0
        while share < size // 8:
            raw.append(make())
            share += len(raw[-1])
    draw.shuffle(raw)
    rows(folder / "raw.jsonl", raw)
    run.clean(
        (str(folder / "raw.jsonl"),), folder / "clean", CleanOptions(workers=1, lang=("en",)), note=lambda _: None
    )
    options, cache = Options(val_fraction=0.02), folder / "cache"
    rows(folder / "held.jsonl", held)
    held_data = prepare((str(folder / "held.jsonl"),), options, whole=True, cache=cache)
    results = {}
    for name, path in (("raw", folder / "raw.jsonl"), ("cleaned", folder / "clean")):
        data = prepare((str(path),), options, cache=cache)
        results[name] = [
            small.train([data], (1.0,), held_data, held_data, steps, seed, WIDTH, BATCH)[0] for seed in small.SEEDS
        ]
        print(name, data.manifest["train"]["bytes"], spread(results[name]), flush=True)
    tokens = steps * small.CONTEXT * BATCH
    evidence.row(
        "existing", f"bits per byte of held-out clean prose after {tokens / 1e6:.1f} M tokens of raw and of cleaned text",
        spread(results["raw"]), spread(results["cleaned"]), time.monotonic() - begin, small.SEEDS,
        note="half of the raw text is copies, base64, minified code, German and repeated text",
    )  # fmt: skip


def speed(evidence: Quality, folder: Path, sizes: list[int]) -> None:
    """MB/s and peak memory of the command, all its processes together, at several sizes."""
    draw, lines = random.Random(4), []
    pool = [s for text in prose() for s in text.replace("\n", " ").split(". ") if 20 < len(s) < 400]
    for size in sizes:
        path = folder / f"{size}.jsonl"
        with path.open("w") as file:
            while file.tell() < size * 1_000_000:
                text = ". ".join(draw.choices(pool, k=40))
                file.write(json.dumps({"text": f"{text}. {draw.random()}"}) + "\n")
        begin, peak = time.monotonic(), 0
        command = [sys.executable, "-m", "fastlm", "data", "clean", str(path), "--out", str(folder / f"out-{size}"),
                   "--workers", "2"]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.2)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        seconds = time.monotonic() - begin
        lines.append([f"{size} MB", f"{seconds:.1f}", f"{size / seconds:.1f}", f"{peak / 2**20:,.0f}"])
        print(*lines[-1], flush=True)
        path.unlink()
        shutil.rmtree(folder / f"out-{size}")
    evidence.table("Speed and memory of the whole command", ["corpus", "seconds", "MB/s", "peak MiB, all processes"], lines,
                   "Two processes, all default steps; rows of forty sentences.")  # fmt: skip


def resident(pid: int) -> int:
    """Bytes that a process and those below it hold alone; what they share counts once for each, in parts."""
    total = 0
    try:
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def planted(evidence: Quality, draw: random.Random) -> None:
    faker = Faker("en_US")
    faker.seed_instance(2)
    phone = lambda: draw.choice(["({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "+1 {} {} {}"]).format(
        draw.randint(201, 989), draw.randint(200, 999), f"{draw.randint(0, 9999):04d}"
    )
    makers = {
        "email": faker.email, "ip": faker.ipv4_public, "iban": faker.iban,
        "card": lambda: faker.credit_card_number(draw.choice(["visa16", "mastercard", "amex", "discover"])),
        "phone": phone,
    }  # fmt: skip
    table = []
    for kind, make in makers.items():
        hit = 0
        for _ in range(PLANTED):
            value, sentence = make(), faker.sentence()
            text = f"{sentence} {value} {faker.sentence()}"
            at = len(sentence) + 1
            hit += any(k == kind and s <= at and e >= at + len(value) for s, e, k in pii.find(text))
        table.append([kind, PLANTED, f"{hit / PLANTED:.3f}"])
    size, alarms = 0, Counter[str]()
    for path in stdlib_files():
        text = path.read_text(errors="replace")
        size += len(text)
        alarms.update(kind for *_, kind in pii.find(text) if kind != "email")
    said = ", ".join(f"{k} {n}" for k, n in alarms.items()) or "none"
    evidence.table(
        "Personal data planted with faker", ["kind", "planted", "recall"], table,
        f"In {size / 1e6:.1f} MB of the standard library's source, e-mail apart (its addresses are real): {said}; "
        f"{sum(alarms.values()) / (size / 1e6):.2f} finds per MB.",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="measure this part alone, into the result that is there")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[100, 1000], metavar="MB", help="corpora of the speed part"
    )
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run")
    parser.add_argument("--provisional", default="", metavar="WHY", help="why times are not to be trusted")
    args = parser.parse_args()
    evidence = Quality(__file__, [f"fastlm.data.clean.{m}" for m in MODULES], provisional=args.provisional)
    with tempfile.TemporaryDirectory(prefix="fastlm-clean-") as name:
        folder = Path(name)
        if args.only in (None, "find"):
            junk(evidence, folder, random.Random(0))
            near(evidence, folder)
            planted(evidence, random.Random(2))
        if args.only in (None, "train"):
            trained(evidence, folder, random.Random(5), args.steps)
        if args.only in (None, "speed"):
            speed(evidence, folder, args.sizes)
    evidence.save(part=args.only is not None)


if __name__ == "__main__":
    main()
