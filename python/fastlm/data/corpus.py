"""Corpora: files, folders and globs of text, source code, .jsonl and .parquet, plain or .gz/.zst, read as documents.

A document is a file, a row of .jsonl or .parquet, or what a separator parts. Reading streams: a plain file above
`WHOLE` bytes comes in pieces of about 64 KiB cut at line ends, so memory stays constant whatever the corpus' size.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastlm.data.errors import InputError

BLOCK = 64 * 1024
WHOLE = 32 * 1024 * 1024
ROWS = (".jsonl", ".parquet")
SUFFIXES = frozenset(
    [
        ".txt",
        ".md",
        ".rst",
        ".tex",
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".js",
        ".ts",
        ".java",
        ".go",
        ".rs",
        ".rb",
        ".sh",
        ".sql",
        ".html",
        ".css",
        ".json",
        ".toml",
        ".yaml",
        ".yml",
        ".ini",
        ".jsonl",
        ".parquet",
    ]
)
STDLIB_SKIP = frozenset(
    [
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "encodings",
        "pydoc_data",
        "idlelib",
        "tkinter",
        "turtledemo",
        "__pycache__",
    ]
)


@dataclass(frozen=True)
class Piece:
    """Bytes of one document; `last` closes it."""

    text: bytes
    last: bool = True


def stdlib_files() -> list[Path]:
    """The running Python's own standard library, about 9 MB: real text on every machine, nothing to download."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in STDLIB_SKIP]
        found += [Path(folder, f) for f in files if f.endswith(".py")]
    return sorted(found)


def kind(path: Path) -> str:
    """The suffix that says how to read it, with .gz or .zst taken off."""
    name = path.name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def expand(names: tuple[str, ...]) -> list[Path]:
    """Files that the names stand for, sorted, each once. No name, or "stdlib": the standard library's source."""
    files: list[Path] = []
    for name in names or ("stdlib",):
        path = Path(name).expanduser()
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and kind(p) in SUFFIXES]
            if not inside:
                raise InputError(f"the folder {name} holds no file of a known kind ({' '.join(sorted(SUFFIXES))})")
            files += sorted(inside)
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


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise InputError(f"reading {path} needs the package zstandard: pip install zstandard") from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, "rb")))  # type: ignore[arg-type]
    return open(path, "rb")


def _blocks(stream: IO[bytes], head: bytes = b"") -> Iterator[Piece]:
    """The rest of a stream in pieces of about BLOCK bytes, cut at line ends; the last one is marked."""
    rest = head
    while True:
        read = stream.read(1 << 20)
        rest += read
        done, start = not read, 0
        while len(rest) - start > (0 if done else 2 * BLOCK):
            end = min(start + BLOCK, len(rest))
            line = rest.find(b"\n", end - 1, end + BLOCK)
            end = min(line + 1 if line >= 0 else end, len(rest))
            yield Piece(rest[start:end], last=done and end == len(rest))
            start = end
        rest = rest[start:]
        if done:
            return


def cut(text: bytes, size: int = BLOCK) -> list[bytes]:
    """Blocks of about `size` bytes, each ending at a line end where one comes within a block's length."""
    out, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            line = text.find(b"\n", end - 1, end + size)
            end = line + 1 if line >= 0 else end
        out.append(text[start:end])
        start = end
    return out


def _rows(path: Path, field: str) -> Iterator[Piece]:
    if kind(path) == ".parquet":
        try:
            import pyarrow.parquet as pq
        except ImportError:
            raise InputError(f"reading {path} needs the package pyarrow: pip install pyarrow") from None
        table = pq.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise InputError(f"{path} has no column {field!r}; it has {', '.join(table.schema_arrow.names)} (--field)")
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                if value:
                    yield Piece(value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass"))
        return
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}, line {number}: not a JSON object with a text in {field!r} (--field)"
                ) from None
            if text:
                yield Piece(str(text).encode("utf-8", "surrogatepass"))


def documents(path: Path, field: str = "text", separator: str = "") -> Iterator[Piece]:
    """The pieces of one file, in order. Raises InputError where it cannot be read."""
    try:
        if kind(path) in ROWS:
            yield from _rows(path, field)
            return
        with _open(path) as stream:
            head = stream.read(WHOLE)
            if len(head) == WHOLE and not separator:
                yield from _blocks(stream, head)
            elif separator:
                yield from _separated(stream, head, separator.encode().decode("unicode_escape").encode())
            elif head:
                yield Piece(head)
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error.strerror if isinstance(error, OSError) else error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("pyarrow", "zstandard", "zlib"):
            raise
        raise InputError(f"cannot read {path}: {error}") from error


def _separated(stream: IO[bytes], head: bytes, separator: bytes) -> Iterator[Piece]:
    rest = head
    while True:
        *whole, rest = rest.split(separator)
        yield from (Piece(text) for text in whole if text)
        read = stream.read(1 << 20)
        if not read:
            break
        rest += read
    if rest:
        yield Piece(rest)
