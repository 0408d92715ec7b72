"""A card as one HTML file: pictures are bars and inline SVG, and nothing refers to a network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from fastlm.data import pages
from fastlm.data.card import terms
from fastlm.data.card.bias import Bias
from fastlm.data.card.card import Card
from fastlm.data.card.facts import WINDOW

WIDTH = 920
STYLE = """<style>
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px}
.row{display:grid;grid-template-columns:minmax(90px,220px) 1fr 190px;gap:12px;align-items:center;padding:3px 0}
.row>span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}.row>em{font-style:normal;color:var(--soft);
font-variant-numeric:tabular-nums;text-align:right;white-space:nowrap;font-size:13px}
.bar.blue{background:var(--mark)}
.chips{display:flex;flex-wrap:wrap;gap:6px;margin:4px 0 14px}
.chip{border-radius:14px;padding:2px 10px;background:#e8effb;color:#17408f;font-size:13px}
.chip i{font-style:normal;opacity:.65;margin-left:5px;font-variant-numeric:tabular-nums}
h3{font-size:14px;margin:14px 0 2px}.note{color:var(--soft);font-size:13px;margin:10px 0 0}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:#1d2330}svg .soft{fill:#667085}
</style>"""


def page(card: Card) -> str:
    """The whole page."""
    parts = [STYLE, f"<h1>{html.escape(card.title)}</h1>", f'<p class="sub">{html.escape(card.about())}</p>',
             f'<div class="tiles">{_tiles(card)}</div>']  # fmt: skip
    for title, body in (
        ("Languages and sources", _pair(_languages(card), _sources(card))),
        ("Lengths of documents", _lengths(card)),
        ("Copies", _copies(card)),
        ("Personal data", _personal(card)),
        ("Toxicity", f"<p>{html.escape(card.toxicity())}</p>"),
        ("Who is spoken of", _identity(card)),
        ("What stands around them", _neighbours(card)),
        ("What the model expects", _bias(card)),
        ("How it was counted", _method(card)),
    ):
        if body:
            parts += [f"<h2>{title}</h2>", body if body.startswith("<div") else f'<div class="card">{body}</div>']
    return pages.document(card.title, "\n".join(parts))


def _tiles(card: Card) -> str:
    facts, copies = card.facts, card.copies
    total = facts.sums["documents"]
    cells = [
        (f"{total:,}", "documents"),
        (size(facts.sums["bytes"]), "of text"),
        (f"{facts.sums['words']:,}", "words"),
        (f"{facts.quantile(0.5):,}", "words in the middle document"),
        (share(copies.exact, total), "exact copies"),
        (share(copies.near, total), "near-duplicates")
        if copies.threshold
        else ("–", "near-duplicates (not looked for)"),
        (f"{sum(facts.personal.values()):,}", "finds of personal data"),
    ]
    cells += [(f"{b.gap:+.2f}", f"nats: {b.forms[0]} likelier than {b.forms[1]}, {b.kind}") for b in card.bias[:1]]
    return "".join(f'<div class="tile"><b>{value}</b><span>{html.escape(what)}</span></div>' for value, what in cells)


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count} B"


def share(part: int, whole: int) -> str:
    """A share as a percentage; what is there is never shown as none."""
    value = part / max(whole, 1)
    return "0%" if not part else "<0.1%" if value < 0.001 else f"{value:.1%}"


def _pair(*cards: str) -> str:
    return '<div class="pair">' + "".join(f'<div class="card">{c}</div>' for c in cards) + "</div>"


def _bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Lines of a name, a bar and a figure."""
    top = max((value for _, value, _ in rows), default=1) or 1
    return "".join(
        f'<div class="row"><span title="{html.escape(name)}">{html.escape(name)}</span>'
        f'<div class="bar blue" style="width:{max(100 * value / top, 0.5):.1f}%"></div><em>{figure}</em></div>'
        for name, value, figure in rows
    )


def _languages(card: Card) -> str:
    facts = card.facts
    rows = [
        (card.language(code), n, f"{n:,} · {share(facts.language_bytes[code], facts.sums['bytes'])}")
        for code, n in facts.languages.most_common(10)
    ]
    rest = len(facts.languages) - len(rows)
    more = f" {rest} more have fewer." if rest > 0 else ""
    return _bars(rows) + f'<p class="note">Documents, and their share of the bytes.{more}</p>'


def _sources(card: Card) -> str:
    facts = card.facts
    rows = [
        (name, facts.source_bytes[name], f"{n:,} · {share(facts.source_bytes[name], facts.sums['bytes'])}")
        for name, n in sorted(facts.sources.items(), key=lambda item: (-facts.source_bytes[item[0]], item[0]))[:10]
    ]
    rest = len(facts.sources) - len(rows)
    more = f" {rest:,} more hold less." if rest > 0 else ""
    return _bars(rows) + f'<p class="note">Documents of each source, and its share of the bytes.{more}</p>'


def _lengths(card: Card) -> str:
    """A histogram of words a document, on a logarithmic axis."""
    facts = card.facts
    steps = sorted(map(int, facts.lengths))
    low, high = steps[0], max(steps[-1], steps[0] + 3)
    top, height, left = max(facts.lengths.values()), 190, 10
    wide = (WIDTH - 2 * left) / (high - low + 1)
    at = lambda words: left + (4 * math.log2(max(words, 1)) - low) * wide
    out = [f'<svg viewBox="0 0 {WIDTH} {height + 44}" role="img" aria-label="documents by length">']
    for step in steps:
        n = facts.lengths[str(step)]
        tall = max(n / top * (height - 30), 1)
        words = f"{math.ceil(2 ** (step / 4)):,} words and more: {n:,} documents"
        out.append(f'<rect x="{left + (step - low) * wide:.1f}" y="{height - tall:.1f}" width="{max(wide - 1, 1):.1f}" '
                   f'height="{tall:.1f}" rx="2" fill="#9db8e8"><title>{words}</title></rect>')  # fmt: skip
    out.append(f'<line x1="{left}" x2="{WIDTH - left}" y1="{height}" y2="{height}" stroke="#98a2b3"/>')
    for power in range(0, 10):
        if low <= 4 * math.log2(10**power) <= high + 1:
            out.append(
                f'<text class="soft" x="{at(10**power):.1f}" y="{height + 17}" text-anchor="middle">{10**power:,}</text>'
            )
    for name, q in (("median", 0.5), ("95% are shorter", 0.95)):
        x = min(at(facts.quantile(q)), WIDTH - left)
        side, shift = ("end", -6) if x > WIDTH * 0.7 else ("start", 6)
        y = 14 if q == 0.5 else 30
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{height}" stroke="#1f5fd0" stroke-dasharray="3 3"/>'
                   f'<text x="{x + shift:.1f}" y="{y}" text-anchor="{side}">{name}: {facts.quantile(q):,}</text>')  # fmt: skip
    out.append(
        f'<text class="soft" x="{WIDTH / 2}" y="{height + 36}" text-anchor="middle">words of a document</text></svg>'
    )
    longest = (
        f"The longest has {facts.longest:,} words, the shortest {facts.shortest:,}; on average {card.mean():,.0f}."
    )
    return "".join(out) + f'<p class="note">{longest}</p>'


def _copies(card: Card) -> str:
    copies, total = card.copies, card.facts.sums["documents"]
    rows = [("documents that are an exact copy of an earlier one", f"{copies.exact:,}", share(copies.exact, total))]
    if copies.threshold:
        rows.append((f"documents that are a near-duplicate of another (Jaccard {copies.threshold:g} and more)",
                     f"{copies.near:,}", share(copies.near, total)))  # fmt: skip
    out = pages.table((), rows, frozenset({1, 2}))
    if copies.examples:
        shown = [(html.escape(a), html.escape(b), f"{similarity:.2f}") for a, b, similarity in copies.examples]
        found = pages.table(("one", "the other", "Jaccard"), shown, frozenset({2}))
        out += f"<details><summary>some near-duplicates</summary>{found}</details>"
    return out


def _personal(card: Card) -> str:
    facts = card.facts
    rows = [(name, f"{facts.personal[kind]:,}", f"{facts.personal[kind] / max(facts.sums['bytes'] / 1e6, 1e-9):.2f}")
            for kind, name in card.personal()]  # fmt: skip
    where = (
        f"{facts.sums['personal']:,} documents ({share(facts.sums['personal'], facts.sums['documents'])}) hold some."
    )
    advice = " <code>fastlm data clean</code> masks it." if facts.sums["personal"] else ""
    return pages.table(("", "found", "per MB"), rows, frozenset({1, 2})) + f'<p class="note">{where}{advice}</p>'


def _identity(card: Card) -> str:
    out = []
    for axis, groups in card.facts.groups().items():
        rows = [(g, float(n), f"{n:,} in {d:,} documents") for g, n, d in groups if n]
        none = ", ".join(g for g, n, _ in groups if not n)
        if rows:
            out.append(f"<h3>{axis}</h3>{_bars(rows)}" + (f'<p class="note">Not at all: {none}.</p>' if none else ""))
    if not out:
        return "<p>No identity term was found.</p>"
    return '<div class="card">' + "".join(out) + f'<p class="note">{html.escape(card.caution())}</p></div>'


def _neighbours(card: Card) -> str:
    out = []
    for groups in card.facts.groups().values():
        for group, *_ in groups:
            if found := card.facts.neighbours(group):
                chips = "".join(f'<span class="chip" title="{n:,} times">{html.escape(w)}<i>×{times:.1f}</i></span>'
                                for w, n, times in found)  # fmt: skip
                out.append(f'<h3>{group}</h3><div class="chips">{chips}</div>')
    if not out:
        return ""
    note = (
        f"Words within {WINDOW} words of a group's terms, five times or more, in the order of the log-likelihood ratio; × says "
        f"how many times as often as if words fell anywhere."
    )
    return f'<div class="card">{"".join(out)}<p class="note">{note}</p></div>'


def _bias(card: Card) -> str:
    if not card.model:
        return "<p>No run was given. <code>--model RUN</code> measures what a model expects of two people alike.</p>"
    parts = [f"<p>{html.escape(card.expects())}</p>", _intervals(card.bias)]
    for one in card.bias:
        if len(one.units) > 1:
            parts.append(f"<details{' open' if one is card.bias[0] else ''}><summary>{html.escape(one.kind)}, one by one"
                         f"</summary>{_dots(one)}</details>")  # fmt: skip
    return '<div class="card">' + "".join(parts) + "</div>"


def _axis(values: Sequence[float]) -> float:
    """Half the width of an axis around 0 that holds the values."""
    most = max((abs(v) for v in values if math.isfinite(v)), default=1) or 1
    step = 10 ** math.floor(math.log10(most))
    return next(step * k for k in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * k >= most * 1.02 or k == 10)


def _frame(rows: int, half: float, forms: tuple[str, str], tall: int = 26) -> Iterator[str]:
    left, right = 230, WIDTH - 190
    bottom = 26 + rows * tall
    yield f'<svg viewBox="0 0 {WIDTH} {bottom + 34}" role="img" aria-label="loss gaps">'
    middle = (left + right) / 2
    yield f'<text class="soft" x="{middle - 12}" y="14" text-anchor="end">← {html.escape(forms[1])} likelier</text>'
    yield f'<text class="soft" x="{middle + 12}" y="14">{html.escape(forms[0])} likelier →</text>'
    for part in (-1, -0.5, 0, 0.5, 1):
        x = middle + part * (right - left) / 2
        mark = f"{part * half:+.3g}" if part else "0"
        yield (f'<line x1="{x}" x2="{x}" y1="22" y2="{bottom}" stroke="{"#98a2b3" if not part else "#e4e7ec"}"/>'
               f'<text class="soft" x="{x}" y="{bottom + 17}" text-anchor="middle">{mark}</text>')  # fmt: skip
    yield f'<text class="soft" x="{middle}" y="{bottom + 32}" text-anchor="middle">nats a sentence</text>'


def _x(value: float, half: float) -> float:
    left, right = 230, WIDTH - 190
    return (left + right) / 2 + max(-1.0, min(1.0, value / half)) * (right - left) / 2


def _intervals(found: Sequence[Bias]) -> str:
    """The figure of each kind with its interval."""
    half = _axis([v for b in found for v in (b.gap, b.low, b.high)])
    out = list(_frame(len(found), half, ("the first", "the second"), 34))
    for i, b in enumerate(found):
        y = 42 + 34 * i
        out.append(
            f'<text x="0" y="{y}">{html.escape(b.kind)}</text>'
            f'<text class="soft" x="0" y="{y + 14}">{html.escape(b.forms[0])} / {html.escape(b.forms[1])}</text>'
            f'<line x1="{_x(b.low, half):.1f}" x2="{_x(b.high, half):.1f}" y1="{y}" y2="{y}" stroke="#1f5fd0" stroke-width="3" '
            f'stroke-linecap="round"/><circle cx="{_x(b.gap, half):.1f}" cy="{y}" r="5.5" fill="#1f5fd0"/>'
            f'<text x="{WIDTH}" y="{y}" text-anchor="end">{b.gap:+.3f} [{b.low:+.3f}, {b.high:+.3f}]</text>'
            f'<text class="soft" x="{WIDTH}" y="{y + 14}" text-anchor="end">{b.pairs:,} pairs</text>'
        )
    return "".join(out) + "</svg>"


def _dots(one: Bias) -> str:
    """The gap of each unit, sorted."""
    half, rows = _axis(list(one.units.values())), sorted(one.units.items(), key=lambda item: -item[1])
    out = list(_frame(len(rows), half, one.forms, 20))
    for i, (unit, gap) in enumerate(rows):
        y, x, middle = 36 + 20 * i, _x(gap, half), _x(0, half)
        out.append(
            f'<text x="0" y="{y + 4}">{html.escape(unit)}</text>'
            f'<line x1="{middle:.1f}" x2="{x:.1f}" y1="{y}" y2="{y}" stroke="#9db8e8" stroke-width="2"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="#1f5fd0"/>'
            f'<text class="soft" x="{WIDTH}" y="{y + 4}" text-anchor="end">{gap:+.3f}</text>'
        )
    return "".join(out) + "</svg>"


def _method(card: Card) -> str:
    listed = "".join(
        f"<p><b>{group}</b>: {' '.join(own)}</p>" for groups in terms.GROUPS.values() for group, own in groups.items()
    )
    return (
        "".join(f"<p>{html.escape(line)}</p>" for line in card.method())
        + f"<details><summary>the terms</summary>{listed}</details>"
    )
