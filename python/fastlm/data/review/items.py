"""What is to be judged: tasks as `fastlm data tasks` writes them, rows of texts or answers, outputs of a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data import filter as filters
from fastlm.data.errors import InputError

TEXTS = ("text", "completion", "output", "answer")  # of a task's data the first that is there is judged


@dataclass(frozen=True)
class Item:
    """`data` is what an export gives back. `unsure`: how uncertain a machine is of it; the largest comes first."""

    data: dict[str, Any]
    unsure: float = 0.0

    @property
    def key(self) -> str:
        """The name by which an item is known again: a hash of its data, as `fastlm data labels` takes it."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """What is judged."""
        return str(next(self.data[name] for name in TEXTS if name in self.data))

    @property
    def prompt(self) -> Any:
        """What the text answers: a text, messages, or None."""
        return self.data.get("prompt")


def read(path: Path, filter: str = "") -> list[Item]:
    """The tasks of a .json in Label Studio's import format, or the rows of a .jsonl.

    The order is that of the file, which `fastlm data tasks --filter` begins with the least sure. With the folder of a filter
    the nearest to a threshold of its policy come first; else those of the least score, where predictions have scores.

    Raises InputError, naming file and task, for what holds no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            found = [{"data": json.loads(line)} for line in content.splitlines() if line.strip()]
        else:
            found = json.loads(content)
        if not isinstance(found, list):
            raise ValueError("it is no list of tasks")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as tasks: {error}") from None
    if not found:
        raise InputError(f"{path} holds no task")
    worst = filters.load(filter).worst if filter else None
    items = []
    for number, task in enumerate(found, 1):
        data = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict) or not any(isinstance(data.get(name), str) for name in TEXTS):
            raise InputError(f"{path}, task {number}: its data has no {', '.join(TEXTS[:-1])} or {TEXTS[-1]}")
        one = Item(data)
        items.append(Item(data, -abs(worst(one.text)) if worst is not None else -_score(task, path, number)))
    return items


def _score(task: dict[str, Any], path: Path, number: int) -> float:
    """The best score of a task's predictions; 0 where it has none."""
    try:
        found = max((float(one["score"]) for one in task.get("predictions") or () if "score" in one), default=0.0)
        if not math.isfinite(found):
            raise ValueError(found)
    except (TypeError, ValueError, AttributeError):
        raise InputError(f"{path}, task {number}: its predictions are not as Label Studio writes them") from None
    return found


def ordered(items: Iterable[Item]) -> list[Item]:
    """The least sure first, each data once; equal ones in their order."""
    unique = {one.key: one for one in items}
    return sorted(unique.values(), key=lambda one: -one.unsure)
