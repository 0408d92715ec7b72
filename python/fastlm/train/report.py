"""What a run left in its folder, as one page and as lines beside other runs: report.html, `fastlm runs`, `fastlm compare`.

All is read from the folder (config.json, facts.json, metrics.jsonl, samples.jsonl, result.json), so a page can be made
again at any time. It is one file: the curves are inline SVG, and nothing in it refers to a network.
"""

from __future__ import annotations

import html
import io
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastlm.data import pages
from fastlm.data.errors import InputError
from fastlm.data.pages import table
from fastlm.train import lock, measuring, pruning
from fastlm.train.callbacks import clock, draw, set_name
from fastlm.train.config import Config
from fastlm.train.files import read_metrics, shown, write_text


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    write_text(folder / "facts.json", json.dumps(facts, indent=1))


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_text(folder / "result.json", json.dumps(result, indent=1))


def read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} cannot be read: it is not an object")
    return found


@dataclass(frozen=True)
class Summary:
    """One run in numbers. What it has not reached yet is None."""

    name: str
    folder: Path
    date: str
    state: str
    step: int
    steps: int
    samples: int
    tokens: int
    parameters: int | None
    best_loss: float | None
    best_bpb: float | None
    speed: float | None  # tokens/s, median over steps
    seconds: float
    config: Config
    rows: list[dict[str, Any]]


def summary(folder: Path) -> Summary:
    """The numbers of a run's folder. Raises InputError when its config.json cannot be read."""
    saved, facts, result = (read(folder / f"{name}.json") for name in ("config", "facts", "result"))
    try:
        config, context = Config.from_dict(saved["config"]), int(saved["model"]["context"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} is not a run's configuration: {error}") from None
    rows = read_metrics(folder)
    step, steps = (int(rows[-1]["step"]) if rows else 0), config.optim.steps
    vals = [row for row in rows if "val_loss" in row]
    counted = [row for row in vals if pruning.settled(config.optim, int(row["step"]))]
    best = min(counted, key=lambda row: float(row["val_loss"]), default=result.get("val") or {})
    fresh = result and int(result.get("step", -1)) == step
    if fresh:
        state = str(result["why"])
    elif owner := lock.holder(folder):
        state = f"running: {owner}"
    else:
        state = "killed" if rows else "not started"
    samples = sum(int(row["samples"]) for row in rows)
    return Summary(
        name=folder.name,
        folder=folder,
        date=facts.get("started") or time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime)),
        state=state,
        step=step,
        steps=steps,
        samples=samples,
        tokens=samples * context,
        parameters=facts.get("parameters", result.get("parameters")),
        best_loss=best.get("val_loss"),
        best_bpb=best.get("val_bpb"),
        speed=median(float(row["tokens_per_s"]) for row in rows) if rows else None,
        seconds=sum(float(row["seconds"]) for row in rows),
        config=config,
        rows=rows,
    )


def all_runs(out: Path) -> list[Summary]:
    """The runs of a folder of runs, oldest first."""
    found = [_listed(path.parent) for path in out.glob("*/config.json")]
    return sorted(found, key=lambda run: (run.date, run.name))


def _listed(folder: Path) -> Summary:
    """A run in a list: one whose files cannot be read does not hide the others."""
    try:
        return summary(folder)
    except InputError as error:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))
        return Summary(
            name=folder.name, folder=folder, date=date, state=f"unreadable: {error}", step=0, steps=0, samples=0, tokens=0,
            parameters=None, best_loss=None, best_bpb=None, speed=None, seconds=0.0, config=Config(), rows=[],
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ page


def svg(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The curves as an SVG element without prologue, metadata or namespace addresses, for HTML to hold."""
    file = io.StringIO()
    draw(runs, file, "svg")
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)


def _tiles(run: Summary, result: dict[str, Any]) -> str:
    val = result.get("val") or {}
    loss, bpb = val.get("val_loss", run.best_loss), val.get("val_bpb", run.best_bpb)
    mfu = [float(row["mfu"]) for row in run.rows if "mfu" in row]
    cells = [
        ("validation loss, nats per token", f"{loss:.4f}" if loss is not None else "–"),
        ("validation, bits per byte", f"{bpb:.4f}" if bpb is not None else "–"),
        ("steps", f"{run.step:,} of {run.steps:,}"),
        ("training tokens", f"{run.tokens:,}"),
        ("parameters", f"{run.parameters:,}" if run.parameters else "–"),
        ("tokens per second, median", f"{run.speed:,.0f}" if run.speed else "–"),
        ("time in steps", clock(run.seconds)),
    ]
    cells += [("model FLOPs utilisation", f"{median(mfu):.1%}")] if mfu else []
    return "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for what, value in cells)


def _sets(run: Summary, result: dict[str, Any]) -> list[str]:
    """The further validation sets, each at the end (of a run that has not ended: the last time it was measured)."""
    last: dict[str, Any] = {}
    for row in run.rows:
        last |= {key: value for key, value in row.items() if key.startswith("val_")}
    last |= result.get("val") or {}
    names = [set_name(key) for key in last if set_name(key)]
    rows = [
        (html.escape(name), f"{last[f'val_{name}_loss']:.4f}", _or_dash(last.get(f"val_{name}_bpb"))) for name in names
    ]
    head = ("", "nats per token", "bits per byte")
    return (
        ["<h2>Validation sets</h2>", f'<div class="card">{table(head, rows, frozenset({1, 2}))}</div>'] if rows else []
    )


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _bars(bits: dict[str, float]) -> str:
    top = max(bits.values())
    ordered = sorted(bits.items(), key=lambda item: item[1])
    return table(
        ("", "bits per byte", ""),
        [
            (
                html.escape(name),
                f"{value:.3f}",
                f'<div class="bar{" own" if name == "this model" else ""}" style="width:{100 * value / top:.1f}%"></div>',
            )
            for name, value in ordered
        ],
        frozenset({1}),
    )


def _configuration(config: Config) -> str:
    groups, plain = config.to_dict(), Config().to_dict()
    out = []
    for group, fields in groups.items():
        rows = []
        for name, value in fields.items():
            text = html.escape(str(value)) if value not in ("", None) else "–"
            mark = "changed" if value != plain[group][name] else ""
            rows.append((name, f'<span class="{mark}">{text}</span>'))
        out.append(f"<div>{table((group, ''), rows)}</div>")
    return f'<div class="cols">{"".join(out)}</div>'


def page(folder: Path) -> str:
    """The report of a run as one HTML text."""
    run, saved = summary(folder), read(folder / "config.json")
    facts, result = read(folder / "facts.json"), read(folder / "result.json")
    samples = read_metrics(folder, "samples.jsonl")
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        f'<p class="sub">{html.escape(run.date)}'
        + (f" · {facts['device']}, {facts['threads']} threads, PyTorch {facts['torch']}" if facts else "")
        + "</p>",
        f'<p class="stop"><b>What stopped it:</b> {html.escape(run.state)}</p>',
        f'<div class="tiles">{_tiles(run, result)}</div>',
    ]
    if run.rows:
        parts += ["<h2>Curves</h2>", f'<div class="card">{svg({run.name: run.rows})}</div>']
    parts += _sets(run, result)
    counted, val = result.get("counted") or {}, result.get("val") or {}
    if counted and "val_bpb" in val:
        parts += [
            "<h2>Against counting</h2>",
            '<div class="card">' + _bars({**counted, "this model": val["val_bpb"]}) + "</div>",
        ]
    if samples:
        shown = [
            f"<p class=sub>step {row['step']:,}"
            + (f", validation loss {row['val_loss']:.4f}" if row.get("val_loss") is not None else "")
            + f"</p><pre>{html.escape(row['text'])}</pre>"
            for row in reversed(samples)
        ]
        earlier = f"<details><summary>{len(shown) - 1} earlier</summary>{''.join(shown[1:])}</details>"
        parts += ["<h2>Samples</h2>", f'<div class="card">{shown[0]}{earlier if shown[1:] else ""}</div>']
    if run.rows:
        last = run.rows[-max(len(run.rows) // 10, 1) :]
        bad = sum(int(row.get("bad", 0)) for row in run.rows)
        stall = sum(float(r["stall"]) * float(r["seconds"]) for r in run.rows) / max(run.seconds, 1e-9)
        parts += [
            "<h2>Throughput</h2>",
            '<div class="card">'
            + table(
                (),
                [
                    ("tokens per second, median", f"{run.speed:,.0f}"),
                    ("tokens per second, last tenth", f"{median(float(r['tokens_per_s']) for r in last):,.0f}"),
                    ("waiting for data", f"{stall:.2%}"),
                    ("steps skipped as not finite", f"{bad:,}"),
                ],
                frozenset({1}),
            )
            + "</div>",
        ]
    if facts:
        memory = [(html.escape(k), f"{v / 2**20:,.0f}") for k, v in facts["memory"].items()]
        memory.append(("<b>together</b>", f"<b>{sum(facts['memory'].values()) / 2**20:,.0f}</b>"))
        parts += ["<h2>Kernels</h2>", f'<div class="card"><pre class="wide">{html.escape(facts["swap"])}</pre></div>']
        parts += ["<h2>Memory, estimated</h2>"]
        parts += ['<div class="card">' + table(("", "MiB"), memory, frozenset({1})) + "</div>"]
    if found := measuring.used(run.rows, int(saved["model"]["context"]) * (2 if run.config.data.dpo else 1)):
        rows = measuring.table(found, run.config.run, facts.get("energy") or {})
        parts += [
            "<h2>Energy</h2>",
            '<div class="card">' + table((), [(html.escape(a), html.escape(b)) for a, b in rows]),
        ]
        parts += ["</div>"]
    data = [
        (
            html.escape(str(d["content"])),
            f"{d['documents']:,}",
            html.escape(str(d["split"])),
            f"{d['train']['tokens']:,}",
            f"{d['val']['tokens']:,}",
        )
        for d in saved.get("data", ())
    ]
    head = ("content hash", "documents", "split by", "training tokens", "validation tokens")
    corpus = ", ".join(saved.get("corpus", ())) or "the source of Python's own standard library"
    parts += [
        "<h2>Data</h2>",
        f'<div class="card"><p class=sub>{html.escape(corpus)}; tokens: {html.escape(saved["tokenizer"]["kind"])}</p>'
        + table(head, data, frozenset({1, 3, 4}))
        + ('<p class=sub><a href="card.html">What the corpus holds</a></p>' if (folder / "card.html").is_file() else "")
        + "</div>",
        "<h2>Configuration</h2>",
        f'<div class="card">{_configuration(run.config)}<p class=sub>Marked: what differs from the defaults.</p></div>',
    ]
    return pages.document(run.name, "\n".join(parts))


def write(folder: Path) -> Path:
    """report.html in the run's folder."""
    path = folder / "report.html"
    write_text(path, shown(page(folder)))
    return path
