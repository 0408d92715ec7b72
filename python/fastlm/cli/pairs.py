"""`fastlm data pairs reviews.db --out pairs.jsonl`: what reviewers preferred, as rows for `fastlm train --dpo`."""

from __future__ import annotations

from pathlib import Path

import tyro

from fastlm.cli import flags
from fastlm.data.review import Store, results
from fastlm.data.rows import dumps
from fastlm.train.files import write_text

EXAMPLES = """
fastlm data pairs myrun/reviews.db --out pairs.jsonl
"""


def pairs(reviews: tyro.conf.Positional[str], out: str) -> int:
    """Write preference pairs for `fastlm train --dpo`.

    A better answer is preferred to the one in whose place it was written. Of two answers to one prompt, the one with thumbs up
    is preferred to the one with thumbs down.

    Args:
        reviews: Database of `fastlm review`.
        out: The .jsonl file to write.
    """
    store = Store.open(Path(reviews).expanduser())
    try:
        rows, left = results.pairs(store)
    finally:
        store.close()
    write_text(Path(out), "".join(dumps(row) + "\n" for row in rows))
    better = sum(row["from"] == "better answer" for row in rows)
    print(f"{len(rows):,} pairs, {better:,} of better answers, {len(rows) - better:,} of thumbs; {out}")
    for reason, count in left.items():
        print(f"  {count:,} left out: {reason}")
    return 0


def main(argv: list[str]) -> int:
    return flags.call(pairs, "fastlm data pairs", argv, EXAMPLES)
