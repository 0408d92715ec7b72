"""Loading: preparing a corpus (MB/s, processes), and batches of training samples, each beside what one would write by hand.

Preparing writes to a folder that is removed again, on every side. It is bounded by the reading and writing of the text
(`bytes`); where a tokenizer runs, by that. Processes are started within the timed call, as for a user; they serve corpora
far larger than these, so what one more of them gives is seen from the larger case.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastlm.bench.harness import Case, Contender, Goal, Missing, Prepared, pytest_cases
from fastlm.data import Options, TokenSource, prepare
from fastlm.data.corpus import stdlib_files
from fastlm.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

MB = 1_000_000


@functools.cache
def _place() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fastlm-bench-loading-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _text(size: int) -> Path:
    """A file of the standard library's source, over and over with a number before each, of `size` bytes."""
    path = _place() / f"{size}.txt"
    sources = [f.read_bytes() for f in stdlib_files()]
    with open(path, "wb") as out:
        for i in range(1 << 30):
            if out.tell() >= size:
                break
            out.write(b"# %d\n" % i + sources[i % len(sources)])
        out.truncate(size)
    return path


@functools.cache
def _bpe() -> BPETokenizer:
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise Missing("the package tokenizers is not installed") from None
    return BPETokenizer.train((f.read_bytes() for f in stdlib_files()[:60]), 2048)


def _made(size: int, tokenizer: Callable[[], Tokenizer] | None, workers: int, pack: int = 0):
    def ready(seed: int) -> Prepared:
        text, own, cache = _text(size), tokenizer() if tokenizer else None, _place() / "cache"

        def run() -> list[np.ndarray]:
            shutil.rmtree(cache, ignore_errors=True)
            found = prepare((str(text),), Options(workers=workers, pack=pack), tokenizer=own, cache=cache)
            return [*found.train, *found.val]

        return run

    return ready


def _by_hand(size: int, tokenizer: Callable[[], BPETokenizer] | None):
    """nanoGPT's prepare.py: the whole text in memory, cut in two, encoded at once, written by tofile. One process."""

    def ready(seed: int) -> Prepared:
        text, own = _text(size), tokenizer() if tokenizer else None
        outs, dtype = [_place() / "train.bin", _place() / "val.bin"], np.uint8 if own is None else np.uint16

        def run() -> list[np.ndarray]:
            data = text.read_bytes()
            for out, part in zip(outs, (data[: size * 19 // 20], data[size * 19 // 20 :])):
                if own is None:
                    np.frombuffer(part, dtype=dtype).tofile(out)
                else:
                    np.array(own._bpe.encode(part.decode("utf-8", "replace")).ids, dtype=dtype).tofile(out)
            return [np.memmap(out, dtype, "r") for out in outs]

        return run

    return ready


def _lost(size: int, tokenizer: Callable[[], Tokenizer]):
    """What part of the text the written tokens do not stand for, or stand for twice, by counts of each ASCII character."""

    def error(arrays: list[np.ndarray], seed: int) -> float:
        own = tokenizer()
        count = lambda text: np.bincount(np.frombuffer(text, np.uint8), minlength=256)[1:128]
        holds = np.stack([count(own.decode([t]) if t != own.eot else b"") for t in range(own.vocab)])
        found, wanted = np.zeros(127, np.int64), np.zeros(127, np.int64)
        for array in arrays:
            for start in range(0, len(array), 16 * MB):
                found += np.bincount(array[start : start + 16 * MB], minlength=own.vocab) @ holds
        with open(_text(size), "rb") as text:
            while block := text.read(16 * MB):
                wanted += count(block)
        return float(np.abs(found - wanted).sum() / size)

    return error


def _prepare_case(size: int, kind: str, smoke: bool) -> Case:
    tokenizer = _bpe if kind == "bpe" else None
    contenders: tuple[Contender, ...] = (
        Contender("fastlm", _made(size, tokenizer, 1), "ours"),
        Contender("fastlm, 2 processes", _made(size, tokenizer, 2), "self"),
        Contender("fastlm, packed documents", _made(size, tokenizer, 1, pack=256), "self"),
        Contender("whole in memory, by hand", _by_hand(size, tokenizer)),
    )
    if smoke:
        contenders = (contenders[0], contenders[-1])
    return Case(
        "loading", f"prepare {size / MB:g} MB {kind}", lambda seed: seed, contenders,
        bytes=2 * size, dtype="uint8", parameters={"bytes": size, "tokenizer": kind},
        error=_lost(size, tokenizer or ByteTokenizer), smoke=smoke, longer=5.0,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- batches


def _source(size: int, context: int, pack: bool) -> TokenSource:
    options = Options(pack=context if pack else 0, workers=1)
    return TokenSource([prepare((str(_text(size)),), options, cache=_place() / "ready")], context, seed=1)


def _loader(size: int, batch: int, context: int, pack: bool):
    def ready(seed: int) -> Prepared:
        source, at = _source(size, context, pack), [0]

        def run() -> Any:
            at[0] += batch
            return source.batch(np.arange(at[0] - batch, at[0]))[:2]

        return run

    return ready


def _random_crops(size: int, batch: int, context: int):
    """nanoGPT's get_batch: a new memory map each time, crops at random places, one by one."""

    def ready(seed: int) -> Prepared:
        path = _text(size)

        def run() -> Any:
            data = np.memmap(path, dtype=np.uint8, mode="r")
            ix = torch.randint(len(data) - context, (batch,))
            x = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in ix])
            y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in ix])
            return x, y

        return run

    return ready


def _follows(result: Any, seed: int) -> float:
    """0 where the targets are the inputs moved by one."""
    x, y = result
    return float((x[:, 1:] != y[:, :-1]).sum()) + float(x.dtype != torch.int64)


def _batch_case(size: int, batch: int, context: int, goals: tuple[Goal, ...], smoke: bool) -> Case:
    contenders = (
        Contender("fastlm", _loader(size, batch, context, False), "ours"),
        Contender("fastlm, packed documents", _loader(size, batch, context, True), "self"),
        Contender("np.memmap, random crops", _random_crops(size, batch, context)),
    )
    return Case(
        "loading", f"batch {batch}x{context} of {size / MB:g} MB", lambda seed: seed, contenders, dtype="int64",
        bytes=batch * context * (1 + 8 + 8), parameters={"batch": batch, "context": context},
        longer=5.0, error=_follows, goals=goals, smoke=smoke,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """Loading is the CPU's work, whatever the device. A batch should cost no more than random crops do."""
    yield _batch_case(MB, 4, 64, (), smoke=True)
    yield _prepare_case(MB, "bytes", smoke=True)
    for batch, context in ((8, 128), (16, 256), (32, 1024)):
        yield _batch_case(64 * MB, batch, context, (Goal("np.memmap, random crops", 1.0),), smoke=False)
    yield _prepare_case(256 * MB, "bytes", smoke=False)
    yield _prepare_case(32 * MB, "bpe", smoke=False)


def profile(device: str, small: bool = False) -> dict[str, Any]:
    """MB of text prepared a second, and cores used meanwhile, those of child processes included; ``small``: of a megabyte."""
    out: dict[str, Any] = {}
    for kind, size in (("bytes", MB),) if small else (("bytes", 256 * MB), ("bpe", 64 * MB)):
        for workers in (1, 2):
            run = _made(size, _bpe if kind == "bpe" else None, workers)(0)
            wall, spent = time.perf_counter(), os.times()
            run()
            wall, done = time.perf_counter() - wall, os.times()
            cores = sum(b - a for a, b in zip(spent[:4], done[:4])) / wall
            name = f"prepare {size / MB:g} MB, {kind}, {workers} process(es)"
            out[name] = {"MB/s": size / MB / wall, "cores": cores}
            print(f"{name}: {size / MB / wall:.1f} MB/s on {cores:.2f} cores")
    return out


test_bench = pytest_cases(cases)
