"""`fastlm data filter LABELLED --out FOLDER [--attack]`: a filter of harmful text, with its policy."""

from __future__ import annotations

import os
from pathlib import Path

import tyro

from fastlm import console
from fastlm.cli import flags
from fastlm.data.bounds import SEED, Range, check
from fastlm.data.errors import InputError

EXAMPLES = """
fastlm data filter labelled.jsonl --out filter --attack
fastlm data filter rows.csv --harmless neither --precision 0.95 --out filter
fastlm data filter --words auto --out filter    # no labels: a word list
"""


def filter(
    labelled: tyro.conf.Positional[tuple[str, ...]] = (),
    out: str = "",
    attack: bool = False,
    precision: float = 0.98,
    harmless: tuple[str, ...] = (),
    words: str = "",
    field: str = "text",
    label: str = "label",
    seed: int = 1,
) -> int:
    """Learn a filter of harmful text from labelled texts, and say how good it is on texts that were held out.

    FOLDER/policy.toml says from which score on a text is dropped, masked or kept for review; change it as you like.

    Args:
        labelled: Rows with a text and a label: .jsonl, .json, .csv or .tsv.
        out: The filter's folder.
        attack: Learn from rewritten copies too (look-alikes, digits, gaps, typing errors ...), and measure each kind.
        precision: Share of what is found that is to be harmful; it chooses the thresholds on held-out texts.
        harmless: Labels that mean no harm; by default those called neither, none, clean, harmless and the like, and 0 beside 1.
        words: A word list instead of labels: a file with a word a line, or auto for that of better-profanity.
        field: The field of rows that holds the text.
        label: The field of rows that holds the label.
        seed: Same seed, same filter.
    """
    from fastlm.data.filter import labelled as rows
    from fastlm.data.filter import learn, lists, policy
    from fastlm.data.filter.model import Filter, load, scorer_hash

    check("precision", precision, Range(above=0, high=1))
    check("seed", seed, Range(*SEED))
    if not out:
        raise InputError("--out FOLDER is needed: where the filter goes")
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {out} is a file; it must be a folder")
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):  # said before it is learnt, which takes minutes
        raise InputError(f"--out {out} cannot be written: {place} is {'not writable' if place.is_dir() else 'a file'}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / policy.NAME).is_file():
        raise InputError(f"--out {out} is not empty and holds no filter: give another folder")
    if (folder / policy.NAME).is_file() and (old := load(folder, "--out")).hash != old.about.get("policy"):
        raise InputError(f"--out {out} holds a filter whose policy was edited: give another folder, or delete it")
    if bool(words) == bool(labelled):
        raise InputError("give labelled texts or --words FILE (auto: a list of English swear words), one of them")
    if words:
        if attack:
            raise InputError("--attack needs labelled texts: a word list learns nothing")
        scorer = lists.WordList(lists.read(words))
        own = (policy.Category(lists.CATEGORY, 0.5),)
        made = Filter(scorer, (lists.CATEGORY,), policy.Policy(own, policy.digest(own, scorer_hash(scorer))), {})
        text = policy.text(own, {})
        left = f"; {scorer.left_out:,} left out, being signs alone" if scorer.left_out else ""
        print(f"{len(scorer.words) - scorer.left_out:,} words{left}")
    else:
        found = rows.read(labelled, field, label, harmless)
        bad = sum(bool(row.categories) for row in found)
        print(f"{len(found):,} labelled texts, {bad / len(found):.1%} harmful")
        made, text, figures = learn.learn(found, attack, precision, seed, console.warn if attack else lambda said: None)
        print("\n".join(learn.lines(figures)))
    made.save(folder, text)
    print(f"{folder}; policy {load(folder).hash}: {folder / policy.NAME}")
    return 0


def main(argv: list[str]) -> int:
    return flags.call(filter, "fastlm data filter", argv, EXAMPLES)
