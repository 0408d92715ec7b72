"""What `fastlm data clean` finds, on documents whose origin is known: `python bench/quality_clean.py`.

Prose of the standard library's documentation; junk (base64, minified code); HTML; German; Debian's copyright files as
real near-duplicates, against brute force; personal data planted with faker. Needs `pip install faker`.
"""

from __future__ import annotations

import base64
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from fastlm.bench.quality import Quality
from fastlm.data.clean import pii, run, words
from fastlm.data.clean.options import CleanOptions, bands
from fastlm.data.corpus import stdlib_files

MODULES = ["run", "rules", "near", "words", "pii", "read", "options"]
PLANTED = 1000


def prose() -> list[str]:
    from pydoc_data.topics import topics

    return [text for text in topics.values() if len(text.split()) >= 120]


def rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def origins(draw: random.Random) -> dict[str, list[str]]:
    from faker import Faker

    faker = Faker("de_DE")
    faker.seed_instance(1)
    clean = prose()
    code = [p.read_text(errors="replace") for p in stdlib_files()[:60]]
    return {
        "prose": clean,
        "copy": [draw.choice(clean) for _ in range(40)],
        "base64": [base64.b64encode(draw.randbytes(4000)).decode() for _ in range(50)],
        "minified": ["".join(text.split()) for text in code if len(text) > 2000],
        "german": ["\n\n".join(faker.texts(10, max_nb_chars=400)) for _ in range(50)],
        "repeated": [(text[:200].strip() + "\n") * 20 for text in clean[:50]],
    }


def by_rule(folder: Path) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Origins of what each rule dropped, and of what was kept."""
    dropped: dict[str, Counter[str]] = {}
    for path in (folder / ".clean/dropped").glob("*/*.jsonl"):
        with path.open() as file:
            dropped.setdefault(path.parent.name, Counter()).update(
                json.loads(line)["source"].partition(".")[0] for line in file
            )
    kept: Counter[str] = Counter()
    for path in folder.glob("*.jsonl"):
        with path.open() as file:
            kept.update(json.loads(line)["source"].partition(".")[0] for line in file)
    return dropped, kept


def junk(evidence: Quality, folder: Path, draw: random.Random) -> None:
    begin = time.monotonic()
    given = origins(draw)
    (folder / "in").mkdir()
    for number, (name, texts) in enumerate(given.items()):
        rows(folder / "in" / f"{number}{name}.jsonl", texts)
    options = CleanOptions(lang=("en",), workers=2)
    table = run.clean((str(folder / "in"),), folder / "out", options)
    assert table is not None
    dropped, kept = by_rule(folder / "out")
    named = lambda counts: ", ".join(f"{name[1:]} {n}" for name, n in counts.most_common())
    evidence.table(
        "What each rule took, by origin",
        ["rule", "documents", "origins"],
        [[rule, sum(c.values()), named(c)] for rule, c in sorted(dropped.items(), key=lambda i: -sum(i[1].values()))],
        "Given: " + ", ".join(f"{name} {len(texts)}" for name, texts in given.items()) + ".",
    )
    total = sum(map(len, given.values()))
    wanted, left = len(given["prose"]), kept["0prose"]
    bad = sum(kept.values()) - left
    evidence.row(
        "existing", "share of documents kept that are clean prose (and of the clean prose, how much is kept)",
        f"{wanted / total:.3f}", f"{left / max(left + bad, 1):.3f} ({left / wanted:.3f})", time.monotonic() - begin,
        note="copies, base64, minified code, German and repeated text mixed in",
    )  # fmt: skip


def near(evidence: Quality, draw: random.Random) -> None:
    begin = time.monotonic()
    texts = {p.read_text(errors="replace") for p in sorted(Path("/usr/share/doc").glob("*/copyright"))}
    found = [words.shingles(text) for text in sorted(texts) if len(text) < 200_000][:400]
    count, height = bands(0.7)
    marks = [words.signature(s, count, height) for s in found]
    close = candidates = hits = 0
    for a in range(len(found)):
        for b in range(a):
            true = words.jaccard(found[a], found[b]) >= 0.7
            candidate = bool((marks[a] == marks[b]).any())
            close, candidates, hits = close + true, candidates + candidate, hits + (true and candidate)
    evidence.table(
        "Near-duplicate pairs against brute force (Debian's copyright files, Jaccard 0.7)",
        ["files", "true pairs", "candidates", "recall", "precision of candidates", "precision once checked"],
        [[len(found), close, candidates, f"{hits / max(close, 1):.4f}", f"{hits / max(candidates, 1):.3f}", "1.000"]],
        f"{count} bands of {height} hashes; exact copies are taken out before. {time.monotonic() - begin:.0f} s.",
    )


def planted(evidence: Quality, draw: random.Random) -> None:
    from faker import Faker

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
    evidence = Quality(
        __file__, [f"fastlm.data.clean.{m}" for m in MODULES], provisional="other programs ran beside it"
    )
    with tempfile.TemporaryDirectory() as folder:
        junk(evidence, Path(folder), random.Random(0))
    near(evidence, random.Random(1))
    planted(evidence, random.Random(2))
    evidence.save()


if __name__ == "__main__":
    main()
