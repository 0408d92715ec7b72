"""Personal data in text: e-mail addresses, public IP addresses, IBANs, card numbers, phone numbers.

A run of digits inside a float, an object identifier or a version is none of these.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from fastlm.data.clean.options import KINDS

# A pattern that begins with a set of characters is searched for several times faster than one that begins with what must not
# stand before it; so that is asked for after the first character.
EMAIL = re.compile(
    r"[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w@])"
)
EMAIL_START = re.compile(r"[A-Za-z0-9](?<![\w.+-].)")
IP4 = re.compile(r"\d(?<![\w.]\d)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w]|\.\d)")
IP6 = re.compile(
    r"[0-9A-Fa-f](?<![\w:.].)[0-9A-Fa-f]{0,3}:(?:[0-9A-Fa-f]{1,4}:){1,6}(?::?[0-9A-Fa-f]{1,4}){1,6}(?![\w:])"
)
VERSION = re.compile(r"(?:version|release|revision|oid|\bv)[\s:=]*$", re.I)
IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
CARD = re.compile(r"\d(?<![\w.+-].)(?:[ -]?\d){11,18}(?![\w]|[.-]\d)")
SEPARATED = r"[ .-]"
PHONE = re.compile(
    rf"(?:\+\d{{1,3}}(?:{SEPARATED}?\(?\d{{2,4}}\)?){{2,6}}"
    rf"|(?:(?:\+?1|001){SEPARATED})?(?:\(\d{{3}}\) ?|\d{{3}}{SEPARATED})\d{{3}}{SEPARATED}\d{{4}}"
    rf"|\(0\d{{1,5}}\) ?\d{{3,8}}(?:{SEPARATED}\d{{2,6}})*)(?:x\d{{1,6}}| ext\.? ?\d{{1,6}})?(?![\w]|[.-]\d|\))"
)
PHONE_START = re.compile(r"[+(\d](?<![\w.+/:=-].)")
DIGITS = re.compile(r"\d[\d .():-]{6}")  # from their first digit on, the shortest address, card and phone number
COLONS = re.compile(r":[0-9a-fA-F]{0,4}:")


def _email(text: str, _begin: int) -> Iterator[tuple[int, int]]:
    end, at = 0, text.find("@")
    while at >= 0:
        starts = EMAIL_START.finditer(text, max(end, at - 64), at)
        if at >= end and (found := next(filter(None, (EMAIL.match(text, s.start()) for s in starts)), None)):
            yield found.span()
            end = found.end()
        at = text.find("@", at + 1)


def _public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    parts = text.split(".")
    numbered = len(parts) == 4 and sum(len(p) == 1 for p in parts) > 2 and len(set(parts)) > 1  # 7.1.4.34, a version
    return address.is_global and not address.is_multicast and not numbered and not text.lower().startswith("ffff:")


def _ip(text: str, begin: int) -> Iterator[tuple[int, int]]:
    for found in IP4.finditer(text, begin):
        if _public(found[0]) and not VERSION.search(text[max(found.start() - 12, 0) : found.start()]):
            yield found.span()
    if COLONS.search(text):
        for found in IP6.finditer(text):
            if _public(found[0]):
                yield found.span()


def _iban(text: str, _begin: int) -> Iterator[tuple[int, int]]:
    from stdnum import iban

    for found in IBAN.finditer(text):
        words = found[0].split(" ")
        while words and not iban.is_valid("".join(words), check_country=False):
            words.pop()
        if words:
            yield found.start(), found.start() + len(" ".join(words))


def _card(text: str, begin: int) -> Iterator[tuple[int, int]]:
    from stdnum import luhn

    for found in CARD.finditer(text, begin):
        digits = re.sub("[ -]", "", found[0])
        brand = digits[0] in "3456" or digits[:4] in ("2131", "1800") or "2221" <= digits[:4] <= "2720"
        if brand and luhn.is_valid(digits) and len(set(digits)) > 1:
            yield found.span()


def _phone(text: str, begin: int) -> Iterator[tuple[int, int]]:
    import phonenumbers

    end = 0
    for start in PHONE_START.finditer(text, max(begin - 1, 0)):  # its first digit may follow a sign
        found = PHONE.match(text, start.start()) if start.start() >= end else None
        end = found.end() if found else end
        if not found or not re.search(r"[ .()+-]", found[0]):
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
    digits = DIGITS.search(text)
    begin = digits.start() if digits else len(text)
    for kind in (k for k in KINDS if k in kinds):
        spans = list(_FINDERS[kind](text, begin))
        out += [(s, e, kind) for s, e in spans if all(e <= a or s >= b for a, b, _ in out)]
    return sorted(out)


def mask(text: str, found: list[tuple[int, int, str]]) -> str:
    """The text with each find as [KIND]."""
    parts, at = [], 0
    for start, end, kind in found:
        parts += [text[at:start], f"[{kind.upper()}]"]
        at = end
    return "".join([*parts, text[at:]])
