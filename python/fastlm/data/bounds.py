"""Which values a flag may have: written next to its field, checked before anything is read.

    steps: int = bounded(2930, 1)                   # at least 1
    dropout: float = bounded(0.0, 0, below=1)       # 0 <= dropout < 1
    lr: float = bounded(3e-3, above=0)              # 0 < lr, finite

A field that is a tuple has the range of each of its values; one that may be None is free where it is None. A field of
`Literal` type has one of its values.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastlm.data.errors import InputError

COUNT = 2**31 - 1  # the largest number of anything that is counted
SEED = (-(2**63), 2**63 - 1)


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` (or `above` it) to `high` (or `below` it)."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = (
            f"at least {self.low}" if self.low is not None else f"above {self.above}" if self.above is not None else ""
        )
        high = (
            f"at most {self.high}" if self.high is not None else f"below {self.below}" if self.below is not None else ""
        )
        return " and ".join(part for part in (low, high or "finite") if part)


def flag(name: str) -> str:
    """The flag of a field or argument."""
    return f"--{name.replace('_', '-')}"


def check(name: str, value: float, allowed: Range) -> None:
    """InputError, naming the flag, for a value that is not of the range."""
    if value not in allowed:
        raise InputError(f"{flag(name)} must be {allowed}; it is {value}")


def bounded(
    default: Any, low: float | None = None, high: float | None = None, *, above: float | None = None,
    below: float | None = None,
) -> Any:  # fmt: skip
    """A dataclass field with a default and the range of its values; whole numbers end at COUNT where nothing is said."""
    if isinstance(default, int) and high is None and below is None:
        high = COUNT
    return dataclasses.field(default=default, metadata={"range": Range(low, high, above, below)})


def optional(low: float | None = None, *, above: float | None = None, whole: bool = True) -> Any:
    """The same for a field whose default is None."""
    return dataclasses.field(default=None, metadata={"range": Range(low, COUNT if whole else None, above)})


def check_fields(group: Any) -> None:
    """InputError for the first field of a dataclass whose value cannot be."""
    kinds = get_type_hints(type(group))
    for one in dataclasses.fields(group):
        value = getattr(group, one.name)
        if get_origin(kinds[one.name]) is Literal and value not in get_args(kinds[one.name]):
            raise InputError(f"{flag(one.name)} must be one of {', '.join(get_args(kinds[one.name]))}; it is {value!r}")
        allowed = one.metadata.get("range")
        for number in value if isinstance(value, tuple) else (value,):
            if allowed is not None and number is not None:
                check(one.name, number, allowed)
