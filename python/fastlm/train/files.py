"""Files that are whole whenever they have their name, and the lines of files that grow."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from fastlm.data.errors import InputError


def sync_folder(folder: Path) -> None:
    """Have a folder's names reach the disk. Some file systems refuse that; the files themselves are synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def utf8(path: Path | str) -> bool:
    """Whether a name is UTF-8; one of other bytes has lone surrogates in their place."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """The text with `?` for bytes that are no UTF-8, for what takes UTF-8 alone."""
    return text.encode("utf-8", "replace").decode()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8: beside its place, synced, and renamed. Raises InputError where it cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")  # ranks may write alike at once
    try:
        with open(draft, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # what was written of it takes room on a full disk
            draft.unlink()
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    sync_folder(path.parent)


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; a line torn by a kill is left out."""
    rows = []
    path = run / name
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a file of metrics that are of later steps."""
    rows = [row for row in read_metrics(path.parent, path.name) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if text != (path.read_text(encoding="utf-8") if path.exists() else ""):
        write_text(path, text)
