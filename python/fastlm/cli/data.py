"""`fastlm data prepare [CORPUS ...]` and `fastlm data show N [CORPUS ...]`: a corpus as training sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Iterator
from typing import Literal

import numpy as np
import tyro

from fastlm.cli import flags, marked
from fastlm.console import Lasting
from fastlm.data import InputError, Prepared, TokenSource, chat
from fastlm.data import tokenizer as tokenizers
from fastlm.data.bounds import COUNT, SEED, Range, check
from fastlm.data.prepare import PARALLEL, Note
from fastlm.train import export, job
from fastlm.train.config import DataConfig
from fastlm.train.folders import find_init

DEFAULT = DataConfig()
SpecialTokens = Literal["run", "text", "read"]


def special_tokens_of(flag: SpecialTokens) -> str:
    """The flag as `job.load` takes it."""
    return "" if flag == "run" else flag


@contextlib.contextmanager
def reading() -> Iterator[Note]:
    """A progress bar on the terminal for what takes long enough to want one."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    stream = Lasting("stderr", beneath_rich=True)
    bars = Progress(*columns, console=Console(file=stream), transient=True)  # type: ignore[arg-type]
    tasks: dict[str, object] = {}

    def note(what: str, done: int, total: int) -> None:
        if total < PARALLEL // 4:
            return
        if what not in tasks:
            for old in tasks.values():
                bars.update(old, visible=False)  # type: ignore[arg-type]
            bars.start()
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)  # type: ignore[arg-type]

    try:
        yield note
    finally:
        bars.stop()


def _lines(data: Prepared, seconds: float) -> Iterator[str]:
    m = data.manifest
    size = m["train"]["bytes"] + m["val"]["bytes"]
    tokenizer = f"{m['tokenizer']['kind']} of {data.tokenizer.vocab:,} tokens ({data.tokenizer.hash})"
    yield f"{m['documents']:,} documents, {size:,} bytes, split by {m['split']}; tokenizer {tokenizer}"
    for side, name in (("train", "training"), ("val", "validation")):
        part = m[side]
        line = f"{name}: {part['tokens']:,} tokens of {part['bytes']:,} bytes in {len(part['files'])} file(s)"
        if data.pack:
            full = part["tokens"] / max(part["contexts"] * data.pack, 1)
            line += f", {part['contexts']:,} contexts of {data.pack}, {full:.1%} full"
        yield line
    yield from job.tuned([data])
    if m.get("left_out"):
        yield (
            f"{m['left_out']:,} documents are on neither side: they, or their groups, are in a --val set or beyond --fraction"
        )
    if m["undecodable"]:
        yield f"{m['undecodable']:,} texts are not UTF-8 throughout"
    yield f"{seconds:.2f} s, {size / 1e6 / seconds:.1f} MB/s; {data.folder}"


PREPARE_EXAMPLES = """
fastlm data prepare book.txt --tokenizer bpe --vocab 4096
fastlm data prepare rows.jsonl --packing documents --context 256
fastlm data prepare chats.jsonl --sft --init myrun
"""


def _as_init(data: DataConfig, init: str) -> DataConfig:
    """The data as `fastlm train --init` would read them: by that model's tokenizer and chat template."""
    folder = find_init(init, "runs") if init else None
    if folder is not None and data.tokenizer == DEFAULT.tokenizer:
        data = dataclasses.replace(data, tokenizer=job.tokenizer_of(folder))
    return dataclasses.replace(data, chat_template=chat.resolve(data.chat_template, folder)) if data.rows else data


def prepare(corpus: flags.Corpus = (), data: DataConfig = DEFAULT, context: int = 128, init: str = "") -> int:
    """Turn a corpus into token shards in the cache, and say what came of it.

    Args:
        corpus: Files, folders and globs, as `fastlm train` takes them.
        context: Tokens of a sample, which counts with --packing documents and --sft.
        init: Take tokenizer and chat template from this model, as `fastlm train --init` does.
    """
    data.check()
    data = _as_init(data, init)
    check("context", context, Range(1, COUNT))
    with reading() as note:
        start = time.perf_counter()
        found = job.read_data(corpus, data, context, note)
        job.check_groups(found, corpus, data, context, note)
        seconds = time.perf_counter() - start
    for one in found:
        print("\n".join(_lines(one, seconds)))
    return 0


SHOW_EXAMPLES = """
fastlm data show 17 book.txt --context 256
fastlm data show 17 --run myrun    # as that run reads it
fastlm data show 0 chats.jsonl --sft --init myrun    # what is trained
"""


def show(
    n: tyro.conf.Positional[int],
    corpus: flags.Corpus = (),
    data: DataConfig = DEFAULT,
    context: int = 128,
    seed: int = 1,
    run: str = "",
    init: str = "",
) -> int:
    """Print sample N of a training run as text, with its document borders; with --sft, which of its tokens are trained on: bold
    on a terminal, else in [[ ]].

    Args:
        n: The sample's number, counted over the whole run from 0.
        corpus: Files, folders and globs, as `fastlm train` takes them.
        context: Tokens of a sample.
        seed: The run's seed.
        run: Take corpus, data, context and seed from this run.
        init: Take tokenizer and chat template from this model, as `fastlm train --init` does.
    """
    if run and init:
        raise InputError("--run and --init exclude each other: a run has its tokenizer and chat template")
    if not 0 <= n < 2**62:
        raise InputError(f"the sample's number must be at least 0 and below 2**62; it is {n}")
    data.check()
    check("context", context, Range(1, COUNT))
    check("seed", seed, Range(*SEED))
    own = None
    if run:
        folder = job.find_run(run)
        config, corpus = job.read_config(folder)
        spec = export.read_tokenizer(folder)
        own = None if spec is None else tokenizers.load(spec)
        data, context, seed = config.data, config.model.length(), config.run.seed
    else:
        data = _as_init(data, init)
    with reading() as note:
        found = job.read_data(corpus, data, context, note, own)
    tokenizer = found[0].tokenizer
    batch = [t.numpy() for t in TokenSource(found, context, seed, data.weights).batch(np.array([n]))]
    if data.rows:
        marked.show(n, batch, tokenizer)
        return 0
    inputs, targets, *documents = (t[0] for t in batch)
    predicted = targets >= 0
    if documents:
        borders = np.flatnonzero(np.diff(documents[0][predicted])) + 1
    else:
        borders = np.flatnonzero(targets[predicted] == tokenizer.eot) + 1
    parts = np.split(targets[predicted], borders)
    print(
        f"sample {n}: {len(inputs)} tokens, {int(predicted.sum())} predicted, {sum(len(p) > 0 for p in parts)} document(s)"
    )
    for part in parts:
        if len(part):
            ended = part[-1] == tokenizer.eot
            text = tokenizer.decode(part[:-1] if ended else part).decode("utf-8", "replace")
            print(f"{text}\n--- {'end of document' if ended else 'goes on'} ({len(part)} tokens)")
    return 0


OTHERS = {  # each in a module of its own, imported when called
    "augment": ("fastlm.cli.augment", "IN ... --out FILE"),
    "clean": ("fastlm.cli.clean", "IN ... --out FOLDER"),
    "filter": ("fastlm.cli.filter", "LABELLED --out FOLDER"),
    "card": ("fastlm.cli.card", "[CORPUS ...] [--model RUN]"),
    "tasks": ("fastlm.cli.tasks", "IN ... --out FILE"),
    "labels": ("fastlm.cli.labels", "EXPORT ... --out FILE"),
    "pairs": ("fastlm.cli.pairs", "REVIEWS --out FILE"),
}


def main(argv: list[str]) -> int:
    if argv and argv[0] in OTHERS:
        return int(importlib.import_module(OTHERS[argv[0]][0]).main(argv[1:]))
    if argv[:1] == ["prepare"]:
        return flags.call(prepare, "fastlm data prepare", argv[1:], PREPARE_EXAMPLES)
    if argv[:1] == ["show"]:
        return flags.call(show, "fastlm data show", argv[1:], SHOW_EXAMPLES)
    asked = argv[:1] in (["-h"], ["--help"])
    others = "".join(f" | {name} {takes}" for name, (_, takes) in OTHERS.items())
    usage = f"usage: fastlm data prepare [CORPUS ...] | show N [CORPUS ...]{others}   (--help tells more)"
    print(usage, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
