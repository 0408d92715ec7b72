"""Corpora: files, folders and globs of text, source code, .jsonl, .parquet and .arrow (a folder that Hugging Face
`datasets` saved to disk), plain or .gz/.zst, read as documents.

A document is a file, a row, or what a separator parts. Reading streams, and is cut into jobs of about `JOB` bytes that
can be done apart: a job names a part of a plain file, which whoever does the job reads, or holds texts that could only be
read in order (compressed, or in columns). A document above `WHOLE` bytes comes in pieces of about 64 KiB cut at line
ends, the same whether it is compressed or not, so memory stays constant whatever the corpus' size.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastlm.data.errors import InputError

BLOCK = 64 << 10
JOB = 4 << 20
WHOLE = 8 << 20
JOB_FILES = 256
COLUMNS = (".parquet", ".arrow")
SUFFIXES = frozenset(
    [".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".java",
     ".go", ".rs", ".rb", ".sh", ".sql", ".html", ".css", ".json", ".toml", ".yaml", ".yml", ".ini", ".jsonl",
     ".parquet", ".arrow"]
)  # fmt: skip
STDLIB_SKIP = frozenset(
    ["test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "idlelib", "tkinter", "turtledemo",
     "__pycache__"]
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Bytes of one document; `last` closes it, and `first` opens it.

    `mark` is what the split goes by where the text is only a part of its document: the mark of the document's head.
    """

    text: bytes
    last: bool = True
    first: bool = True
    mark: float | None = None


@dataclass(frozen=True)
class Part:
    """The bytes [start, end) of a plain file of `size` bytes, borders moved to line ends: a whole short file, or some of
    a long one."""

    path: Path
    start: int
    end: int
    size: int


Job = tuple["Piece | Part", ...]


def mark(text: bytes) -> float:
    """A number in [0, 1) that depends on the text alone: below the validation fraction, the text is held out."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") / 2**64


# ------------------------------------------------------------------------------------------------------- which files


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


# --------------------------------------------------------------------------------------------------- where text is cut


def _border(text: bytes, at: int, reach: int = BLOCK) -> int:
    """The first line end in text[at - 1 : at + reach], else `at` moved back to where no character is cut."""
    line = text.find(b"\n", max(at - 1, 0), at + reach)
    if line >= 0:
        return line + 1
    back = at
    while back > max(at - 3, 1) and back < len(text) and text[back] & 0xC0 == 0x80:
        back -= 1
    return back


def cut(text: bytes, size: int = BLOCK) -> list[bytes]:
    """Blocks of about `size` bytes, each ending at a line end where one comes within a block's length."""
    out, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = start + _border(text[start : end + size], size, size)
        out.append(text[start:end])
        start = end
    return out


def _regions(stream: IO[bytes], text: bytes = b"") -> Iterator[tuple[bytes, bool]]:
    """(text, last) of about JOB bytes each, from a stream whose first bytes are `text`; borders as `_part` has them."""
    at, target = 0, JOB
    while True:
        while len(text) <= target - at + 2 * BLOCK:
            more = stream.read(JOB)
            if not more:
                yield text, True
                return
            text += more
        end = _border(text, target - at)
        yield text[:end], False
        at, target, text = at + end, target + JOB, text[end:]


def _split(text: bytes, last: bool, first: bool, head: float) -> Iterator[Piece]:
    blocks = cut(text)
    for i, block in enumerate(blocks):
        yield Piece(block, last and i == len(blocks) - 1, first and i == 0, head)


def _long(stream: IO[bytes], text: bytes) -> Iterator[Piece]:
    """A document above WHOLE, in pieces."""
    head, first = mark(cut(text[: 2 * BLOCK])[0]), True
    for region, last in _regions(stream, text):
        yield from _split(region, last, first, head)
        first = False


def _part(part: Part) -> Iterator[Piece]:
    """The pieces of a part of a plain text file."""
    with open(part.path, "rb") as file:
        if part.size <= WHOLE:
            yield Piece(file.read())
            return
        head = mark(cut(file.read(2 * BLOCK))[0])
        ends = []
        for at in (part.start, part.end):
            if 0 < at < part.size:
                file.seek(at - 4)
                at += _border(file.read(BLOCK + 4), 4) - 4
            ends.append(at)
        file.seek(ends[0])
        text = file.read(ends[1] - ends[0])
        yield from _split(text, ends[1] == part.size, part.start == 0, head)


def _parts(path: Path, size: int) -> Iterator[Part]:
    """A long plain file in parts; none begins so near the end that it would be empty."""
    starts = [s for s in range(0, size, JOB) if not s or s < size - 2 * BLOCK]
    yield from (Part(path, s, e, size) for s, e in zip(starts, [*starts[1:], size]))


# ------------------------------------------------------------------------------------------------------ rows and streams


def _open(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """The file's text as a stream, and the file itself, whose place says how far reading has come."""
    raw = open(path, "rb")  # noqa: SIM115
    if path.name.lower().endswith(".gz"):
        return gzip.open(raw, "rb"), raw  # type: ignore[return-value]
    if path.name.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise InputError(f"reading {path} needs the package zstandard: pip install zstandard") from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)), raw
    return raw, raw


def _row(value: Any, where: str) -> Iterator[Piece]:
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if value is not None and not isinstance(value, bytes):
        raise InputError(f"{where}: the field must hold a text, it is a {type(value).__name__} (--field)")
    if value:
        yield Piece(value)


def _line(line: bytes, field: str, where: str) -> Iterator[Piece]:
    if line.strip():
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{where}: not a JSON object with a text in {field!r} (--field)") from None
        yield from _row(value, where)


def _lines(part: Part, field: str) -> Iterator[Piece]:
    """The rows of the lines of a .jsonl that begin in [start, end)."""
    with open(part.path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while (at := file.tell()) < part.end and (line := file.readline()):
            try:
                yield from _line(line, field, "")
            except InputError as error:
                file.seek(0)
                number = 1
                while at > 0:
                    read = file.read(min(at, JOB))
                    number, at = number + read.count(b"\n"), at - len(read)
                raise InputError(f"{part.path}, line {number}{error}") from None


def _columns(path: Path, field: str) -> Iterator[Piece]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"reading {path} needs the package pyarrow: pip install pyarrow") from None
    with open(path, "rb") as file:
        if kind(path) == ".parquet":
            table = pq.ParquetFile(file)
            schema, batches = table.schema_arrow, lambda: table.iter_batches(batch_size=1024, columns=[field])
        elif file.read(6) == b"ARROW1":
            file.seek(0)
            feather = pa.ipc.open_file(file)
            schema, batches = feather.schema, lambda: map(feather.get_batch, range(feather.num_record_batches))
        else:
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            schema, batches = stream.schema, lambda: stream
        if field not in schema.names:
            raise InputError(f"{path} has no column {field!r}; it has {', '.join(schema.names)} (--field)")
        number = 0
        for batch in batches():
            column = batch.column(batch.schema.names.index(field))
            for value in column.to_pylist():
                number += 1
                yield from _row(value, f"{path}, row {number}")


def _separated(stream: IO[bytes], text: bytes, separator: bytes) -> Iterator[Piece]:
    """What the separator parts. A document that grows above WHOLE goes on in pieces, as a long file does."""
    head: float | None = None
    while True:
        *whole, text = text.split(separator)
        for document in whole:
            if head is not None:  # the end of a long one
                yield from _split(document or b"\n", True, False, head)
                head = None
            elif document:
                yield Piece(document)
        if len(text) > WHOLE:
            first = head is None
            head = mark(cut(text[: 2 * BLOCK])[0]) if head is None else head
            end = _border(text, len(text) - 2 * BLOCK)
            yield from _split(text[:end], False, first, head)
            text = text[end:]
        read = stream.read(JOB)
        if not read:
            break
        text += read
    if head is not None:
        yield from _split(text, True, False, head)
    elif text:
        yield Piece(text)


def _streamed(path: Path, field: str, separator: bytes) -> Iterator[tuple[Piece, int]]:
    """(piece, bytes of the file read so far) of what can only be read in order."""
    if kind(path) in COLUMNS:
        for piece in _columns(path, field):
            yield piece, 0
        return
    stream, raw = _open(path)
    with raw, stream:
        if kind(path) == ".jsonl":
            for number, line in enumerate(stream, 1):
                for piece in _line(line, field, f"{path}, line {number}"):
                    yield piece, raw.tell()
            return
        text = stream.read(WHOLE + 1)
        if separator:
            pieces = _separated(stream, text, separator)
        else:
            pieces = _long(stream, text) if len(text) > WHOLE else iter([Piece(text)] if text else [])
        for piece in pieces:
            yield piece, raw.tell()


class _Named:
    """Errors of reading as one sentence that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | EOFError):
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise InputError(f"cannot read {self.path}: {why}") from error
        if error is not None and type(error).__module__.split(".")[0] in ("pyarrow", "zstandard", "zlib"):
            raise InputError(f"cannot read {self.path}: {error}") from error


# ----------------------------------------------------------------------------------------------------------------- jobs


def parting(separator: str) -> bytes:
    """A separator as typed (\\n and \\t understood) in bytes."""
    return separator.replace("\\n", "\n").replace("\\t", "\t").encode()


def jobs(files: list[Path], field: str = "text", separator: str = "") -> Iterator[tuple[Job, int]]:
    """(job, bytes on disk that it stands for) of a corpus, in order. Where they are cut depends on the files alone."""
    held: list[Piece | Part] = []
    size = disk = 0
    parts = parting(separator)
    for path in files:
        with _Named(path):
            length = path.stat().st_size
            plain = kind(path) not in COLUMNS and not path.name.lower().endswith((".gz", ".zst"))
            if plain and (not separator or kind(path) == ".jsonl"):
                ranged = length > (JOB if kind(path) == ".jsonl" else WHOLE)
                found = _parts(path, length) if ranged else iter([Part(path, 0, length, length)] if length else [])
                pairs: Iterator[tuple[Piece | Part, int]] = ((p, p.end - p.start) for p in found)
            else:
                pairs = _progress(_streamed(path, field, parts), length)
            for item, part in pairs:
                held.append(item)
                disk += part
                size += item.end - item.start if isinstance(item, Part) else len(item.text)
                if size >= JOB or (isinstance(item, Part) and len(held) >= JOB_FILES):
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
        with _Named(item.path):
            if kind(item.path) == ".jsonl":
                yield from _lines(item, field)
                continue
            for piece in _part(item):
                if item.start == 0 and piece.first and (at := piece.text.find(b"\0", 0, BLOCK)) >= 0:
                    raise InputError(
                        f"{item.path} is no text: byte {at} is 0, as in binary files and UTF-16; leave it out, or "
                        f"convert it to UTF-8"
                    )
                yield piece


def documents(path: Path, field: str = "text", separator: str = "") -> Iterator[Piece]:
    """The pieces of one file, in order. Raises InputError where it cannot be read."""
    for job, _ in jobs([path], field, separator):
        yield from pieces(job, field)
