"""From a corpus to token shards, once: read, split by document, encode, write, and remember in a cache.

The split takes a document for validation by its content's hash alone, so it stays the same when documents are added and
exact copies fall on one side. A row's group takes the place of its content: what was made from a document, and its
near-duplicates, fall where it does. With few documents, or one that dominates, blocks of 64 KiB cut at line ends take
the place of documents without a group. A large corpus is read and encoded in several processes, and written in order by
this one: the same text and tokenizer give the same bytes at any number of them. The cache's key is the files (path, size,
time), the tokenizer and the options: a second call starts at once.
"""

from __future__ import annotations

import contextlib
import copy
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

from fastlm.data import readers
from fastlm.data import tokenizer as tokenizers
from fastlm.data.corpus import documents, expand, jobs, pieces, whole_texts
from fastlm.data.cutting import BLOCK, Job, Part
from fastlm.data.errors import InputError
from fastlm.data.groups import fold_of, group_of
from fastlm.data.pack import Packer, Rows
from fastlm.data.shards import Column, ShardWriter, open_shard
from fastlm.data.split import Held, Split, documents_of, interval, marked, named_and_there, parse_fold, sided
from fastlm.data.tuning import KEYS, Rendering
from fastlm.data.workers import ordered

FORMAT = 3
FEW_DOCUMENTS = 200
DOMINANT = 0.05
SMALLEST_BLOCK = 2048
PARALLEL = 64 << 20  # bytes on disk from which several processes pay for their start
LARGE = 64 * PARALLEL  # the same where little is to be done with a text: bytes as they are, or counting alone
ALWAYS_HASHED = 256 << 20  # bytes of shards up to which each opening reads and hashes them all
SIDES = ("train", "val")
UINT8 = np.dtype(np.uint8)

Note = Callable[[str, int, int], None]  # (what is done, bytes on disk done, of how many)


def silent(what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Options:
    """How a corpus becomes shards. `pack`: the context into which documents are packed; 0: contiguous blocks.

    `rows`: "sft" or "dpo" where rows are to be fine-tuned on, as `tuning` has it, with the chat template of this specification;
    `pack` is then the context that cuts them. `workers`: processes; 0: one per core for a large corpus. They change no byte of
    the result. `fold`, such as 2/5, holds out that part of the marks in place of `val_fraction`; `fraction` is the part of the
    other texts that is trained on.
    """

    tokenizer: str = "bytes"
    vocab: int = 8192
    special_tokens: str = "text"
    field: str = "text"
    separator: str = ""
    val_fraction: float = 0.05
    pack: int = 0
    workers: int = dataclasses.field(default=0, compare=False, repr=False)
    rows: str = dataclasses.field(default="", repr=False)
    chat_template: str = dataclasses.field(default="", repr=False)
    fold: str = dataclasses.field(default="", repr=False)
    fraction: float = dataclasses.field(default=1.0, repr=False)

    @property
    def reads(self) -> str:
        """The field of rows that is read, as the readers take it."""
        return readers.ROW if self.rows else self.field

    @property
    def rendering(self) -> Rendering | None:
        return Rendering(self.rows, self.chat_template, self.pack) if self.rows else None


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
            self.kind: str = self.manifest.get("kind", "")
            keys = ("files", "spans", "rows", *(["trained"] if self.kind else []))
            names = [f for side in SIDES for key in keys for f in self.manifest[side][key]]
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
        self.references: dict[str, np.ndarray] = {}  # of pairs, by side: what another model gives them, [pairs, 2]
        self._trained = {side: Column(opened(side, "trained")) for side in SIDES} if self.kind else {}

    def bytes_per_target(self, side: str) -> float:
        """Bytes of text that a token stands for on which a loss is taken."""
        part = self.manifest[side]
        return float(part["target_bytes"] / part["targets"] if self.kind else part["bytes"] / part["tokens"])

    def rows(self, side: str, seed: int = 0) -> Rows:
        """The packed contexts of a side."""
        tokens = Column(self.train if side == "train" else self.val)
        spans, rows = map(Column, self._index[side])
        trained, answers = self._trained.get(side), 2 if self.kind == "dpo" else 1
        made = Rows(tokens, spans, rows, self.pack, self.tokenizer.eot, seed, self.content, trained, answers)
        made.reference = self.references.get(side)
        return made

    def pairs(self, side: str) -> int:
        """How many rows of --sft, or pairs of --dpo, a side has."""
        return int(self.manifest[side]["pieces"])

    def turned(self) -> Prepared:
        """The same with its sides exchanged, so that what measures on the validation side measures on the training side."""
        made = copy.copy(self)
        made.train, made.val = self.val, self.train
        made.manifest = {**self.manifest, "train": self.manifest["val"], "val": self.manifest["train"]}
        for name in ("_index", "_trained", "references"):
            held = getattr(self, name)
            setattr(made, name, {other: held[side] for side, other in zip(SIDES, SIDES[::-1]) if side in held})
        return made

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


@dataclass
class _Counted:
    """Documents without a group: their number, bytes, the largest, and bytes of the last where it goes on in the next
    job. Rows that no block parts, having a group or being read as a whole: their number and bytes."""

    documents: int = 0
    total: int = 0
    largest: int = 0
    rest: int = 0
    rows: int = 0
    rows_total: int = 0


def _count(job: Job, name: str) -> _Counted:
    documents = total = largest = size = rows = rows_total = 0
    for piece in pieces(job, name):
        if piece.group or piece.where:
            rows, rows_total = rows + 1, rows_total + len(piece.text)
            continue
        size += len(piece.text)
        total += len(piece.text)
        if piece.last:
            documents, largest, size = documents + 1, max(largest, size), 0
    return _Counted(documents, total, largest, size, rows, rows_total)


class _Corpus:
    """Files, and what a first reading of them says of the split."""

    def __init__(self, files: list[Path], options: Options, note: Note) -> None:
        self.files, self.options, self.note = files, options, note
        self.documents = self.total = 0
        self.grouped = False
        try:
            self.disk = sum(file.stat().st_size for file in files)
        except OSError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        light = options.tokenizer == "bytes"
        self.workers = options.workers or (cores if self.disk >= (LARGE if light else PARALLEL) else 1)

    def each(self, what: str, function: Callable[..., Any], *shared: Any) -> Iterator[Any]:
        """function(job, *shared) for each job, in order; progress is told."""
        found = jobs(self.files, self.options.reads, self.options.separator)
        done = 0
        workers = 1 if function is _count and self.disk < LARGE else self.workers
        for result, size in ordered(function, found, workers, *shared):
            yield result
            done += size
            self.note(what, done, self.disk)

    def count(self) -> _Counted:
        """Counts documents into `documents` and bytes into `total`; tells those of a group apart."""
        found = _Counted()
        if whole_texts(self.files, self.options.reads, self.options.separator):
            sizes = [n for n in (f.stat().st_size for f in self.files) if n]
            found = _Counted(len(sizes), sum(sizes), max(sizes, default=0))
        else:
            size = 0
            for more in self.each("reading", _count, self.options.reads):
                found.documents, found.total = found.documents + more.documents, found.total + more.total
                found.rows, found.rows_total = found.rows + more.rows, found.rows_total + more.rows_total
                size += more.largest if more.documents else 0  # the first that ends may have begun in an earlier job
                found.largest = max(found.largest, more.largest, size)
                size = more.rest if more.documents else size + more.rest
        self.documents, self.total, self.grouped = (
            found.documents + found.rows,
            found.total + found.rows_total,
            found.rows > 0,
        )
        return found

    @staticmethod
    def block(found: _Counted) -> int:
        """Bytes of a block where documents without a group are few or one dominates; else 0."""
        if found.documents and (found.documents < FEW_DOCUMENTS or found.largest > DOMINANT * found.total):
            return min(BLOCK, max(found.total // 20, SMALLEST_BLOCK))
        return 0

    def split(self) -> Split:
        found = self.count()
        if not self.total:
            names = ", ".join(str(f) for f in self.files[:3]) + (" ..." if len(self.files) > 3 else "")
            raise InputError(f"the corpus is empty: {len(self.files)} file(s) without text ({names})")
        fraction = self.options.val_fraction
        size = self.block(found)
        if not size and not self.grouped:
            return Split(0, fraction)
        # so few that chance may choose none: then the one with the smallest hash
        lowest, kinds = 1.0, set[float]()
        for job, _ in jobs(self.files, self.options.reads, self.options.separator):
            for _, _, own, *_ in marked(job, Split(size, 1.0), self.options.reads):
                lowest = min(lowest, own)
                if len(kinds) < 2:
                    kinds.add(own)
            if lowest < fraction:
                break
        return Split(size, float(np.nextafter(lowest, 1.0)) if lowest >= fraction and len(kinds) > 1 else fraction)

    def train_texts(self, split: Split) -> Iterator[bytes]:
        done, how = 0, self.options.rendering
        for job, size in jobs(self.files, self.options.reads, self.options.separator):
            for _, text, held, *_ in sided(job, split, self.options.reads):
                if held is False:
                    yield from [text] if how is None else how.texts(text)
            done += size
            self.note("learning the tokenizer", done, self.disk)


# --------------------------------------------------------------------------------------------------- encode and write


@dataclass
class _Encoded:
    """What a job becomes: tokens of both sides, and (side, tokens, first, last) of each text in order.

    Of rows to fine-tune on: also which tokens are trained, bytes of their text, and how many sequences were cut; in `texts` a
    row's sequences follow each other, the first and the last marked.
    """

    tokens: list[np.ndarray]
    texts: list[tuple[int, int, bool, bool]]
    bytes: list[int]
    undecodable: int
    left_out: int = 0
    trained: list[np.ndarray] = dataclasses.field(default_factory=list)
    target_bytes: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    cut: int = 0


def _encode_rows(job: Job, split: Split, tokenizer: tokenizers.Tokenizer, how: Rendering) -> _Encoded:
    sides: list[list[Any]] = [[], []]
    out = _Encoded([], [], [0, 0], 0)
    for piece, text, held, *_ in sided(job, split, readers.ROW):
        if held is None:
            out.left_out += 1
            continue
        try:
            found = how.sequences(text, tokenizer)
        except InputError as error:
            raise InputError(f"{piece.place()}: {error}") from None
        sides[held] += found
        out.bytes[held] += len(text)
        out.target_bytes[held] += sum(one.size for one in found)
        out.cut += sum(one.cut for one in found)
        last = len(found) - 1
        out.texts += [(int(held), len(one.tokens), i == 0, i == last) for i, one in enumerate(found)]
    out.tokens = [np.concatenate([o.tokens for o in s]) if s else np.empty(0, tokenizer.dtype) for s in sides]
    out.trained = [np.concatenate([o.trained for o in s]) if s else np.empty(0, np.uint8) for s in sides]
    return out


def _encode(
    job: Job, split: Split, tokenizer: tokenizers.Tokenizer, name: str, how: Rendering | None = None
) -> _Encoded:
    if how is not None:
        return _encode_rows(job, split, tokenizer, how)
    sides: list[list[np.ndarray]] = [[], []]
    out = _Encoded([], [], [0, 0], 0)
    eot = np.array([tokenizer.eot], dtype=tokenizer.dtype)
    for _, text, held, first, last in sided(job, split, name):
        if held is None:
            out.left_out += last or bool(split.block)
            continue
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
    pack, how = corpus.options.pack, corpus.options.rendering
    writers = [ShardWriter(folder, side, tokenizer.dtype, tokenizer.hash) for side in SIDES]
    masks = [ShardWriter(folder, f"{side}-trained", UINT8, tokenizer.hash) for side in SIDES]
    targets, target_bytes, cut, counts = [0, 0], [0, 0], 0, list[int]()
    packers = [Packer(folder, side, pack, tokenizer.hash) for side in SIDES] if pack else []
    size, texts, undecodable, left_out, before = [0, 0], [0, 0], 0, 0, -1
    for done in corpus.each("encoding", _encode, split, tokenizer, corpus.options.reads, how):
        for side, writer in enumerate(writers):
            writer.append(done.tokens[side])
            size[side] += done.bytes[side]
            target_bytes[side] += done.target_bytes[side]
            if how is not None:
                masks[side].append(done.trained[side])
                targets[side] += int(done.trained[side].sum())
        cut += done.cut
        undecodable += done.undecodable
        left_out += done.left_out
        for side, count, first, last in done.texts:
            if how is not None:
                texts[side] += last
                counts = [count] if first else [*counts, count]
                if last:
                    packers[side].example(counts)
                continue
            texts[side] += 1
            if pack:
                packers[side].add(count, begins=first or side != before)
            before = -1 if last else side
    by_block = f"{'64 KiB' if split.block == BLOCK else f'{split.block} byte'} blocks"
    by_group = " and groups" if corpus.grouped and how is None else ""
    whole = "documents" if how is None else "rows"
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "documents": corpus.documents,
        "split": "none" if split.limit > 1 else (by_block if split.block else whole) + by_group,
        "undecodable": undecodable,
        "left_out": left_out,
        "pack": pack,
        "tokenizer": tokenizer.spec(),
        **({} if how is None else {"kind": how.kind, "cut": cut}),
    }
    digest = hashlib.sha256(tokenizer.hash.encode() + (b"" if how is None else how.kind.encode()))
    for number, (name, writer) in enumerate(zip(SIDES, writers)):
        files = writer.close()
        spans, rows, index = packers[number].close() if pack else ([], [], [])
        manifest[name] = {"files": files, "tokens": writer.tokens, "bytes": size[number], "pieces": texts[number]}
        manifest[name] |= {"spans": spans, "rows": rows, "contexts": packers[number].rows if pack else 0}
        if how is not None:
            manifest[name] |= {"trained": masks[number].close(), "targets": targets[number]}
            manifest[name] |= {"target_bytes": target_bytes[number]}
            index = [*index, *masks[number].content]
        digest.update(json.dumps([name, writer.content, *([pack, index] if pack else [])]).encode())
        if not writer.tokens and not (name == "train" and split.limit > 1):
            empty = "training" if name == "train" else "validation"
            raise InputError(
                f"the {empty} side of the split is empty ({corpus.documents} document(s), {corpus.total} bytes): "
                f"give more text or change {_deciding(corpus.options, name)}"
                + (f"; {left_out} document(s) were left out, which a --val set holds" if left_out else "")
            )
    manifest["content"] = digest.hexdigest()[:32]
    manifest["times"] = {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob("*.tok"))}
    with open(folder / "manifest.json", "w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())


def _deciding(options: Options, side: str) -> str:
    """The flag that decides how large a side of the split is, and its value."""
    if side == "train" and options.fraction < 1:
        return f"--fraction (now {options.fraction:g})"
    return f"--fold (now {options.fold})" if options.fold else f"--val-fraction (now {options.val_fraction})"


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
        elsewhere = isinstance(error.filename, str | bytes) and not Path(os.fsdecode(error.filename)).is_relative_to(
            folder.parent
        )
        if elsewhere:  # not the cache's fault
            raise InputError(f"cannot prepare the corpus: {os.fsdecode(error.filename)}: {error.strerror}") from error
        raise InputError(f"cannot write the cache {folder.parent}: {error.strerror} (set FASTLM_CACHE)") from error
    return folder


def prepare(
    corpus: tuple[str, ...],
    options: Options | None = None,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    kept: tokenizers.Tokenizer | None = None,
    whole: bool = False,
    without: Held | None = None,
    least: float = 0.0,
    bounds: tuple[float, float] | None = None,
    cache: Path | None = None,
    note: Note = silent,
) -> Prepared:
    """The prepared corpus, from the cache when its files have not changed. `note(what, done, total)` is told of bytes.

    `tokenizer` takes the place of the one that the options name; so does `kept`, unless the options' own is in the cache
    and is the same. `whole`: no split, all is validation. `without`: what neither side takes (`held`). `least`: what the
    limit of the split is raised to (`joint_limit`). `bounds`: the marks that the options' fold holds out, where they are not
    this corpus's alone (`fold_bounds`).
    Raises InputError where the corpus, an option or the cache cannot be used.
    """
    options = options or Options()
    _check(options, named=tokenizer is None and kept is None)
    options = of_set(corpus, options) if whole else options
    more: tuple[object, ...] = (options.rows, options.chat_template) if options.rows else ()
    if without is not None and without.groups.size + without.documents.size:
        more += ("without", hashlib.sha256(without.groups.tobytes() + b"|" + without.documents.tobytes()).hexdigest())
    if whole:
        options = dataclasses.replace(options, fold="", fraction=1.0)
    if options.fold and bounds is None:
        bounds = fold_bounds([corpus], options, cache=cache, note=note)
    if least > options.val_fraction and not options.fold:
        more += ("least", least)
    more += _parts_of(options, bounds)
    folders = (cache or cache_folder()) / "corpora"
    key = _key(corpus, options, tokenizer.hash if tokenizer else _named(options), whole, *more)
    if kept is not None:
        if (folders / key / "manifest.json").exists() and Prepared(folders / key).tokenizer.hash == kept.hash:
            return Prepared(folders / key)
        tokenizer, key = kept, _key(corpus, options, kept.hash, whole, *more)

    def make(draft: Path) -> None:
        found = _Corpus(expand(corpus), options, note)
        if options.rows:
            _need_rows(corpus, found.files, options.rows)
        if whole:
            found.count()
        split = (
            Split(0, 2.0) if whole else dataclasses.replace(_narrowed(found.split(), options, bounds), without=without)
        )
        if least > split.limit and not options.fold:
            split = dataclasses.replace(split, limit=least)
        own = tokenizer or tokenizers.make(
            options.tokenizer, options.vocab, lambda: found.train_texts(split), options.special_tokens
        )
        _write(found, split, own, draft)

    return Prepared(_made(folders / key, make))


def joint_tokenizer(
    corpora: list[tuple[str, ...]], options: Options, *, cache: Path | None = None, note: Note = silent
) -> tokenizers.Tokenizer:
    """The tokenizer that the options name; one that learns does so on the training sides of all the corpora."""
    _check(options)
    more: tuple[object, ...] = (options.rows, options.chat_template) if options.rows else ()
    bounds = fold_bounds(corpora, options, cache=cache, note=note) if options.fold else None
    more += _parts_of(options, bounds)
    every = tuple(name for corpus in corpora for name in corpus)
    key = _key(every, options, _named(options), list(map(len, corpora)), *more)

    def make(draft: Path) -> None:
        parts = [_Corpus(expand(corpus), options, note) for corpus in corpora]
        for corpus, part in zip(corpora, parts):
            if options.rows:
                _need_rows(corpus, part.files, options.rows)
        splits = [_narrowed(part.split(), options, bounds) for part in parts]

        def texts() -> Iterator[bytes]:
            for part, split in zip(parts, splits):
                yield from part.train_texts(split)

        spec = tokenizers.make(options.tokenizer, options.vocab, texts, options.special_tokens).spec()
        (draft / "manifest.json").write_text(json.dumps(spec))

    folder = _made((cache or cache_folder()) / "tokenizers" / key, make)
    return tokenizers.load(json.loads((folder / "manifest.json").read_text()))


def held(
    corpora: list[tuple[str, ...]], options: Options, *, cache: Path | None = None, note: Note = silent
) -> Held | None:
    """What validation sets hold, by document, block and group: for `without` of the corpus that is trained on.

    Each set counts as a corpus of its own, so its blocks are those that `fastlm data augment` makes of it alone.
    """

    def make(draft: Path) -> None:
        np.save(draft / "marks.npy", _marks(corpora, options, documents_of, note))
        (draft / "manifest.json").write_text("{}")

    if not corpora:
        return None
    key = _key(
        tuple(name for one in corpora for name in one),
        "marks and blocks",
        options.field,
        options.separator,
        *_rows_of(options),
    )
    found = np.load(_made((cache or cache_folder()) / "marks" / key, make) / "marks.npy")
    return Held(found[found[:, 1] == 0, 0], found[found[:, 1] == 1, 0])


def _marks(corpora: list[tuple[str, ...]], options: Options, of: Callable[..., np.ndarray], note: Note) -> np.ndarray:
    """What `of` finds in the jobs of corpora, each cut as it is split alone: sorted, each once, [marks, 2]."""
    found = [np.empty((0, 2))]
    for one in corpora:
        part = _Corpus(expand(one), of_set(one, options), note)
        split = Split(part.block(part.count()), 1.0)
        found += part.each("reading", of, split, part.options.reads)
    return np.unique(np.concatenate(found), axis=0)


def strangers(
    corpora: list[tuple[str, ...]], options: Options, *, cache: Path | None = None, note: Note = silent
) -> tuple[int, int]:
    """(groups that are hashes of no text here, all groups that are hashes) of corpora that are trained or validated on.

    A text is a document, or a block where its corpus is split by blocks. A copy of one whose group is a stranger's may fall
    on another side than its source.
    """
    if whole_texts([path for one in corpora for path in expand(one)], options.field, options.separator):
        return 0, 0

    def make(draft: Path) -> None:
        found = _marks(corpora, options, named_and_there, note)
        named, there = found[found[:, 1] == 1, 0], found[found[:, 1] == 0, 0]
        counts = {"strange": len(np.setdiff1d(named, there, assume_unique=True)), "all": len(named)}
        (draft / "manifest.json").write_text(json.dumps(counts))

    names = tuple(name for one in corpora for name in one)
    key = _key(names, "strangers", options.field, options.separator, list(map(len, corpora)), *_rows_of(options))
    found = json.loads((_made((cache or cache_folder()) / "groups" / key, make) / "manifest.json").read_text())
    return found["strange"], found["all"]


def joint_limit(
    corpora: list[tuple[str, ...]], options: Options, *, cache: Path | None = None, note: Note = silent
) -> float:
    """The limit that corpora mixed by weights share where one of them has groups, else 0.

    A corpus so small that its split takes the lowest mark raises its limit; a copy in another corpus must follow it.
    """
    _check(options)
    every = [path for corpus in corpora for path in expand(corpus)]
    if whole_texts(every, options.reads, options.separator):
        return 0.0

    def make(draft: Path) -> None:
        parts = [_Corpus(expand(corpus), options, note) for corpus in corpora]
        limits = [part.split().limit for part in parts]
        limit = max(limits) if any(part.grouped for part in parts) else 0.0
        (draft / "manifest.json").write_text(json.dumps({"limit": limit}))

    key = _key(
        tuple(name for corpus in corpora for name in corpus),
        "limit", options.field, options.separator, options.val_fraction, list(map(len, corpora)), *_rows_of(options),
    )  # fmt: skip
    return float(
        json.loads((_made((cache or cache_folder()) / "limits" / key, make) / "manifest.json").read_text())["limit"]
    )


def fold_bounds(
    corpora: list[tuple[str, ...]], options: Options, *, cache: Path | None = None, note: Note = silent
) -> tuple[float, float]:
    """The marks [low, high) that the options' fold holds out of corpora, the same in each of them.

    Raises InputError for fewer documents, blocks and groups than folds.
    """
    number, folds = parse_fold(options.fold)

    def make(draft: Path) -> None:
        seen, found = set[int](), set[float]()
        for one in corpora:
            part = _Corpus(expand(one), options, note)
            split = Split(part.block(part.count()), 1.0)
            for job, _ in jobs(part.files, options.reads, options.separator):
                for _, _, own, *_ in marked(job, split, options.reads):
                    found.add(own)
                    seen.add(fold_of(own, folds))
                if len(seen) == folds:  # none is empty, whatever follows
                    break
        low, high = interval(sorted(found), number, folds)
        (draft / "manifest.json").write_text(json.dumps({"low": low, "high": high}))

    names = tuple(name for one in corpora for name in one)
    key = _key(
        names, "fold", options.fold, options.field, options.separator, list(map(len, corpora)), *_rows_of(options)
    )
    read = json.loads((_made((cache or cache_folder()) / "limits" / key, make) / "manifest.json").read_text())
    return float(read["low"]), float(read["high"])


def _narrowed(split: Split, options: Options, bounds: tuple[float, float] | None) -> Split:
    """A split by the options' fold, which holds out the marks in `bounds`, and by the part that is trained on."""
    if bounds is not None:
        split = dataclasses.replace(split, low=bounds[0], limit=bounds[1])
    return dataclasses.replace(split, part=options.fraction)


def _parts_of(options: Options, bounds: tuple[float, float] | None) -> tuple[object, ...]:
    """What of the options names a part of the texts, for the key of a cache; nothing where all are taken."""
    held = ("fold", *bounds) if options.fold and bounds is not None else ()
    return (*held, *(("fraction", options.fraction) if options.fraction < 1 else ()))


def split_units(
    corpus: tuple[str, ...], options: Options | None = None, note: Note = silent
) -> Iterator[tuple[bytes, str]]:
    """(text, group) of what the split decides on, in order: documents, or blocks where the corpus is split by blocks.

    What is made from such a text must carry its group.
    """
    options = options or Options()
    found = _Corpus(expand(corpus), options, note)
    split = found.split()
    for job, _ in jobs(found.files, options.reads, options.separator):
        for piece, text, *_ in marked(job, split, options.reads):
            yield text, piece.group or group_of(text)


def _rows_of(options: Options) -> tuple[str, ...]:
    """What of the options tells how rows are read, for the key of a cache; nothing where they hold texts."""
    return (options.rows,) if options.rows else ()


def of_set(corpus: tuple[str, ...], options: Options) -> Options:
    """The options by which a validation set is read beside rows that are fine-tuned on: as texts, where it holds texts, or rows
    that have a text in `field` and are no rows to fine-tune on."""
    if not options.rows:
        return options
    files = expand(corpus)
    for file in files:
        with readers.Named(file):
            if readers.form(file, readers.ROW) == "text":
                continue
            first = next(documents(file, readers.ROW), None)
            row = json.loads(first.text) if first is not None else {}
            if options.field not in row or any(set(keys) <= row.keys() for keys in KEYS[options.rows]):
                return options
    return dataclasses.replace(options, rows="", chat_template="")


def _need_rows(corpus: tuple[str, ...], files: list[Path], kind: str) -> None:
    if not corpus:
        raise InputError(f"--{kind} trains on rows: name a CORPUS of them (.jsonl, .json, .csv, .parquet)")
    for path in files:
        with readers.Named(path):
            if readers.form(path, readers.ROW) == "text":
                raise InputError(f"{path} is a text, and --{kind} trains on rows (.jsonl, .json, .csv, .parquet)")


def _named(options: Options) -> str:
    own = Path(options.tokenizer).expanduser()
    return hashlib.sha256(own.read_bytes()).hexdigest() if own.is_file() else ""


def _check(options: Options, named: bool = True) -> None:
    """InputError for an option that cannot be; `named`: the tokenizer is the one that they name."""
    if not 0 < options.val_fraction < 1:
        raise InputError(f"--val-fraction must lie between 0 and 1; it is {options.val_fraction}")
    if options.workers < 0 or options.pack < 0:
        raise InputError(f"--workers and the context must not be negative; they are {options.workers}, {options.pack}")
    if not named:
        return
    if options.vocab < tokenizers.SMALLEST_BPE and options.tokenizer == "bpe":
        raise InputError(
            f"--vocab must be at least {tokenizers.SMALLEST_BPE}, the bytes and the end of text, for bpe; it is {options.vocab}"
        )
    tokenizers.known(options.tokenizer)
