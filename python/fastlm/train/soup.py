"""`fastlm soup A B C --out S`: the average of runs' weights as one run (Wortsman et al. 2022, "Model soups").

    uniform   the mean of all members
    greedy    members by their validation loss, best first: one is taken where the mean with it is no worse

Runs with a common ancestor lie in one basin, and the mean of their weights is as good as they are or better. Means of runs
that were trained apart are as bad as no training, so they are refused unless forced.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm import compress
from fastlm.console import warn
from fastlm.data import InputError
from fastlm.data import tokenizer as tokenizers
from fastlm.data.prepare import Note, silent
from fastlm.models.gpt import GPT
from fastlm.train import checkpoint, export, lineage, reference, report, state, together
from fastlm.train.checkpoint import Piece
from fastlm.train.evaluating import Evaluation
from fastlm.train.files import write_text
from fastlm.train.folders import has_data
from fastlm.train.machine import pick_device


@dataclass
class Member:
    """One run: its validation loss and bits per byte, None where there is no text; and whether it is in the soup."""

    folder: Path
    loss: float | None = None
    bits: float | None = None
    taken: bool = True


@dataclass
class Soup:
    """What came of it. `shared` is the common ancestor."""

    folder: Path
    method: str
    members: list[Member]
    measured: dict[str, float]
    shared: lineage.Ancestor | None

    def lines(self) -> list[str]:
        """A line of each run, and one of the soup."""
        rows = [
            (str(one.folder), _said(one.loss, one.bits), "" if one.taken else "left out: with it the mean is worse")
            for one in self.members
        ]
        count = sum(one.taken for one in self.members)
        loss, bits = self.measured.get("val_loss"), self.measured.get("val_bpb")
        rows.append((f"soup of {count}" + (" (one run alone)" if count == 1 else ""), _said(loss, bits), ""))
        wide = max(len(name) for name, *_ in rows)
        return [f"{name:<{wide}}  {said}  {left}".rstrip() for name, said, left in rows]


def _said(loss: float | None, bits: float | None) -> str:
    if loss is None:
        return ""
    return f"{loss:.4f} nats" + ("" if bits is None else f", {bits:.4f} bits per byte")


def run(
    folders: Sequence[Path], target: Path, *, method: str = "greedy", text: tuple[str, ...] = (), force: bool = False,
    device: str = "auto", note: Note = silent,
) -> Soup:  # fmt: skip
    """Average runs into the new folder `target`.

    `text` is what they are measured on, in the place of the first one's validation split. Raises InputError for runs that
    cannot be averaged, and for those without a common ancestor unless `force`.
    """
    together.need_several(folders, "soup")
    if target.exists():
        raise InputError(f"{target} exists and is not overwritten: choose another --out, or remove it")
    measures = bool(text) or has_data(folders[0])
    if method == "greedy" and not measures:
        raise InputError(
            f"{folders[0]} is a model without a run's data: give --text, or --method uniform, which needs none"
        )
    common = lineage.shared(folders)
    if common is None:
        _refuse(folders, force)
    pot = _Pot(folders, device)
    evaluate = None
    if measures:
        evaluate = Evaluation(folders[0], pot.tokenizer, pot.model.config.context, pot.place, text, note)
        if others := [] if text else together.strangers(folders):
            warn(
                f"{', '.join(map(str, others))}: other data than those of {folders[0]}, or another split, so what measures "
                f"here may have been trained on there"
            )
    members, measured = [Member(folder) for folder in folders], dict[str, float]()
    alone = [evaluate(pot.filled(pot.read(folder))) if evaluate is not None else {} for folder in folders]
    for one, found in zip(members, alone, strict=True):
        one.loss, one.bits = found.get("val_loss"), found.get("val_bpb")
    order = sorted(range(len(members)), key=lambda i: _rank(members[i].loss))
    for i in order:
        one, with_it = members[i], pot.with_one_more(pot.read(members[i].folder))
        if evaluate is not None and method == "greedy":
            found = evaluate(pot.filled(with_it.mean())) if measured else alone[i]
            one.taken = not measured or found["val_loss"] <= measured["val_loss"]
            measured = found if one.taken else measured
        if one.taken:
            pot.sums = with_it
    if evaluate is not None and method == "uniform":
        measured = evaluate(pot.filled(pot.sums.mean()))
    made = Soup(target, method, members, measured, common)
    _write(made, pot, force)
    return made


def _rank(loss: float | None) -> float:
    """Losses in order, the best first; what is no number comes last."""
    return math.inf if loss is None or math.isnan(loss) else loss


def _refuse(folders: Sequence[Path], force: bool) -> None:
    names = f"{', '.join(map(str, folders[:-1]))} and {folders[-1]}"
    why = f"{names} have no common ancestor: the mean of weights that were trained apart is as bad as no training"
    if not force:
        raise InputError(f"{why} (--fork one run, or --init from one folder; --force averages all the same)")
    warn(why)


@dataclass(frozen=True)
class _Sums:
    """Sums of tensors over so many models, float64."""

    tensors: dict[str, Tensor]
    count: int

    def mean(self) -> dict[str, Tensor]:
        return {name: (t / self.count).float() for name, t in self.tensors.items()}


class _Pot:
    """The sum of the members taken so far, and a model to measure means in. Members are read one at a time."""

    def __init__(self, folders: Sequence[Path], device: str) -> None:
        """Raises InputError, naming both, for a run that is unlike the first."""
        self.first = first = folders[0]
        self.sums = _Sums({}, 0)
        self.source = self._read(first)
        self.tokenizer = self._tokenizer(first, self.source)
        self.masks = self.source.masks
        shape = _plain(self.source)
        for folder in folders[1:]:
            other = self._read(folder)
            together.check_tokenizers((first, folder), (self.tokenizer, self._tokenizer(folder, other)))
            if _plain(other) != shape:
                differ = [k for k, v in _plain(other).items() if v != shape[k]]
                told = ", ".join(f"{k} {shape[k]} and {_plain(other)[k]}" for k in differ)
                raise InputError(f"{first} and {folder} are of different shapes ({told}): they have no mean")
            if not _same(other.masks, self.masks):
                raise InputError(f"{first} and {folder} are pruned by different masks: their mean would be neither's")
        self.place = pick_device(device)
        self.model = GPT(self.source.shape).to(self.place).eval()

    @staticmethod
    def _read(folder: Path) -> export.Source:
        found = export.read_model(folder)
        if found.int8 is not None:
            raise InputError(f"{folder} is an int8 model: average the runs that it and its like were made of")
        return found

    @staticmethod
    def _tokenizer(folder: Path, source: export.Source) -> tokenizers.Tokenizer:
        spec = source.tokenizer or export.read_tokenizer(folder)
        if spec is None:
            raise InputError(f"{folder} holds no tokenizer.json, so there is no telling what its tokens mean")
        return tokenizers.load(spec)

    def read(self, folder: Path) -> dict[str, Tensor]:
        return self._read(folder).tensors

    def with_one_more(self, tensors: dict[str, Tensor]) -> _Sums:
        if not self.sums.count:
            return _Sums({name: t.double() for name, t in tensors.items()}, 1)
        return _Sums({name: t + tensors[name] for name, t in self.sums.tensors.items()}, self.sums.count + 1)

    def filled(self, tensors: dict[str, Tensor]) -> GPT:
        state.load_model(self.model, tensors, self.first)
        return self.model


def _plain(source: export.Source) -> dict[str, Any]:
    """A shape without what it does in training alone."""
    return {k: v for k, v in dataclasses.asdict(source.shape).items() if k != "dropout"}


def _same(masks: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return masks.keys() == others.keys() and all(torch.equal(mask, others[name]) for name, mask in masks.items())


def _write(made: Soup, pot: _Pot, force: bool) -> None:
    """The run's folder, whole or not at all."""
    target, first = made.folder, pot.first
    base = first.parent.parent if (first / "state.json").is_file() else first
    body = json.loads((base / "config.json").read_text(encoding="utf-8"))
    kept = {k: copy.deepcopy(v) for k, v in body.items() if k in ("config", "corpus", "data")}
    if "config" in kept:
        kept["config"]["run"]["name"] = target.name
        kept["config"]["model"]["lora_rank"] = 0  # adapters are merged
    began = [] if made.shared is None else lineage.since(first, made.shared)
    config = {
        **kept,
        "id": lineage.new(),
        "ancestors": [dataclasses.asdict(one) for one in began],
        "model": dataclasses.asdict(pot.source.shape),
        "tokenizer": pot.tokenizer.spec(),
        "soup": {
            "method": made.method,
            "forced": force and made.shared is None,
            "members": [
                {"run": str(one.folder.resolve()), "loss": one.loss, "bits_per_byte": one.bits, "taken": one.taken}
                for one in made.members
            ],
        },
    }
    model = pot.filled(pot.sums.mean())
    compress.attach(model, pot.masks)
    tensors = {n: Piece.whole(t.cpu()) for n, t in state.model_tensors(model).items()}
    count = sum(one.taken for one in made.members)
    result = {"why": f"soup of {count} runs", "step": 0, "val": made.measured, "counted": {}, "best": {}}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    draft = target.parent / f".draft-{target.name}-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest = checkpoint.write_groups(draft, {"model": tensors}, 0, 1)
        if config["tokenizer"]["kind"] != "bytes":
            write_text(draft / "tokenizer.json", export.tokenizer_json(config["tokenizer"]))
        if (base / reference.FILE).is_file():
            shutil.copyfile(base / reference.FILE, draft / reference.FILE)
        if target.exists():
            raise InputError(f"{target} exists and is not overwritten: choose another --out, or remove it")
        checkpoint.seal(draft, target, manifest, {"result.json": result, "config.json": config})
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if "config" in kept:
        report.write(target)
