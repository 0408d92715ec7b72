"""Spreading a plain model over the ranks of a mesh: each kind of parallelism is a function over it.

`wrap` gives what to call in a step and a `Layout`: what this process holds of each parameter, as plain local tensors, and
where that lies in the whole. Optimizers, clipping, moving average and checkpoints see those tensors alone, so none of them
knows of a mesh; the plain model's names and shapes stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.data.errors import InputError
from fastlm.ops import Part
from fastlm.train.config import Config
from fastlm.train.mesh import ProcessGroup
from fastlm.train.pieces import Piece
from fastlm.train.ranks import Ranks

if TYPE_CHECKING:
    from fastlm.train.pipeline import Pipeline
    from fastlm.train.tensor_parallel import Cut, Tensors

__all__ = ["Layout", "Ranks", "check", "wrap"]


class Layout:
    """A model whole on every rank, or cut by tensor parallelism and into the stages of a pipeline alone.

    Of tied matrices a pipeline's last rank holds a copy that the same gradients keep the same.
    """

    def __init__(
        self, model: nn.Module, ranks: Ranks, tensors: Tensors | None = None, pipe: Pipeline | None = None
    ) -> None:
        self.model, self.ranks, self.tensors, self.pipe = model, ranks, tensors, pipe
        self.stages: list[nn.Module] = [model] if pipe is None else [*pipe.parts]  # what a step calls, by `schedule`
        self.cuts: Mapping[str, Cut] = {} if tensors is None else tensors.cuts
        self.part = (0, 1) if tensors is None else (tensors.rank, tensors.ranks)  # of the positions
        held = dict(model.named_parameters())
        names = frozenset(held) if pipe is None else pipe.names
        self._copy = "embed.weight" if "head.weight" in held.keys() - names else ""
        self.params: dict[str, Tensor] = {
            self._copy if n == "head.weight" and self._copy else n: p for n, p in held.items()
        }
        self._local = {n: tuple(p.shape) for n, p in self.params.items()}  # as tensor parallelism leaves them
        self.writes = ranks.data_rank == 0  # whether this rank's shards go into checkpoints; another's are the same
        self.elsewhere = names - self.params.keys()  # parameters that other stages of a pipeline hold

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each trainable parameter of the plain model as the local tensor that an optimizer may change."""
        return ((n, p) for n, p in self.params.items() if p.requires_grad)

    def grads(self) -> list[Tensor]:
        """The gradients of this step, complete, in the places where the optimizer looks for them. Called once a step."""
        if self.pipe is not None:
            self.pipe.finish()
            if "head.weight" not in self.pipe.names and (self.pipe.first or self.pipe.last):  # tied, over both ends
                torch.distributed.all_reduce(self.params["embed.weight"].grad, group=self.pipe.ends)
        if self.tensors is not None:
            self.tensors.complete([p.grad for n, p in self.params.items() if p.grad is not None and n not in self.cuts])
        return [p.grad for p in self.params.values() if p.grad is not None]

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def norm(self) -> Tensor:
        """The norm of the whole gradient, the same on every rank."""
        grads = [p.grad for n, p in self.params.items() if p.grad is not None and self._counted(n)]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=self.ranks.device)
        groups = self._norm_groups()
        if not groups:
            return norm
        square = norm.square()
        for group in groups:
            torch.distributed.all_reduce(square, group=group)
        return square.sqrt()

    def _norm_groups(self) -> list[Any]:
        """Groups over which squares are summed: of ranks that hold different parts."""
        return [part.group for part in (self.pipe, self.tensors) if part is not None]

    def _counted(self, name: str) -> bool:
        """Whether this rank's part of a parameter is not another's too, of those over which squares are summed."""
        return (self.part[0] == 0 or name in self.cuts) and not (self._copy and name == self._copy)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""
        return self.cuts[name].shape if name in self.cuts else self._local[name]

    def _rows(self, name: str) -> tuple[int, int]:
        """First and last + 1 of the rows that are held of what tensor parallelism leaves of a parameter."""
        return 0, self._local[name][0]

    def pieces(self, name: str, t: Tensor) -> list[Piece]:
        """The boxes of the whole that `t` consists of, a tensor cut as the parameter `name`."""
        return [self._once(name, piece) for piece in self._boxes(name, t)]

    def _once(self, name: str, piece: Piece) -> Piece:
        """Left to the first rank of a pipeline where this one's is a copy."""
        return replace(piece, kept=False) if self._copy and name == self._copy else piece

    def _boxes(self, name: str, t: Tensor) -> list[Piece]:
        cut, shape = self.cuts.get(name), self.shape(name)
        low, high = self._rows(name)
        rest = (0,) * (len(shape) - 1)
        if cut is None:
            return [Piece(t, shape, (low, *rest), kept=self.part[0] == 0)]
        if cut.dim:
            return [Piece(t, shape, (low, cut.held(self.part[0])[0][0], *rest[1:]))]
        out, at = [], 0
        for start, length in cut.held(self.part[0]):
            a, b = max(at, low), min(at + length, high)
            if a < b:
                out.append(Piece(t[a - low : b - low], shape, (start + a - at, *rest)))
            at += length
        return out or [Piece(t, shape, (shape[0], *rest))]

    def keeps(self, piece: Piece) -> bool:
        """Whether this rank is the one that writes a piece into checkpoints: of equal ones the first rank's is."""
        whole = tuple(piece.tensor.shape) == piece.shape
        return piece.kept and (self.ranks.data_rank == self.part[0] == 0 if whole else self.writes)

    def scalar(self, name: str, t: Tensor) -> Piece:
        """A value that the optimizer keeps of the whole parameter `name`."""
        return self._once(name, Piece.whole(t))

    def whole(self, name: str, t: Tensor) -> Tensor:
        """All ranks' pieces of `t`, a tensor cut as the parameter `name`, as one."""
        if name not in self.cuts:
            return t
        assert self.tensors is not None
        return self.tensors.whole(self.cuts[name], t)

    def rows_each(self, name: str) -> int:
        """Rows of the parameter `name` that a rank holds, the last ranks fewer."""
        return self._local[name][0]

    def score(self, name: str) -> Part:
        """The parameter `name` as a score of `ops.prune_mask_parts`; not of tensor parallelism's."""
        p = self.params[name].detach()
        return Part(p, tuple(p.shape), (0,) * p.dim())

    def own(self, name: str, t: Tensor) -> Tensor:
        """This rank's piece of a whole tensor."""
        return self.cuts[name].take(t, self.part[0]) if name in self.cuts else t

    def last(self, stage: int, micro: bool) -> contextlib.AbstractContextManager[Any]:
        """Around what one stage does of a micro-batch; gradients are only reduced in the last one of a step."""
        return contextlib.nullcontext()

    def schedule(self, micros: int) -> Iterator[tuple[str, int, int]]:
        """("forward" | "backward", number of the micro-batch, index in `stages`) in the order of a step."""
        if self.pipe is not None:
            yield from self.pipe.schedule(micros)
            return
        for i in range(micros):
            yield "forward", i, 0
            yield "backward", i, 0


class Replicated(Layout):
    """DistributedDataParallel: the model whole on every rank, gradients averaged."""

    def __init__(self, model: nn.Module, ranks: ProcessGroup, tensors: Tensors | None) -> None:
        super().__init__(model, ranks, tensors)
        self.wrapped = nn.parallel.DistributedDataParallel(
            model,
            process_group=ranks.mesh["dp"].get_group(),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        self.stages = [self.wrapped]

    def last(self, stage: int, micro: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if micro else self.wrapped.no_sync()


class Averaged(Layout):
    """Stages that are repeated over dp, their gradients averaged after the last backward: DDP knows of no pipelines."""

    def grads(self) -> list[Tensor]:
        assert isinstance(self.ranks, ProcessGroup)
        found = [p.grad for p in self.params.values() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in found])
        torch.distributed.all_reduce(flat, group=self.ranks.mesh["dp"].get_group())
        for g, mean in zip(found, (flat / self.ranks.sizes["dp"]).split([g.numel() for g in found])):
            g.copy_(mean.view(g.shape))
        return super().grads()


class Sharded(Layout):
    """FSDP2 (Zhao et al. 2023): each parameter cut along its first dimension, gathered where a forward needs it.

    With dp > 1 the shards are repeated over dp (hybrid sharding). Each stage of a pipeline is sharded for itself: its
    gradients are reduced after its own last backward, and what FSDP keeps of a backward is no other stage's. The linear
    layers' weights travel in the autocast type, the very numbers that autocast would make of them; all others, and every
    gradient's sum, in float32.
    """

    def __init__(
        self, model: nn.Module, ranks: ProcessGroup, config: Config, tensors: Tensors | None, pipe: Pipeline | None
    ) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = ranks.mesh["dp", "fsdp"] if ranks.sizes["dp"] > 1 else ranks.mesh["fsdp"]
        narrow: dict[str, Any] = {}
        if config.run.dtype != "float32":
            policy = MixedPrecisionPolicy(
                param_dtype=getattr(torch, config.run.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            narrow = {"mp_policy": policy}
        for root in [model] if pipe is None else pipe.parts:
            for block in _blocks(root):
                if narrow:
                    for part in block.children():
                        if list(part.parameters()) and _only_linear(part):
                            fully_shard(part, mesh=mesh, **narrow)
                fully_shard(block, mesh=mesh)
            fully_shard(root, mesh=mesh)
            root.register_forward_hook(_let_go)
        super().__init__(model, ranks, tensors, pipe)
        self._group = ranks.mesh["fsdp"].get_group()
        self._parts, self._at = ranks.sizes["fsdp"], ranks.mesh.get_local_rank("fsdp")
        self.writes = ranks.mesh.get_local_rank("dp") == 0
        self._sharded, self.params = self.params, {}
        for name, p in self._sharded.items():
            own = nn.Parameter(p.to_local().detach(), requires_grad=p.requires_grad)  # type: ignore[attr-defined]
            assert own.data_ptr() == p.to_local().data_ptr()  # type: ignore[attr-defined]
            self.params[name] = own

    def grads(self) -> list[Tensor]:
        for name, p in self._sharded.items():
            self.params[name].grad = None if p.grad is None else p.grad.to_local()  # type: ignore[attr-defined]
        return super().grads()

    def zero_grad(self) -> None:
        super().zero_grad()
        for p in self.params.values():
            p.grad = None

    def _norm_groups(self) -> list[Any]:
        return [self._group, *super()._norm_groups()]

    def _start(self, rows: int, at: int) -> int:
        return min(-(-rows // self._parts) * at, rows)

    def _rows(self, name: str) -> tuple[int, int]:
        rows = self._local[name][0]
        return self._start(rows, self._at), self._start(rows, self._at + 1)

    def whole(self, name: str, t: Tensor) -> Tensor:
        from fastlm.train.tensor_parallel import all_gather

        rows = self._local[name][0]
        most = self.rows_each(name)
        padded = t.new_zeros(most, *t.shape[1:])
        padded[: t.shape[0]] = t
        out = t.new_empty(most * self._parts, *t.shape[1:])
        all_gather(out, padded, group=self._group)
        return super().whole(name, out[:rows])

    def rows_each(self, name: str) -> int:
        return -(-self._local[name][0] // self._parts)

    def score(self, name: str) -> Part:
        p = self.params[name].detach()
        return Part(p, self.shape(name), (self._rows(name)[0], *(0,) * (p.dim() - 1)), (self._group,))

    def own(self, name: str, t: Tensor) -> Tensor:
        return super().own(name, t)[slice(*self._rows(name))]

    def last(self, stage: int, micro: bool) -> contextlib.AbstractContextManager[Any]:
        self.stages[stage].set_requires_gradient_sync(micro)  # type: ignore[operator]
        return contextlib.nullcontext()


def _let_go(root: nn.Module, *_: Any) -> None:
    """FSDP keeps what is in no block gathered until a backward; none follows an evaluation, whose weights may be others
    than those of the next step (the moving average's, the best ones)."""
    if not torch.is_grad_enabled():
        root.reshard()  # type: ignore[operator]


def _only_linear(module: nn.Module) -> bool:
    return all(
        isinstance(m, nn.Linear) or not list(m.parameters(recurse=False)) for m in module.modules()
    )  # what autocast casts in any case


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that a model repeats: the items of its ModuleLists that hold parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return [item for m in lists for item in m if any(True for _ in item.parameters())]


def unbuilt(config: Config, sizes: Mapping[str, int]) -> str:
    """Which option is not built together with a mesh of these sizes, or ""."""
    for name in (n for n in ("fsdp", "tp", "pp") if sizes.get(n, 1) > 1):
        for option, on in (("--compile", config.run.compile), ("--lora-rank", config.model.lora_rank)):
            if on:
                return f"{option} with --mesh {name}=... is not built; leave one of them out, or use dp=..."
    return ""


def check(config: Config, sizes: Mapping[str, int]) -> None:
    """Raise InputError for what is not built together, or makes no sense together, with a mesh of these sizes."""
    if why := unbuilt(config, sizes):
        raise InputError(why)
    if config.run.pp_stages > 1 and sizes.get("pp", 1) == 1:
        raise InputError(
            f"--pp-stages must be 1 without a pipeline (--mesh pp=N with N above 1); it is {config.run.pp_stages}"
        )


def wrap(model: nn.Module, config: Config, ranks: Ranks) -> tuple[nn.Module, Layout]:
    """The model to call in a step, and what this process holds of it."""
    check(config, ranks.sizes)
    if not isinstance(ranks, ProcessGroup):
        return model, Layout(model, ranks)
    sizes = ranks.sizes
    tensors = pipe = None
    if sizes["fsdp"] > 1 or sizes["tp"] > 1 or sizes["pp"] > 1:
        with torch.no_grad():
            for t in [*model.parameters(), *model.buffers()]:  # one process's values, whatever each drew
                torch.distributed.broadcast(t, src=0)
    if sizes["tp"] > 1:
        from fastlm.train import tensor_parallel

        tensors = tensor_parallel.cut(model, ranks.mesh["tp"].get_group())
    if sizes["pp"] > 1:
        from fastlm.train import pipeline

        pipe = pipeline.cut(model, ranks, tensors, config.run.pp_stages)
    if sizes["fsdp"] > 1:
        return model, Sharded(model, ranks, config, tensors, pipe)
    if pipe is not None and sizes["dp"] > 1:
        return model, Averaged(model, ranks, tensors, pipe)
    if sizes["dp"] == 1 and (tensors is not None or pipe is not None):
        return model, Layout(model, ranks, tensors, pipe)
    layout = Replicated(model, ranks, tensors)
    return layout.wrapped, layout
