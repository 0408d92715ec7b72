"""Text as a filter reads it: what is done to a word so that a list does not know it is undone.

Look-alikes of other scripts, digits and signs that stand for letters, characters without width, letters set apart by
blanks or points, and letters repeated. What is left are lower-case words with a blank between them.
"""

from __future__ import annotations

import html
import re
import unicodedata

# Letters of Cyrillic, Greek and others that look like a Latin one (Unicode's confusables.txt, the everyday part of it).
ALIKE = {
    "а": "a", "б": "b", "в": "b", "г": "r", "е": "e", "ё": "e", "з": "e", "и": "n", "і": "i", "ї": "i", "ј": "j", "к": "k",
    "м": "m", "н": "h", "о": "o", "п": "n", "р": "p", "с": "c", "т": "t", "у": "y", "х": "x", "ѕ": "s", "ԁ": "d", "ԛ": "q",
    "ԝ": "w", "ь": "b", "һ": "h", "ӏ": "l", "ց": "g", "ո": "n", "ս": "u", "օ": "o", "զ": "q", "հ": "h",
    "α": "a", "β": "b", "γ": "y", "δ": "d", "ε": "e", "η": "n", "ι": "i", "κ": "k", "μ": "u", "ν": "v", "ο": "o", "ρ": "p",
    "σ": "o", "τ": "t", "υ": "u", "χ": "x", "ω": "w", "ϲ": "c", "ς": "c",
    "ı": "i", "ɩ": "i", "ł": "l", "ø": "o", "đ": "d", "ħ": "h", "ŧ": "t", "æ": "ae", "œ": "oe", "ß": "ss", "ɑ": "a",
    "ɡ": "g", "ɢ": "g", "ʀ": "r", "ɪ": "i", "ɴ": "n", "ʜ": "h", "ʏ": "y", "ʟ": "l", "ᴀ": "a", "ʙ": "b", "ᴄ": "c", "ᴅ": "d",
    "ᴇ": "e", "ᴋ": "k", "ᴍ": "m", "ᴏ": "o", "ᴘ": "p", "ᴛ": "t", "ᴜ": "u", "ᴠ": "v", "ᴡ": "w", "ᴢ": "z", "ꜱ": "s",
    "€": "e", "£": "l", "¢": "c", "¥": "y", "¡": "i", "’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-",
}  # fmt: skip
SIGNS = {"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s", "!": "i",
         "|": "i", "+": "t"}  # fmt: skip


class _Characters(dict[int, "str | None"]):
    """What each character becomes, by need: look-alikes a letter, accents and characters without width nothing."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        found: str | None = ALIKE.get(character, character)
        if 0x300 <= code < 0x370 or unicodedata.category(character) in ("Cf", "Me"):
            found = None
        self[code] = found
        return found


_characters = _Characters()
_signs = str.maketrans(SIGNS)
_ENTITY = re.compile(r"&#?\w{2,8};")
_LINK = re.compile(r"(?:https?://|www\.)\S+")
_SIGNED = re.compile(r"(?<![a-z0-9@$!|+])(?=[a-z]*[0-9@$!|+])[a-z0-9@$!|+]+")  # tried once a run: linear in its length
_PLAIN = re.compile(r"\d+(?:st|nd|rd|th|[a-z]{0,2})")  # 10, 3rd, 5k, 24h: numbers that stay
_APART = re.compile(r"(?<![a-z])[a-z](?:[ ._*/\\-]{1,3}[a-z](?![a-z])){2,}")
_INSIDE = re.compile(r"(?<=[a-z])[.*_'~^#%-]{1,3}(?=[a-z])")
_AGAIN = re.compile(r"([a-z])\1{2,}")
_WORD = re.compile(r"[^\W_]+")


def _letters(found: re.Match[str]) -> str:
    word = found[0].rstrip("!+|")
    if _PLAIN.fullmatch(word) or not any("a" <= c <= "z" for c in word):
        return found[0]
    return word.translate(_signs)


def fold(text: str) -> list[str]:
    """The words of a text, folded."""
    if "&" in text:
        text = _ENTITY.sub(lambda m: html.unescape(m[0]), text)
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text).translate(_characters).lower()
    text = _LINK.sub(" ", text)
    text = _SIGNED.sub(_letters, text)
    text = _APART.sub(lambda m: re.sub("[^a-z]", "", m[0]), text)
    text = _AGAIN.sub(r"\1\1", _INSIDE.sub("", text))
    return _WORD.findall(text)
