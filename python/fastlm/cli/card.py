"""`fastlm data card CORPUS [--model RUN]`: what a corpus holds, as a page and as a dataset card."""

from __future__ import annotations

import datetime
import shutil
import sys
from pathlib import Path

import tyro

from fastlm.cli import flags
from fastlm.cli.data import reading
from fastlm.data import corpus as corpora
from fastlm.data import filter as filters
from fastlm.data.bounds import COUNT, SEED, Range, check
from fastlm.data.card import bias, markdown, page, scan
from fastlm.data.card.card import Card
from fastlm.data.clean import CleanOptions
from fastlm.data.clean.run import needed
from fastlm.data.errors import FULL, InputError
from fastlm.train import job, report
from fastlm.train.files import write_text


def card(
    corpus: tyro.conf.Positional[tuple[str, ...]] = (),
    out: str = "",
    model: str = "",
    name: str = "",
    dedup: float = 0.7,
    filter: str = "",
    field: str = "text",
    separator: str = "",
    workers: int = 1,
    seed: int = 1,
) -> int:
    """Show what a corpus holds: card.html for people, card.md in Hugging Face's dataset-card format.

    Args:
        corpus: Files, folders and globs, as `fastlm train` takes them; of none the corpus of --model, or the default.
        out: Folder of the two files; by default that of --model, where they lie beside its report, else the current one.
        model: Run whose losses of sentences that differ in a person alone give a figure of its bias.
        name: Title of the card; by default the corpus' names.
        dedup: Jaccard similarity of 5-word shingles from which documents are near-duplicates; 0: not looked for.
        filter: Folder of a toxicity filter (policy.toml).
        field: The field of rows that holds the text.
        separator: Text that parts documents within a file.
        workers: Processes that read; they change no figure.
        seed: Seed of the bootstrap.
    """
    needed("card")
    check("workers", workers, Range(1, COUNT))
    check("seed", seed, Range(*SEED))
    options = CleanOptions(dedup=dedup, field=field, separator=separator, workers=workers, filter=filter)
    options.check()
    policy = filters.load(filter).hash if filter else ""
    run = job.find_run(model) if model else None
    if run is not None and not corpus and (run / "config.json").is_file():
        _, corpus = job.read_config(run)
    folder = Path(out).expanduser() if out else run or Path()
    for path in (folder / "card.md", folder / "card.html"):
        corpora.refuse_inside(path, corpus)
    markdown.refuse_edited(folder / "card.md")
    work = folder / ".card"
    try:
        with reading() as note:
            facts, copies = scan.scan(corpus, work, options, workers, note)
    except KeyboardInterrupt:
        print(f"fastlm data card: interrupted; {_kept(work)}, and the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(f"{error.strerror}; {_kept(work)}: make room and the same command goes on") from error
    title = name or ", ".join(Path(n).name for n in corpus) or "The source of Python's standard library"
    made = Card(title, corpus, datetime.date.today().isoformat(), facts, copies, policy=policy)
    if run is not None:
        from fastlm.cli.augment import scorer

        made.model = run.name
        pairs = [*bias.fixed(), *bias.of_sentences(facts.sentences.values())]
        made.bias = bias.measure(pairs, scorer(str(run), whole=True), seed)
    write_text(folder / "card.html", page.page(made))
    write_text(folder / "card.md", markdown.text(made))
    shutil.rmtree(work)
    if run is not None and folder.resolve() == run.resolve() and (run / "report.html").is_file():
        report.write(run)
    _say(made)
    print(f"{folder / 'card.html'}, {folder / 'card.md'}")
    return 0


def _kept(work: Path) -> str:
    return f"what is counted is kept in {work}"


def _say(made: Card) -> None:
    facts, copies, total = made.facts, made.copies, made.facts.sums["documents"]
    codes = ", ".join(f"{code} {n / total:.0%}" for code, n in facts.languages.most_common(3))
    print(f"{total:,} documents, {page.size(facts.sums['bytes'])}, {facts.sums['words']:,} words; languages: {codes}")
    print(
        f"copies: {copies.exact:,} exact, {copies.near:,} near; personal data: {sum(facts.personal.values()):,} finds in "
        f"{facts.sums['personal']:,} documents"
    )
    for one in made.bias:
        print(
            f"{one.kind}: {one.forms[0]} against {one.forms[1]} {one.gap:+.3f} nats [{one.low:+.3f}, {one.high:+.3f}], "
            f"{one.pairs:,} pairs"
        )


def main(argv: list[str]) -> int:
    return flags.call(card, "fastlm data card", argv)
