"""What watches a run: metrics.jsonl, a progress bar, a picture of the curves, tensorboard. Each is told by the trainer.

A callback is any object with some of the methods of `Callback`: ready, start, step, evaluated, rewind and end. `row` is a
step's line of metrics, `found` what an evaluation found.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from fastlm import console
from fastlm.data.errors import InputError
from fastlm.train.config import Config, RunConfig
from fastlm.train.files import keep_until, read_metrics, shown
from fastlm.train.ranks import Ranks


class RunView(Protocol):
    """What callbacks see of a trainer."""

    @property
    def folder(self) -> Path: ...
    @property
    def step(self) -> int: ...
    @property
    def config(self) -> Config: ...
    @property
    def ranks(self) -> Ranks: ...
    def memory(self) -> int:
        """Peak memory in bytes."""
        ...

    def pause(self, until: str) -> None:
        """End after this step, with a checkpoint, to go on later."""
        ...


class Callback:
    everywhere = (
        False  # whether every rank has one, since what it asks of the model needs them all; only the first writes
    )

    def ready(self, trainer: RunView) -> None:
        """Before the run's files change. What cannot serve raises InputError here, and the run stays as it was."""

    def start(self, trainer: RunView) -> None: ...

    def step(self, trainer: RunView, row: dict[str, Any]) -> None: ...

    def evaluated(self, trainer: RunView, found: dict[str, Any]) -> None: ...

    def rewind(self, trainer: RunView) -> None:
        """The trainer went back to an earlier step, after a loss spike."""

    def end(self, trainer: RunView) -> None: ...


EVENTS = tuple(name for name in vars(Callback) if not name.startswith("_") and callable(getattr(Callback, name)))


def check(callbacks: Iterable[object]) -> None:
    """Raise InputError for an object that listens to nothing that a trainer tells."""
    for callback in callbacks:
        if not any(callable(getattr(callback, name, None)) for name in EVENTS):
            raise InputError(f"a callback must have a method {', '.join(EVENTS)}; {callback!r} has none of them")


def tell(callbacks: Iterable[object], event: str, *what: Any) -> None:
    """Call the method of that name of each callback that has one, whatever its class."""
    for callback in callbacks:
        if (method := getattr(callback, event, None)) is not None:
            method(*what)


def end(callbacks: Iterable[object], trainer: RunView) -> None:
    """Tell each callback of the end. What one cannot write (a full disk) is said: it hides neither the others' end nor
    why training ended."""
    for callback in callbacks:
        try:
            tell([callback], "end", trainer)
        except (InputError, OSError) as error:
            text = str(error) if isinstance(error, InputError) else error.strerror or str(error)
            console.warn(f"{type(callback).__name__.lower()} in {trainer.folder} is not whole: {text}")


class Metrics(Callback):
    """metrics.jsonl, one line a step. Going on after a kill first drops the lines after the checkpoint."""

    def ready(self, trainer: RunView) -> None:
        self.path = trainer.folder / "metrics.jsonl"
        self._append().close()

    def start(self, trainer: RunView) -> None:
        self._open(trainer)

    def rewind(self, trainer: RunView) -> None:
        self.file.close()
        self._open(trainer)

    def _open(self, trainer: RunView) -> None:
        keep_until(self.path, trainer.step)
        self.file = self._append()

    def _append(self) -> TextIO:
        try:
            return open(self.path, "a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error

    def step(self, trainer: RunView, row: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error

    def end(self, trainer: RunView) -> None:
        self.file.close()


def clock(seconds: float) -> str:
    seconds = int(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress(Callback):
    """A bar with loss, validation, tokens/s, stall, memory and time left; plain lines where there is no terminal."""

    def start(self, trainer: RunView) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = Console(file=console.Lasting("stdout", beneath_rich=True))  # type: ignore[arg-type]
        self.val, self.loss, self.shown, self.bar = "", None, time.perf_counter(), None
        self.first = trainer.step
        self.began = time.perf_counter()
        if self.console.is_terminal:
            self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("", total=trainer.config.optim.steps, completed=trainer.step)

    def step(self, trainer: RunView, row: dict[str, Any]) -> None:
        if row["loss"] is not None:
            self.loss = row["loss"] if self.loss is None else 0.95 * self.loss + 0.05 * row["loss"]
        if "val_loss" in row:
            self.val = f" | val {row['val_loss']:.3f}" + (f" = {row['val_bpb']:.3f} bpb" if "val_bpb" in row else "")
        now, steps = time.perf_counter(), trainer.config.optim.steps
        last = row["step"] == steps
        every = 0.2 if self.bar is not None else 10.0
        if now - self.shown < every and not last:
            return
        self.shown = now
        done = row["step"] - self.first
        left = (now - self.began) / max(done, 1) * (steps - row["step"])
        loss = float("nan") if self.loss is None else self.loss
        mfu = f" | {row['mfu']:.0%} MFU" if "mfu" in row else ""
        text = (
            f"step {row['step']}/{steps} | loss {loss:.3f}{self.val} | {row['tokens_per_s']:,.0f} tok/s{mfu} | "
            f"stall {row['stall']:.1%} | {trainer.memory() / 2**20:,.0f} MB | {clock(left)} left"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], description=text)
        else:
            console.say(text)

    def end(self, trainer: RunView) -> None:
        if self.bar is not None:
            self.bar.stop()


def set_name(key: str) -> str:
    """The further validation set whose loss a metric `val_NAME_loss` is; "" for every other metric."""
    found = re.fullmatch(r"val_(\w+)_loss", key)
    return found[1] if found else ""


def smoothed(values: list[float], reach: float = 0.02) -> list[float]:
    """The values smoothed without a lag: at each place the straight line through its neighbours, by weighted least squares.

    A mean of the past runs behind a falling curve. Here the weights fall off on both sides, to 0 at `reach` of the whole
    (at least four values) away, and the line follows a slope to the ends (Cleveland 1979).
    """
    y = np.array(values)
    wide = max(round(reach * len(y)), 4)
    out = np.empty(len(y))
    for i in range(len(y)):
        low = max(i - wide, 0)
        x = np.arange(low, min(i + wide + 1, len(y))) - i
        w = (1 - (np.abs(x) / (wide + 1.0)) ** 3) ** 3
        near = y[low : low + len(x)]
        total, first, second = w.sum(), (w * x).sum(), (w * x * x).sum()
        det = total * second - first * first
        mean = (w * near).sum()
        out[i] = (second * mean - first * (w * x * near).sum()) / det if det > 1e-9 else mean / total
    return out.tolist()


def draw(runs: dict[str, list[dict[str, Any]]], path: Any, form: str = "png") -> None:
    """Training and validation loss of runs against the step, in one picture (a path or a file object, png or svg)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in runs.items():
        prefix = f"{shown(name)}: " if len(runs) > 1 else ""
        train = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
        if train:
            smooth = smoothed([loss for _, loss in train])
            line = axes.plot([s for s, _ in train], smooth, label=f"{prefix}training", linewidth=1.6, zorder=3)
            if len(runs) == 1:
                axes.plot(*zip(*train), color=line[0].get_color(), alpha=0.45, linewidth=0.8, label="each step")
        for key in sorted(
            {k for r in rows for k in r if k == "val_loss" or set_name(k)}, key=lambda k: k != "val_loss"
        ):
            val = [(r["step"], r[key]) for r in rows if key in r]
            label = f"validation {set_name(key)}".rstrip()
            axes.plot(*zip(*val), "o-", label=f"{prefix}{label}", markersize=3.5)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlm"}):
        figure.savefig(path, dpi=120, format=form, metadata={"Date": None} if form == "svg" else None)
    plt.close(figure)


class Samples(Callback):
    """samples.jsonl: after each evaluation a text of the model, one line {step, val_loss, text}."""

    everywhere = True  # of a cut model no rank alone can run its part

    def __init__(self, write: Callable[[int], str]) -> None:
        self.write = write  # so many tokens of text

    def start(self, trainer: RunView) -> None:
        self.path = trainer.folder / "samples.jsonl"
        self.rewind(trainer)

    def rewind(self, trainer: RunView) -> None:
        if trainer.ranks.first:
            keep_until(self.path, trainer.step)

    def evaluated(self, trainer: RunView, found: dict[str, Any]) -> None:
        last = trainer.step == trainer.config.optim.steps
        text = self.write(trainer.config.run.sample // (1 if last else 4))
        row = {"step": trainer.step, "val_loss": found.get("val_loss"), "text": text}
        if not trainer.ranks.first:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error


class Picture(Callback):
    """loss.png in the run's folder."""

    def end(self, trainer: RunView) -> None:
        draw({trainer.folder.name: read_metrics(trainer.folder)}, trainer.folder / "loss.png")


class Tensorboard(Callback):
    def ready(self, trainer: RunView) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        self._make = SummaryWriter

    def start(self, trainer: RunView) -> None:
        self.writer = self._make(str(trainer.folder / "tensorboard"), purge_step=trainer.step + 1)

    def step(self, trainer: RunView, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["step"])

    def end(self, trainer: RunView) -> None:
        self.writer.close()


class Wandb(Callback):
    """Weights & Biases, as asked for by --wandb PROJECT: each step's numbers, each sample, under the run's name."""

    def __init__(self, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise InputError("--wandb needs the package wandb: pip install wandb") from None
        self.wandb, self.project, self.run = wandb, project, None

    def ready(self, trainer: RunView) -> None:
        name = trainer.folder.name
        settings = {"config": trainer.config.to_dict(), "dir": str(trainer.folder), "resume": "allow"}
        try:
            self.run = self.wandb.init(project=self.project, name=name, id=name, **settings)
        except self.wandb.errors.Error as error:
            raise InputError(
                f"--wandb {self.project}: {error}; WANDB_MODE=offline logs on this machine alone"
            ) from None

    def step(self, trainer: RunView, row: dict[str, Any]) -> None:
        self.wandb.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    def end(self, trainer: RunView) -> None:
        if self.run is not None:
            self.wandb.finish()
            self.run = None


def standard(run: RunConfig) -> list[Callback]:
    """Those that the flags of a run ask for."""
    found: list[Callback] = [Metrics()]
    found += [] if run.quiet else [Progress()]
    found += [Tensorboard()] if run.tensorboard else []
    return found + ([Wandb(run.wandb)] if run.wandb else [])
