"""Token shards: memory-mapped files of tokens behind a header that says what they are and what they must hash to.

Layout: 8 bytes magic, then JSON {version, dtype, count, tokenizer, content} padded with spaces to HEADER bytes, then the
tokens. A shard is written to a temporary name, synced and renamed; a truncated or altered one is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastlm.data.errors import InputError

MAGIC = b"fastlm\x00\x01"
VERSION = 1
HEADER = 512
SHARD_TOKENS = 1 << 28


class ShardWriter:
    """Appends tokens to NAME-00000.tok, NAME-00001.tok ... of a folder; `close` returns the file names."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, tokenizer: str, limit: int = 0) -> None:
        self.folder, self.name, self.dtype, self.tokenizer = folder, name, dtype, tokenizer
        self.limit = limit or SHARD_TOKENS
        self.files: list[str] = []
        self.content: list[str] = []
        self.tokens = 0
        self._file = None
        self._buffer: list[np.ndarray] = []
        self._held = 0

    def append(self, tokens: np.ndarray) -> None:
        self._buffer.append(tokens.astype(self.dtype, copy=False))
        self._held += len(tokens)
        if self._held >= 1 << 20:
            self._flush()

    def _flush(self) -> None:
        data = np.concatenate(self._buffer) if self._buffer else np.empty(0, self.dtype)
        self._buffer, self._held = [], 0
        while len(data):
            if self._file is None:
                self._start()
            part, data = data[: self.limit - self._count], data[self.limit - self._count :]
            raw = part.data.cast("B")
            self._file.write(raw)  # type: ignore[attr-defined]
            self._hash.update(raw)
            self._count += len(part)
            self.tokens += len(part)
            if self._count == self.limit:
                self._finish()

    def _start(self) -> None:
        self._path = self.folder / f"{self.name}-{len(self.files):05d}.tok"
        self._file = open(self._path.with_suffix(".tmp"), "wb")  # type: ignore[assignment]  # noqa: SIM115
        self._file.write(bytes(HEADER))  # type: ignore[attr-defined]
        self._hash, self._count = hashlib.sha256(), 0

    def _finish(self) -> None:
        assert self._file is not None
        head = {
            "version": VERSION,
            "dtype": self.dtype.name,
            "count": self._count,
            "tokenizer": self.tokenizer,
            "content": self._hash.hexdigest(),
        }
        self._file.seek(0)
        self._file.write(MAGIC + json.dumps(head).encode().ljust(HEADER - len(MAGIC)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path.with_suffix(".tmp"), self._path)
        self.files.append(self._path.name)
        self.content.append(head["content"])
        self._file = None

    def close(self) -> list[str]:
        self._flush()
        if self._file is not None:
            self._finish()
        return self.files


def open_shard(path: Path, tokenizer: str | None = None, verify: bool = True) -> np.ndarray:
    """The tokens of a shard as a memory map. Raises InputError, naming the file, when it is not whole."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER)
        head = json.loads(raw[len(MAGIC) :]) if raw.startswith(MAGIC) else None
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"the shard {path} cannot be read: {error}") from error
    if head is None or head.get("version") != VERSION:
        raise InputError(f"{path} is not a fastlm token shard of version {VERSION}")
    dtype = np.dtype(head["dtype"])
    if size != HEADER + head["count"] * dtype.itemsize:
        raise InputError(
            f"the shard {path} is truncated or altered: {size} bytes, {HEADER + head['count'] * dtype.itemsize} expected"
        )
    if tokenizer is not None and head["tokenizer"] != tokenizer:
        raise InputError(f"the shard {path} was written with tokenizer {head['tokenizer']}, this run uses {tokenizer}")
    if verify:
        with open(path, "rb") as file:  # not through the map, whose pages would count as this process' memory
            file.seek(HEADER)
            digest = hashlib.sha256()
            while raw := file.read(1 << 22):
                digest.update(raw)
        if digest.hexdigest() != head["content"]:
            raise InputError(
                f"the shard {path} is altered: its content does not match its hash; delete its folder to remake it"
            )
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER, shape=(head["count"],))


class Column:
    """Shards as one long array: `take` gathers at any places, across files."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = list(shards)
        self.ends = np.cumsum([len(s) for s in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def take(self, index: np.ndarray) -> np.ndarray:
        """int64 values at `index`, each in [0, len(self))."""
        if len(self.shards) == 1:
            return self.shards[0][index].astype(np.int64)
        out = np.empty(index.shape, dtype=np.int64)
        of = np.searchsorted(self.ends, index, side="right")
        for s in np.unique(of):
            here = of == s
            out[here] = self.shards[s][index[here] - (self.ends[s] - len(self.shards[s]))]
        return out
