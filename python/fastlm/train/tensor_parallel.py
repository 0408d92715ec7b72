"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019, Korthikanti et al. 2022) over fastlm's GPT.

`cut(model, group)` leaves on each rank of the group its part of every matrix and changes the classes of the modules that
hold them; names and the forwards that the model is written in stay. T ranks, local sizes in lower case:

    embedding [V/T, C]     rows of the vocabulary; summed over the ranks, each keeps its part of the positions [B, l, C]
    qkv, up   [n/T, C]     output rows: whole heads, whole columns of the MLP; the input is gathered to [B, L, C] before
    out, down [C, n/T]     input columns; the products are summed over the ranks, each keeps [B, l, C]
    head      [V/T, C]     the loss's softmax is taken over the ranks, chunk by chunk

Between them (norms, dropout, residual) each rank works on its L/T positions, with its part of the masks of the whole.
Parameters that stay whole (norms, positions, biases of out and down) get the gradient of these positions alone:
`Tensors.complete` sums them. A forward whose length T does not divide (generation) holds all positions on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import rng
from fastlm.data.errors import InputError
from fastlm.models.gpt import GPT, MLP, Attention
from fastlm.models.loss import IGNORE, chunk_rows, token_gradients

__all__ = ["Cut", "Tensors", "cut", "cuts"]

# torch 2.13's names, and the earlier ones
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Cut:
    """How a tensor of `shape` is shared out: along `dim` it consists of sections, each cut evenly over the ranks."""

    shape: tuple[int, ...]
    dim: int
    sections: tuple[int, ...]
    ranks: int

    def held(self, rank: int) -> list[tuple[int, int]]:
        """(start in the whole, length) along `dim` of what a rank holds, one piece behind the other."""
        out, start = [], 0
        for size in self.sections:
            each = -(-size // self.ranks)
            low, high = min(each * rank, size), min(each * (rank + 1), size)
            out.append((start + low, high - low))
            start += size
        return out

    def local(self, rank: int) -> tuple[int, ...]:
        """The shape of what a rank holds."""
        size = sum(length for _, length in self.held(rank))
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def take(self, whole: Tensor, rank: int) -> Tensor:
        return torch.cat([whole.narrow(self.dim, *piece) for piece in self.held(rank)], self.dim)

    def put(self, whole: Tensor, part: Tensor, rank: int) -> None:
        at = 0
        for start, length in self.held(rank):
            whole.narrow(self.dim, start, length).copy_(part.narrow(self.dim, at, length))
            at += length


# ------------------------------------------------------------------------------------------------ between the ranks


def _gather(x: Tensor, group: Any, ranks: int) -> Tensor:
    """[B, l, ...] of each rank as [B, l * ranks, ...]."""
    out = x.new_empty(ranks, *x.shape)
    all_gather(out.flatten(0, 1), x.contiguous(), group=group)
    return out.movedim(0, 1).flatten(1, 2)


def _scatter(x: Tensor, group: Any, ranks: int) -> Tensor:
    """The ranks' sum of [B, L, ...], of which each keeps its [B, L / ranks, ...]."""
    parts = x.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    reduce_scatter(out, parts.flatten(0, 1), group=group)
    return out


class _Gather(torch.autograd.Function):
    """Positions gathered for products of which each rank makes a part: their gradients are summed and shared out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, ranks: int) -> Tensor:
        ctx.group, ctx.ranks = group, ranks
        return _gather(x, group, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _scatter(grad, ctx.group, ctx.ranks), None, None


class _Scatter(torch.autograd.Function):
    """Partial sums of the ranks added up, and their positions shared out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, ranks: int) -> Tensor:
        ctx.group, ctx.ranks = group, ranks
        return _scatter(x, group, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _gather(grad, ctx.group, ctx.ranks), None, None


class _Logits(torch.autograd.Function):
    """Columns of the logits gathered. Every rank makes the same of them, so each takes its columns of the gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tensors: Tensors) -> Tensor:
        columns = Cut((*part.shape[:-1], tensors.vocab), part.dim() - 1, (tensors.vocab,), tensors.ranks)
        ctx.columns, ctx.rank = columns, tensors.rank
        return tensors.whole(columns, part)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.columns.take(grad, ctx.rank), None


class _Loss(torch.autograd.Function):
    """linear_cross_entropy of [N, C] under a rank's rows of the output matrix: models/loss.py says what it computes.

    The gradient by x is that of the rank's rows alone, to be summed over the ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, tensors: Tensors, smoothing: float, z_loss: float
    ) -> Tensor:
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_w else None
        w, vocab, group = weight.to(x.dtype), tensors.vocab, tensors.group
        first = -(-vocab // tensors.ranks) * tensors.rank
        rows = chunk_rows(-(-vocab // tensors.ranks))
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], rows):
            part, target = x[start : start + rows], targets[start : start + rows]
            counts = target != IGNORE
            h = (part @ w.t()).float()
            most = h.amax(1)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
            own = target - first
            mine = (own >= 0) & (own < h.shape[1]) & counts
            own = own.clamp(0, h.shape[1] - 1)[:, None]
            power = (h - most[:, None]).exp_()
            sums = torch.stack([power.sum(1), h.gather(1, own)[:, 0] * mine, h.sum(1)])
            dist.all_reduce(sums, group=group)
            lse = most + sums[0].log()
            loss = lse - (1 - smoothing) * sums[1] - smoothing / vocab * sums[2] + z_loss * lse.square()
            total += loss.masked_fill(~counts, 0.0).sum()
            if dx is not None or dw is not None:
                g = power * ((1 + 2 * z_loss * lse) / sums[0])[:, None] - smoothing / vocab
                g.scatter_add_(1, own, -(1 - smoothing) * mine.float()[:, None])
                g = g.masked_fill_(~counts[:, None], 0.0).to(x.dtype)
                if dx is not None:
                    torch.matmul(g, w, out=dx[start : start + rows])
                if dw is not None:
                    dw += g.t() @ part
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        dx, dw = ctx.saved_tensors
        gx = None if dx is None else dx * grad.to(dx.dtype)
        gw = None if dw is None else (dw * grad).to(ctx.weight_dtype)
        return gx, gw, None, None, None, None


class _Each(torch.autograd.Function):
    """linear_token_losses of [N, C] under a rank's rows of the output matrix, as `_Loss` is of their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, tensors: Tensors) -> Tensor:
        w, vocab, group = weight.to(x.dtype), tensors.vocab, tensors.group
        ctx.first, ctx.rows = -(-vocab // tensors.ranks) * tensors.rank, chunk_rows(-(-vocab // tensors.ranks))
        out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        lse = torch.empty_like(out)
        for start in range(0, x.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            h = (x[part] @ w.t()).float()
            most = h.amax(1)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
            own, mine = _own(targets[part], ctx.first, h.shape[1])
            sums = torch.stack([(h - most[:, None]).exp_().sum(1), h.gather(1, own)[:, 0] * mine])
            dist.all_reduce(sums, group=group)
            lse[part] = most + sums[0].log()
            out[part] = (lse[part] - sums[1]).masked_fill(targets[part] == IGNORE, 0.0)
        ctx.save_for_backward(x, weight, targets, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return token_gradients(ctx, grad, lambda targets, columns: _own(targets, ctx.first, columns))


def _own(targets: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """(row [N, 1] of each target among a rank's, which begin at `first`; whether it is one of them)."""
    own = targets - first
    return own.clamp(0, rows - 1)[:, None], (own >= 0) & (own < rows) & (targets != IGNORE)


# ----------------------------------------------------------------------------------------------- a rank's part of a model


class Tensors:
    """What the modules of a cut model share: the group, how each parameter was cut, and how positions stand just now."""

    def __init__(self, group: Any, vocab: int, cuts: dict[str, Cut]) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.vocab, self.cuts = vocab, cuts
        self.split = True  # whether activations between the matrices hold a part of the positions

    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.group, self.ranks) if self.split else x

    def reduce(self, x: Tensor) -> Tensor:
        if self.split:
            return _Scatter.apply(x, self.group, self.ranks)
        dist.all_reduce(x, group=self.group)
        return x

    def whole(self, cut: Cut, part: Tensor) -> Tensor:
        """The whole of a tensor of which each rank holds its part by `cut`."""
        shapes = [cut.local(rank) for rank in range(self.ranks)]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        padded = part.new_zeros(max(sizes))
        padded[: part.numel()] = part.reshape(-1)
        parts = part.new_empty(self.ranks, max(sizes))
        all_gather(parts.view(-1), padded, group=self.group)
        out = part.new_empty(cut.shape)
        for rank, (shape, size) in enumerate(zip(shapes, sizes)):
            cut.put(out, parts[rank, :size].view(shape), rank)
        return out

    def complete(self, grads: list[Tensor]) -> None:
        """Sum the gradients of parameters that every rank holds whole, each rank's being that of its positions."""
        if grads:
            flat = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(flat, group=self.group)
            for g, summed in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(summed.view(g.shape))


class _Embedding(nn.Embedding):
    tensors: Tensors

    def forward(self, tokens: Tensor) -> Tensor:
        t = self.tensors
        own = tokens - -(-t.vocab // t.ranks) * t.rank
        mine = (own >= 0) & (own < self.weight.shape[0])
        x = F.embedding(own.clamp(0, self.weight.shape[0] - 1), self.weight)
        return t.reduce(x.masked_fill(~mine[..., None], 0.0))


class _Places(nn.Embedding):
    tensors: Tensors

    def forward(self, positions: Tensor) -> Tensor:
        t = self.tensors
        return super().forward(positions.chunk(t.ranks, -1)[t.rank] if t.split else positions)


class _Rows(nn.Linear):
    tensors: Tensors

    def forward(self, x: Tensor) -> Tensor:
        y = self.tensors.reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Head(nn.Linear):
    tensors: Tensors

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = _Logits.apply(F.linear(self.tensors.gather(x), self.weight), self.tensors)
        return logits


class _Model(GPT):
    tensors: Tensors

    def loss(self, x: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
        t, device = self.tensors, x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # before it travels
        with torch.autocast(device, enabled=False):
            x = t.gather(x)
            loss: Tensor = _Loss.apply(
                x.flatten(0, 1), self.head.weight, targets.reshape(-1), t, float(smoothing), float(z_loss)
            )
        return loss

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        t, device = self.tensors, x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            flat = _Each.apply(t.gather(x).flatten(0, 1), self.head.weight, targets.reshape(-1), t)
        return flat.view(targets.shape)


def cuts(model: nn.Module, ranks: int) -> dict[str, Cut]:
    """How each parameter of `model` that is cut is shared out; the others stay whole. Reads shapes alone.

    Raises InputError for a model that is not fastlm's GPT, one with LoRA, or one that cannot be cut evenly.
    """
    if not isinstance(model, GPT):
        raise InputError(f"--mesh tp={ranks} cuts fastlm's GPT and not a {type(model).__name__}; use dp or fsdp")
    c = model.config
    if c.shapes:
        raise InputError(
            f"--mesh tp={ranks} cuts layers of one shape, and this model's differ (--shapes); use dp or fsdp"
        )
    sizes = {"heads": c.heads, "kv-heads": c.kv_heads or c.heads, "hidden": c.mlp_width, "context": c.context}
    for flag, size in sizes.items():
        if size % ranks:
            raise InputError(f"--mesh tp={ranks} must divide --{flag}, which is {size}")
    if -(-c.vocab // ranks) * (ranks - 1) >= c.vocab:
        raise InputError(f"--mesh tp={ranks} leaves a rank without one of the {c.vocab} rows of the embedding (--rows)")
    out: dict[str, Cut] = {}

    def add(path: str, module: nn.Module, known: type, dim: int, sections: tuple[int, ...]) -> None:
        if type(module) is not known:
            raise InputError(f"--mesh tp={ranks} cuts a plain {known.__name__} and {path} is a {type(module).__name__}")
        for name, p in module.named_parameters():
            if dim == 0 or name == "weight":  # a bias behind a sum over the ranks stays whole
                out[f"{path}.{name}"] = Cut(tuple(p.shape), dim, sections, ranks)

    for path, module in model.named_modules():
        if isinstance(module, Attention):
            q, kv = module.heads * module.size, module.kv_heads * module.size
            add(f"{path}.qkv", module.qkv, nn.Linear, 0, (q, kv, kv))
            add(f"{path}.out", module.out, nn.Linear, 1, (q,))
        elif isinstance(module, MLP):
            add(f"{path}.up", module.up, nn.Linear, 0, (c.mlp_width,) * (2 if module.gated else 1))
            add(f"{path}.down", module.down, nn.Linear, 1, (c.mlp_width,))
    add("embed", model.embed, nn.Embedding, 0, (c.vocab,))
    if not c.tied:
        add("head", model.head, nn.Linear, 0, (c.vocab,))
    return out


def cut(model: nn.Module, group: Any) -> Tensors:
    """Leave this rank of the group its part of `model`, the same on every rank before. Errors: those of `cuts`."""
    ranks = dist.get_world_size(group)
    found = cuts(model, ranks)
    assert isinstance(model, GPT)
    tensors = Tensors(group, model.config.vocab, found)
    modules = dict(model.named_modules())
    for name, how in found.items():
        path, _, field = name.rpartition(".")
        p = getattr(modules[path], field)
        local = how.take(p.detach(), tensors.rank).clone(memory_format=torch.contiguous_format)
        setattr(modules[path], field, nn.Parameter(local, requires_grad=p.requires_grad))
    if model.config.tied:
        model.head.weight = model.embed.weight
    kinds: dict[nn.Module, type[nn.Module]] = {model.embed: _Embedding, model.head: _Head}
    if model.place is not None:
        kinds[model.place] = _Places
    for module in modules.values():
        if isinstance(module, Attention):
            module.heads, module.kv_heads = module.heads // ranks, module.kv_heads // ranks
            setattr(module, rng.FIRST_HEAD, module.heads * tensors.rank)
            kinds[module.out] = _Rows
        elif isinstance(module, MLP):
            kinds[module.down] = _Rows
        else:
            continue
        module.register_forward_pre_hook(lambda _, args: (tensors.gather(args[0]), *args[1:]))
    kinds[model] = type(type(model).__name__, (_Model, type(model)), {})
    for module, kind in kinds.items():
        module.__class__, module.tensors = kind, tensors  # type: ignore[assignment]

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs["tokens"]
        tensors.split = kwargs.get("cache") is None and tokens.shape[1] % ranks == 0
        if not tensors.split and torch.is_grad_enabled():
            raise ValueError(f"tp={ranks} trains on lengths that it divides; the tokens are {list(tokens.shape)}")

    model.register_forward_pre_hook(before, with_kwargs=True)
    return tensors
