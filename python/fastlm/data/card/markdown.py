"""A card in Hugging Face's dataset-card format: YAML that the hub reads, and sections of its template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fastlm.data.card.card import Card
from fastlm.data.card.page import share, size
from fastlm.data.card.sheet import cell, is_own, sealed, table
from fastlm.data.errors import InputError

_STEPS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_MAKER = "fastlm data card"


def size_category(documents: int) -> str:
    """The hub's word for a number of documents."""
    for at, name in enumerate(_STEPS):
        if documents < 10 ** (at + 3):
            return f"{_STEPS[at - 1]}<n<{name}" if at else "n<1K"
    return "n>1T"


def text(card: Card) -> str:
    """The card, with a last line that tells whether it was edited since."""
    return sealed("\n".join(_lines(card)) + "\n", _MAKER)


def refuse_edited(path: Path) -> None:
    """InputError where writing would take what someone wrote: a file that is no card, or one that was edited."""
    if path.exists() and not is_own(path, _MAKER):
        raise InputError(f"{path} was written or edited by someone: move it away, or give another --out")


def _header(card: Card) -> Iterator[str]:
    codes = card.languages()
    yield "---"
    yield f"pretty_name: {json.dumps(cell(card.title), ensure_ascii=False)}"
    if codes:
        yield "language:"
        yield from (f"- {json.dumps(code)}" for code in codes)  # quoted: YAML reads no as false
        yield f"multilinguality:\n- {'monolingual' if len(codes) == 1 else 'multilingual'}"
    yield f"size_categories:\n- {size_category(card.facts.sums['documents'])}"
    yield "task_categories:\n- text-generation"
    yield "task_ids:\n- language-modeling"
    yield "---"


def _lines(card: Card) -> Iterator[str]:
    facts, copies, total = card.facts, card.copies, card.facts.sums["documents"]
    yield from _header(card)
    yield f"\n# {cell(card.title)}\n"
    yield f"Made by `fastlm data card` on {card.date}. What only people know (licence, consent, purpose) is theirs to add.\n"
    yield "## Dataset Description\n"
    yield from table(("", "figure"), [
        ("documents", f"{total:,}"), ("text", size(facts.sums["bytes"])), ("words", f"{facts.sums['words']:,}"),
        ("words of a document: mean", f"{card.mean():,.0f}"),
        *((f"words of a document: {name}", f"{facts.quantile(q):,}") for name, q in
          (("5% are shorter", 0.05), ("median", 0.5), ("95% are shorter", 0.95))),
        ("longest, shortest", f"{facts.longest:,}, {facts.shortest:,}"),
        ("exact copies", f"{copies.exact:,} ({share(copies.exact, total)})"),
        ("near-duplicates", f"{copies.near:,} ({share(copies.near, total)})" if copies.threshold else "not looked for"),
    ])  # fmt: skip
    yield "### Languages\n"
    yield from table(("language", "documents", "share of bytes"), [
        (card.language(code), f"{n:,}", share(facts.language_bytes[code], facts.sums["bytes"]))
        for code, n in facts.languages.most_common(20)
    ])  # fmt: skip
    yield "## Dataset Creation\n\n### Source Data\n"
    ordered = sorted(facts.sources.items(), key=lambda item: (-facts.source_bytes[item[0]], item[0]))
    yield from table(("source", "documents", "share of bytes"), [
        (name, f"{n:,}", share(facts.source_bytes[name], facts.sums["bytes"])) for name, n in ordered[:20]
    ])  # fmt: skip
    yield "### Personal and Sensitive Information\n"
    yield from table(("kind", "found"), [(name, f"{facts.personal[kind]:,}") for kind, name in card.personal()])
    yield f"{facts.sums['personal']:,} documents ({share(facts.sums['personal'], total)}) hold some.\n"
    yield f"Toxicity: {card.toxicity()}\n"
    yield "## Bias, Risks, and Limitations\n\n### Who is spoken of\n"
    yield card.caution() + "\n"
    yield from table(("group", "mentions", "documents", "around them more than elsewhere"), [
        (group, f"{n:,}", f"{docs:,}", ", ".join(f"{w} ×{times:.1f}" for w, _, times in facts.neighbours(group, 8)) or "-")
        for groups in facts.groups().values() for group, n, docs in groups if n
    ])  # fmt: skip
    yield from _expected(card)
    yield "### How it was counted\n"
    yield from (f"- {line}" for line in card.method())


def _expected(card: Card) -> Iterator[str]:
    if not card.model:
        return
    yield "### What a model expects\n"
    yield card.expects() + "\n"
    yield from table(("pairs", "first / second", "loss gap, nats", "95% interval", "pairs", "first likelier"), [
        (b.kind, f"{b.forms[0]} / {b.forms[1]}", f"{b.gap:+.3f}", f"[{b.low:+.3f}, {b.high:+.3f}]", f"{b.pairs:,}",
         f"{b.first_likelier:.0%}") for b in card.bias
    ])  # fmt: skip
