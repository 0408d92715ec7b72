"""What swapped modules did when they were called: how often an op ran in each, and why where it did not.

``swap`` gives each module a ``Seen`` under an attribute that is no buffer and no parameter; ``report.seen`` reads them.
A call that torch.compile traces is not counted, since a counter in a graph would compile it again at every call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fastlm.swap.tensors import tell

ATTRIBUTE = "_fastlm_seen"
log = logging.getLogger("fastlm")


@dataclass(eq=False)
class Group:
    """The modules of one ``swap``; ``hook``: what waits for the end of the model's first forward."""

    members: list[Seen] = field(default_factory=list)
    hook: RemovableHandle | None = None

    def done(self) -> None:
        """Waits no longer."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def check(self) -> None:
        """Logs one sentence if a module was promised and the first forward did not reach it."""
        attended = {s.path for s in self.members if s.ran and "attention" in s.now}
        # Attention takes the p of a dropout that its module holds for it, and never calls that.
        missed = [s.path for s in self.members if not (s.called or _held_for(s, attended))]
        if missed:
            names = ", ".join(missed[:3]) + (f" and {len(missed) - 3} more" if len(missed) > 3 else "")
            log.warning("fastlm.swap: the first forward did not run %s, which swap reported as served", names)


@dataclass(eq=False)
class Seen:
    """``ran``: calls of an op; ``idle``: calls in which there was nothing to do; ``why``: reasons of all others."""

    path: str
    now: str
    group: Group
    ran: int = 0
    idle: int = 0
    why: dict[str, int] = field(default_factory=dict)

    @property
    def called(self) -> bool:
        return bool(self.ran or self.idle or self.why)


def _held_for(seen: Seen, attended: set[str]) -> bool:
    return seen.now.startswith("dropout") and seen.path.rpartition(".")[0] in attended


class SeenRow(NamedTuple):
    """One swapped module: how often its op ran, how often there was nothing to do, and (reason, times) of what did not run."""

    module: str
    now: str
    ran: int
    idle: int
    why: tuple[tuple[str, int], ...]


class SeenTable(list[SeenRow]):
    """Rows by module; ``print`` shows a table."""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = max((len(row.module) for row in self), default=6)
        for row in self:
            text = f"{row.module or '(model)':{width}}  {row.now}: ran {row.ran} times"
            if row.idle:
                text += f", nothing to do {row.idle} times"
            yield text + "".join(f"; {times} times not: {why}" for why, times in row.why)
            if not (row.ran or row.idle or row.why):
                yield f"{'':{width}}  it was never called (calls under torch.compile are not counted)"


@dataclass(eq=False)
class FirstForward:
    """A forward hook of the model that ``swap`` was given, until its first forward ends. Copied and pickled with it."""

    group: Group

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        self.group.done()
        if not any(_compiled(m) for m in module.modules()):  # calls in a compiled part are not counted
            self.group.check()


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_torchdynamo_orig_callable")


def watch(model: nn.Module, group: Group) -> None:
    """Lets ``group`` be checked when the first forward of ``model`` ends."""
    if not isinstance(model, torch.jit.ScriptModule):
        group.hook = model.register_forward_hook(FirstForward(group))


def ran(module: nn.Module) -> None:
    """Counts a call of an op in ``module``."""
    if torch.compiler.is_compiling():
        return
    seen = module.__dict__.get(ATTRIBUTE)
    if seen is not None:
        seen.ran += 1


def idle(module: nn.Module) -> None:
    """Counts a call in which ``module`` had nothing to do, as dropout in evaluation."""
    if torch.compiler.is_compiling():
        return
    seen = module.__dict__.get(ATTRIBUTE)
    if seen is not None:
        seen.idle += 1


def stepped_back(module: nn.Module, what: str) -> None:
    """Counts, and logs once, that the original serves a call of ``module``: ``what`` completes "a Block ..."."""
    if torch.compiler.is_compiling():
        return
    tell(f"a {type(module).__name__} {what}")
    seen = module.__dict__.get(ATTRIBUTE)
    if seen is not None:
        seen.why[what] = seen.why.get(what, 0) + 1
