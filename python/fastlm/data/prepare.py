"""From a corpus to token shards, once: read, split by document, encode, write, and remember in a cache.

The split takes a document for validation by its content's hash alone, so it stays the same when documents are added and
exact copies fall on one side. With few documents, or one that dominates, blocks of 64 KiB cut at line ends take their
place. The cache's key is the files (path, size, time), the tokenizer and the options: a second call starts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data import tokenizer as tokenizers
from fastlm.data.corpus import BLOCK, Piece, cut, documents, expand
from fastlm.data.errors import InputError
from fastlm.data.shards import ShardWriter, open_shard

FORMAT = 1
FEW_DOCUMENTS = 200
DOMINANT = 0.05
SMALLEST_BLOCK = 2048


@dataclass(frozen=True)
class Options:
    tokenizer: str = "bytes"
    vocab: int = 8192
    field: str = "text"
    separator: str = ""
    val_fraction: float = 0.05


class Prepared:
    """A prepared corpus: token arrays of both sides, tokenizer, manifest. `content` names the data itself, not its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        self.tokenizer = tokenizers.load(self.manifest["tokenizer"])
        self.content: str = self.manifest["content"]
        self.train = [open_shard(folder / f, self.tokenizer.hash) for f in self.manifest["train"]["files"]]
        self.val = [open_shard(folder / f, self.tokenizer.hash) for f in self.manifest["val"]["files"]]

    def text(self, side: str, limit: int | None = None) -> bytes:
        """The bytes of one side (at most about `limit` of them), for the models that count."""
        out, size = [], 0
        for shard in self.train if side == "train" else self.val:
            if isinstance(self.tokenizer, tokenizers.ByteTokenizer):
                out.append(shard[: None if limit is None else limit - size].tobytes())
                size += len(out[-1])
            else:
                for start in range(0, len(shard), 1 << 16):
                    out.append(self.tokenizer.decode(shard[start : start + (1 << 16)]))
                    size += len(out[-1])
                    if limit is not None and size >= limit:
                        break
            if limit is not None and size >= limit:
                break
        return b"".join(out)


def cache_folder() -> Path:
    base = os.environ.get("FASTLM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastlm"
    )
    return Path(base)


def _fraction(text: bytes) -> float:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") / 2**64


def _all(files: list[Path], options: Options) -> Iterator[Piece]:
    for file in files:
        yield from documents(file, options.field, options.separator)


def _blocks_of(pieces: Iterator[Piece], size: int) -> Iterator[Piece]:
    for piece in pieces:
        parts = cut(piece.text, size)
        for i, part in enumerate(parts):
            yield Piece(part, last=piece.last and i == len(parts) - 1)


def _write(files: list[Path], options: Options, folder: Path, note: Callable[[int, int], None]) -> None:
    count, total, largest, document = 0, 0, 0, 0
    for piece in _all(files, options):
        document += len(piece.text)
        total += len(piece.text)
        if piece.last:
            count, largest, document = count + 1, max(largest, document), 0
    if not total:
        names = ", ".join(str(f) for f in files[:3]) + (" ..." if len(files) > 3 else "")
        raise InputError(f"the corpus is empty: {len(files)} file(s) without text ({names})")
    by_block = count < FEW_DOCUMENTS or largest > DOMINANT * total
    size = min(BLOCK, max(total // 20, SMALLEST_BLOCK))

    def pieces() -> Iterator[Piece]:
        return _blocks_of(_all(files, options), size) if by_block else _all(files, options)

    held: Callable[[bytes], bool] = lambda text: _fraction(text) < options.val_fraction
    if by_block:  # so few that chance may choose none: then the one with the smallest hash
        hashes = {_fraction(p.text) for p in pieces()}
        if len(hashes) > 1 and min(hashes) >= options.val_fraction > 0:
            lowest = min(hashes)
            held = lambda text: _fraction(text) == lowest

    def train_texts() -> Iterator[bytes]:
        return (p.text for p in pieces() if not held(p.text))

    tokenizer = tokenizers.make(options.tokenizer, options.vocab, train_texts)
    eot = np.array([tokenizer.eot])
    sides = {side: ShardWriter(folder, side, tokenizer.dtype, tokenizer.hash) for side in ("train", "val")}
    counted = {side: {"bytes": 0, "pieces": 0} for side in sides}
    done = 0
    for piece in pieces():
        side = "val" if held(piece.text) else "train"
        sides[side].append(tokenizer.encode(piece.text))
        if piece.last:
            sides[side].append(eot)
        counted[side]["bytes"] += len(piece.text)
        counted[side]["pieces"] += 1
        done += len(piece.text)
        note(done, total)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "documents": count,
        "split": "64 KiB blocks" if by_block and size == BLOCK else f"{size} byte blocks" if by_block else "documents",
        "tokenizer": tokenizer.spec(),
    }
    digest = hashlib.sha256(tokenizer.hash.encode())
    for side, writer in sides.items():
        manifest[side] = {"files": writer.close(), "tokens": writer.tokens, **counted[side]}
        digest.update(json.dumps([side, writer.content]).encode())
        if not writer.tokens:
            name = "training" if side == "train" else "validation"
            raise InputError(
                f"the {name} side of the split is empty ({count} document(s), {total} bytes): "
                f"give more text or change --val-fraction (now {options.val_fraction})"
            )
    manifest["content"] = digest.hexdigest()[:32]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def prepare(
    corpus: tuple[str, ...],
    options: Options | None = None,
    *,
    cache: Path | None = None,
    note: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """The prepared corpus, from the cache when its files have not changed. `note(done, total)` is told of bytes."""
    options = options or Options()
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction must lie between 0 and 1; it is {options.val_fraction}")
    files = expand(corpus)
    stats = []
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
        stats.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
    own = Path(options.tokenizer).expanduser()
    content = hashlib.sha256(own.read_bytes()).hexdigest() if own.is_file() else ""
    key = hashlib.sha256(repr((FORMAT, stats, options, content)).encode()).hexdigest()[:24]
    root = (cache or cache_folder()) / "corpora"
    folder = root / key
    if not (folder / "manifest.json").exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=root))
        except OSError as error:
            raise InputError(f"cannot write the cache {root}: {error.strerror} (set FASTLM_CACHE)") from error
        try:
            _write(files, options, draft, note)
            try:
                os.rename(draft, folder)
            except OSError:
                if not (folder / "manifest.json").exists():  # else another process was first, with the same bytes
                    raise
        except OSError as error:
            raise InputError(f"cannot write the cache {root}: {error.strerror} (set FASTLM_CACHE)") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return Prepared(folder)
