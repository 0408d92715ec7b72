"""Ways to read documents: lines of JSON, columns, what a separator parts; plain or compressed."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastlm.data import cutting
from fastlm.data.cutting import Part, Piece
from fastlm.data.errors import InputError

COLUMNS = (".parquet", ".arrow")


def kind(path: Path) -> str:
    """The suffix that says how to read it, with .gz or .zst taken off."""
    name = path.name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


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


def lines(part: Part, field: str) -> Iterator[Piece]:
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
                    read = file.read(min(at, cutting.JOB))
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
    """What the separator parts. A document that grows above cutting.WHOLE goes on in pieces, as a long file does."""
    head: float | None = None
    while True:
        *whole, text = text.split(separator)
        for document in whole:
            if head is not None:  # the end of a long one
                yield from cutting.split(document or b"\n", True, False, head)
                head = None
            elif document:
                yield Piece(document)
        if len(text) > cutting.WHOLE:
            first = head is None
            head = cutting.mark(cutting.cut(text[: 2 * cutting.BLOCK])[0]) if head is None else head
            end = cutting.border(text, len(text) - 2 * cutting.BLOCK)
            yield from cutting.split(text[:end], False, first, head)
            text = text[end:]
        read = stream.read(cutting.JOB)
        if not read:
            break
        text += read
    if head is not None:
        yield from cutting.split(text, True, False, head)
    elif text:
        yield Piece(text)


def streamed(path: Path, field: str, separator: bytes) -> Iterator[tuple[Piece, int]]:
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
        text = stream.read(cutting.WHOLE + 1)
        if separator:
            pieces = _separated(stream, text, separator)
        else:
            pieces = cutting.long(stream, text) if len(text) > cutting.WHOLE else iter([Piece(text)] if text else [])
        for piece in pieces:
            yield piece, raw.tell()


class Named:
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
