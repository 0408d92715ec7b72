"""Pipeline parallelism over fastlm's GPT: each rank of the group keeps some of the blocks, and micro-batches flow through.

`cut(model, ...)` leaves a stage its blocks (the first also the embedding, the last norm and head) and puts modules that
pass things on in the others' places, so the model's forward stays as it is written. In training a stage that is not the
last returns a zero in place of the loss: its backward waits for the gradient that the next stage sends. So the trainer
runs the same lines on every stage, in the order of `schedule`: one forward, one backward (1F1B, Narayanan et al. 2019),
with at most as many micro-batches in flight as there are stages behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlm import rng
from fastlm.data.errors import InputError
from fastlm.models.gpt import GPT
from fastlm.train.mesh import Group
from fastlm.train.tensor_parallel import Tensors

__all__ = ["Pipeline", "cut", "schedule"]


def schedule(stage: int, stages: int, micros: int) -> Iterator[tuple[str, int]]:
    """("forward" | "backward", number of the micro-batch) in the order of a stage."""
    ahead = min(stages - 1 - stage, micros)
    for i in range(micros + ahead):
        if i < micros:
            yield "forward", i
        if i >= ahead:
            yield "backward", i - ahead


class Pipeline:
    """A stage's links to the one before and the one behind. Activations are float32 [B, positions, C]."""

    def __init__(self, ranks: Group, width: int, tensors: Tensors | None) -> None:
        assert ranks.device is not None
        self.stages, self.width, self.tensors, self.device = ranks.sizes["pp"], width, tensors, ranks.device
        apart = ranks.size // self.stages  # ranks of neighbouring stages
        self.stage = ranks.rank // apart
        self.first, self.last = self.stage == 0, self.stage == self.stages - 1
        self.ranks = [ranks.rank % apart + apart * stage for stage in range(self.stages)]
        made: list[Any] = []
        for at in range(apart):  # every rank takes part in making every group
            column = [at + apart * stage for stage in range(self.stages)]
            # each direction has a group of its own: on a GPU the transfers of one group wait for each other
            groups = [dist.new_group(column) for _ in range(3)] + [dist.new_group([column[0], column[-1]])]
            made = groups if column == self.ranks else made
        self.group, self._down, self._up, self.ends = made
        self._sent: list[tuple[Any, Tensor]] = []

    def send(self, x: Tensor, by: int) -> None:
        """To the neighbour `by` stages on; returns before it has arrived."""
        x = x.detach().contiguous()
        self._sent = [(work, t) for work, t in self._sent if not work.is_completed()]
        self._sent.append((dist.isend(x, self.ranks[self.stage + by], group=self._down if by > 0 else self._up), x))

    def receive(self, shape: tuple[int, ...], by: int) -> Tensor:
        x = torch.empty(shape, device=self.device)
        dist.recv(x, self.ranks[self.stage + by], group=self._up if by > 0 else self._down)
        return x

    def finish(self) -> None:
        """Until all that was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def share(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The last stage's result on every stage."""
        out = out.float().contiguous() if self.last else torch.empty(shape, device=self.device)
        dist.broadcast(out, self.ranks[-1], group=self.group)
        return out


class _Send(torch.autograd.Function):
    """Hidden states to the next stage; zero in the loss's place, whose backward waits for their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pipe: Pipeline) -> Tensor:
        pipe.send(x.float(), 1)
        ctx.pipe, ctx.shape, ctx.dtype = pipe, x.shape, x.dtype
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.pipe.receive(ctx.shape, 1).to(ctx.dtype), None


class _Receive(torch.autograd.Function):
    """Hidden states of the stage before, which gets their gradient. `anchor` makes autograd ask for it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: tuple[int, ...], pipe: Pipeline) -> Tensor:
        ctx.pipe = pipe
        return pipe.receive(shape, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        ctx.pipe.send(grad.float(), -1)
        return torch.zeros((), device=grad.device), None, None


class _Incoming(nn.Module):
    """In the embedding's place."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.pipe = pipe

    def forward(self, tokens: Tensor) -> Tensor:
        pipe, length = self.pipe, tokens.shape[1]
        if pipe.tensors is not None and pipe.tensors.split:
            length //= pipe.tensors.ranks
        anchor = torch.zeros((), device=tokens.device, requires_grad=True)
        x: Tensor = _Receive.apply(anchor, (tokens.shape[0], length, pipe.width), pipe)
        return x


class _Outgoing(nn.Module):
    """In the head's place."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.pipe = pipe

    def forward(self, x: Tensor) -> Tensor:
        zero: Tensor = _Send.apply(x, self.pipe)
        return zero


class _Elsewhere(nn.Module):
    """In the place of what another stage computes: hidden states go through."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class _Nothing(nn.Module):
    """In the place of the learned positions, which the first stage has added."""

    def forward(self, positions: Tensor) -> float:
        return 0.0


class _Stage(GPT):
    pipe: Pipeline

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(tokens, targets, *args, **kwargs)
        if torch.is_grad_enabled():
            return out
        shape = () if targets is not None else (*tokens.shape, self.config.vocab)
        out = self.pipe.share(out, shape)
        self.pipe.finish()
        return out

    def loss(self, x: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
        if self.pipe.last:
            return super().loss(x, targets, smoothing, z_loss)
        zero: Tensor = _Send.apply(x, self.pipe)
        return zero


def cut(model: nn.Module, ranks: Group, tensors: Tensors | None) -> Pipeline:
    """Leave this stage its part of `model`, the same on every rank before (but for what tensor parallelism cut).

    Raises InputError for a model that is not fastlm's GPT, or has fewer blocks than there are stages.
    """
    stages = ranks.sizes["pp"]
    if not isinstance(model, GPT):
        raise InputError(f"--mesh pp={stages} cuts fastlm's GPT and not a {type(model).__name__}; use dp or fsdp")
    layers = model.config.layers
    if layers < stages:
        raise InputError(f"--mesh pp={stages} needs a block for each stage; --layers is {layers}")
    pipe = Pipeline(ranks, model.config.width, tensors)
    for i in range(layers):
        if i * stages // layers != pipe.stage:
            model.blocks[i] = _Elsewhere()
    if not pipe.first:
        model.embed, model.drop = _Incoming(pipe), _Elsewhere()  # type: ignore[assignment]
        if model.place is not None:
            model.place = _Nothing()  # type: ignore[assignment]
    if not pipe.last:
        model.norm, model.head = _Elsewhere(), _Outgoing(pipe)  # type: ignore[assignment]
    model.contexts = rng.checkpoint_context(model)  # what is recomputed is of an earlier micro-batch than the last set
    model.__class__, model.pipe = type(type(model).__name__, (_Stage, type(model)), {}), pipe  # type: ignore[assignment]
    return pipe
