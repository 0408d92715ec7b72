"""`fastlm review RUN_OR_TASKS`: a page of this machine on which people judge outputs or tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fastlm import console
from fastlm.cli import flags
from fastlm.cli.prompts import prompts_of
from fastlm.data import chat
from fastlm.data import filter as filters
from fastlm.data.augment.text import needed
from fastlm.data.bounds import COUNT, SEED, Range, check
from fastlm.data.errors import InputError
from fastlm.data.review import items as reviewed
from fastlm.data.review import results
from fastlm.data.review.items import Item
from fastlm.data.review.store import Store, is_store
from fastlm.data.rows import dumps
from fastlm.train import job, outputs
from fastlm.train.files import shown, write_text

EXAMPLES = """
fastlm review myrun --n 100    # what it says: thumbs and better answers
fastlm review tasks.json --labels harmless hateful offensive
fastlm review myrun/reviews.db --export export.json
"""
DEFAULT = ("harmless", "harmful")
KEYS = 9
PORT = 8642


def review(
    run_or_tasks: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_TASKS")],
    labels: tuple[str, ...] = (),
    judges: int | None = None,
    filter: str = "",
    prompts: str = "",
    n: int = 100,
    each: int = 2,
    tokens: int = 100,
    temperature: float = 0.8,
    seed: int = 1,
    db: str = "",
    export: str = "",
    port: int = PORT,
    device: str = "auto",
    out: str = "runs",
) -> int:
    """Serve a page on 127.0.0.1 on which people judge outputs of a run, or tasks, the uncertain ones first.

    Labels by the keys 1 to 9, thumbs, better answers, undo. All goes into one database, reviews.db, which the same command
    opens again. `fastlm data pairs` makes preference pairs of it, and `fastlm data labels` labelled rows.

    Args:
        run_or_tasks: A run, whose outputs are drawn; tasks (.json of `fastlm data tasks`, or .jsonl); or a reviews.db.
        labels: Up to nine labels. By default harmless and harmful, or the filter's categories; for answers to prompts none.
        judges: People that judge an item; 0: everyone judges all.
        filter: Folder of a filter: what lies nearest to a threshold of its policy comes first.
        prompts: File of prompts for a run: a line each, or rows with prompt or messages (.jsonl). By default beginnings of
            held-out documents.
        n: Outputs to draw from a run.
        each: Outputs to one prompt; a good and a bad one are a preference pair.
        tokens: Tokens of an output, at most.
        temperature: 0 takes the likeliest token, 1 samples as trained.
        seed: Seed of the sampling.
        db: The database; by default reviews.db in the run's folder or beside the tasks.
        export: Write all judgements to this file in Label Studio's JSON format, and serve nothing.
        port: Port of the page; 0: one that is free.
        device: auto, cpu, cuda or mps.
        out: Folder of runs.
    """
    for name, value, allowed in (
        ("judges", judges, Range(0, COUNT)),
        ("n", n, Range(1, COUNT)),
        ("each", each, Range(1, COUNT)),
        ("tokens", tokens, Range(1, COUNT)),
        ("temperature", temperature, Range(0)),
        ("seed", seed, Range(*SEED)),
        ("port", port, Range(0, 65535)),
    ):
        if value is not None:
            check(name, value, allowed)
    _check_labels(labels)
    if not export:
        needed("flask", "the page of a review", "review")
    path = Path(run_or_tasks).expanduser()
    if path.is_file() and is_store(path):
        if db or prompts:
            raise InputError("a database has its items already: --db and --prompts are for a run or for tasks")
        store = Store.open(path)
    elif path.is_file():
        found = reviewed.read(path, filter)
        own = _labels(labels, filter, any(one.prompt for one in found))
        store = Store.make(Path(db) if db else path.with_name("reviews.db"), shown(path.name), own, judges or 0)
        store.add(found)
    else:
        folder = _run(run_or_tasks, out)
        drawn = Drawn(folder, prompts, n, each, tokens, temperature, seed, device, filter)
        own = _labels(labels, filter, answers=True)
        store = Store.make(Path(db) if db else folder / "reviews.db", shown(folder.resolve().name), own, judges or 0)
        if not store.progress()["items"]:
            store.add(drawn.items())
    try:
        store.settle(labels or None, judges)
        return _exported(store, Path(export)) if export else _serve(store, port)
    finally:
        store.close()


def _check_labels(labels: Sequence[str]) -> None:
    if len(labels) > KEYS or len({*labels}) < len(labels):
        raise InputError(f"--labels takes up to {KEYS} labels, one a key, each once; it is {' '.join(labels)}")
    if wrong := [one for one in labels if not one.strip() or not one.isprintable() or len(one) > 40]:
        raise InputError(f"--labels takes words of up to 40 printable characters; one is {wrong[0]!r}")


def _run(name: str, out: str) -> Path:
    try:
        return job.find_run(name, out)
    except InputError:
        raise InputError(f"there is no run, file of tasks or database {name} (here or in {out}/)") from None


def _labels(given: tuple[str, ...], filter: str, answers: bool) -> tuple[str, ...]:
    """The labels of a new database; `answers`: items are answers to prompts, which thumbs are for."""
    if given:
        return given
    if filter:
        return (*filters.load(filter).categories[: KEYS - 1], DEFAULT[0])
    return () if answers else DEFAULT


def _exported(store: Store, path: Path) -> int:
    found = results.exported(store)
    write_text(path, dumps(found, indent=1) + "\n")
    count = sum(len(one["annotations"]) for one in found)
    print(f"{len(found):,} items, {count:,} judgements; {path}")
    return 0


def _serve(store: Store, port: int) -> int:
    from fastlm.data.review import app

    with app.listening(port) as own:
        print(_told(store))
        at = own.getsockname()[1]
        print(f"http://{app.HOST}:{at}/#{store.meta('token')}\nCtrl-C ends it; all that is judged stays", flush=True)
        app.serve(store, own)
        print(f"\n{_told(store)}")
    return 0


def _told(store: Store) -> str:
    found = store.progress()
    people = ", ".join(f"{one['name']} {one['count']:,}" for one in found["reviewers"])
    judged = f"{found['judged']:,} judged{f' ({people})' if people else ''}"
    return f"{found['items']:,} items, {judged}; {store.path}"


# --------------------------------------------------------------------------------------------------- outputs of a run


class Drawn:
    """Outputs of a run that are drawn when they are asked for."""

    def __init__(
        self, folder: Path, prompts: str, n: int, each: int, tokens: int, temperature: float, seed: int, device: str,
        filter: str,
    ) -> None:  # fmt: skip
        self.folder, self.prompts, self.n, self.each, self.tokens = folder, prompts, n, min(each, n), tokens
        self.temperature, self.seed, self.device, self.filter = temperature, seed, device, filter

    def items(self) -> list[Item]:
        model, tokenizer = job.load(self.folder, self.device)
        template = chat.resolve("", self.folder)
        worst = filters.load(self.filter).worst if self.filter else None
        choose = job.sampler(self.temperature, seed=self.seed, vocab=tokenizer.vocab)
        prompts = prompts_of(self.folder, self.prompts, -(-self.n // self.each), self.seed)
        found = list[Item]()
        start = time.perf_counter()
        for prompt, said in outputs.drawn(model, tokenizer, prompts, template, self.tokens, self.each, choose):
            data = {"prompt": prompt, "text": said.text, "source": shown(self.folder.resolve().name)}
            found.append(Item(data, -abs(worst(said.text)) if worst is not None else said.surprise))
            if len(found) == self.n:
                break
        console.say(f"{len(found):,} outputs drawn in {time.perf_counter() - start:.0f} s")
        return found


def main(argv: list[str]) -> int:
    return flags.call(review, "fastlm review", argv, EXAMPLES)
