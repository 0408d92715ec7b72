"""Pages of one file: their look, tables, and the shell that holds them. Nothing in one refers to a network."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#e4e7ec;--back:#f7f8fa;--card:#fff;--mark:#1f5fd0}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1000px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:17px;margin:36px 0 12px}
.sub{color:var(--soft);margin:0 0 20px}
.stop{border-left:4px solid var(--mark);background:var(--card);padding:10px 16px;border-radius:0 8px 8px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 18px;overflow-x:auto}
.card svg{width:100%;height:auto;display:block}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500;font-size:13px}tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right}.changed{font-weight:600;color:var(--mark)}
pre{margin:0;white-space:pre-wrap;word-break:break-word;font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
pre.wide{white-space:pre}
.bar{height:10px;border-radius:5px;background:#c3cad8}.bar.own{background:var(--mark)}
details{margin-top:8px}summary{cursor:pointer;color:var(--soft)}
.cols{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:0 32px}
"""


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: frozenset[int] = frozenset()) -> str:
    """An HTML table of cells that are HTML already."""
    line = lambda tag, cells: "".join(
        f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(cells)
    )
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    top = f"<tr>{line('th', head)}</tr>" if head else ""
    return f"<table>{top}{body}</table>"


def document(title: str, body: str) -> str:
    """A whole page around a body that is HTML already."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)} · fastlm</title><style>{STYLE}</style></head><body><main>"
        + body
        + "</main></body></html>\n"
    )
