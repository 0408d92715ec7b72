"""A look at one text as one HTML file: nothing in it refers to a network, and no text of a prompt is ever markup."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from fastlm.data import pages

MARK = "fastlm inspect"  # by which a page of ours is known, so that no other file is overwritten
_FILES = Path(__file__).parent


def is_own(path: Path) -> bool:
    """Whether a file is a page that `write` may take the place of."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return f"<!-- {MARK} -->" in file.read(1 << 16)


def data(found: dict[str, Any]) -> str:
    """JSON that ends no script element and opens no comment, whatever text it holds."""
    text = json.dumps(found, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(found: dict[str, Any], title: str, about: str) -> str:
    """The whole page of what `look.look` found. `about` says of what model it is."""
    found = found | {"open": _opening(found["loss"])}
    held, gain = found["attention"]["held"], found["saliency"]
    style, script = (_FILES.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    parts = [
        f"<!-- {MARK} --><style>{style}</style>",
        f'<h1>A look inside {html.escape(title)}</h1><p class="sub">{html.escape(about)}</p>',
        f'<div class="tiles">{_tiles(found)}</div>',
        _BAR,
        _LOSS,
        _attention(held, found["attention"]["left"]),
        _LENS,
        _saliency(gain),
        _table(found),
        f'<p class="foot">{_FOOT}</p>',
        f'<script type="application/json" id="look">{data(found)}</script><script>{script}</script>',
        "<noscript><p>The pictures of this page need JavaScript; the table of losses does not.</p></noscript>",
    ]
    return pages.document(f"A look inside {title}", "\n".join(part for part in parts if part))


def _opening(loss: list[float | None]) -> int:
    """The step that the page opens with: the most surprising one."""
    return max(range(1, len(loss)), key=lambda at: loss[at] or 0.0)


def _tiles(found: dict[str, Any]) -> str:
    losses, ranks = found["loss"][1:], found["rank"][1:]
    mean = sum(losses) / len(losses)
    cells = [
        (f"{len(found['tokens']):,}", "tokens"),
        (f"{mean:.3f}", "nats a token, the mean loss"),
        (f"{math.exp(min(mean, 700)):,.4g}", "perplexity"),
        (f"{sum(r == 1 for r in ranks) / len(ranks):.0%}", "were the model's first guess"),
        (f"{median(ranks):,.0f}", f"median rank of {found['vocab']:,}"),
    ]
    return "".join(f'<div class="tile"><b>{value}</b><span>{html.escape(what)}</span></div>' for value, what in cells)


_BAR = """<div id="bar"><div class="row">
<button class="tick" id="back" type="button" aria-label="the token before">←</button>
<button class="tick" id="on" type="button" aria-label="the next token">→</button>
<div id="said" aria-live="polite"></div></div></div>"""
_LOSS = """<h2>What surprised it</h2><div class="card">
<p class="lead">Each token's loss, by what stands before it. Choose one here, in any strip or table below, or with
<kbd>←</kbd> <kbd>→</kbd>; everything then shows the step that predicts it.</p>
<div class="two"><div><div class="strip" id="loss"></div>
<div class="key">0 <i class="of-loss"></i> <span id="lossmost"></span></div></div>
<div><p class="lead" id="guessed"></p><div id="guesses"></div></div></div></div>"""
_LENS = """<h2>Layer by layer</h2><div class="card">
<p class="lead">The logit lens: what the model would say if it ended after each layer. The top row is what it says. The
stronger the colour, the surer; underlined where it is the token that came.</p>
<div class="scroll" tabindex="0" role="region" aria-label="the logit lens"><table class="lens" id="lens"></table></div>
<p class="lead gap" id="pathsaid"></p><div id="path"></div></div>"""
_FOOT = """Positions count from 0. Loss is in nats. Weights of attention are exact to 0.4%, saliency to 0.4% of the largest in
its row. Made by <code>fastlm inspect</code>; the file holds all it needs."""


def _attention(held: dict[int, list[str]], left: str) -> str:
    note = f'<p class="tip">{html.escape(left)}</p>' if left else ""
    if not held:
        return f'<h2>What it looked at</h2><div class="card"><p>This model\'s attention cannot be seen.</p>{note}</div>'
    return f"""<h2>What it looked at</h2><div class="card">
<div class="pick"><label>layer <select id="layer"></select></label><label>head <select id="head"></select></label>
<span>or choose a picture: a row a layer, a column a head</span></div>
<div class="heads" tabindex="0" role="region" aria-label="all heads"><div class="grid" id="grid"></div></div>
<p class="lead gap" id="seensaid"></p>
<div class="two"><div><div class="strip" id="seen"></div><div class="gap" id="seentop"></div></div>
<div><canvas id="map" role="img" aria-label="weights: a row for each position, a column for each it looks at"></canvas>
<p class="tip" id="tip">Rows look, columns are looked at.</p></div></div>{note}</div>"""


def _saliency(gain: dict[str, Any]) -> str:
    note = f'<p class="tip">{html.escape(gain["left"])}</p>' if gain["left"] else ""
    if "rows" not in gain:
        return f'<h2>What mattered</h2><div class="card">{note}</div>'
    toggle = ""
    if gain["count"] > 1:
        toggle = '<div class="pick"><label><input type="checkbox" id="whole"> for the whole text</label></div>'
    return f"""<h2>What mattered</h2><div class="card">
<p class="lead">Integrated gradients of the tokens' embeddings, in {gain["steps"]} steps from the text's mean embedding. For
the whole text their sum is {gain["off"]:.2%} off.</p>{toggle}
<p class="lead" id="gainsaid"></p><div class="strip" id="gain"></div>
<div class="key">less likely <i class="of-gain"></i> more likely, up to <span id="gainmost"></span></div>{note}</div>"""


def _table(found: dict[str, Any]) -> str:
    rows = []
    for at, token in enumerate(found["tokens"]):
        loss = found["loss"][at]
        shown = html.escape(found["pieces"][token][0])
        cells = ("", "", "") if loss is None else (f"{loss:.3f}", f"{math.exp(-loss):.3g}", f"{found['rank'][at]:,}")
        rows.append((str(at), f"<code>{shown}</code>", str(token), *cells))
    head = ("", "token", "number", "loss", "probability", "rank")
    table = pages.table(head, rows, frozenset({0, 2, 3, 4, 5}))
    return f'<details class="card"><summary>Loss and rank of each token as a table</summary>{table}</details>'
