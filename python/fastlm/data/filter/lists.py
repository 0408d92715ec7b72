"""A word list as a scorer, for those who have no labels: one compiled expression over folded text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fastlm.data.augment.text import needed
from fastlm.data.errors import InputError
from fastlm.data.filter.fold import fold

AUTO = "auto"
CATEGORY = "listed"


def read(name: str, said: str = "") -> list[str]:
    """The words of a file, one a line (# begins a comment); of `auto` those of better-profanity. `said` is how errors name it.

    Raises InputError for a file that cannot be read or holds no word.
    """
    path = Path(name).expanduser()
    if name == AUTO:
        package = needed("better_profanity", "the word list", "safety")
        path = Path(package.__file__).parent / "profanity_wordlist.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{said or f'--words {name}'} cannot be read: {error}") from None
    found = sorted({word for line in lines if (word := line.partition("#")[0].strip().lower())})
    if not found:
        raise InputError(f"{said or f'--words {name}'} holds no word")
    return found


def plain(words: Iterable[str]) -> set[str]:
    """The words of a list that are letters alone."""
    return {word for word in words if word.isalpha()}


class WordList:
    """Scores 1 where a word of the list stands in a text, else 0.

    `left_out` counts the words of which folding leaves nothing, such as signs alone. Raises InputError where all are.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words
        read = [" ".join(fold(word)) for word in words]
        self.left_out = read.count("")
        folded = sorted({*read} - {""}, key=lambda w: (-len(w), w))
        if not folded:
            raise InputError(
                f"the word list has no word to look for: all {len(words):,} are left out, being signs alone"
            )
        self.expression = re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, folded))})(?!\S)")

    def scores(self, text: str) -> tuple[float, ...]:
        return (float(self.expression.search(" ".join(fold(text))) is not None),)
