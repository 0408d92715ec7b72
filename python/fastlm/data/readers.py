"""Ways to read documents: text, rows of JSON, CSV and columns, what a separator parts; plain or compressed.

The suffix says how a file is read, and of a .json its content: an array of objects and objects line by line are rows, one
object that has the field is a row, and anything else is text. Byte 0 is refused wherever it stands.
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from fastlm.data import cutting, groups
from fastlm.data.cutting import Part, Piece
from fastlm.data.errors import InputError

GROUP = "group"  # the key of a row, or the column, that copies of one text share
SOURCE = "source"  # that says where its text is from
COLUMNS = (".parquet", ".arrow")
LINES = (".jsonl", ".ndjson", ".jsonlines")
TABLES = {".csv": ",", ".tsv": "\t"}
PACKED = (".gz", ".zst", ".xz", ".bz2")
DEFAULT_FIELD = "text"
ROW = "\0"  # in the place of a field: the whole row is the text, as JSON
LONGEST = 64 << 20  # of a .json: bytes of a row, of the first line, of a single object
BLANKS = re.compile(r"\s*")

Form = Literal["text", "lines", "array", "object", "table", "columns"]


def kind(path: Path) -> str:
    """The suffix that says how to read it, with that of a compression taken off."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def compressed(path: Path) -> bool:
    return path.name.lower().endswith(PACKED)


def form(path: Path, field: str) -> Form:
    """How the documents of a file are to be read; rows have the text in `field`.

    Raises InputError for a .json that holds no rows though `field` names one.
    """
    suffix = kind(path)
    if suffix != ".json":
        table: dict[str, Form] = {**dict.fromkeys(LINES, "lines"), **dict.fromkeys(TABLES, "table")}
        return table.get(suffix, "columns" if suffix in COLUMNS else "text")
    found = _json_form(path, field)
    if found == "text" and field != DEFAULT_FIELD and path.stat().st_size:
        raise InputError(
            f"{path} holds no rows{_with(field)}: of a .json an array of objects, objects line by line and "
            f"one object that has the field are rows"
        )
    return found


def _json_form(path: Path, field: str) -> Form:
    stream, raw = _open(path)
    with raw, stream:
        line = b""
        while not line.strip():
            if not (line := stream.readline(LONGEST).removeprefix(b"\xef\xbb\xbf")):
                return "text"
        text = line.lstrip()
        if text.startswith(b"["):
            text = text[1:].lstrip()
            while not text and (line := stream.readline(LONGEST)):
                text = line.lstrip()
            return "array" if text.startswith(b"{") else "text"
        if not text.startswith(b"{"):
            return "text"
        if isinstance(_parsed(line), dict) and any(further.strip() for further in stream):
            return "lines"
        stream.seek(0)
        whole = _parsed(stream.read(LONGEST))
        return "object" if isinstance(whole, dict) and (field == ROW or isinstance(whole.get(field), str)) else "text"


def _with(field: str) -> str:
    """What a row must have, behind the word for it."""
    return "" if field == ROW else f" with {field!r} (--field)"


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(_decoded(text))
    except ValueError:
        return None


def _decoded(line: bytes) -> str:
    """The characters of a line of JSON. Bytes that are not UTF-8 become lone surrogates, which `to_bytes` makes bytes again."""
    return line.decode("utf-8-sig", "surrogateescape")


def to_bytes(text: str) -> bytes:
    r"""The inverse of `_decoded`; a lone surrogate that JSON wrote as \ud83d stays what it is, no UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        escaped = ("surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass" for c in text)
        return b"".join(c.encode("utf-8", how) for c, how in zip(text, escaped))


# ---------------------------------------------------------------------------------------------------------- compression


class _Zstd(io.RawIOBase):
    """The text of a .zst, which may be several frames. The package's own reader takes one that was cut off for the end."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self.raw, self.make = raw, zstandard.ZstdDecompressor().decompressobj
        self.frame: Any = None
        self.input = self.output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output:
            self.input = self.input or self.raw.read(16 << 10)
            if not self.input:
                if self.frame is not None:
                    raise EOFError("it ends within a compressed frame: the file was cut off")
                return 0
            self.frame = self.frame or self.make()
            self.output, self.input = self.frame.decompress(self.input), b""
            if self.frame.eof:
                self.input, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.output))
        buffer[:count], self.output = self.output[:count], self.output[count:]
        return count


def _open(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """The file's text as a stream, and the file itself, whose place says how far reading has come."""
    raw = open(path, "rb")  # noqa: SIM115
    if not compressed(path):
        return raw, raw
    if not path.stat().st_size:
        raw.close()
        raise EOFError("it is empty, which no compressed file is: it was cut off")
    suffix = path.suffix.lower()
    if suffix == ".zst":
        try:
            return io.BufferedReader(_Zstd(raw), 1 << 20), raw
        except ImportError:
            raise InputError(f"reading {path} needs the package zstandard: pip install zstandard") from None
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return openers[suffix](raw, "rb"), raw


class _NoZero(io.RawIOBase):
    """A stream that refuses the byte 0 where it is read."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.stream, self.path, self.at = stream, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        text = self.stream.read(len(buffer))
        cutting.refuse_zero(text, self.path, self.at)
        self.at += len(text)
        buffer[: len(text)] = text
        return len(text)


# ------------------------------------------------------------------------------------------------------------------ rows


def _row(value: Any, where: str, group: Any = None, source: Any = None) -> Iterator[Piece]:
    if isinstance(value, str):
        value = to_bytes(value)
    if value is not None and not isinstance(value, bytes):
        raise InputError(f"{where}: the field must hold a text, it is a {type(value).__name__} (--field)")
    if value:
        if b"\0" in value:
            raise InputError(f"{where}: the text holds the byte 0, which no text does; remove it, or the row")
        yield _grouped(value, group, source if isinstance(source, str) else "", where)


def _grouped(text: bytes, group: Any, source: str, where: str) -> Piece:
    """A row's text, whose side of the split its group decides where it has one."""
    if group is None or group == "":
        return Piece(text, source=source)
    if isinstance(group, bool) or not isinstance(group, str | int):
        raise InputError(f"{where}: the group must be a string, it is a {type(group).__name__}")
    return Piece(text, mark=groups.mark(str(group)), group=str(group), source=source)


def _whole(row: dict[str, Any], where: str) -> Iterator[Piece]:
    """A row as JSON, without what the split and the card read apart."""
    own = {k: v for k, v in row.items() if k not in (GROUP, SOURCE)}
    text = json.dumps(
        own, sort_keys=True, default=lambda _: None
    )  # bytes of a table are no text: what needs one refuses
    for piece in _row(text, where, row.get(GROUP), row.get(SOURCE)):
        yield dataclasses.replace(piece, where=where)


def _object(row: Any, field: str, where: str) -> Iterator[Piece]:
    if field == ROW:
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object, but a {type(row).__name__}")
        yield from _whole(row, where)
        return
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object with a text in {field!r}, but a {type(row).__name__} (--field)")
    if field not in row:
        has = ", ".join(row) or "nothing"
        raise InputError(f"{where}: not a JSON object with a text in {field!r}; it has {has} (--field)")
    yield from _row(row[field], where, row.get(GROUP), row.get(SOURCE))


def _line(line: bytes, field: str, where: str) -> Iterator[Piece]:
    if line.strip():
        try:
            row = json.loads(_decoded(line))
        except ValueError as error:
            what = "" if field == ROW else f" with a text in {field!r}"
            raise InputError(f"{where}: not a JSON object{what} ({error})") from None
        except RecursionError:
            raise InputError(f"{where}: the JSON is nested too deeply") from None
        yield from _object(row, field, where)


def lines(part: Part, field: str) -> Iterator[Piece]:
    """The rows of the lines of a .jsonl that begin in [start, end)."""
    with open(part.path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while (at := file.tell()) < part.end and (line := file.readline()):
            cutting.refuse_zero(line, part.path, at)
            try:
                for piece in _line(line, field, ""):
                    yield dataclasses.replace(piece, where=str(part.path), at=at) if field == ROW else piece
            except InputError as error:
                raise InputError(f"{part.path}, line {cutting.line_at(part.path, at)}{error}") from None


class _Array:
    """A JSON array of objects, read one after the other; `text` holds what is read and not yet decoded from `at` on."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.source, self.path = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""), path
        self.decode, self.text, self.at = json.JSONDecoder().raw_decode, "", 0

    def more(self) -> bool:
        """Read on, at least as much as is held: a long row is decoded few times in vain."""
        self.text, self.at = self.text[self.at :], 0
        read = self.source.read(max(cutting.JOB, len(self.text)))
        self.text += read
        return bool(read)

    def sign(self) -> str:
        """The next character that is no blank, "" at the end."""
        while (at := BLANKS.match(self.text, self.at).end()) == len(self.text):  # type: ignore[union-attr]
            self.at = at
            if not self.more():
                return ""
        self.at = at + 1
        return self.text[at]

    def row(self, where: str) -> Any:
        while True:
            try:
                row, self.at = self.decode(self.text, BLANKS.match(self.text, self.at).end())  # type: ignore[union-attr]
                return row
            except ValueError as error:  # a row that goes on in what is not read yet, mostly
                if len(self.text) - self.at > LONGEST or not self.more():
                    raise InputError(f"{where} of the JSON array is cut off or damaged ({error})") from None
            except RecursionError:
                raise InputError(f"{where}: the JSON is nested too deeply") from None

    def rows(self, field: str) -> Iterator[Piece]:
        number, sign = 0, self.sign()  # the bracket that `form` saw
        while sign != "]":
            number += 1
            where = f"{self.path}, row {number}"
            yield from _object(self.row(where), field, where)
            sign = self.sign()
            if sign not in (",", "]"):
                said = f"followed by {sign!r}" if sign else "the last before the file is cut off"
                raise InputError(f"{where} of the JSON array is {said}, not by a comma or the closing bracket")
        if sign := self.sign():
            raise InputError(f"{self.path}: the JSON array of {number} rows is followed by {sign!r}")


def _table(stream: IO[bytes], field: str, path: Path) -> Iterator[Piece]:
    """The rows of a .csv or .tsv whose first line names the columns."""
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    limit = csv.field_size_limit(2**31 - 1)  # global, so it is set back
    try:
        rows = csv.reader(text, delimiter=TABLES[kind(path)], strict=True)
        names = next(rows, [])
        if names and field not in (ROW, *names):
            raise InputError(f"{path} has no column {field!r}; its first line names {', '.join(names)} (--field)")
        column = names.index(field) if field in names else 0
        others = [names.index(name) if name in names else None for name in (GROUP, SOURCE)]
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if row and len(row) != len(names):
                raise InputError(f"{where}: the row has {len(row)} columns, and the first line names {len(names)}")
            if row and field == ROW:
                yield from _whole(dict(zip(names, row)), where)
            elif row:
                yield from _row(row[column], where, *(None if at is None else row[at] for at in others))
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _columns(path: Path, field: str) -> Iterator[Piece]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"reading {path} needs the package pyarrow: pip install pyarrow") from None
    with open(path, "rb") as file:
        if kind(path) == ".parquet":
            table = pq.ParquetFile(file)
            has = table.schema_arrow.names
            wanted = has if field == ROW else [name for name in (field, GROUP, SOURCE) if name in has]
            schema, batches = table.schema_arrow, lambda: table.iter_batches(batch_size=1024, columns=wanted)
        elif file.read(6) == b"ARROW1":
            file.seek(0)
            feather = pa.ipc.open_file(file)
            schema, batches = feather.schema, lambda: map(feather.get_batch, range(feather.num_record_batches))
        else:
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            schema, batches = stream.schema, lambda: stream
        if field not in (ROW, *schema.names):
            raise InputError(f"{path} has no column {field!r}; it has {', '.join(schema.names)} (--field)")
        number = 0
        for batch in batches():
            if field == ROW:
                for row in batch.to_pylist():
                    number += 1
                    yield from _whole(row, f"{path}, row {number}")
                continue
            named = batch.schema.names
            column = batch.column(named.index(field)).to_pylist()
            others = [batch.column(named.index(name)).to_pylist() if name in named else [None] * len(column)
                      for name in (GROUP, SOURCE)]  # fmt: skip
            for value, group, source in zip(column, *others):
                number += 1
                yield from _row(value, f"{path}, row {number}", group, source)


# ------------------------------------------------------------------------------------------------------------------ text


def _separated(stream: IO[bytes], text: bytes, separator: bytes) -> Iterator[Piece]:
    """What the separator parts. A document that grows above WHOLE goes on in pieces, as a long file does."""
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


def _texts(stream: IO[bytes], separator: bytes) -> Iterator[Piece]:
    text = stream.read(cutting.WHOLE + 1)
    if separator:
        yield from _separated(stream, text, separator)
    elif len(text) > cutting.WHOLE:
        yield from cutting.long(stream, text)
    elif text:
        yield Piece(text)


def streamed(path: Path, found: Form, field: str, separator: bytes) -> Iterator[tuple[Piece, int]]:
    """(piece, bytes of the file read so far) of what can only be read in order."""
    if found == "columns":
        for piece in _columns(path, field):
            yield piece, 0
        return
    opened, raw = _open(path)
    with raw, opened, io.BufferedReader(_NoZero(opened, path), 1 << 20) as stream:
        if found == "lines":
            pieces: Iterator[Piece] = (
                p for n, line in enumerate(stream, 1) for p in _line(line, field, f"{path}, line {n}")
            )
        elif found == "array":
            pieces = _Array(stream, path).rows(field)
        elif found == "table":
            pieces = _table(stream, field, path)
        elif found == "object":
            pieces = _line(stream.read(), field, str(path))
        else:
            pieces = _texts(stream, separator)
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
        if error is not None and type(error).__module__.split(".")[0] in ("pyarrow", "zstandard", "zlib", "_lzma"):
            raise InputError(f"cannot read {self.path}: {error}") from error
