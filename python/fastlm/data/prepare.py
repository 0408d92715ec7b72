"""From a corpus to token shards, once: read, split by document, encode, write, and remember in a cache.

The split takes a document for validation by its content's hash alone, so it stays the same when documents are added and
exact copies fall on one side. With few documents, or one that dominates, blocks of 64 KiB cut at line ends take their
place. A large corpus is read and encoded in several processes, and written in order by this one: the same text and
tokenizer give the same bytes at any number of them. The cache's key is the files (path, size, time), the tokenizer and
the options: a second call starts at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data import tokenizer as tokenizers
from fastlm.data.corpus import expand, jobs, pieces, whole_texts
from fastlm.data.cutting import BLOCK, Job, Part, cut, mark
from fastlm.data.errors import InputError
from fastlm.data.pack import Packer, Rows
from fastlm.data.shards import Column, ShardWriter, open_shard
from fastlm.data.workers import ordered

FORMAT = 3
FEW_DOCUMENTS = 200
DOMINANT = 0.05
SMALLEST_BLOCK = 2048
PARALLEL = 64 << 20  # bytes on disk from which several processes pay for their start
LARGE = 64 * PARALLEL  # the same where little is to be done with a text: bytes as they are, or counting alone
ALWAYS_HASHED = 256 << 20  # bytes of shards up to which each opening reads and hashes them all
SIDES = ("train", "val")

Note = Callable[[str, int, int], None]  # (what is done, bytes on disk done, of how many)


def silent(what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Options:
    """How a corpus becomes shards. `pack`: the context into which documents are packed; 0: contiguous blocks.

    `workers`: processes; 0: one per core for a large corpus. They change no byte of the result.
    """

    tokenizer: str = "bytes"
    vocab: int = 8192
    field: str = "text"
    separator: str = ""
    val_fraction: float = 0.05
    pack: int = 0
    workers: int = dataclasses.field(default=0, compare=False, repr=False)


class Prepared:
    """A prepared corpus: token arrays of both sides, tokenizer, manifest. `content` names the data itself, not its place.

    Shards are checked against their hashes: small ones always, large ones when their time is not the one they were
    written at.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
            self.tokenizer = tokenizers.load(self.manifest["tokenizer"])
            self.content: str = self.manifest["content"]
            self.pack: int = self.manifest["pack"]
            names = [f for side in SIDES for key in ("files", "spans", "rows") for f in self.manifest[side][key]]
            times = self.manifest["times"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / 'manifest.json'} cannot be read ({error!r}): delete its folder") from error
        small = sum((folder / f).stat().st_size for f in names if (folder / f).exists()) <= ALWAYS_HASHED

        def opened(side: str, key: str) -> list[np.ndarray]:
            return [
                open_shard(p, self.tokenizer.hash, small or not p.exists() or p.stat().st_mtime_ns != times.get(p.name))
                for p in (folder / f for f in self.manifest[side][key])
            ]

        self.train, self.val = opened("train", "files"), opened("val", "files")
        self._index = {side: (opened(side, "spans"), opened(side, "rows")) for side in SIDES} if self.pack else {}

    def rows(self, side: str, seed: int = 0) -> Rows:
        """The packed contexts of a side."""
        tokens = Column(self.train if side == "train" else self.val)
        spans, rows = map(Column, self._index[side])
        return Rows(tokens, spans, rows, self.pack, self.tokenizer.eot, seed, self.content)

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


# ------------------------------------------------------------------------------------------------------------ the split


@dataclass(frozen=True)
class Split:
    """Which texts are held out: those whose mark is below `limit`, by document (`block` 0) or by block of that size."""

    block: int
    limit: float


def _parts(job: Job, split: Split, name: str) -> Iterator[tuple[bytes, bool, bool, bool]]:
    """(text, held out, first, last) of each document, or block of one."""
    for piece in pieces(job, name):
        if not split.block:
            own = mark(piece.text) if piece.mark is None else piece.mark
            yield piece.text, own < split.limit, piece.first, piece.last
            continue
        blocks = cut(piece.text, split.block)
        for i, text in enumerate(blocks):
            yield text, mark(text) < split.limit, piece.first and i == 0, piece.last and i == len(blocks) - 1


def _count(job: Job, name: str) -> tuple[int, int, int, int]:
    """(documents, bytes, largest document, bytes of the last one where it goes on in the next job)."""
    documents = total = largest = size = 0
    for piece in pieces(job, name):
        size += len(piece.text)
        total += len(piece.text)
        if piece.last:
            documents, largest, size = documents + 1, max(largest, size), 0
    return documents, total, largest, size


class _Corpus:
    """Files, and what a first reading of them says of the split."""

    def __init__(self, files: list[Path], options: Options, note: Note) -> None:
        self.files, self.options, self.note = files, options, note
        try:
            self.disk = sum(file.stat().st_size for file in files)
        except OSError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        light = options.tokenizer == "bytes"
        self.workers = options.workers or (cores if self.disk >= (LARGE if light else PARALLEL) else 1)

    def each(self, what: str, function: Callable[..., Any], *shared: Any) -> Iterator[Any]:
        """function(job, *shared) for each job, in order; progress is told."""
        found = jobs(self.files, self.options.field, self.options.separator)
        done = 0
        workers = 1 if function is _count and self.disk < LARGE else self.workers
        for result, size in ordered(function, found, workers, *shared):
            yield result
            done += size
            self.note(what, done, self.disk)

    def count(self) -> tuple[int, int, int]:
        """(documents, bytes, the largest)."""
        documents = total = largest = size = 0
        if whole_texts(self.files, self.options.field, self.options.separator):
            sizes = [n for n in (f.stat().st_size for f in self.files) if n]
            return len(sizes), sum(sizes), max(sizes, default=0)
        for more, part, biggest, rest in self.each("reading", _count, self.options.field):
            documents, total = documents + more, total + part
            size += biggest if more else 0  # the first that ends may have begun in an earlier job
            largest = max(largest, biggest, size)
            size = rest if more else size + rest
        return documents, total, largest

    def split(self) -> Split:
        self.documents, self.total, largest = self.count()
        if not self.total:
            names = ", ".join(str(f) for f in self.files[:3]) + (" ..." if len(self.files) > 3 else "")
            raise InputError(f"the corpus is empty: {len(self.files)} file(s) without text ({names})")
        fraction = self.options.val_fraction
        if self.documents >= FEW_DOCUMENTS and largest <= DOMINANT * self.total:
            return Split(0, fraction)
        size = min(BLOCK, max(self.total // 20, SMALLEST_BLOCK))
        # so few that chance may choose none: then the one with the smallest hash
        lowest, kinds = 1.0, set[float]()
        for job, _ in jobs(self.files, self.options.field, self.options.separator):
            for text, *_ in _parts(job, Split(size, 1.0), self.options.field):
                lowest = min(lowest, mark(text))
                if len(kinds) < 2:
                    kinds.add(mark(text))
            if lowest < fraction:
                break
        return Split(size, float(np.nextafter(lowest, 1.0)) if lowest >= fraction and len(kinds) > 1 else fraction)

    def train_texts(self, split: Split) -> Iterator[bytes]:
        done = 0
        for job, size in jobs(self.files, self.options.field, self.options.separator):
            yield from (text for text, held, *_ in _parts(job, split, self.options.field) if not held)
            done += size
            self.note("learning the tokenizer", done, self.disk)


# --------------------------------------------------------------------------------------------------- encode and write


@dataclass
class _Encoded:
    """What a job becomes: tokens of both sides, and (side, tokens, first, last) of each text in order."""

    tokens: list[np.ndarray]
    texts: list[tuple[int, int, bool, bool]]
    bytes: list[int]
    undecodable: int


def _encode(job: Job, split: Split, tokenizer: tokenizers.Tokenizer, name: str) -> _Encoded:
    sides: list[list[np.ndarray]] = [[], []]
    out = _Encoded([], [], [0, 0], 0)
    eot = np.array([tokenizer.eot], dtype=tokenizer.dtype)
    for text, held, first, last in _parts(job, split, name):
        try:
            tokens = tokenizer.encode(text)
        except InputError as error:
            where = next((str(item.path) for item in job if isinstance(item, Part)), "a row or document")
            raise InputError(f"{where} (or one soon after): {error}") from None
        try:
            text.decode()
        except UnicodeDecodeError:
            out.undecodable += 1
        sides[held] += [tokens, eot] if last else [tokens]
        out.bytes[held] += len(text)
        out.texts.append((int(held), len(tokens) + last, first, last))
    out.tokens = [np.concatenate(s) if s else np.empty(0, tokenizer.dtype) for s in sides]
    return out


def _write(corpus: _Corpus, split: Split, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    pack = corpus.options.pack
    writers = [ShardWriter(folder, side, tokenizer.dtype, tokenizer.hash) for side in SIDES]
    packers = [Packer(folder, side, pack, tokenizer.hash) for side in SIDES] if pack else []
    size, texts, undecodable, before = [0, 0], [0, 0], 0, -1
    for done in corpus.each("encoding", _encode, split, tokenizer, corpus.options.field):
        for side, writer in enumerate(writers):
            writer.append(done.tokens[side])
            size[side] += done.bytes[side]
        undecodable += done.undecodable
        for side, count, first, last in done.texts:
            texts[side] += 1
            if pack:
                packers[side].add(count, begins=first or side != before)
            before = -1 if last else side
    by_block = f"{'64 KiB' if split.block == BLOCK else f'{split.block} byte'} blocks"
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "documents": corpus.documents,
        "split": "none" if split.limit > 1 else by_block if split.block else "documents",
        "undecodable": undecodable,
        "pack": pack,
        "tokenizer": tokenizer.spec(),
    }
    digest = hashlib.sha256(tokenizer.hash.encode())
    for number, (name, writer) in enumerate(zip(SIDES, writers)):
        files = writer.close()
        spans, rows, index = packers[number].close() if pack else ([], [], [])
        manifest[name] = {"files": files, "tokens": writer.tokens, "bytes": size[number], "pieces": texts[number]}
        manifest[name] |= {"spans": spans, "rows": rows, "contexts": packers[number].rows if pack else 0}
        digest.update(json.dumps([name, writer.content, *([pack, index] if pack else [])]).encode())
        if not writer.tokens and not (name == "train" and split.limit > 1):
            empty = "training" if name == "train" else "validation"
            raise InputError(
                f"the {empty} side of the split is empty ({corpus.documents} document(s), {corpus.total} bytes): "
                f"give more text or change --val-fraction (now {corpus.options.val_fraction})"
            )
    manifest["content"] = digest.hexdigest()[:32]
    manifest["times"] = {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob("*.tok"))}
    with open(folder / "manifest.json", "w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------ the cache


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time: of several ranks one prepares, the others wait and find it done."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(corpus: tuple[str, ...], *what: object) -> str:
    stats = []
    for file in expand(corpus):
        try:
            stat = file.stat()
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
        stats.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr((FORMAT, stats, *what)).encode()).hexdigest()[:24]


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; `make` fills a draft of it, which is renamed when it is whole."""
    if (folder / "manifest.json").exists():
        return folder
    draft = folder.with_name(f".draft-{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock")):
            if (folder / "manifest.json").exists():
                return folder
            for old in (draft, folder):
                shutil.rmtree(old, ignore_errors=True)
            draft.mkdir()
            try:
                make(draft)
                os.rename(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write the cache {folder.parent}: {error.strerror} (set FASTLM_CACHE)") from error
    return folder


def prepare(
    corpus: tuple[str, ...],
    options: Options | None = None,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    whole: bool = False,
    cache: Path | None = None,
    note: Note = silent,
) -> Prepared:
    """The prepared corpus, from the cache when its files have not changed. `note(what, done, total)` is told of bytes.

    `tokenizer` takes the place of the one that the options name. `whole`: no split, all is validation.
    Raises InputError where the corpus, an option or the cache cannot be used.
    """
    options = options or Options()
    _check(options)
    made = tokenizer.hash if tokenizer else _named(options)
    key = _key(corpus, options, made, whole)

    def make(draft: Path) -> None:
        found = _Corpus(expand(corpus), options, note)
        if whole:
            found.documents, found.total, _ = found.count()
        split = Split(0, 2.0) if whole else found.split()
        own = tokenizer or tokenizers.make(options.tokenizer, options.vocab, lambda: found.train_texts(split))
        _write(found, split, own, draft)

    return Prepared(_made((cache or cache_folder()) / "corpora" / key, make))


def joint_tokenizer(
    corpora: list[tuple[str, ...]], options: Options, *, cache: Path | None = None, note: Note = silent
) -> tokenizers.Tokenizer:
    """The tokenizer that the options name; one that learns does so on the training sides of all the corpora."""
    _check(options)
    key = _key(tuple(name for corpus in corpora for name in corpus), options, _named(options), list(map(len, corpora)))

    def make(draft: Path) -> None:
        parts = [_Corpus(expand(corpus), options, note) for corpus in corpora]
        splits = [part.split() for part in parts]

        def texts() -> Iterator[bytes]:
            for part, split in zip(parts, splits):
                yield from part.train_texts(split)

        spec = tokenizers.make(options.tokenizer, options.vocab, texts).spec()
        (draft / "manifest.json").write_text(json.dumps(spec))

    folder = _made((cache or cache_folder()) / "tokenizers" / key, make)
    return tokenizers.load(json.loads((folder / "manifest.json").read_text()))


def _named(options: Options) -> str:
    own = Path(options.tokenizer).expanduser()
    return hashlib.sha256(own.read_bytes()).hexdigest() if own.is_file() else ""


def _check(options: Options) -> None:
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction must lie between 0 and 1; it is {options.val_fraction}")
    if options.workers < 0 or options.pack < 0:
        raise InputError(f"--workers and the context must not be negative; they are {options.workers}, {options.pack}")
