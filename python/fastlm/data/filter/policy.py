"""A filter's policy.toml: which categories count, from which score on, and what then happens to a text.

The file is for people to discuss and change. Its hash is that of what it says and of the scorer that it is for; comments do
not change it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.data.errors import InputError

FORMAT = 1
NAME = "policy.toml"
ACTIONS = ("drop", "review", "mask")  # of several that apply the first is taken
SHARE = 0.1

HEAD = f"""# What this filter calls harmful, and what happens then. Change it by discussion: its hash goes into what uses it.
#
# threshold  a passage (a text of at most a few sentences) counts from this score on, 0 to 1
# share      a document counts when so large a part of its text is in such passages; 0: one passage is enough
# action     "drop": the document goes. "review": it is kept apart for people. "mask": its passages become [FILTERED].
#
# A category that is deleted here is not looked for.
format = {FORMAT}
"""


@dataclass(frozen=True)
class Category:
    """One category's rule; `about` is a comment in the file."""

    name: str
    threshold: float
    action: str = "drop"
    share: float = SHARE
    about: str = ""


@dataclass(frozen=True)
class Policy:
    """The categories in the order of the file, and the hash of policy and scorer, sixteen hexadecimal digits."""

    categories: tuple[Category, ...]
    hash: str


def digest(categories: tuple[Category, ...], scorer: str) -> str:
    said = [(c.name, c.threshold, c.action, c.share) for c in categories]
    return hashlib.sha256(json.dumps([FORMAT, scorer, sorted(said)]).encode()).hexdigest()[:16]


def _quoted(name: str) -> str:
    """As a TOML string, which knows no pairs of surrogates and takes no bare U+007F."""
    return json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")


def text(categories: tuple[Category, ...], left_out: dict[str, str]) -> str:
    """The file. `left_out` says why a category is not looked for."""
    parts = [HEAD]
    for one in categories:
        about = f"  # {one.about}" if one.about else ""
        parts.append(f"[category.{_quoted(one.name)}]\nthreshold = {one.threshold!r}{about}\nshare = {one.share!r}\n"
                     f"action = {_quoted(one.action)}\n")  # fmt: skip
    parts += [f"# {_quoted(name)} is not looked for: {why}\n" for name, why in left_out.items()]
    return "\n".join(parts)


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from fastlm.data.augment.text import needed

        tomllib = needed("tomli", "policy.toml", "safety")
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except (UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    return found


def _number(path: Path, name: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and 0 <= value <= 1):
        raise InputError(f"{path}: {key} of the category {name!r} must be a number from 0 to 1; it is {value!r}")
    return float(value)


def read(path: Path, known: tuple[str, ...], scorer: str) -> Policy:
    """The policy of a file, for a scorer of these categories.

    Raises InputError, naming the category and the key, for what the file cannot say.
    """
    found = _toml(path)
    if found.get("format") != FORMAT:
        raise InputError(f"{path}: format must be {FORMAT}, as this version reads it; it is {found.get('format')!r}")
    tables = found.get("category", {})
    if wrong := sorted(found.keys() - {"format", "category"}):
        raise InputError(f"{path}: {wrong[0]!r} is no part of a policy; it holds format and [category.NAME]")
    if not isinstance(tables, dict) or not tables:
        raise InputError(f"{path} names no category; the filter knows {', '.join(known)}")
    out = []
    for name, own in tables.items():
        if name not in known:
            raise InputError(f"{path}: the category {name!r} is unknown to the filter; it knows {', '.join(known)}")
        if not isinstance(own, dict) or "threshold" not in own:
            raise InputError(f"{path}: the category {name!r} has no threshold")
        if wrong := sorted(own.keys() - {"threshold", "share", "action"}):
            raise InputError(f"{path}: the category {name!r} has {wrong[0]!r}; it takes threshold, share and action")
        action = own.get("action", "drop")
        if action not in ACTIONS:
            raise InputError(
                f"{path}: action of the category {name!r} must be one of {', '.join(ACTIONS)}; it is {action!r}"
            )
        threshold, share = (_number(path, name, key, own.get(key, SHARE)) for key in ("threshold", "share"))
        out.append(Category(name, threshold, action, share))
    return Policy(tuple(out), digest(tuple(out), scorer))
