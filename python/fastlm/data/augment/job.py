"""A corpus to a file of augmented copies, written once: seeded, and begun again where it was broken off.

Each row is `{"text", "group", "method", "copy", "source"}`. Beside an unfinished OUT lies `OUT.state`, which says how many
texts are done and how long OUT was then; the same command goes on from there, and ends with the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data import corpus, cutting, groups
from fastlm.data.augment import text as prose
from fastlm.data.augment import thesaurus, translate
from fastlm.data.bounds import SEED, bounded, check_fields
from fastlm.data.errors import InputError
from fastlm.data.prepare import Options, _Corpus, silent
from fastlm.data.rows import dumps

BATCH = 128 << 10  # bytes of text between two writes; Apertium's start is paid once each
Note = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Augment:
    """What is done to each text, in this order, for each copy.

    Args:
        backtranslate: Round trips, one a copy in turn: `apertium:A-B`, such as `apertium:eng-cat`, or `hf:FOLDER,FOLDER`.
        replace: Share of the words that are replaced by synonyms, such as 0.1.
        thesaurus: A MyThes .dat file, or auto: the one that the system has for `lang`.
        shuffle: Places that a sentence may move within its paragraph.
        copies: Copies of each text.
        seed: Same seed, same file.
        lang: The texts' language, by its code of two letters.
        field: The field of rows that holds the text.
        separator: What parts the documents of a text file.
    """

    backtranslate: tuple[str, ...] = ()
    replace: float = bounded(0.0, 0, 1)
    thesaurus: str = "auto"
    shuffle: int = bounded(0, 0)
    copies: int = bounded(1, 1)
    seed: int = bounded(1, *SEED)
    lang: str = "en"
    field: str = "text"
    separator: str = ""

    def check(self) -> None:
        check_fields(self)
        if not (self.backtranslate or self.replace or self.shuffle):
            raise InputError("nothing to do: give --backtranslate, --replace or --shuffle")


@dataclass
class Source:
    """A text as the split sees it: a document, or a block of one where the corpus is split by blocks."""

    text: str
    group: str
    path: str


@dataclass
class Report:
    """Counts of what was done and why what was not kept was dropped."""

    counts: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        c = self.counts
        yield f"{c['texts']:,} texts ({c['bytes']:,} bytes), {c['rows']:,} copies written, {c['unchanged']:,} unchanged"
        if c["sent"]:
            why = ", ".join(f"{name} {self.drops[name]:,}" for name in translate.DROPS if self.drops[name])
            yield f"back-translation: {c['sent']:,} sentences, {c['kept']:,} kept ({c['kept'] / c['sent']:.1%}); dropped: {why}"
        if c["replaced"]:
            yield f"replacement: {c['replaced']:,} of {c['words']:,} words ({c['replaced'] / c['words']:.1%})"
        if c["moved"]:
            yield f"shuffling: {c['moved']:,} sentences moved"


def sources(names: tuple[str, ...], options: Augment) -> Iterator[Source]:
    """The texts of a corpus, each with the group that the split goes by. Raises InputError with file and line."""
    files = corpus.expand(names)
    split = _Corpus(files, Options(field=options.field, separator=options.separator), silent).split()
    return _texts(files, options, split.block)


def _texts(files: list[Path], options: Augment, block: int) -> Iterator[Source]:
    for path in files:
        head = ""
        for piece in corpus.documents(path, options.field, options.separator):
            own = piece.group
            head = own or (groups.group_of(piece.text) if piece.first else head)
            by_block = block and not own
            for part in cutting.cut(piece.text, block) if by_block else [piece.text]:
                group = groups.group_of(part) if by_block else head
                yield Source(part.decode("utf-8", "replace"), group, path.name)


class Worker:
    """The methods, made once."""

    def __init__(self, options: Augment, score: thesaurus.Score | None = None) -> None:
        self.options, self.score, self.report = options, score, Report()
        self.trips = [translate.make(name) for name in options.backtranslate]
        self.chrf = translate.scorer() if self.trips else None
        self.thesaurus = None
        if options.replace:
            self.thesaurus = thesaurus.Thesaurus(thesaurus.find(options.thesaurus, options.lang), options.lang)

    def rows(self, batch: list[Source], start: int) -> Iterator[dict[str, Any]]:
        """The copies of texts number `start` and on."""
        cut = [list(prose.paragraphs(source.text, self.options.lang)) for source in batch]
        made: list[list[dict[str, Any]]] = [[] for _ in batch]
        known = [
            prose.names([s for p in parts if isinstance(p, prose.Paragraph) for s in p.sentences]) for parts in cut
        ]
        for copy in range(self.options.copies):
            trips = self._trips(cut, known, copy)
            for i, (source, parts) in enumerate(zip(batch, cut)):
                rng = random.Random(f"{self.options.seed}:{source.group}:{start + i}:{copy}")
                text, methods = self._copy(parts, trips, rng)
                if text == source.text or any(row["text"] == text for row in made[i]):
                    self.report.counts["unchanged"] += 1
                    continue
                made[i].append({"text": text, "group": source.group, "method": "+".join(methods), "copy": copy,
                                "source": source.path})  # fmt: skip
        for source, rows in zip(batch, made):
            self.report.counts.update({"texts": 1, "bytes": len(source.text.encode()), "rows": len(rows)})
            yield from rows

    def _trips(self, cut: list[list[Any]], known: list[set[str]], copy: int) -> dict[str, str]:
        """The kept round trip of each sentence of a batch."""
        if not self.trips:
            return {}
        owners: dict[str, set[str]] = {}
        for parts, names in zip(cut, known):
            for part in parts:
                if isinstance(part, prose.Paragraph):
                    for sentence in part.sentences:
                        owners.setdefault(sentence, set()).update(names)
        asked = list(owners)
        kept = {}
        for sentence, result in zip(asked, self.trips[copy % len(self.trips)](asked)):
            why = translate.judge(sentence, result, owners[sentence], self.chrf)
            self.report.counts["sent"] += 1
            if why:
                self.report.drops[why] += 1
            else:
                self.report.counts["kept"] += 1
                kept[sentence] = str(result)
        return kept

    def _copy(self, parts: list[Any], trips: dict[str, str], rng: random.Random) -> tuple[str, list[str]]:
        out, methods = [], dict[str, None]()
        for part in parts:
            if not isinstance(part, prose.Paragraph):
                out.append(part)
                continue
            found = [trips.get(s, s) for s in part.sentences]
            if found != part.sentences:
                methods["backtranslate"] = None
            if self.thesaurus is not None:
                for i, sentence in enumerate(found):
                    self.report.counts["words"] += len(prose.WORD.findall(sentence))
                    found[i], count = thesaurus.replace(sentence, self.options.replace, self.thesaurus, rng, self.score)
                    self.report.counts["replaced"] += count
                    if count:
                        methods["replace"] = None
            if self.options.shuffle:
                order = shuffled(len(found), self.options.shuffle, rng)
                if moved := sum(i != j for i, j in enumerate(order)):
                    self.report.counts["moved"] += moved
                    methods["shuffle"] = None
                    found = [found[j] for j in order]
            same = found == part.sentences
            out.append(
                part.source if same else prose.Paragraph(found, part.source, part.indent, part.first, part.width).text()
            )
        return "".join(out), list(methods)


def shuffled(count: int, reach: int, rng: random.Random) -> list[int]:
    """An order of `count` things in which none is more than `reach` places from where it was."""
    keys = [i + rng.uniform(0, reach + 1) for i in range(count)]
    order = sorted(range(count), key=keys.__getitem__)
    assert all(abs(i - j) <= reach for i, j in enumerate(order))
    return order


def run(
    names: tuple[str, ...], out: Path, options: Augment, score: thesaurus.Score | None = None, model: str = "",
    note: Note = silent,
) -> Report:  # fmt: skip
    """Writes the copies of a corpus to `out`, or goes on where an earlier call was broken off; says what came of it.

    `model` names what `score` is of. Raises InputError where an input, a program or `out` cannot be used.
    """
    options.check()
    corpus.refuse_inside(out, names)
    key = _key(names, options, model)
    state = out.with_name(out.name + ".state")
    worker = Worker(options, score)
    done, size = _resume(out, state, key, worker.report)
    total = sum(file.stat().st_size for file in corpus.expand(names))
    found = sources(names, options)
    for _ in range(done):
        next(found)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "r+b" if out.exists() else "w+b") as file:
            file.truncate(size)
            file.seek(size)
            _save(state, key, done, size, worker.report)
            for batch in _batches(found):
                for row in worker.rows(batch, done):
                    file.write(dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                done += len(batch)
                _save(state, key, done, file.tell(), worker.report)
                note("augmenting", min(worker.report.counts["bytes"], total), total)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{out}: {error.strerror}; the copies of {done:,} texts are kept, make room and the same command goes on"
        ) from error
    except KeyboardInterrupt:
        raise Interrupted(f"the copies of {done:,} texts are kept in {out}; the same command goes on") from None
    if not done:
        raise InputError(f"the corpus {' '.join(names)} holds no text")
    state.unlink()
    return worker.report


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what is kept."""


def _batches(found: Iterator[Source]) -> Iterator[list[Source]]:
    held, size = list[Source](), 0
    for source in found:
        held.append(source)
        size += len(source.text)
        if size >= BATCH:
            yield held
            held, size = [], 0
    if held:
        yield held


def _key(names: tuple[str, ...], options: Augment, model: str) -> str:
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in corpus.expand(names)]
    return hashlib.sha256(repr((stats, options, model)).encode()).hexdigest()[:24]


def _save(state: Path, key: str, done: int, size: int, report: Report) -> None:
    draft = state.with_name(state.name + ".draft")
    draft.write_text(
        json.dumps({"key": key, "texts": done, "size": size, "counts": report.counts, "drops": report.drops})
    )
    os.replace(draft, state)


def _resume(out: Path, state: Path, key: str, report: Report) -> tuple[int, int]:
    """(texts done, bytes of `out` that hold their copies)."""
    if not state.exists():
        if out.exists():
            raise InputError(f"--out {out} exists; it is written once: remove it, or give another name")
        return 0, 0
    try:
        was = json.loads(state.read_text())
        if was["key"] != key:
            raise InputError(
                f"{out} was begun with other options or inputs: remove it and {state.name}, or give another --out"
            )
        if out.stat().st_size < was["size"]:
            raise ValueError("the file is shorter than it was")
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{out} cannot be gone on with ({error}): remove it and {state.name}") from None
    report.counts.update(was["counts"])
    report.drops.update(was["drops"])
    return int(was["texts"]), int(was["size"])
