"""Spreading a plain model over the ranks of a mesh: each kind of parallelism is a function over it.

`wrap` gives what to call in a step and a `Layout`: what this process holds of each parameter, as plain local tensors, and
where that lies in the whole. Optimizers, clipping, moving average and checkpoints see those tensors alone, so none of them
knows of a mesh; the plain model's names and shapes stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.data.errors import InputError
from fastlm.train.checkpoint import Piece
from fastlm.train.config import Config
from fastlm.train.mesh import Group, Ranks

__all__ = ["Layout", "Ranks", "wrap"]


class Layout:
    """A model whole on every rank: what DDP and one process have."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.params: dict[str, Tensor] = dict(model.named_parameters())
        self.writes = ranks.first  # whether this rank's shards go into checkpoints; another's are the same

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each trainable parameter of the plain model as the local tensor that an optimizer may change."""
        return ((n, p) for n, p in self.params.items() if p.requires_grad)

    def grads(self) -> list[Tensor]:
        """The gradients of this step, local, in the places where the optimizer looks for them."""
        return [p.grad for p in self.params.values() if p.grad is not None]

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def norm(self, grads: list[Tensor]) -> Tensor:
        """The norm of the whole gradient, the same on every rank."""
        return torch.nn.utils.get_total_norm(grads)

    def piece(self, name: str, t: Tensor) -> Piece:
        """The box of the whole that `t` is, a tensor cut as the parameter `name`."""
        return Piece.whole(t)

    def keeps(self, piece: Piece) -> bool:
        """Whether this rank is the one that writes a piece into checkpoints: of equal ones the first rank's is."""
        return self.ranks.first if tuple(piece.tensor.shape) == piece.shape else self.writes

    def whole(self, name: str, t: Tensor) -> Tensor:
        """All ranks' pieces of `t`, a tensor cut as the parameter `name`, as one."""
        return t

    def own(self, name: str, t: Tensor) -> Tensor:
        """This rank's piece of a whole tensor."""
        return t

    def last(self, micro: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch; gradients are only reduced in the last one of a step."""
        return contextlib.nullcontext()


class Replicated(Layout):
    """DistributedDataParallel: the model whole on every rank, gradients averaged."""

    def __init__(self, model: nn.Module, ranks: Group) -> None:
        super().__init__(model, ranks)
        self.wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def last(self, micro: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if micro else self.wrapped.no_sync()


class Sharded(Layout):
    """FSDP2 (Zhao et al. 2023): each parameter cut along its first dimension, gathered where a forward needs it.

    With dp > 1 the shards are repeated over dp (hybrid sharding). The linear layers' weights travel in the autocast type,
    the very numbers that autocast would make of them; all others, and every gradient's sum, in float32.
    """

    def __init__(self, model: nn.Module, ranks: Group, config: Config) -> None:
        import torch.distributed as dist
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        tensors = [*model.parameters(), *model.buffers()]
        with torch.no_grad():
            for t in tensors:  # one process's values, whatever each drew
                dist.broadcast(t, src=0)
        self._cut = {n: tuple(p.shape) for n, p in model.named_parameters()}
        mesh = ranks.mesh["dp", "fsdp"] if ranks.sizes["dp"] > 1 else ranks.mesh["fsdp"]
        narrow: dict[str, Any] = {}
        if config.run.dtype != "float32":
            policy = MixedPrecisionPolicy(
                param_dtype=getattr(torch, config.run.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            narrow = {"mp_policy": policy}
        for block in _blocks(model):
            if narrow:
                for part in block.children():
                    if list(part.parameters()) and _only_linear(part):
                        fully_shard(part, mesh=mesh, **narrow)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        super().__init__(model, ranks)
        self._group = ranks.mesh["fsdp"].get_group()
        self._parts, self._at = ranks.sizes["fsdp"], ranks.mesh.get_local_rank("fsdp")
        self.writes = ranks.mesh.get_local_rank("dp") == 0
        self._sharded = dict(model.named_parameters())
        self.params = {}
        for name, p in self._sharded.items():
            local = nn.Parameter(p.to_local().detach(), requires_grad=p.requires_grad)  # type: ignore[attr-defined]
            assert local.data_ptr() == p.to_local().data_ptr()  # type: ignore[attr-defined]
            self.params[name] = local

    def grads(self) -> list[Tensor]:
        for name, p in self._sharded.items():
            self.params[name].grad = None if p.grad is None else p.grad.to_local()  # type: ignore[attr-defined]
        return super().grads()

    def zero_grad(self) -> None:
        super().zero_grad()
        for p in self.params.values():
            p.grad = None

    def norm(self, grads: list[Tensor]) -> Tensor:
        import torch.distributed as dist

        square = torch.nn.utils.get_total_norm(grads).square()
        dist.all_reduce(square, group=self._group)
        return square.sqrt()

    def _start(self, rows: int, at: int) -> int:
        return min(-(-rows // self._parts) * at, rows)

    def piece(self, name: str, t: Tensor) -> Piece:
        shape = self._cut[name]
        return Piece(t, shape, (self._start(shape[0], self._at), *(0,) * (len(shape) - 1)))

    def whole(self, name: str, t: Tensor) -> Tensor:
        import torch.distributed as dist

        shape = self._cut[name]
        most = -(-shape[0] // self._parts)
        padded = t.new_zeros(most, *shape[1:])
        padded[: t.shape[0]] = t
        out = t.new_empty(most * self._parts, *shape[1:])
        dist.all_gather_into_tensor(out, padded, group=self._group)
        return out[: shape[0]]

    def own(self, name: str, t: Tensor) -> Tensor:
        return t[self._start(t.shape[0], self._at) : self._start(t.shape[0], self._at + 1)]

    def last(self, micro: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(micro)  # type: ignore[operator]
        return contextlib.nullcontext()


def _only_linear(module: nn.Module) -> bool:
    return all(
        isinstance(m, nn.Linear) or not list(m.parameters(recurse=False)) for m in module.modules()
    )  # what autocast casts in any case


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that a model repeats: the items of its ModuleLists."""
    return [item for m in model.modules() if isinstance(m, nn.ModuleList) for item in m]


def wrap(model: nn.Module, config: Config, ranks: Ranks) -> tuple[nn.Module, Layout]:
    """The model to call in a step, and what this process holds of it."""
    if not isinstance(ranks, Group):
        return model, Layout(model, ranks)
    if ranks.sizes["fsdp"] > 1:
        if config.run.compile:
            raise InputError("--compile with --mesh fsdp=... is not built; leave one of them out, or use dp=...")
        return model, Sharded(model, ranks, config)
    layout = Replicated(model, ranks)
    return layout.wrapped, layout
