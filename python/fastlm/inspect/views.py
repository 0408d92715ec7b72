"""What a model does with one text, seen through hooks on the model itself: surprise, attention, logit lens, saliency.

The model may be the plain GPT, one whose modules `fastlm.swap` serves, one of transformers, or anybody's own: `anatomy.find`
says where its parts are. It keeps its weights, its mode and its hooks. Shapes: L positions, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlm.inspect.anatomy import Anatomy, before, hooks, logits_of, stream_of, with_stream
from fastlm.reference import attention as reference

STEPS = 32  # nodes of the integral; see bench/quality_inspect.py
ROWS = 1 << 25  # logits that are held at once


def surprise(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats, float32, and rank (1: the likeliest), int64, of tokens 1 to L-1 by logits [L, V] of the tokens before."""
    logits, targets = logits[:-1].float(), tokens[1:, None]
    own = logits.gather(1, targets)
    loss = logits.logsumexp(1) - own[:, 0]
    return loss, (logits > own).sum(1) + 1


# -------------------------------------------------------------------------------------------------------------- attention


class _Watch(TorchFunctionMode):
    """Takes down the weights of each attention that runs: PyTorch's, fastlm's, or a softmax that a module writes out."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.block, self.seen = length, -1, dict[int, Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.block < 0 or self.block in self.seen:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._keep(_of_sdpa(*args, **kwargs))
        elif getattr(func, "__name__", "") == "attention" and str(func).startswith("fastlm.attention"):
            self._keep(_of_op(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            assert weights is not None
            self._keep(weights)
            return out, weights.mean(1) if kwargs.get("need_weights", True) else None
        else:
            out = func(*args, **kwargs)
            if func in (F.softmax, torch.softmax, Tensor.softmax) and isinstance(out, Tensor) and out.dim() == 4:
                self._keep(out)
            return out
        return func(*args, **kwargs)

    def _keep(self, weights: Tensor) -> None:
        if weights.shape[0] == 1 and tuple(weights.shape[2:]) == (self.length, self.length):
            self.seen[self.block] = weights[0].detach().float()


def _weights(q: Tensor, k: Tensor, options: reference.Options) -> Tensor:
    """The probabilities [B, H, L, L] as the op defines them: its output for values that are the unit vectors."""
    unit = torch.eye(k.shape[2], dtype=torch.float32, device=k.device).expand(*k.shape[:3], -1)
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    bias = None if options.bias is None else options.bias.expand(*q.shape[:3], k.shape[2])
    return reference.forward(q, k, unit, *options._replace(bias=bias, scale=scale, p=0.0), torch.float32)[0]  # type: ignore[arg-type]


def _of_sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
             is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    if query.dim() == 3:
        query, key = query[None], key[None]
    return _weights(query, key, reference.Options(bias=attn_mask, causal=2 if is_causal else 0, scale=scale))


def _of_op(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    given = reference.Options.of(options)
    return _weights(q, k, given) if given.cu_seqlens_q is None else q.new_empty(0, 0, 0, 0)


@torch.no_grad()
def attention(model: nn.Module, parts: Anatomy, tokens: Tensor) -> list[Tensor | None]:
    """Weights [H, L, L], float32, of the first self-attention in each block for tokens [1, L]; None where none was seen.

    Row i is what position i takes from each position; it sums to 1, or to less where the head has a sink.
    """
    watch = _Watch(tokens.shape[1])
    made: list[Any] = []
    for number, block in enumerate(parts.blocks):
        made.append(before(block, lambda _, n=number: setattr(watch, "block", n)))  # type: ignore[misc]
        made.append(block.register_forward_hook(lambda *_: setattr(watch, "block", -1)))
    with hooks(*made), watch:
        logits_of(model, tokens)
    return [watch.seen.get(number) for number in range(len(parts.blocks))]


# ------------------------------------------------------------------------------------------------------------- logit lens


@torch.no_grad()
def lens(model: nn.Module, parts: Anatomy, tokens: Tensor) -> Iterator[Tensor]:
    """Logits [L, V] that the model would give if it ended after 0, 1, ... all of its blocks (nostalgebraist 2020).

    The stream of each depth takes the place of the last block's output, and the model itself does the rest: its norm, its
    head, and whatever it has besides. So the last ones are the model's own logits, bit for bit.
    """
    streams: list[Tensor | None] = []
    last = parts.blocks[-1]
    made = [before(parts.blocks[0], streams.append)]
    made += [block.register_forward_hook(lambda m, a, out: streams.append(stream_of(out))) for block in parts.blocks]
    with hooks(*made):
        logits_of(model, tokens)
    for stream in streams:
        assert stream is not None
        with hooks(last.register_forward_hook(lambda m, a, out, x=stream: with_stream(out, x))):  # type: ignore[misc]
            logits = logits_of(model, tokens)[0]
        yield logits


# --------------------------------------------------------------------------------------------------------------- saliency

Goal = tuple[int, int]  # a position, and the token that is to come after it


def saliency(
    model: nn.Module, parts: Anatomy, tokens: Tensor, goals: Sequence[Sequence[Goal]], steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """How much each token of [1, L] adds to the log-likelihood of groups of goals: [groups, L], float32, in nats.

    Integrated gradients (Sundararajan, Taly and Yan 2017) of the tokens' embeddings, by Gauss-Legendre nodes. The baseline
    has the mean of the text's own embeddings in each place: a path to zero would be one jump where a norm follows. What the
    attributions of a group should sum to, the log-likelihood minus that of the baseline, comes beside them [groups]: the
    difference is the error of the integral.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    nodes, weights = (nodes + 1) / 2, weights / 2
    found: list[Tensor] = []
    with torch.no_grad(), hooks(parts.embedding.register_forward_hook(lambda m, a, out: found.append(out.detach()))):
        logits = logits_of(model, tokens)
    base = found[0].mean(1, keepdim=True)
    way = found[0] - base
    share = max(1, ROWS // logits[0].numel())
    total = torch.zeros(len(goals), tokens.shape[1], device=way.device)
    for start in range(0, steps, share):
        a = torch.as_tensor(nodes[start : start + share], dtype=way.dtype, device=way.device)[:, None, None]
        w = torch.as_tensor(weights[start : start + share], dtype=torch.float32, device=way.device)
        path = (base + a * way).requires_grad_()
        likely = _likelihoods(model, parts, tokens, path, goals)
        for number, one in enumerate(likely):
            (gradient,) = torch.autograd.grad((one * w).sum(), path, retain_graph=True)
            total[number] += (gradient * way).sum((0, 2)).float()
    with torch.no_grad():
        ends = _likelihoods(model, parts, tokens, torch.cat([base.expand_as(way), found[0]]), goals)
    return total, torch.stack([(one[1] - one[0]).float() for one in ends])


def _likelihoods(
    model: nn.Module, parts: Anatomy, tokens: Tensor, embedded: Tensor, goals: Sequence[Sequence[Goal]]
) -> list[Tensor]:
    """Log-likelihood [B] of each group of goals, with embeddings [B, L, C] in the place of those of the tokens."""
    with hooks(parts.embedding.register_forward_hook(lambda m, a, out: embedded)):
        logits = logits_of(model, tokens.expand(len(embedded), -1))
    likely = logits.float().log_softmax(2)
    return [likely[:, [at for at, _ in group], [token for _, token in group]].sum(1) for group in goals]


def goals_of(tokens: Tensor) -> list[Goal]:
    """What the model was to predict in tokens [1, L]: each token after the first, by the one before it."""
    return [(at, int(token)) for at, token in enumerate(tokens[0, 1:])]
