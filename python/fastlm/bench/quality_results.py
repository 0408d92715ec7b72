"""Quality results as files: read, and told whether their sources have changed since."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastlm.bench import sources

SCHEMA = 1


def source_hash(names: Iterable[str], root: Path) -> str:
    """Sixteen digits that change when one of the named files of the checkout changes in more than comments."""
    return sources._digest([root / name for name in sorted(set(names))], root)


def load(root: Path) -> dict[str, dict[str, Any]]:
    """All quality results by name. Raises ValueError that names a file which is none."""
    found = {}
    for path in sorted((root / "bench/results").glob("quality-*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a quality result: {error}") from error
        lacking = [k for k in ("command", "date", "machine", "files", "sources", "rows") if k not in data]
        if data.get("schema") != SCHEMA or lacking:
            raise ValueError(
                f"{path} is not a quality result of schema {SCHEMA}: it lacks {', '.join(lacking) or 'it'}"
            )
        found[path.stem] = data
    return found


def changed(data: dict[str, Any], root: Path) -> bool:
    """Whether the sources that a result is of have changed since, or are gone."""
    return not all((root / f).is_file() for f in data["files"]) or source_hash(data["files"], root) != data["sources"]
