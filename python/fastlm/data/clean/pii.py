"""Personal data in text: e-mail addresses, public IP addresses, IBANs, card numbers, phone numbers.

A run of digits inside a float, an object identifier or a version is none of these.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator

from fastlm.data.clean.options import KINDS

EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@])"
)
IP4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
IP6 = re.compile(
    r"[0-9A-Fa-f](?<![\w:.].)[0-9A-Fa-f]{0,3}:(?:[0-9A-Fa-f]{1,4}:){1,6}(?::?[0-9A-Fa-f]{1,4}){1,6}(?![\w:])"
)
VERSION = re.compile(r"(?:version|release|revision|oid|\bv)[\s:=]*$", re.I)
IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
CARD = re.compile(r"(?<![\w.+-])\d(?:[ -]?\d){11,18}(?![\w]|[.-]\d)")
SEPARATED = r"[ .-]"
PHONE = re.compile(
    rf"(?<![\w.+/:=-])(?:\+\d{{1,3}}(?:{SEPARATED}?\(?\d{{2,4}}\)?){{2,6}}"
    rf"|(?:(?:\+?1|001){SEPARATED})?(?:\(\d{{3}}\) ?|\d{{3}}{SEPARATED})\d{{3}}{SEPARATED}\d{{4}}"
    rf"|\(0\d{{1,5}}\) ?\d{{3,8}}(?:{SEPARATED}\d{{2,6}})*)(?:x\d{{1,6}}| ext\.? ?\d{{1,6}})?(?![\w]|[.-]\d|\))"
)
# Python's search goes fast through a text only by a pattern that begins with a set of characters. So a cheap one finds where
# a find may begin, and the whole pattern is tried there alone. The shortest address, card and phone number are seven of
# these characters from their first digit on.
DIGITS = re.compile(r"\d(?=[\d .():-]{6})")
COLONS = re.compile(r":[0-9a-fA-F]{0,4}:")


def _tried(pattern: re.Pattern[str], text: str, places: Iterable[int]) -> Iterator[re.Match[str]]:
    """What ``pattern.finditer(text)`` finds, if it can begin at these places alone, which are in order."""
    end = 0
    for place in places:
        if place >= end and (found := pattern.match(text, place)):
            end = found.end()
            yield found


def _email(text: str, _digits: list[int]) -> Iterator[tuple[int, int]]:
    at, places = text.find("@"), set[int]()
    while at >= 0:
        places.update(range(max(at - 64, 0), at))
        at = text.find("@", at + 1)
    yield from (found.span() for found in _tried(EMAIL, text, sorted(places)))


def _public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    parts = text.split(".")
    numbered = len(parts) == 4 and sum(len(p) == 1 for p in parts) > 2 and len(set(parts)) > 1  # 7.1.4.34, a version
    return address.is_global and not address.is_multicast and not numbered and not text.lower().startswith("ffff:")


def _ip(text: str, digits: list[int]) -> Iterator[tuple[int, int]]:
    for found in _tried(IP4, text, digits):
        if _public(found[0]) and not VERSION.search(text[max(found.start() - 12, 0) : found.start()]):
            yield found.span()
    if COLONS.search(text):
        for found in IP6.finditer(text):
            if _public(found[0]):
                yield found.span()


def _iban(text: str, _digits: list[int]) -> Iterator[tuple[int, int]]:
    from stdnum import iban

    for found in IBAN.finditer(text):
        words = found[0].split(" ")
        while words and not iban.is_valid("".join(words), check_country=False):
            words.pop()
        if words:
            yield found.start(), found.start() + len(" ".join(words))


def _card(text: str, digits: list[int]) -> Iterator[tuple[int, int]]:
    from stdnum import luhn

    for found in _tried(CARD, text, digits):
        number = re.sub("[ -]", "", found[0])
        brand = number[0] in "3456" or number[:4] in ("2131", "1800") or "2221" <= number[:4] <= "2720"
        if brand and luhn.is_valid(number) and len(set(number)) > 1:
            yield found.span()


def _phone(text: str, digits: list[int]) -> Iterator[tuple[int, int]]:
    import phonenumbers

    places = {p for digit in digits for p in range(max(digit - 2, 0), digit + 1) if p == digit or text[p] in "+("}
    for found in _tried(PHONE, text, sorted(places)):
        if not re.search(r"[ .()+-]", found[0]):
            continue
        try:
            number = phonenumbers.parse(found[0], "US")
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_possible_number(number):
            yield found.span()


_FINDERS = {"email": _email, "ip": _ip, "iban": _iban, "card": _card, "phone": _phone}


def find(text: str, kinds: tuple[str, ...] = KINDS) -> list[tuple[int, int, str]]:
    """(start, end, kind) of each, in order and without overlap; of two the kind that KINDS names first."""
    out: list[tuple[int, int, str]] = []
    digits = [found.start() for found in DIGITS.finditer(text)]
    for kind in (k for k in KINDS if k in kinds):
        spans = list(_FINDERS[kind](text, digits))
        out += [(s, e, kind) for s, e in spans if all(e <= a or s >= b for a, b, _ in out)]
    return sorted(out)


def mask(text: str, found: list[tuple[int, int, str]]) -> str:
    """The text with each find as [KIND]."""
    parts, at = [], 0
    for start, end, kind in found:
        parts += [text[at:start], f"[{kind.upper()}]"]
        at = end
    return "".join([*parts, text[at:]])
