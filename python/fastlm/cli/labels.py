"""`fastlm data tasks IN --out tasks.json` and `fastlm data labels EXPORT... --out labelled.jsonl`: labels by a crowd."""

from __future__ import annotations

from pathlib import Path

import tyro

from fastlm.cli import flags
from fastlm.data import annotate
from fastlm.data.bounds import COUNT, SEED, Range, check
from fastlm.data.rows import dumps
from fastlm.train.files import write_text


def tasks(
    corpus: tyro.conf.Positional[tuple[str, ...]],
    out: str,
    n: int = 500,
    seed: int = 1,
    field: str = "text",
    filter: str = "",
) -> int:
    """Write documents as tasks that Label Studio imports.

    Args:
        corpus: Files, folders and globs.
        out: The JSON file to write.
        n: Documents to draw.
        seed: Same seed, same documents.
        field: The field of rows that holds the text.
        filter: Folder of a filter: not drawn, but those that it is least sure of, these first.
    """
    check("n", n, Range(1, COUNT))
    check("seed", seed, Range(*SEED))
    found = annotate.tasks(corpus, n, seed, field, filter)
    write_text(Path(out), dumps(found, indent=1) + "\n")
    print(f"{len(found):,} tasks; {out}")
    return 0


def labels(exports: tyro.conf.Positional[tuple[str, ...]], out: str, below: float = 0.8, disputed: str = "") -> int:
    """Merge several annotators' labels into one an item, with its confidence.

    Args:
        exports: Exports of Label Studio in its JSON format, or databases of `fastlm review`.
        out: The .jsonl file to write.
        below: Confidence below which an item is disputed; above 1 all are.
        disputed: The JSON file that disputed items are written to, as new tasks.
    """
    check("below", below, Range(0, 2))
    found = annotate.merge(*annotate.read(map(Path, exports)))
    again = found.disputed(below)
    write_text(Path(out), "".join(dumps(row) + "\n" for row in found.rows()))
    if disputed:
        write_text(Path(disputed), dumps(again, indent=1) + "\n")
    print(f"{len(found.merged):,} items, {len(found.labels):,} labels; Krippendorff's alpha {found.alpha:.3f}; {out}")
    for who, (right, count) in found.accuracy().items():
        print(f"  {who}: agrees with the merged label in {right:.1%} of {count:,}")
    print(f"{len(again):,} items below a confidence of {below}" + (f"; {disputed}" if disputed else ""))
    return 0


def main_tasks(argv: list[str]) -> int:
    return flags.call(tasks, "fastlm data tasks", argv)


def main(argv: list[str]) -> int:
    return flags.call(labels, "fastlm data labels", argv)
