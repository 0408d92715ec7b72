"""The front page's three figures and its chart, of the newest full run of one class of machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.bench import pictures, results

PICTURE = "docs/speed.png"


@dataclass(frozen=True)
class Figure:
    """A case that the front page shows: what it is to a reader, and what its baselines are called there."""

    op: str
    case: str
    title: str
    sentence: str
    baselines: tuple[tuple[str, str], ...]


FIGURES = (
    Figure("step", "6x384 context 256 batch 16 dropout 0.2 bfloat16", "One training step",
           "A training step of a 10 M parameter model in bfloat16 takes {ours}",
           (("torch", "PyTorch"), ("torch compiled", "torch.compile"))),
    Figure("attention", "1x12x2048x64 bfloat16 causal forward+backward", "Attention, forward and backward",
           "Causal attention over 2,048 tokens in bfloat16, forward and backward, takes {ours}",
           (("sdpa", "PyTorch's SDPA"), ("torch.compile", "torch.compile"))),
    Figure("dropout_add_norm", "4096x1024 float32 p=0.1 forward", "Dropout + add + norm, forward",
           "Dropout, residual add and layer norm of 4096×1024 in float32 take {ours}",
           (("eager", "PyTorch"), ("torch.compile", "torch.compile"))),
)  # fmt: skip


def chosen(files: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The result that the front page is of: the most suites, then the newest. None where none has all of the figures."""
    whole = [data for data in files if all(_timed(data, figure) for figure in FIGURES)]
    return max(whole, key=lambda data: (len(data["runs"]), data["date"]), default=None)


def _timed(data: dict[str, Any], figure: Figure) -> list[tuple[str, dict[str, Any]]]:
    """(name for a reader, contender) of each baseline that ran and then of fastlm; empty if one of them did not run."""
    case = next((c for c in data["cases"] if (c["op"], c["name"]) == (figure.op, figure.case)), None)
    ours = results.ours_of(case) if case else None
    if case is None or ours is None:
        return []
    ran = {c["name"]: c for c in case["contenders"] if c["status"] == "ok"}
    bars = [(label, ran[name]) for name, label in figure.baselines if name in ran]
    return [*bars, ("fastlm", ours)] if len(bars) == len(figure.baselines) else []


def milliseconds(seconds: float) -> str:
    """Milliseconds with their unit, to three digits."""
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def text(files: list[dict[str, Any]]) -> str:
    """Markdown: the chart, the figures with the command that makes each, and the machine."""
    data = chosen(files)
    if data is None:
        return "Not measured."
    lines = []
    for figure in FIGURES:
        *others, (_, ours) = _timed(data, figure)
        sentence = figure.sentence.format(ours=f"**{milliseconds(ours['median_s'])}**")
        beside = " and ".join(
            f"{milliseconds(c['median_s'])} with {label} ({c['median_s'] / ours['median_s']:.2g}×)"
            for label, c in others
        )
        lines.append(f"- {sentence}: {beside}. `make bench ARGS={figure.op}`")
    m = data["machine"]
    dates = sorted(data["runs"][figure.op]["date"][:10] for figure in FIGURES)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    where = f"{m['device']}, {m['threads']} threads, {m['instruction_set']}, torch {m['versions']['torch']}, {when}"
    chart = f"![{finding(data)}]({PICTURE})"
    return "\n".join([chart, "", *lines, "", f"Medians on {where}."])


def finding(data: dict[str, Any]) -> str:
    """The chart's title: what it shows, in one sentence."""
    (_, torch), *_, (_, ours) = _timed(data, FIGURES[0])
    return (
        f"A training step with fastlm is {torch['median_s'] / ours['median_s']:.1f}× as fast as with PyTorch on a CPU"
    )


def draw(data: dict[str, Any], path: Path) -> Path:
    """Bars of each figure's times, shorter is better, with the quartiles as whiskers."""
    plt = pictures.pyplot()
    figure, axes = plt.subplots(1, len(FIGURES), figsize=(11, 2.9), layout="constrained")
    for axis, shown in zip(axes, FIGURES, strict=True):
        pictures.bars(axis, [(name, c, c["kind"] == "ours") for name, c in _timed(data, shown)])
        axis.set_title(shown.title, fontsize=11)
    figure.suptitle(finding(data), fontsize=13, fontweight="bold")
    pictures.save(figure, path, data)
    plt.close(figure)
    return path


def stale(files: list[dict[str, Any]], root: Path) -> bool:
    """Whether the chart is missing or of other data."""
    data = chosen(files)
    return data is not None and not pictures.is_of(root / PICTURE, pictures.digest(data))
