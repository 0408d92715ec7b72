"""The folders of runs: a new one, one found by name or path, and its config.json."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from fastlm.data import InputError, Prepared
from fastlm.models.gpt import GPTConfig
from fastlm.train import checkpoint, export, lineage, lock
from fastlm.train.config import Config
from fastlm.train.files import write_text


def new_folder(config: Config) -> tuple[Path, lock.Lock]:
    """runs/NAME, made now, and its lock. A folder that is there already is never written into, unless it is a run's that
    was killed before it began: then it holds nothing but a lock that nobody has."""
    name = config.run.name or time.strftime("%Y%m%d-%H%M%S")
    folder, number = Path(config.run.out) / name, 1
    while True:
        try:
            own = _claim(folder)
        except OSError as error:
            raise InputError(f"cannot make the run's folder {folder}: {error.strerror}") from error
        if own is not None:
            return folder, own
        if config.run.name:
            raise InputError(
                f"the run {folder} exists and is not overwritten: choose another --name, or --resume {folder}"
            )
        number += 1
        folder = Path(config.run.out) / f"{name}-{number}"


def _claim(folder: Path) -> lock.Lock | None:
    """The lock of a folder that holds nothing else; None where the folder is another's."""
    while True:
        try:
            folder.mkdir(parents=True)
            made = True
        except FileExistsError:
            made = False
        try:
            if not set(os.listdir(folder)) <= {lock.NAME}:
                return None
            own = lock.take(folder)
        except (lock.Held, NotADirectoryError):
            return None
        except (InputError, FileNotFoundError):
            if folder.exists():
                raise
            continue  # the other process that had made it has just given it up
        if own.stands(folder):
            if (made or own.firm) and os.listdir(folder) == [lock.NAME]:
                return own
            own.release()
            return None
        own.release()


def find_run(name: str | None, out: str = "runs") -> Path:
    """The folder of a run by path or name; without one, the run that was written to last."""
    if name:
        for folder in (Path(name), Path(out) / name):
            if (folder / "config.json").is_file() or (folder / "state.json").is_file():
                return folder
            if (folder / "series.json").is_file():
                part = min((path.parent.name for path in folder.glob("*/config.json")), default="one of its folders")
                raise InputError(f"{name} is a series of runs: name one of them, such as {folder / part}")
        raise InputError(f"there is no run {name} (a folder with config.json, here or in {out}/)")
    runs = [p.parent for p in Path(out).glob("*/config.json") if checkpoint.steps(p.parent)]
    if not runs:
        raise InputError(f"{out}/ holds no run with a checkpoint; train one first, or name its folder")
    return max(runs, key=lambda folder: max(p.stat().st_mtime for _, p in checkpoint.steps(folder)))


def find_origin(name: str, out: str) -> Path:
    """The run that --resume or --fork names: in --out, or in runs/, since a run may go elsewhere than its origin lies."""
    if out not in ("", "runs"):
        try:
            return find_run(name, out)
        except InputError:
            if not any((Path("runs") / name / file).is_file() for file in ("config.json", "state.json")):
                raise
    return find_run(name)


def find_init(name: str, out: str) -> Path:
    """What --init names: a run, checkpoint or exported folder by path, or a run by name, in --out or in runs/."""
    return Path(name) if Path(name).exists() else find_origin(name, out)


def has_data(folder: Path) -> bool:
    """Whether a folder is a run's, or made of one: its config.json names a corpus. A checkpoint's or exported one is not."""
    if (folder / "state.json").is_file():
        return False
    try:
        return "corpus" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_config(folder: Path) -> tuple[Config, tuple[str, ...]]:
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Config.from_dict(saved["config"]), tuple(saved["corpus"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None


def check_trains(folder: Path) -> None:
    """InputError for a folder that a command wrote of trained runs: no training goes on there."""
    body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    made = next((what for what in ("compressed", "soup") if what in body), None)
    if made is not None:
        what = "a compressed model" if made == "compressed" else "a soup of runs"
        raise InputError(
            f"{folder} is {what} and holds no training to go on with: --init {folder} in the place of --resume or --fork "
            f"starts a run from it"
        )


def forked_from(folder: Path) -> Path | None:
    """The checkpoint that a fork started from, or None for any other run."""
    try:
        origin = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("fork", "")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None
    return Path(origin) if origin else None


def write_config(
    folder: Path,
    config: Config,
    corpus: tuple[str, ...],
    model: GPTConfig,
    data: list[Prepared],
    fork: Path | None = None,
) -> None:
    """config.json and the tokenizer; `fork` is the checkpoint that the run starts from, if there is one."""
    where = [str(Path(c).resolve()) if Path(c).exists() else c for c in corpus]
    saved = config.to_dict()
    if config.run.when:
        saved["run"]["when"] = str(Path(config.run.when).resolve())
    pairs = [given.partition("=") for given in config.data.val]
    saved["data"]["val"] = [f"{n}={Path(p).resolve() if Path(p).exists() else p}" for n, _, p in pairs]
    body: dict[str, Any] = {
        "config": saved,
        "corpus": where,
        "fork": str(fork.resolve()) if fork is not None else "",
        **lineage.record(folder, fork, config.model.init),
        "model": dataclasses.asdict(model),
        "tokenizer": data[0].tokenizer.spec(),
        "data": [
            {"content": d.content, **{k: d.manifest[k] for k in ("documents", "split", "train", "val")}} for d in data
        ],
    }
    if body["tokenizer"]["kind"] != "bytes":
        write_text(folder / "tokenizer.json", export.tokenizer_json(body["tokenizer"]))  # for others; it repeats a part
    write_text(folder / "config.json", json.dumps(body, indent=1))  # last: with it the run has begun
