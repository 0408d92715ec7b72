"""`fastlm soup RUN RUN ... --out S`: the average of runs' weights as a run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from fastlm import console
from fastlm.cli import flags
from fastlm.cli.data import reading
from fastlm.train import job
from fastlm.train import soup as soups

EXAMPLES = """
fastlm soup a b c --out soup    # forks of one run, such as of other seeds
fastlm soup a b c --out mean --method uniform
"""


def soup(
    run: tyro.conf.Positional[tuple[str, ...]] = (),
    out: str = "",
    method: Literal["greedy", "uniform"] = "greedy",
    text: tuple[str, ...] = (),
    force: bool = False,
    device: str = "auto",
) -> int:
    """Average the weights of runs that come from one: forks of it, or runs by --init of one folder.

    Writes a run's folder that generate, eval, export, compare and train --init take.

    Args:
        run: Two or more runs, checkpoints or exported folders, by path or name.
        out: The new run: a name in runs/, or a path.
        method: greedy: the best run first, then each that leaves the loss on the validation split no worse. uniform: all.
        text: Files, folders or globs to measure on; without any, the first run's validation split.
        force: Average runs without a common ancestor too.
        device: auto, cpu, cuda or mps.
    """
    if not out.rstrip("/"):
        raise job.InputError("--out must name the new run: a name in runs/, or a path")
    target = Path(out) if "/" in out.rstrip("/") else Path("runs") / out.rstrip("/")
    folders = [job.find_run(name) for name in run]
    with reading() as note:
        made = soups.run(folders, target, method=method, text=text, force=force, device=device, note=note)
    for line in made.lines():
        console.say(line)
    if made.shared is not None:
        at = "" if made.shared.step is None else f" at step {made.shared.step}"
        console.say(f"common ancestor: {made.shared.path}{at}")
    console.say(f"run folder: {made.folder}")
    return 0


def main(argv: list[str]) -> int:
    return flags.call(soup, "fastlm soup", argv, EXAMPLES)
