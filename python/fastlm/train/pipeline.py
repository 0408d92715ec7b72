"""Pipeline parallelism over fastlm's GPT: each rank of the group keeps some of the blocks, and micro-batches flow through.

`cut(model, ...)` leaves a rank the blocks of its stages (the first rank also the embedding, the last one norm and head) and
makes a `Stage` of each: a module that runs the model's forward, as it is written, with modules that pass things on in the
place of what other stages compute. In training a stage that is not the last returns a zero in place of the loss: its
backward waits for the gradient that the next stage sends. So the trainer runs the same lines on every stage, in the order
that stages.py says.
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
from fastlm.train.mesh import ProcessGroup
from fastlm.train.stages import schedule, stage_of
from fastlm.train.tensor_parallel import Tensors

__all__ = ["Pipeline", "Stage", "cut"]


class Pipeline:
    """A rank's links to the one before and the one behind. Activations are float32 [B, positions, C]."""

    parts: list[Stage]  # the rank's stages, in their order
    names: frozenset[str]  # of the whole model's parameters

    def __init__(self, ranks: ProcessGroup, width: int, tensors: Tensors | None, each: int) -> None:
        assert ranks.device is not None
        self.size, self.each, self.stages = ranks.sizes["pp"], each, ranks.sizes["pp"] * each
        self.width, self.tensors, self.device = width, tensors, ranks.device
        apart = ranks.size // self.size  # ranks of neighbouring stages
        self.rank = ranks.rank // apart
        self.first, self.last = self.rank == 0, self.rank == self.size - 1  # whether it holds the first stage, the last
        self.ranks = [ranks.rank % apart + apart * at for at in range(self.size)]
        self.running = False  # whether one of the stages is
        made: list[Any] = []
        for at in range(apart):  # every rank takes part in making every group
            column = [at + apart * rank for rank in range(self.size)]
            # Each direction has a group of its own, and so has the way from the last rank round to the first: on a GPU the
            # transfers of one group wait for each other.
            groups = [dist.new_group(column) for _ in range(3 if each == 1 else 5)]
            groups.append(dist.new_group([column[0], column[-1]]))
            made = groups if column == self.ranks else made
        self.group, *self._links, self.ends = made
        self._sent: list[tuple[Any, Tensor]] = []

    def _link(self, source: int, target: int) -> Any:
        """The group in which neighbouring stages talk in this direction."""
        around = min(source, target) % self.size == self.size - 1
        return self._links[(source > target) + 2 * around]

    def send(self, x: Tensor, source: int, target: int) -> None:
        """From a stage of this rank to a neighbour; returns before it has arrived."""
        x = x.detach().contiguous()
        self._sent = [(work, t) for work, t in self._sent if not work.is_completed()]
        work = dist.isend(x, self.ranks[target % self.size], group=self._link(source, target))
        self._sent.append((work, x))

    def receive(self, shape: tuple[int, ...], source: int, target: int) -> Tensor:
        x = torch.empty(shape, device=self.device)
        dist.recv(x, self.ranks[source % self.size], group=self._link(source, target))
        return x

    def finish(self) -> None:
        """Until all that was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def share(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The last stage's result on every rank."""
        out = out.float().contiguous() if self.last else torch.empty(shape, device=self.device)
        dist.broadcast(out, self.ranks[-1], group=self.group)
        return out

    def schedule(self, micros: int) -> Iterator[tuple[str, int, int]]:
        """This rank's order of a step."""
        return schedule(self.rank, self.size, self.each, micros)


class _Send(torch.autograd.Function):
    """Hidden states to the next stage; zero in the loss's place, whose backward waits for their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pipe: Pipeline, stage: int) -> Tensor:
        pipe.send(x.float(), stage, stage + 1)
        ctx.pipe, ctx.stage, ctx.shape, ctx.dtype = pipe, stage, x.shape, x.dtype
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.pipe.receive(ctx.shape, ctx.stage + 1, ctx.stage).to(ctx.dtype), None, None


class _Receive(torch.autograd.Function):
    """Hidden states of the stage before, which gets their gradient. `anchor` makes autograd ask for it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: tuple[int, ...], pipe: Pipeline, stage: int) -> Tensor:
        ctx.pipe, ctx.stage = pipe, stage
        return pipe.receive(shape, stage - 1, stage)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        ctx.pipe.send(grad.float(), ctx.stage, ctx.stage - 1)
        return torch.zeros((), device=grad.device), None, None, None


class _Incoming(nn.Module):
    """In the embedding's place."""

    def __init__(self, pipe: Pipeline, stage: int) -> None:
        super().__init__()
        self.pipe, self.stage = pipe, stage

    def forward(self, tokens: Tensor) -> Tensor:
        pipe, length = self.pipe, tokens.shape[1]
        if pipe.tensors is not None and pipe.tensors.split:
            length //= pipe.tensors.ranks
        anchor = torch.zeros((), device=tokens.device, requires_grad=True)
        x: Tensor = _Receive.apply(anchor, (tokens.shape[0], length, pipe.width), pipe, self.stage)
        return x


class _Outgoing(nn.Module):
    """In the head's place."""

    def __init__(self, pipe: Pipeline, stage: int) -> None:
        super().__init__()
        self.pipe, self.stage = pipe, stage

    def forward(self, x: Tensor) -> Tensor:
        zero: Tensor = _Send.apply(x, self.pipe, self.stage)
        return zero


class _Elsewhere(nn.Module):
    """In the place of what another stage computes: hidden states go through."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class _Nothing(nn.Module):
    """In the place of the learned positions, which the first stage has added."""

    def forward(self, positions: Tensor) -> float:
        return 0.0


class Stage(nn.Module):
    """One stage of a model: what it holds of it, under the model's own names. Its forward is the model's."""

    def __init__(self, model: GPT, pipe: Pipeline, number: int) -> None:
        super().__init__()
        self._whole = (model,)  # no child: its parameters are not all the stage's
        first, last = number == 0, number == pipe.stages - 1
        self.embed = model.embed if first else _Incoming(pipe, number)
        self.place = model.place if first or model.place is None else _Nothing()
        self.drop = model.drop if first else _Elsewhere()
        self.blocks = nn.ModuleList(
            block if stage_of(i, len(model.blocks), pipe.stages) == number else _Elsewhere()
            for i, block in enumerate(model.blocks)
        )
        self.norm = model.norm if last else _Elsewhere()
        self.head = model.head if last else _Outgoing(pipe, number)
        self.pipe = pipe

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        model = self._whole[0]
        held, model._modules, self.pipe.running = model._modules, self._modules, True
        try:
            out: Tensor = model(*args, **kwargs)
            return out
        finally:
            model._modules, self.pipe.running = held, False


class _Staged(GPT):
    """The model as a whole: it evaluates by the rank's stages in turn; training calls the stages themselves."""

    pipe: Pipeline

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        pipe, cache = self.pipe, kwargs.get("cache")
        if pipe.running:
            return super().forward(tokens, targets, *args, **kwargs)
        if torch.is_grad_enabled():
            raise RuntimeError("a model cut into stages trains by its stages; call it under torch.no_grad()")
        length = 0 if cache is None else cache.length
        for part in pipe.parts:
            if cache is not None:  # each stage reads the same positions
                cache.length = length
            out = part(tokens, targets, *args, **kwargs)
        shape = (*tokens.shape, self.config.vocab) if targets is None else (2,) if kwargs.get("wins") else ()
        out = pipe.share(out, shape)
        pipe.finish()
        return out

    def loss(self, x: Tensor, *args: Any) -> Tensor:
        return self.head(x) if isinstance(self.head, _Outgoing) else super().loss(x, *args)

    def preference(self, x: Tensor, *args: Any) -> Tensor:
        return self.head(x) if isinstance(self.head, _Outgoing) else super().preference(x, *args)


def cut(model: nn.Module, ranks: ProcessGroup, tensors: Tensors | None, each: int = 1) -> Pipeline:
    """Leave this rank the parts of `model`, the same on every rank before (but for what tensor parallelism cut), that its
    `each` stages have.

    Raises InputError for a model that is not fastlm's GPT, or has fewer blocks than there are stages.
    """
    size = ranks.sizes["pp"]
    if not isinstance(model, GPT):
        raise InputError(f"--mesh pp={size} cuts fastlm's GPT and not a {type(model).__name__}; use dp or fsdp")
    layers = model.config.layers
    if layers < size * each:
        several = f" with --pp-stages {each}" if each > 1 else ""
        raise InputError(
            f"--mesh pp={size}{several} needs a block for each of {size * each} stages; --layers is {layers}"
        )
    pipe = Pipeline(ranks, model.config.width, tensors, each)
    pipe.names = frozenset(name for name, _ in model.named_parameters())
    pipe.parts = [Stage(model, pipe, pipe.rank + pipe.size * k) for k in range(each)]
    for i in range(layers):
        if stage_of(i, layers, pipe.stages) % pipe.size != pipe.rank:
            model.blocks[i] = _Elsewhere()
    if not pipe.first:
        model.embed, model.drop = _Elsewhere(), _Elsewhere()  # type: ignore[assignment]
        model.place = None if model.place is None else _Nothing()  # type: ignore[assignment]
    if not pipe.last:
        model.norm, model.head = _Elsewhere(), _Elsewhere()  # type: ignore[assignment]
    model.contexts = rng.checkpoint_context(model)  # what is recomputed is of an earlier micro-batch than the last set
    model.__class__, model.pipe = type(type(model).__name__, (_Staged, type(model)), {}), pipe  # type: ignore[assignment]
    return pipe
