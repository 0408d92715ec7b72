"""The home of the classes that ``fastlm.swap`` gives to modules: an attribute of that name is made when asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

decode: Callable[[str], type]  # set by fastlm.swap.classes


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return decode(name)  # noqa: F821
