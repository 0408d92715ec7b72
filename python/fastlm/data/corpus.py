"""Corpora: files, folders and globs of text, source code, rows (.jsonl, .json, .csv, .parquet) and .arrow (a folder that
Hugging Face `datasets` saved to disk), plain or compressed, read as documents.

A document is a file, a row, or what a separator parts. Reading streams, and is cut into jobs of about `JOB` bytes that
can be done apart: a job names a part of a plain file, which whoever does the job reads, or holds texts that could only be
read in order (compressed, or in columns). A document above `WHOLE` bytes comes in pieces of about 64 KiB cut at line
ends, the same whether it is compressed or not, so memory stays constant whatever the corpus' size.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fastlm.data import cutting, readers
from fastlm.data.cutting import Job, Part, Piece
from fastlm.data.errors import InputError
from fastlm.data.readers import COLUMNS, LINES, TABLES, Form, compressed, form, kind

JOB_FILES = 256
SUFFIXES = frozenset(
    [".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".java",
     ".go", ".rs", ".rb", ".sh", ".sql", ".html", ".css", ".json", ".toml", ".yaml", ".yml", ".ini",
     *LINES, *TABLES, *COLUMNS]
)  # fmt: skip
STDLIB_SKIP = frozenset(
    ["test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "idlelib", "tkinter", "turtledemo",
     "__pycache__"]
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- which files


def stdlib_files() -> list[Path]:
    """The running Python's own standard library, about 9 MB: real text on every machine, nothing to download."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in STDLIB_SKIP]
        found += [Path(folder, f) for f in files if f.endswith(".py")]
    return sorted(found)


def _saved(folder: Path) -> list[Path] | None:
    """The .arrow files of a folder that `datasets`' save_to_disk wrote, or None if it is no such folder."""
    splits = folder / "dataset_dict.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_text())["splits"]
            if len(names) != 1:
                raise InputError(f"{folder} holds the splits {', '.join(names)}: name one, such as {folder / names[0]}")
            return _saved(folder / names[0])
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            return [folder / f["filename"] for f in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the saved dataset {folder} cannot be read: {error!r}") from error
    return None


def _inside(root: Path) -> list[Path]:
    """Files of a known kind below a folder, sorted; hidden files and folders are left out."""
    found = []
    for folder, names, files in os.walk(root):
        saved = _saved(Path(folder))
        if saved is not None:
            found += saved
            names.clear()
            continue
        names[:] = [n for n in names if not n.startswith(".")]
        here = [Path(folder, f) for f in files if not f.startswith(".")]
        found += [p for p in here if kind(p) in SUFFIXES and p.is_file()]
    return sorted(found)


def expand(names: tuple[str, ...]) -> list[Path]:
    """Files that the names stand for, sorted, each once. No name, or "stdlib": the standard library's source."""
    files: list[Path] = []
    for name in names or ("stdlib",):
        path = Path(name).expanduser()
        if path.is_dir():
            inside = _inside(path)
            if not inside:
                raise InputError(f"the folder {name} holds no file of a known kind ({' '.join(sorted(SUFFIXES))})")
            files += inside
        elif path.exists():
            files.append(path)
        elif name == "stdlib":
            files += stdlib_files()
        elif any(c in name for c in "*?["):
            found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
            if not found:
                raise InputError(f"no file matches {name}")
            files += sorted(found)
        else:
            raise InputError(
                f"the corpus {name} does not exist; give files, folders or globs, or nothing for the default"
            )
    return list(dict.fromkeys(files))


def refuse_inside(out: Path, names: tuple[str, ...]) -> None:
    """InputError where a file that is to be written would be a part of the corpus that it is made from."""
    out = Path(os.path.abspath(out.expanduser().resolve()))
    for name in names:
        path = Path(name).expanduser()
        place = path.resolve()
        if path.is_dir():
            inside = out.relative_to(place).parts if out.is_relative_to(place) else (".",)
            read = kind(out) in SUFFIXES and not any(part.startswith(".") for part in inside)
        else:
            read = not path.exists() and out.match(str(place))
        if read:
            raise InputError(f"--out {out} would be read as a part of {name} the next time: write beside it")


# ----------------------------------------------------------------------------------------------------------------- jobs


def parting(separator: str) -> bytes:
    """A separator as typed (\\n and \\t understood) in bytes."""
    return separator.replace("\\n", "\n").replace("\\t", "\t").encode()


def apart(path: Path, found: Form, separator: str) -> bool:
    """Whether parts of the file can be read apart: a plain one, by lines or as one text."""
    return not compressed(path) and (found == "lines" or (found == "text" and not separator))


def whole_texts(files: list[Path], field: str, separator: str) -> bool:
    """Whether each file is one document, of as many bytes as the file has."""
    for path in files:
        with readers.Named(path):
            if separator or compressed(path) or form(path, field) != "text":
                return False
    return True


def jobs(files: list[Path], field: str = "text", separator: str = "") -> Iterator[tuple[Job, int]]:
    """(job, bytes on disk that it stands for) of a corpus, in order. Where they are cut depends on the files alone."""
    held: list[Piece | Part] = []
    size = disk = 0
    border = parting(separator)
    for path in files:
        with readers.Named(path):
            length = path.stat().st_size
            found = form(path, field)
            if apart(path, found, separator):
                rows = found == "lines"
                ranged = length > (cutting.JOB if rows else cutting.WHOLE)
                parts = (
                    cutting.parts(path, length, rows)
                    if ranged
                    else iter([Part(path, 0, length, length, rows)] if length else [])
                )
                pairs: Iterator[tuple[Piece | Part, int]] = ((p, p.end - p.start) for p in parts)
            else:
                pairs = _progress(readers.streamed(path, found, field, border), length)
            for item, part in pairs:
                held.append(item)
                disk += part
                size += item.end - item.start if isinstance(item, Part) else len(item.text)
                if size >= cutting.JOB or (isinstance(item, Part) and len(held) >= JOB_FILES):
                    yield tuple(held), disk
                    held, size, disk = [], 0, 0
    if held:
        yield tuple(held), disk


def _progress(pieces: Iterator[tuple[Piece, int]], length: int) -> Iterator[tuple[Piece, int]]:
    """Places in the file as steps that sum to its length."""
    at, waiting = 0, None
    for piece, place in pieces:
        if waiting is not None:
            yield waiting
        waiting, at = (piece, max(min(place, length) - at, 0)), max(place, at)
    if waiting is not None:
        yield waiting[0], waiting[1] + max(length - at, 0)


def pieces(job: Job, field: str = "text") -> Iterator[Piece]:
    """The pieces of a job, read where they are not at hand."""
    for item in job:
        if isinstance(item, Piece):
            yield item
            continue
        with readers.Named(item.path):
            if item.rows:
                yield from readers.lines(item, field)
                continue
            yield from cutting.read_part(item)


def documents(path: Path, field: str = "text", separator: str = "") -> Iterator[Piece]:
    """The pieces of one file, in order. Raises InputError where it cannot be read."""
    for job, _ in jobs([path], field, separator):
        yield from pieces(job, field)
