"""`fastlm runs` lists runs side by side; `fastlm compare RUN RUN ...` draws them in one picture and says how they differ."""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from fastlm.cli import flags
from fastlm.train import job, report
from fastlm.train.callbacks import clock, draw


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _table(found: list[report.Summary], title: str = "") -> Table:
    table = Table(title=title or None, box=None, header_style="bold", pad_edge=False)
    for name in ("run", "date", "steps", "tokens", "parameters", "best val loss", "bits/byte", "tokens/s", "time"):
        table.add_column(name, justify="left" if name in ("run", "date") else "right", no_wrap=name == "run")
    table.add_column("state", overflow="fold")
    for run in found:
        table.add_row(
            run.name,
            run.date[:16],
            f"{run.step:,}/{run.steps:,}",
            f"{run.tokens / 1e6:,.2f} M",
            "–" if run.parameters is None else f"{run.parameters / 1e6:,.2f} M",
            _number(run.best_loss, ".4f"),
            _number(run.best_bpb, ".4f"),
            _number(run.speed, ",.0f"),
            clock(run.seconds),
            run.state,
        )
    return table


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=200)


def runs(out: str = "runs") -> int:
    """List runs side by side, oldest first.

    Args:
        out: Folder of runs.
    """
    found = report.all_runs(Path(out))
    if not found:
        raise job.InputError(f"{out}/ holds no run; train one first, or name the folder by --out")
    _console().print(_table(found))
    return 0


EXAMPLES = """
fastlm compare first second --picture both.svg
"""


def compare(run: tyro.conf.Positional[tuple[str, ...]], picture: str = "compare.png", out: str = "runs") -> int:
    """Draw runs in one picture, and print what differs in their configurations and what they reached.

    Args:
        run: Two or more runs, by folder or name.
        picture: Where to draw them (.png or .svg).
        out: Folder of runs.
    """
    if len(run) < 2:
        raise job.InputError(f"fastlm compare needs two runs or more; it was given {len(run)}")
    form = Path(picture).suffix.lstrip(".").lower()
    if form not in ("png", "svg"):
        raise job.InputError(f"--picture must end in .png or .svg; it is {picture}")
    found = [report.summary(job.find_run(name, out)) for name in run]
    names = [r.name for r in found]
    labels = names if len(set(names)) == len(names) else [str(r.folder) for r in found]
    try:
        draw({label: r.rows for label, r in zip(labels, found)}, picture, form)
    except OSError as error:
        raise job.InputError(f"cannot write {picture}: {error.strerror}") from error
    console = _console()
    console.print(_table(found))
    configs = [r.config.to_dict() for r in found]
    differ = [
        (name, [c[group][name] for c in configs])
        for group in configs[0]
        for name in configs[0][group]
        if name != "name" and any(c[group][name] != configs[0][group][name] for c in configs)
    ]
    console.print()
    if differ:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("configuration", *labels):
            table.add_column(column, overflow="fold")
        for name, values in differ:
            table.add_row(name, *map(str, values))
        console.print(table)
    else:
        console.print("the configurations are the same")
    console.print(f"\npicture: {picture}")
    return 0


def main(argv: list[str]) -> int:
    return flags.call(runs, "fastlm runs", argv)


def main_compare(argv: list[str]) -> int:
    return flags.call(compare, "fastlm compare", argv, EXAMPLES)
