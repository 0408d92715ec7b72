"""A trained model made smaller: `fastlm compress RUN` applies methods in turn, measures before and after, writes a folder.

    RUN-int8/  config.json (the run's, with "compressed": what was done)  model.safetensors  tokenizer.json  manifest.json

A method changes the model in place and says what it did; another one (pruning, healing) is one more class like `Int8`. Size
is that of the tensors, perplexity that of the same validation tokens, tokens/s of generating one text, in turns before and
after. Of several methods each is measured.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from fastlm import compress
from fastlm.compress import quantize
from fastlm.data import InputError, Prepared, TokenSource
from fastlm.data import tokenizer as tokenizers
from fastlm.data.prepare import of_set
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.nn import Int8Linear
from fastlm.nn.int8 import convert_
from fastlm.train import checkpoint, export, job, modelcard, state
from fastlm.train.checkpoint import Piece
from fastlm.train.config import Config, told_shape
from fastlm.train.files import write_text
from fastlm.train.generation import sampler

Batches = Callable[[], list[torch.Tensor]]  # calibration inputs [rows, context]


@dataclass
class Text:
    """The data of `origin` (none of a model alone), split as its run splits them; called it gives calibration inputs."""

    origin: Path
    data: list[Prepared]
    config: Config
    model: GPT
    samples: int
    seed: int

    def __call__(self) -> list[torch.Tensor]:
        return _calibration(self.origin, self.data, self.model, self.samples, self.seed)


class Method(Protocol):
    """One way to make a model smaller, or better again."""

    name: ClassVar[str]  # ends the new folder's name

    def check(self) -> None:
        """Raise InputError, naming the flag, for options that exclude each other; before anything is read."""

    def apply(self, model: GPT, text: Text, /) -> list[str]:
        """Change the model in place; returns what was done as lines to print. `text` reads calibration text."""

    def record(self) -> dict[str, Any]:
        """What config.json keeps under the method's name."""


@dataclass
class Int8:
    """Linear layers in int8: weights and activations, or weights alone."""

    name: ClassVar[str] = "int8"
    weight_only: bool = False
    group: int | None = None
    smooth: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    only_faster: bool = False
    split: bool = False
    layers: list[str] = field(default_factory=list)
    smoothed: compress.Smoothed | None = None
    outliers: dict[str, list[int]] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return "weight_only" if self.weight_only else "dynamic"

    def check(self) -> None:
        if self.group is not None and not self.weight_only:
            raise InputError(
                f"--group {self.group} needs --weight-only: with activations in int8 too, a row of weights has one scale"
            )
        if self.smooth and self.weight_only:
            raise InputError(
                "--smooth and --weight-only exclude each other: SmoothQuant makes activations easier to quantise at the "
                "weights' cost, and --weight-only leaves activations as they are"
            )
        if self.split and self.weight_only:
            raise InputError(
                "--split and --weight-only exclude each other: --weight-only leaves activations as they are"
            )

    def apply(self, model: GPT, batches: Batches) -> list[str]:
        masks = compress.masks(model)  # what is zero is zero in int8 too; a run from this model needs them
        compress.unprune(model)
        try:
            made = quantize.plan(
                model, self.mode, include=self.include or None, exclude=self.exclude or None, group=self.group,
                only_faster=self.only_faster,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(str(error)) from None
        self.layers = [row.module for row in made.converted]
        if not self.layers:
            reasons = "; ".join(sorted({why for _, _, why in made.left}))
            raise InputError(f"no layer of the model becomes int8: {reasons}")
        lines = []
        if self.smooth:
            self.smoothed = compress.smooth(model, batches(), self.layers)
            lines += self._smoothing(self.smoothed)
        if self.split:
            found = compress.outlier_columns(model, batches(), self.layers)
            self.outliers = {path: columns.tolist() for path, columns in found.items()}
            lines += self._splitting()
            for path, columns in found.items():
                convert_(model.get_submodule(path), self.mode, None, split=columns)
            made.modules = [m for m in made.modules if not isinstance(m, Int8Linear)]
        compress.convert(made)
        compress.attach(model, masks)
        counts: dict[str, int] = {}
        for path in self.layers:
            counts[path.rpartition(".")[2]] = counts.get(path.rpartition(".")[2], 0) + 1
        kinds = ", ".join(f"{name} ({n})" for name, n in counts.items())
        return [f"int8, {self.mode}: {kinds}", *(f"float: {path}: {why}" for path, _, why in made.left), *lines]

    def _smoothing(self, made: compress.Smoothed) -> list[str]:
        folded = sum(len(layers) for _, layers, _ in made.folded)
        most = max((scale for *_, scale in made.folded), default=1.0)
        lines = [f"smoothed: {folded} layers, folded into {len(made.folded)} norms (factors up to {most:g})"]
        reasons: dict[str, list[str]] = {}
        for path, why in made.left:
            reasons.setdefault(why, []).append(path.rpartition(".")[2])
        return lines + [f"not smoothed: {', '.join(dict.fromkeys(names))}: {why}" for why, names in reasons.items()]

    def _splitting(self) -> list[str]:
        if not self.outliers:
            return ["split: no column of an input stands out, so none is in float"]
        count = sum(map(len, self.outliers.values()))
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in self.outliers))
        return [f"split: {count} columns of {len(self.outliers)} layers in float ({names})"]

    def record(self) -> dict[str, Any]:
        smoothed = None if self.smoothed is None else asdict(self.smoothed)
        more = {"smooth": smoothed, "split": self.outliers if self.split else None}
        return {"mode": self.mode, "group": self.group, "layers": self.layers, **more}


@dataclass
class Measured:
    """Of one model: bytes of its tensors, and where there are validation data perplexity; tokens/s of generating one text."""

    size: int
    perplexity: float | None = None
    tokens: int = 0
    speed: float = 0.0


@dataclass
class Compressed:
    """What `run` reached, which `table` prints. `steps`: by the name of each method, what stood after it."""

    folder: Path
    before: Measured
    after: Measured
    lines: list[str]
    steps: dict[str, Measured] = field(default_factory=dict)

    def table(self) -> str:
        b, a = self.before, self.after
        names = list(self.steps) if len(self.steps) > 1 else ["after"]
        between = list(self.steps.values())[:-1]
        rows = [["", "before", *names, ""]]
        rows.append(["size", *(_bytes(m.size) for m in (b, *between, a)), f"{a.size / b.size:.2f}x"])
        speeds = [f"{b.speed:,.0f}", *("-" for _ in between), f"{a.speed:,.0f}"]
        rows.append(["generating, tokens/s", *speeds, f"{a.speed / b.speed:.2f}x"])
        if b.perplexity is not None and a.perplexity is not None:
            change = f"{a.perplexity / b.perplexity - 1:+.3%} on {b.tokens:,} tokens"
            rows.append(["perplexity", *(f"{m.perplexity:.4f}" for m in (b, *between, a)), change])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = [
            "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:-1], widths[1:], strict=True)), r[-1]])
            for r in rows
        ]
        if a.speed < b.speed:
            saves = "memory and disk" if a.size < b.size else "nothing by itself"
            lines.append(f"the compressed model is slower here: what it saves on this machine is {saves}")
        return "\n".join(line.rstrip() for line in lines)


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size:,} bytes"


def run(
    origin: Path,
    methods: Sequence[Method],
    *,
    text: tuple[str, ...] = (),
    name: str = "",
    out: str = "runs",
    device: str = "auto",
    samples: int = 64,
    seed: int = 1,
    note: Any = None,
) -> Compressed:
    """Apply `methods` to the model of `origin` and write the result into OUT/NAME (ORIGIN-METHOD where no name is given).

    `samples` contexts of the training split, chosen by `seed`, are the calibration text. Raises InputError for a folder
    that exists, and for a method that needs data of a model that has none.
    """
    for method in methods:
        method.check()
    source = export.read_model(origin)
    if source.int8 is not None:
        raise InputError(f"{origin} is an int8 model already: compress the run that it was made of")
    base = origin.parent.parent if (origin / "state.json").is_file() else origin
    body: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    target = Path(out) / (name or "-".join([base.name, *(m.name for m in methods)]))
    if target.exists():
        raise InputError(f"{target} exists and is not overwritten: choose another --name, or remove it")
    model, tokenizer = job.load(origin, device)
    compress.attach(model, source.masks)
    config, data = _data(base, body, text, tokenizer, model.config.context, note)
    before = _measure(model, config, data)
    plain = copy.deepcopy(model)
    text_of_run, lines, steps = Text(origin, data, config, model, samples, seed), [], {}
    for method in methods:
        lines += method.apply(model, text_of_run)
        steps[method.name] = after = _measure(model, config, data)
    before.speed, after.speed = _speeds(plain, model)
    made = Compressed(target, before, after, lines, steps)
    record = {
        **{m.name: m.record() for m in methods},
        "origin": str(origin.resolve()),
        "calibration": {"samples": samples, "seed": seed, "split": "train"},
        "before": asdict(before),
        "steps": {name: asdict(one) for name, one in steps.items()} if len(steps) > 1 else {},
        "after": asdict(after),
    }
    write(target, model, body, source, record)
    if "config" in body:
        modelcard.write(target)
    return made


def _shape(model: dict[str, Any], shape: GPTConfig) -> None:
    """A run's settings of its model, told the shape that the model has now."""
    told = told_shape(shape)
    for name in ("layers", "heads", *told):
        model[name] = told.get(name, getattr(shape, name))


def write(target: Path, model: GPT, body: dict[str, Any], source: export.Source, record: dict[str, Any]) -> None:
    """The folder of a compressed model, whole or not at all. InputError where the disk does not take it."""
    kept = {k: v for k, v in body.items() if k in ("config", "corpus", "data", "chat_template")}
    if "config" in kept:
        kept["config"] = copy.deepcopy(kept["config"])
        kept["config"]["run"]["name"] = target.name
        kept["config"]["model"]["lora_rank"] = 0  # adapters are merged
        if model.config != source.shape:
            _shape(kept["config"]["model"], model.config)
    config = {**kept, "model": asdict(model.config), "tokenizer": source.tokenizer, "compressed": record}
    draft = target.parent / f".draft-{target.name}-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {n: Piece.whole(t.cpu()) for n, t in state.model_tensors(model).items()}
        manifest = checkpoint.write_groups(draft, {"model": tensors}, 0, 1)
        if source.tokenizer and source.tokenizer["kind"] != "bytes":
            write_text(draft / "tokenizer.json", export.tokenizer_json(source.tokenizer))
        if target.exists():
            raise InputError(f"{target} exists and is not overwritten: choose another --name, or remove it")
        checkpoint.seal(draft, target, manifest, {"config.json": config})
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _data(
    base: Path,
    body: dict[str, Any],
    text: tuple[str, ...],
    tokenizer: tokenizers.Tokenizer,
    context: int,
    note: Any,
) -> tuple[Config, list[Prepared]]:
    """The run's own corpus, or the given one split in the same way; none for a model alone without a text. Of a run of --dpo a
    text is asked for; of --sft it may be one, or rows."""
    config, corpus = job.read_config(base) if "corpus" in body else (Config(), ())
    if not text and "corpus" not in body:
        return config, []
    if config.data.dpo and not text:
        raise InputError(f"{base} learned from pairs, and what calibrates, heals and measures is text: name a TEXT")
    if text:
        config.data.weights, config.data.dpo = (), False
        config.data.sft = bool(of_set(text, job.options_of(config.data, context)).rows)
    return config, job.read_data(text or corpus, config.data, context, note or job.silent, tokenizer)


def _calibration(origin: Path, data: list[Prepared], model: GPT, samples: int, seed: int) -> list[torch.Tensor]:
    """`samples` contexts of the training split, as batches of eight."""
    if not data:
        raise InputError(f"{origin} is a model without a run's data: name a TEXT to calibrate on")
    source = TokenSource(data, model.config.context, seed, ())
    device = next(model.parameters()).device
    numbers = np.arange(samples)
    return [torch.as_tensor(source.batch(numbers[i : i + 8])[0]).long().to(device) for i in range(0, samples, 8)]


@torch.no_grad()
def _measure(model: GPT, config: Config, data: list[Prepared]) -> Measured:
    size = sum(t.numel() * t.element_size() for t in state.model_tensors(model).values())
    if not data:
        return Measured(size)
    place = next(model.parameters()).device
    found = job.validation(data, config, model.config.context, place)(model, False)
    return Measured(size, math.exp(min(found["val_loss"], 700.0)), int(found["val_tokens"]))


def _speeds(before: GPT, after: GPT, turns: int = 5) -> tuple[float, float]:
    """Tokens/s of generating one text of half a context with each, the best of turns that alternate."""
    models: tuple[GPT, GPT] = (before, after)
    count = max(1, before.config.context // 2)
    best = [0.0, 0.0]
    for turn in range(turns + 1):
        for i, model in enumerate(models):
            speed = count / _seconds(model, count)
            best[i] = max(best[i], speed if turn else 0.0)  # the first turn warms up
    return best[0], best[1]


def _seconds(model: GPT, count: int) -> float:
    device = next(model.parameters()).device
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    begin = time.perf_counter()
    model.generate(start, count, sampler(0.0))  # choosing a token on the CPU waits for the device
    return time.perf_counter() - begin


def int8_layers(model: nn.Module) -> list[str]:
    """Paths of a model's int8 layers."""
    found = compress.held(model)
    return [] if found is None else list(found.layers)
