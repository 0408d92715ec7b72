"""What a rule of swap is: it says of a module what it would rewrite. ``order.RULES`` lists them.

A rule is one object with ``match(module, path) -> Rewrite | Reason | None``. A rewrite names the rule and the facts,
short strings, from which the module's new class can be made again in another process: classes are built from the
original class and these facts alone (see ``classes.py``), never from an instance. Rules compose: a module that two rules
match gets one class with both. To add one, write a file like ``dropout.py`` or ``blocks.py`` and name it in ``order.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from fastlm.swap.source import Methods

Facts = tuple[str, ...]


@dataclass(frozen=True)
class Rewrite:
    """A module that rule ``rule`` can swap.

    ``what`` is shown in the report; ``op``, and ``inputs`` tensors of shape ``example`` ask ``backend.which`` who serves.
    """

    rule: str
    facts: Facts
    what: str
    op: str
    example: tuple[int, ...] = (1, 64)
    inputs: int = 1


@dataclass(frozen=True)
class Reason:
    """Why a module that looks as if it could be swapped is left alone: one sentence."""

    why: str


class Rule:
    """One kind of rewriting. ``mixin`` is put before the original class; ``edit`` may change the source of its methods."""

    name: ClassVar[str]
    mixin: ClassVar[type | None] = None
    draws: ClassVar[int] = 0  # places of the mixin itself that draw random numbers; an edit adds its own

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        """What to do with a module that is not swapped yet; None if this rule has nothing to say about it."""
        raise NotImplementedError

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        """The rewrite of a module that is swapped already, for the report."""
        raise NotImplementedError

    def namespace(self, facts: Facts) -> dict[str, Any]:
        """Attributes of the class."""
        return {}

    def edit(self, methods: Methods, facts: Facts) -> None:
        """Changes the syntax trees of the class's methods."""
