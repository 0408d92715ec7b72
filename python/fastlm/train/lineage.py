"""Where a run's weights come from: `id` and `ancestors` in config.json, by which `fastlm soup` knows what runs share.

`id` is drawn when a run begins, and stays when its folder is moved, copied or resumed. `ancestors`, nearest first, are
{"run": id, "step": steps it had taken, "path": where it lay}: what a fork starts from, what --init names, and theirs. A
folder without an id (exported, or of transformers) has a hash of its weights in the place of one, and a run from before
there were ids its path.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastlm.data import InputError
from fastlm.train import checkpoint, pruning
from fastlm.train.config import Config


@dataclass(frozen=True)
class Ancestor:
    """A run at a step; None where its weights are no run's at a step, but those of a whole folder."""

    run: str
    step: int | None
    path: str


def record(folder: Path, fork: Path | None, init: str) -> dict[str, Any]:
    """`id` and `ancestors` for the config.json of `folder`: those that it has, else new ones.

    `fork` is the checkpoint that the run starts from, else `init` what --init names; either may be none. (A fork has the
    --init of its origin among its settings.)
    """
    found = _body(folder)
    if "id" in found:
        return {"id": found["id"], "ancestors": found.get("ancestors", [])}
    begun = fork or (Path(init) if init else None)
    ancestors = chain(begun) if begun is not None else []
    # of an older run that goes on: its forks know it by its path
    own = str(folder.resolve()) if found else new()
    return {"id": own, "ancestors": [asdict(one) for one in ancestors]}


def new() -> str:
    """An id that no other run has."""
    return secrets.token_hex(16)


def since(folder: Path, ancestor: Ancestor) -> list[Ancestor]:
    """An ancestor of a folder and what it in turn comes from."""
    found = chain(folder)
    at = next(i for i, one in enumerate(found) if one.run == ancestor.run)
    return [ancestor, *found[at + 1 :]]


def chain(folder: Path) -> list[Ancestor]:
    """The run (of a checkpoint the run at that step; of an exported folder that) and what it comes from, nearest first."""
    own = (folder / "state.json").is_file()
    run = folder.resolve().parent.parent if own else folder.resolve()
    body = _body(run)
    if "id" in body:
        further = [Ancestor(**one) for one in body.get("ancestors", ())]
        return [Ancestor(body["id"], _step(folder, body), str(run)), *further]
    name = str(run) if "config" in body else _hash(run) or str(run)
    origins = [
        Path(place)
        for place in (
            body.get("fork"),
            body.get("config", {}).get("model", {}).get("init"),
            body.get("compressed", {}).get("origin"),
        )
        if place
    ]
    further = [one for place in origins for one in (chain(place) if place.exists() else [_gone(place)])]
    return [Ancestor(name, _step(folder, body), str(run)), *dict.fromkeys(further)]


def shared(folders: Sequence[Path]) -> Ancestor | None:
    """The nearest run that all of them come from, at the last step that they have in common; None where there is none.

    One of them may be what the others come from. Weights that nothing was trained into are nobody's ancestor.
    """
    chains = [chain(folder) for folder in folders]
    for one in chains[0]:
        found = [next((other for other in others if other.run == one.run), None) for others in chains]
        if all(found):
            steps = [other.step for other in found if other is not None and other.step is not None]
            if not steps or min(steps) > 0:
                return Ancestor(one.run, min(steps, default=None), one.path)
    return None


def _gone(place: Path) -> Ancestor:
    """An origin that is there no more, by its path: a checkpoint's name tells its step."""
    if place.parent.name == "checkpoints":
        number = place.name.rpartition("-")[2]
        return Ancestor(str(place.parent.parent), int(number) if number.isdigit() else None, str(place.parent.parent))
    return Ancestor(str(place), None, str(place))


def _body(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        return {}
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None
    return found


def _step(folder: Path, body: dict[str, Any]) -> int | None:
    """The step whose weights `export.read_model` takes."""
    if (folder / "state.json").is_file():
        return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
    if "config" not in body:
        return None
    optim = Config.from_dict(body["config"]).optim
    best = [step for step, _ in checkpoint.steps(folder, "best") if pruning.settled(optim, step)]
    steps = best or [step for step, _ in checkpoint.steps(folder)]
    return steps[-1] if steps else None


def _hash(folder: Path) -> str:
    """Of the weights in a folder that is no run's; "" where it has none."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest() if files else ""
