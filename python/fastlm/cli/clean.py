"""`fastlm data clean IN ... --out FOLDER`: a corpus without junk, copies and personal data."""

from __future__ import annotations

import sys

from fastlm.cli import flags
from fastlm.data import InputError
from fastlm.data.clean import CleanOptions

DEFAULT = CleanOptions()


EXAMPLES = """
fastlm data clean notes/ rows.jsonl --out cleaned
fastlm data clean 'src/**/*.py' --quality off --repetition off --out code
fastlm data clean --out cleaned --show-dropped near_duplicate
"""


def clean(corpus: flags.Corpus = (), out: str = "", show_dropped: str = "", steps: CleanOptions = DEFAULT) -> int:
    """Clean a corpus into a folder that `fastlm train` reads, and say what each rule took.

    Started again after a kill, it goes on.

    Args:
        corpus: Files, folders and globs, as `fastlm train` takes them.
        out: The folder.
        show_dropped: Print ten documents that this rule took in the folder, each with its reason.
    """
    from pathlib import Path

    from fastlm.data.clean import run

    if not out:
        raise InputError("--out FOLDER is needed: where the cleaned corpus goes, or is")
    if corpus or not show_dropped:
        table = run.clean(corpus, Path(out).expanduser(), steps)
        if table is None:
            return 0
        if not show_dropped:
            print("\n".join(run.lines(table)))
            print(f"fastlm train {out}")
    if show_dropped:
        print("\n".join(run.show_dropped(Path(out).expanduser(), show_dropped)))
    return 0


def main(argv: list[str]) -> int:
    try:
        return int(flags.call(clean, "fastlm data clean", argv, EXAMPLES))
    except KeyboardInterrupt:
        print("fastlm data clean: interrupted; what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
