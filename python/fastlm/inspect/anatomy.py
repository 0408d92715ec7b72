"""Where a language model's parts are: found by watching one forward, so that nothing about its class is assumed.

Shapes: L positions, C width of the residual stream, V vocabulary. One text at a time: tokens are int64 [1, L].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.data.errors import InputError

SAME = 1e-3  # of the largest logit; what a later token may change of earlier logits by rounding


@dataclass(frozen=True)
class Anatomy:
    """The module that embeds tokens, and the blocks that read and write the residual stream, in their order."""

    embedding: nn.Module
    blocks: tuple[nn.Module, ...]


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the model gives for tokens [B, L]: [B, L, V]. InputError where it gives no logits."""
    out = model(tokens)
    out = getattr(out, "logits", out)
    out = out[0] if isinstance(out, tuple | list) else out
    if not isinstance(out, Tensor) or out.shape[:2] != tokens.shape or out.dim() != 3:
        raise InputError(
            f"{type(model).__name__} gives no logits for each token, so there is no language model to look into"
        )
    return out


def stream_of(value: Any) -> Tensor | None:
    """The residual stream in what a block was given or gave: a tensor, or the first of a tuple."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def with_stream(value: Any, stream: Tensor) -> Any:
    """What a block gave, with another residual stream in its place."""
    return stream if isinstance(value, Tensor) else type(value)((stream, *value[1:]))


@contextlib.contextmanager
def hooks(*made: Any) -> Iterator[None]:
    """Hooks that are gone afterwards, whatever happens."""
    try:
        yield
    finally:
        for one in made:
            one.remove()


def before(block: nn.Module, see: Callable[[Tensor | None], None]) -> Any:
    """A hook that shows the residual stream that a block is given."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(stream_of(args) if args else stream_of(kwargs.get("hidden_states")))

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def find(model: nn.Module, tokens: Tensor) -> Anatomy:
    """The parts of a model that predicts each next token, from its forward over tokens [1, L], L > 1.

    The blocks are the outermost list of modules that are called once each, in order, and turn a tensor [1, L, C] into one
    like it. InputError, in one sentence, for a model that has none, that looks ahead, or that is in training mode.
    """
    if model.training:
        raise InputError("the model is in training mode, where its dropout draws: call model.eval() first")
    calls: list[tuple[nn.Module, Tensor | None]] = []
    outs: dict[nn.Module, Tensor | None] = {}
    embeddings: list[nn.Module] = []
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
    made: list[Any] = []
    for module in dict.fromkeys(item for one in lists for item in one):
        made.append(before(module, lambda x, m=module: calls.append((m, x))))  # type: ignore[misc]
        made.append(module.register_forward_hook(lambda m, a, out: outs.__setitem__(m, stream_of(out))))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            made.append(module.register_forward_hook(
                lambda m, a, out: embeddings.append(m) if a[0].shape[-1:] == tokens.shape[-1:]
                and torch.equal(a[0].view(-1, a[0].shape[-1])[0], tokens[0]) else None))  # fmt: skip
    with torch.no_grad(), hooks(*made):
        logits = logits_of(model, tokens)
    if not embeddings:
        raise InputError(
            f"{type(model).__name__} gives its tokens to no nn.Embedding, so there is nothing to look into"
        )
    for one in lists:
        if _are_blocks(list(one), calls, outs):
            _refuse_foresight(model, tokens, logits)
            return Anatomy(embeddings[0], tuple(one))
    raise InputError(
        f"{type(model).__name__} has no list of blocks that read and write a residual stream one after the other"
    )


def _are_blocks(
    items: list[nn.Module], calls: list[tuple[nn.Module, Tensor | None]], outs: dict[nn.Module, Tensor | None]
) -> bool:
    inside = set(items)
    if [m for m, _ in calls if m in inside] != items:
        return False
    return all(
        x is not None
        and (y := outs.get(m)) is not None
        and x.dim() == 3
        and x.shape == y.shape
        and x.is_floating_point()
        for m, x in calls
        if m in inside
    )


def _refuse_foresight(model: nn.Module, tokens: Tensor, logits: Tensor) -> None:
    """InputError if the logits are not finite, or the last token changes what the model says before it.

    An encoder does not predict the next token.
    """
    if not logits.isfinite().all():
        raise InputError(f"{type(model).__name__} gives logits that are not finite: it diverged, or is damaged")
    other = tokens.clone()
    other[0, -1] = tokens[0, 0] if tokens[0, -1] != tokens[0, 0] else (tokens[0, 0] + 1) % logits.shape[-1]
    with torch.no_grad():
        changed = (logits_of(model, other) - logits)[:, :-1].abs().max()
    if changed > SAME * logits.abs().max():
        raise InputError(
            f"{type(model).__name__} looks ahead, as an encoder does: inspect needs a model that predicts each next token"
        )
