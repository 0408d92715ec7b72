"""What people do to a word so that a filter does not see it, by family: `FAMILIES[name](word, draw)` rewrites one word.

A family changes a word wherever it can; a word that it cannot change comes back as it was. `rewrite` does it to the words
of a text that give the text away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection

from fastlm.data.filter import fold

WORD = re.compile(r"[^\W\d_]+")
VOWELS = frozenset("aeiouAEIOU")
SHORT = 4  # letters below which a word is not edited: it would be another
ZERO = ("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad")
MARKS = ("\u0301", "\u0300", "\u0308", "\u0323", "\u0336", "\u0332")
_LIKE: dict[str, list[str]] = {}
for _other, _letter in fold.ALIKE.items():
    if len(_letter) == 1 and _letter.isalpha() and _other.isalpha():
        _LIKE.setdefault(_letter, []).append(_other)
for _letter in "abcdefghijklmnopqrstuvwxyz":  # full width, and the bold letters of mathematics
    _LIKE.setdefault(_letter, []).extend((chr(0xFF41 + ord(_letter) - 97), chr(0x1D41A + ord(_letter) - 97)))
_DIGIT = {"o": "0", "i": "1!", "e": "3", "a": "4@", "s": "5$", "t": "7+", "b": "8", "g": "9", "l": "1|"}
_KEYS = {key: row[max(at - 1, 0) : at] + row[at + 1 : at + 2]
         for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm") for at, key in enumerate(row)}  # fmt: skip
_SOUNDS = (("ph", "f"), ("ck", "k"), ("ss", "zz"), ("er", "a"), ("oo", "u"), ("ee", "i"), ("f", "ph"), ("c", "k"), ("k", "c"),
           ("s", "z"), ("i", "y"), ("u", "oo"), ("a", "uh"))  # fmt: skip
Attack = Callable[[str, random.Random], str]


def _each(word: str, table: dict[str, str] | dict[str, list[str]], draw: random.Random) -> str:
    """Half of the letters of a table exchanged, at least one."""
    places = [at for at, letter in enumerate(word) if letter.lower() in table]  # "İ".lower() is two characters
    chosen = set(draw.sample(places, max(-(-len(places) // 2), 1))) if places else set()
    return "".join(draw.choice(table[c.lower()]) if at in chosen else c for at, c in enumerate(word))


def look_alikes(word: str, draw: random.Random) -> str:
    return _each(word, _LIKE, draw)


def digits(word: str, draw: random.Random) -> str:
    return _each(word, _DIGIT, draw)


def spacing(word: str, draw: random.Random) -> str:
    return draw.choice((" ", ".", "-", "_", "*", ". ", "/")).join(word)


def repeats(word: str, draw: random.Random) -> str:
    chosen = set(draw.sample(range(len(word)), max(len(word) // 3, 1)))
    return "".join(c * draw.randint(2, 5) if at in chosen else c for at, c in enumerate(word))


def zero_width(word: str, draw: random.Random) -> str:
    return "".join(c + draw.choice(ZERO) * (draw.random() < 0.5 or at == 0) for at, c in enumerate(word))


def accents(word: str, draw: random.Random) -> str:
    return "".join(c + draw.choice(MARKS) * (draw.random() < 0.5 or at == 0) for at, c in enumerate(word))


# From here on a word keeps its first letter, and one of three letters stays: it must be read as what it was (Rawlinson 1976).


def dropped_vowels(word: str, draw: random.Random) -> str:
    if len(word) < SHORT:
        return word
    return word[0] + "".join(c for c in word[1:] if c not in VOWELS)


def swapped_letters(word: str, draw: random.Random) -> str:
    places = [at for at in range(1, len(word) - 1) if word[at] != word[at + 1]]
    if len(word) < SHORT or not places:
        return word
    at = draw.choice(places)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def dropped_letter(word: str, draw: random.Random) -> str:
    if len(word) < SHORT:
        return word
    at = draw.randrange(1, len(word))
    return word[:at] + word[at + 1 :]


def added_letter(word: str, draw: random.Random) -> str:
    at = draw.randrange(1, len(word) + 1)
    return word[:at] + draw.choice("abcdefghijklmnopqrstuvwxyz") + word[at:]


def neighbouring_key(word: str, draw: random.Random) -> str:
    places = [at for at, c in enumerate(word) if at and c.lower() in _KEYS]
    if len(word) < SHORT or not places:
        return word
    at = draw.choice(places)
    return word[:at] + draw.choice(_KEYS[word[at].lower()]) + word[at + 1 :]


def stars(word: str, draw: random.Random) -> str:
    chosen = set(draw.sample(range(1, len(word)), max((len(word) - 1) // 3, 1))) if len(word) > 1 else set()
    sign = draw.choice("*#-_")
    return "".join(sign if at in chosen else c for at, c in enumerate(word))


def cut(word: str, draw: random.Random) -> str:
    at = draw.randrange(1, len(word)) if len(word) > 1 else 0
    return f"{word[:at]} {word[at:]}" if at else word


def sounds(word: str, draw: random.Random) -> str:
    low = word.lower()
    known = [pair for pair in _SOUNDS if pair[0] in low]
    if not known:
        return word
    old, new = draw.choice(known)
    return low.replace(old, new)


def framed(word: str, draw: random.Random) -> str:
    frame = draw.choice(("x", "xx", "xX", "z", "q", "_", "o"))
    return frame + word + frame


FAMILIES: dict[str, Attack] = {
    f.__name__.replace("_", "-"): f
    for f in (look_alikes, digits, spacing, repeats, zero_width, accents, dropped_vowels, swapped_letters, dropped_letter,
              added_letter, neighbouring_key, stars, cut, sounds, framed)
}  # fmt: skip


def rewrite(text: str, family: str, targets: Collection[str], draw: random.Random) -> str:
    """The text with each of its `targets` (lower case) rewritten; where it has none, a third of its words."""
    attack = FAMILIES[family]
    found = [m for m in WORD.finditer(text) if m[0].lower() in targets]
    if not found:
        words = [m for m in WORD.finditer(text) if len(m[0]) > 2]
        found = sorted(draw.sample(words, -(-len(words) // 3)), key=lambda m: m.start())
    parts, end = [], 0
    for match in found:
        parts += [text[end : match.start()], attack(match[0], draw)]
        end = match.end()
    return "".join([*parts, text[end:]])
