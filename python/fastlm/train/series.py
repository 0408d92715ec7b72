"""Several runs of one configuration as a whole: `fastlm train CORPUS --folds 5`, `--fractions 0.125 0.25 0.5`.

    OUT/NAME/  series.json (what is run)  fold-1/ ... fold-5/ (runs as any)  result.json  report.html (of all)

Each part is a run by `--fold I/K` or `--fraction F`, taken at its best weights and measured on all that it holds out, and on as
much of what it trained on. What has ended stays, and what was killed goes on, so the whole resumes as one run does.
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from fastlm.console import say
from fastlm.data import InputError, chat
from fastlm.data.bounds import COUNT, Range, check, flag
from fastlm.data.prepare import Note, Prepared, silent
from fastlm.train import export, job, series_report
from fastlm.train.config import Config
from fastlm.train.evaluating import Evaluation
from fastlm.train.files import write_text
from fastlm.train.folders import find_init
from fastlm.train.series_report import Part

FILE = "series.json"
Train = Callable[[list[str]], int]  # `fastlm train` with these words; its exit status


@dataclass(frozen=True)
class Series:
    """What is run: `kind` is "fold" or "fraction", `parts` the values of that flag."""

    folder: Path
    kind: str
    parts: tuple[str, ...]
    config: Config
    corpus: tuple[str, ...]

    def name(self, part: str) -> str:
        return f"{self.kind}-{part.partition('/')[0]}"

    def settings(self, part: str) -> Config:
        made = copy.deepcopy(self.config)
        setattr(made.data, self.kind, part if self.kind == "fold" else float(part))
        made.run.name, made.run.out = self.name(part), str(self.folder)
        return made


def asked(folds: int | None, fractions: tuple[float, ...], config: Config) -> tuple[str, tuple[str, ...]] | None:
    """(kind, parts) of --folds and --fractions; None without them. Raises InputError, naming the flag, for what cannot be."""
    if folds is None and not fractions:
        return None
    if folds is not None:
        check("folds", folds, Range(2, COUNT))
        if fractions:
            raise InputError("--folds and --fractions exclude each other: one after the other")
        if config.data.fold:
            raise InputError(f"--folds and --fold exclude each other: --folds {folds} runs every fold")
    for part in fractions:
        check("fractions", part, Range(above=0, high=1))
    if fractions and (len(set(fractions)) != len(fractions) or len(fractions) < 3):
        raise InputError(
            f"--fractions takes three parts of the training text or more, each once: the largest is held back to test the law "
            f"that the others give; it is given {' '.join(f'{f:g}' for f in fractions)}"
        )
    if fractions and config.data.fraction != 1:
        raise InputError(f"--fractions and --fraction exclude each other; --fraction is {config.data.fraction:g}")
    name = "--folds" if folds is not None else "--fractions"
    if config.run.when:
        raise InputError(f"{name} and --when exclude each other: --deadline is of one run")
    if folds is not None:
        return "fold", tuple(f"{i}/{folds}" for i in range(1, folds + 1))
    return "fraction", tuple(f"{part:.12g}" for part in sorted(fractions))


# ------------------------------------------------------------------------------------------------------------ the folder


def begin(kind: str, parts: tuple[str, ...], config: Config, corpus: tuple[str, ...], note: Note = silent) -> Series:
    """A new series in a new folder. Its data are prepared first, so that what cannot be parted is refused before training."""
    config, corpus = _resolved(config, corpus)
    made = Series(
        Path(config.run.out) / (config.run.name or time.strftime("%Y%m%d-%H%M%S")), kind, parts, config, corpus
    )
    _prepare(made, note)
    place, number = made.folder, 1
    while not _claim(place):
        if config.run.name:
            raise InputError(
                f"the series {place} exists and is not overwritten: choose another --name, or --resume {place}"
            )
        number += 1
        place = made.folder.with_name(f"{made.folder.name}-{number}")
    made = dataclasses.replace(made, folder=place)
    body = {"kind": kind, "parts": parts, "config": config.to_dict(), "corpus": corpus}
    write_text(place / FILE, json.dumps(body, indent=1))
    return made


def _claim(folder: Path) -> bool:
    """Make a folder; one that is there serves if it is empty, as a kill before `series.json` leaves it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return not os.listdir(folder)
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def find(name: str, out: str) -> Path | None:
    """The folder of a series that --resume names, by path or name; None where it names none."""
    places = (Path(name), Path(out or "runs") / name, Path("runs") / name) if name else ()
    return next((place for place in places if (place / FILE).is_file()), None)


def read(folder: Path) -> Series:
    try:
        body = json.loads((folder / FILE).read_text(encoding="utf-8"))
        config = Config.from_dict(body["config"])
        return Series(folder, body["kind"], tuple(body["parts"]), config, tuple(body["corpus"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / FILE} cannot be read: {error}") from None


def _resolved(config: Config, corpus: tuple[str, ...]) -> tuple[Config, tuple[str, ...]]:
    """With paths that hold from any folder."""
    made = copy.deepcopy(config)
    whole = lambda path: os.path.abspath(path) if path and (Path(path).exists() or glob.has_magic(path)) else path
    if made.model.init:
        made.model.init = os.path.abspath(find_init(made.model.init, made.run.out))
    made.data.tokenizer, made.run.when = whole(made.data.tokenizer), whole(made.run.when)
    if not made.data.chat_template.startswith("{"):
        made.data.chat_template = whole(made.data.chat_template)
    pairs = [given.partition("=") for given in made.data.val]
    made.data.val = tuple(f"{name}={whole(path)}" for name, _, path in pairs)
    return made, tuple(map(whole, corpus))


def _prepare(made: Series, note: Note) -> None:
    """The data of every part into the cache. Raises InputError where one of them cannot be."""
    context, init = 0, made.config.model.init
    if init:
        given = copy.deepcopy(made.config.model)
        given.take_shape(export.read_model(Path(init)).shape)
        context = given.length()
    sizes = []
    for part in made.parts:
        config = made.settings(part)
        if config.data.rows:
            config.data.chat_template = chat.resolve(config.data.chat_template, Path(init) if init else None)
        try:
            data = job.read_data(made.corpus, config.data, context or config.model.length(), note)
        except InputError as error:
            raise InputError(str(error).replace(f"--fold {part}: ", f"--folds {len(made.parts)}: ")) from None
        sizes.append(_bytes(data))
    for i in range(1, len(sizes)) if made.kind == "fraction" else ():
        if sizes[i] <= sizes[i - 1]:
            raise InputError(
                f"--fractions: {made.parts[i - 1]} and {made.parts[i]} of the training text are the same {sizes[i]:,} bytes: "
                f"give more text, or parts that differ more"
            )


def _bytes(data: list[Prepared]) -> int:
    """Bytes of text that is trained on."""
    return sum(int(one.manifest["train"]["bytes"]) for one in data)


def words(config: Config, corpus: tuple[str, ...]) -> list[str]:
    """What `fastlm train` must be given for a configuration."""
    out, plain = list(corpus), Config()
    for group in (config.model, config.data, config.optim, config.run):
        defaults = next(g for g in vars(plain).values() if type(g) is type(group))
        kinds = get_type_hints(type(group))
        for one in dataclasses.fields(group):
            value = getattr(group, one.name)
            if value == getattr(defaults, one.name):
                continue
            if kinds[one.name] is bool:
                out.append(flag(one.name) if value else f"--no-{one.name.replace('_', '-')}")
            elif isinstance(value, tuple):
                out += [flag(one.name), *map(str, value)]
            else:
                out.append(f"{flag(one.name)}={value}")
    return out


# --------------------------------------------------------------------------------------------------------------- the runs


def run(made: Series, train: Train) -> int:
    """Train what has not ended, measure each part, and write what came of all; the exit status."""
    found: list[Part] = []
    for number, part in enumerate(made.parts, 1):
        place = made.folder / made.name(part)
        if not _ended(place):
            say(f"{made.kind} {number} of {len(made.parts)}: {place}")
            begun = (place / "config.json").is_file()
            code = train(["--resume", str(place)] if begun else words(made.settings(part), made.corpus))
            if code:
                say(f"{made.kind} {number} has not ended; go on with the whole by fastlm train --resume {made.folder}")
                return code
        found.append(_measured(made, part, place))
        series_report.write(made.folder, made.kind, found, len(made.parts))
    for line in series_report.lines(made.kind, found):
        say(line)
    say(f"report: {made.folder / 'report.html'}")
    return 0


def _ended(folder: Path) -> bool:
    """Whether a run has taken all its steps, or stopped early."""
    try:
        why = str(json.loads((folder / "result.json").read_text(encoding="utf-8"))["why"])
    except (OSError, ValueError, KeyError):
        return False
    return why == "all steps done" or why.startswith("early")


def _measured(made: Series, part: str, folder: Path) -> Part:
    """A part's best weights on what it holds out, and on as much of what it trained on; once, then from its folder."""
    kept, best = folder / "measured.json", _best(folder)
    if kept.is_file():
        body = json.loads(kept.read_text(encoding="utf-8"))
        if body["step"] == best:
            return Part(**body)
    device = made.config.run.device
    model, tokenizer = job.load(folder, device)
    place: torch.device = next(model.parameters()).device
    evaluate = Evaluation(folder, tokenizer, model.config.context, place)
    val = evaluate(model)
    tokens = int(val.get("val_tokens", made.config.run.eval_tokens))
    train = evaluate.on_training(model, tokens)
    unit = "bits per byte" if "val_bpb" in val else "nats per pair"
    key = "val_bpb" if "val_bpb" in val else "val_loss"
    seen = made.config.optim.steps * made.config.optim.batch * evaluate.context
    out = Part(
        name=folder.name, part=part, step=best, val=val[key], train=train[key], unit=unit, size=_bytes(evaluate.data),
        tokens=sum(int(one.manifest["train"]["tokens"]) for one in evaluate.data), seen=seen,
    )  # fmt: skip
    write_text(kept, json.dumps(dataclasses.asdict(out)))
    return out


def _best(folder: Path) -> int:
    """The step of a run's best weights; of one that never measured any, its last."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return int((result.get("best") or {}).get("step", result["step"]))


def members(folder: Path) -> Iterator[Path]:
    """The runs of a series."""
    made = read(folder)
    yield from (folder / made.name(part) for part in made.parts)
