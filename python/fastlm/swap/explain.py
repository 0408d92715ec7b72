"""fastlm.explain: what ``torch.compile(model, backend="fastlm")`` would rewrite, what it nearly would, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.swap.graph import Event


@dataclass
class Explanation:
    """``fired`` and ``missed`` hold events (pattern, where, why); ``graphs``: how many graphs Dynamo traced.

    ``print(explanation)`` shows a table.
    """

    events: list[Event] = field(default_factory=list)
    graphs: int = 0

    @property
    def fired(self) -> list[Event]:
        """What would be rewritten."""
        return [event for event in self.events if not event.why]

    @property
    def missed(self) -> list[Event]:
        """What nearly would, each with the reason in ``why``."""
        return [event for event in self.events if event.why]

    def __str__(self) -> str:
        graphs = f"{self.graphs} graph{'s' if self.graphs != 1 else ''}"
        lines = [f"{graphs}: {len(self.fired)} rewrites"]
        for pattern, count in Counter(event.pattern for event in self.fired).items():
            lines.append(f"  {count:4d} x {pattern}")
        if self.missed:
            lines.append("nearly:")
        reasons: dict[tuple[str, str], list[str]] = {}
        for event in self.missed:
            reasons.setdefault((event.pattern, event.why), []).append(event.where)
        for (pattern, why), places in reasons.items():
            lines += [f"  {len(places):4d} x {pattern}: {why}", f"         first at {places[0]}"]
        return "\n".join(lines)


def explain(model: nn.Module | Callable[..., Any], inputs: Any) -> Explanation:
    """What the compile backend "fastlm" finds in ``model``: how often each pattern fires, and where one nearly does.

    Args:
        model: a module, swapped or not, or a function; it is traced in its present mode, training or not.
        inputs: a tensor, a sequence of positional arguments, or a mapping of keyword arguments.

    The forward runs once, without inductor and without a backward. Buffers and random states are left as they were.

    Raises TypeError if ``model`` cannot be called or ``inputs`` is none of the three.
    """
    from fastlm.swap.compiled import rewrite_all

    if not callable(model):
        raise TypeError(f"fastlm.explain: model is a {type(model).__name__}; it must be an nn.Module or a function")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        args = tuple(inputs)
    else:
        raise TypeError(
            f"fastlm.explain: inputs is a {type(inputs).__name__}; it must be a tensor, a sequence of positional "
            f"arguments or a mapping of keyword arguments"
        )
    found = Explanation()

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.graphs += 1
        found.events += rewrite_all(gm)
        return gm

    model = getattr(model, "_orig_mod", model)
    buffers = [(b, b.clone()) for b in model.buffers()] if isinstance(model, nn.Module) else []
    devices = {t.device for t in model.parameters() if t.is_cuda} if isinstance(model, nn.Module) else set()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            torch.compile(model, backend=backend)(*args, **kwargs)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
    return found
