"""Parts of a GPT removed whole: heads by key-value groups, channels of the MLPs, layers. What is left is a plain smaller GPT.

What a part matters is measured on text, by pre-hooks while the model's own forward runs. With X the inputs of the matrix W
that reads the parts (``attn.out``, ``mlp.down``), C = X^T X, and p the columns of a part: tr(W_p C_pp W_p^T), the sum of
squares of what it adds to the residual stream. The least go, and the others take up what they can of them by least squares:
W_k += W_r C_rk (C_kk + damping)^-1 (the surgeon of SparseGPT, for whole columns). Block by block, each on what the smaller
ones before it give.

A layer matters by the loss without it (one goes, the rest is measured again). Widths of heads stay, and rotary positions.

All layers lose as many heads and channels. With ``per_layer`` as many go in all, and of all layers together the least by what
part of its layer's squares a part gives; then layers differ, which no class of transformers holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.compress import calibrate
from fastlm.compress.masks import MASK
from fastlm.models.gpt import GPT, Attention
from fastlm.nn.masked import hold_, release_

KINDS = ("heads", "channels", "layers")
MULTIPLE = 8  # channels left are a multiple of this where there are so many: kernels read them in vectors
DAMPING = 0.01


@dataclass
class Shrunk:
    """What ``shrink`` removed: by layer, the parts left, and what part of the sum of squares the removed ones had."""

    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)  # of all: how many there were, how many are left
    layers: list[int] = field(default_factory=list)  # numbers of the layers that went, in the order in which they went
    losses: list[float] = field(default_factory=list)  # of the calibration text: at first, and after each of them
    rows: list[tuple[str, int, int, float]] = field(default_factory=list)  # (module, were, are, part of the squares)
    tokens: int = 0
    per_layer: bool = False

    def __str__(self) -> str:
        of = "all layers together" if self.per_layer else "each layer"
        lines = [f"{name}: {was} -> {now} of {of}" for name, (was, now) in self.kinds.items() if name != "layers"]
        if self.layers:
            was, now = self.kinds["layers"]
            steps = ", ".join(
                f"{layer} (loss {loss:.4f})" for layer, loss in zip(self.layers, self.losses[1:], strict=True)
            )
            lines.insert(0, f"layers: {was} -> {now}; from a loss of {self.losses[0]:.4f} went {steps}")
        width = max((len(row[0]) for row in self.rows), default=0)
        lines += [
            f"  {path:<{width}}  {was} -> {now}, which gave {part:.1%} of the squares"
            for path, was, now, part in self.rows
        ]
        return "\n".join([*lines, f"measured on {self.tokens:,} tokens; what is left is a smaller dense model"])


def count(kind: str, amount: float, size: int) -> int:
    """How many of ``size`` parts stay. An amount below 1 is the part that goes, another one the number of those that go."""
    if not amount > 0 or (amount >= 1 and amount != int(amount)):
        raise ValueError(
            f"shrink: {kind} is {amount:g}; it must be the part that goes, above 0 and below 1, or a number"
        )
    left = size - (int(amount) if amount >= 1 else round(amount * size))
    if kind == "channels" and left > MULTIPLE and amount < 1:
        left = min(-(-left // MULTIPLE) * MULTIPLE, size)
    if left < 1 or left == size:
        what = "leaves none" if left < 1 else "removes none"
        raise ValueError(f"shrink: {kind} {amount:g} of {size} {what}")
    return left


def shrink(
    model: nn.Module,
    calibration: Sequence[Tensor],
    *,
    heads: float = 0.0,
    channels: float = 0.0,
    layers: float = 0.0,
    per_layer: bool = False,
) -> Shrunk:
    """Removes parts of fastlm's GPT in place; ``model.config`` says the new shape, the same in every layer but with
    ``per_layer``. Its blocks are new modules: make optimizers after this.

    Args:
        calibration: Tokens int64 [B, L], several batches.
        heads: The part of the key-value groups of each layer that goes, with their query heads, or a number of them. Of a
            model with one key-value head: of the query heads.
        channels: The part of the MLPs' channels, or a number; with a part, those left are rounded up to a multiple of 8.
        layers: The part of the layers, or a number.
        per_layer: Remove as many heads and channels in all, more of them from layers that need them less; one of each, or
            8 channels, stay. Layers of a model that was shrunk so once differ, and it takes no other way.

    Returns:
        What went, and how much it mattered.

    Raises:
        ValueError: another model than a GPT, an amount that leaves or removes none, no calibration. The model is unchanged
            then, as it is where measuring fails.
    """
    if not isinstance(model, GPT):
        raise ValueError(f"shrink: model is a {type(model).__name__}; it must be fastlm's GPT")
    batches = list(calibration)
    if not batches:
        raise ValueError("shrink: calibration is empty; it must be one batch at least")
    for path, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            raise ValueError(f"shrink: blocks.{path} is int8; shrink the float model")
    c = model.config
    if per_layer and not (heads or channels):
        raise ValueError("shrink: per_layer is True; it is of heads and channels, which are 0")
    if c.shapes and not per_layer and (heads or channels):
        raise ValueError("shrink: per_layer is False; it must be True of a model whose layers differ")
    groups = (c.kv_heads or c.heads) if c.kv_heads != 1 else c.heads
    amounts = {"layers": (layers, c.layers), "heads": (heads, groups), "channels": (channels, c.mlp_width)}
    left = {kind: count(kind, amount, size) for kind, (amount, size) in amounts.items() if amount}
    if not left:
        raise ValueError("shrink: heads, channels and layers are all 0; one must be more")
    made = copy.deepcopy(model).eval()
    report = Shrunk({kind: (amounts[kind][1], now) for kind, now in left.items()}, per_layer=per_layer)
    report.tokens = sum(b.numel() for b in batches)
    with torch.no_grad():
        if "layers" in left:
            _layers(made, batches, left["layers"], report)
        keep = {kind: [now] * len(made.blocks) for kind, now in left.items()}
        if per_layer:
            for kind in left.keys() - {"layers"}:
                keep[kind] = _shares(made, kind, batches, amounts[kind], left[kind], report)
        for i, block in enumerate(made.blocks):
            if "heads" in left:
                _heads(made, i, batches, keep["heads"][i], report)
            if "channels" in left:
                _channels(made, i, batches, keep["channels"][i], report)
            block.train(model.training)
    _adopt(model, made, left, groups, bool(per_layer or c.shapes))
    return report


def _adopt(model: GPT, made: GPT, left: dict[str, int], groups: int, differ: bool) -> None:
    """The blocks of ``made`` for the model, and its shape."""
    c = model.config
    changes: dict[str, Any] = {}
    if "layers" in left:
        changes["layers"] = left["layers"]
    if differ:
        blocks: Any = made.blocks
        changes["shapes"] = tuple((b.attn.heads, b.attn.kv_heads, b.mlp.down.weight.shape[1]) for b in blocks)
        changes["head_size"] = c.size
    elif "heads" in left:
        changes |= {"heads": c.heads // groups * left["heads"], "head_size": c.size}
        changes["kv_heads"] = 1 if c.kv_heads == 1 else left["heads"] if c.kv_heads else 0
    if "channels" in left and not differ:
        changes["hidden"] = left["channels"]
    model.config = replace(c, **changes)
    model.blocks = made.blocks
    for i, block in enumerate(model.blocks):
        block.attn.layer = i  # type: ignore[union-attr,assignment]


# ------------------------------------------------------------------------------------------------------------- the parts


def _layers(model: GPT, batches: Sequence[Tensor], keep: int, report: Shrunk) -> None:
    """Removes, one after the other, the layer without which the loss is least."""
    blocks, numbers = list(model.blocks), list(range(len(model.blocks)))
    report.losses.append(_loss(model, batches))
    while len(blocks) > keep:
        losses = []
        for i in range(len(blocks)):
            model.blocks = nn.ModuleList(blocks[:i] + blocks[i + 1 :])
            losses.append(_loss(model, batches))
        least = min(range(len(losses)), key=losses.__getitem__)
        del blocks[least]
        report.layers.append(numbers.pop(least))
        report.losses.append(losses[least])
    model.blocks = nn.ModuleList(blocks)


def _loss(model: GPT, batches: Sequence[Tensor]) -> float:
    """Nats per token of the calibration text."""
    total = sum(float(model(b[:, :-1], b[:, 1:])) for b in batches)
    return total / sum(b[:, 1:].numel() for b in batches)


def _units(model: GPT, i: int, kind: str) -> tuple[str, nn.Linear, int]:
    """Path and matrix that reads the parts of a layer, and how many there are."""
    block: Any = model.blocks[i]
    if kind == "channels":
        return f"blocks.{i}.mlp.down", block.mlp.down, block.mlp.down.weight.shape[1]
    attn = block.attn
    return f"blocks.{i}.attn.out", attn.out, attn.heads if attn.kv_heads == 1 else attn.kv_heads


def _shares(
    model: GPT, kind: str, batches: Sequence[Tensor], amount: tuple[float, int], left: int, report: Shrunk
) -> list[int]:
    """How many parts each layer keeps where the least of all layers go, each measured in parts of its layer's squares."""
    units = [_units(model, i, kind) for i in range(len(model.blocks))]
    sizes = [n for _, _, n in units]
    step = MULTIPLE if kind == "channels" and amount[0] < 1 and not any(n % MULTIPLE for n in sizes) else 1
    gone = (amount[1] - left) * len(sizes)
    if model.config.shapes:  # what layers have already differs
        gone = round(amount[0] * sum(sizes)) if amount[0] < 1 else int(amount[0]) * len(sizes)
    paths = {path: reader for path, reader, _ in units}
    found = calibrate._see(model, paths, {path: [1] * len(batches) for path in paths}, batches, True)
    order: list[tuple[float, int]] = []
    for i, (path, reader, n) in enumerate(units):
        if not found[path].sums.isfinite().all():
            raise ValueError(f"shrink: the inputs of {path} are not finite on the calibration")
        scores = importance(reader.weight, found[path].sums, reader.weight.shape[1] // n)
        part = (scores / scores.sum()).nan_to_num(0.0).sort(stable=True).values
        order += [(float(few), i) for few in part.unflatten(0, (-1, step)).sum(1)[:-1]]  # the last one stays
    if gone // step > len(order):
        raise ValueError(f"shrink: {kind} {amount[0]:g} of {sum(sizes)} leaves none in a layer")
    keep = list(sizes)
    for _, i in sorted(order)[: gone // step]:
        keep[i] -= step
    report.kinds[kind] = (sum(sizes), sum(keep))
    return keep


def _heads(model: GPT, i: int, batches: Sequence[Tensor], keep: int, report: Shrunk) -> None:
    attn: Attention = model.blocks[i].attn  # type: ignore[assignment]
    size, kv = attn.size, attn.kv_heads
    alone = kv == 1  # one key-value head: it stays, and query heads go
    units = attn.heads if alone else kv
    rows = attn.heads // units * size  # of the queries of one unit
    chosen, part = _choose(model, f"blocks.{i}.attn.out", attn.out, batches, rows, keep)
    columns = _spread(chosen, rows)
    queries = attn.heads * size
    keys = torch.arange(size, device=columns.device) if alone else _spread(chosen, size)
    attn.qkv = cut(attn.qkv, rows=torch.cat((columns, queries + keys, queries + kv * size + keys)))
    attn.out = cut(attn.out, columns=columns)
    attn.heads, attn.kv_heads = keep * (attn.heads // units), 1 if alone else keep
    report.rows.append((f"blocks.{i}.attn", units, keep, part))


def _channels(model: GPT, i: int, batches: Sequence[Tensor], keep: int, report: Shrunk) -> None:
    mlp: Any = model.blocks[i].mlp
    width = mlp.down.weight.shape[1]
    chosen, part = _choose(model, f"blocks.{i}.mlp.down", mlp.down, batches, 1, keep)
    mlp.up = cut(mlp.up, rows=torch.cat((chosen, width + chosen)) if mlp.gated else chosen)
    mlp.down = cut(mlp.down, columns=chosen)
    report.rows.append((f"blocks.{i}.mlp", width, keep, part))


def _choose(
    model: GPT, path: str, reader: nn.Linear, batches: Sequence[Tensor], size: int, keep: int
) -> tuple[Tensor, float]:
    """The units of ``size`` columns of ``reader`` that stay, in order, and what part of the squares the others had. Its
    weight is mended for their absence."""
    if keep * size == reader.weight.shape[1]:
        return torch.arange(keep, device=reader.weight.device), 0.0
    found = calibrate._see(model, {path: reader}, {path: [1] * len(batches)}, batches, True)[path]
    if not found.sums.isfinite().all():
        raise ValueError(f"shrink: the inputs of {path} are not finite on the calibration")
    scores = importance(reader.weight, found.sums, size)
    chosen = scores.sort(descending=True, stable=True).indices[:keep].sort().values
    reader.weight.copy_(mended(reader.weight, found.sums, _spread(chosen, size)))
    if (mask := reader._buffers.get(MASK)) is not None:
        ops.apply_mask_(reader.weight, mask)
    total = float(scores.sum())
    return chosen, 1 - float(scores[chosen].sum()) / total if total else 0.0


def importance(weight: Tensor, c: Tensor, size: int) -> Tensor:
    """tr(W_p C_pp W_p^T) of each p of ``size`` columns: weight [out, in], c = X^T X [in, in]; returns [in / size]."""
    w = weight.to(c.dtype).unflatten(1, (-1, size)).transpose(0, 1)  # [parts, out, size]
    units = torch.arange(w.shape[0], device=c.device)
    blocks = c.unflatten(0, (-1, size)).unflatten(2, (-1, size))[units, :, units]  # [parts, size, size]
    return ((w @ blocks) * w).sum((1, 2))


def mended(weight: Tensor, c: Tensor, keep: Tensor) -> Tensor:
    """Weight [out, in] whose columns ``keep`` give best, by least squares, what all gave on inputs of c = X^T X."""
    gone = torch.ones(c.shape[0], dtype=torch.bool, device=c.device)
    gone[keep] = False
    inner, mean, damping = c[keep][:, keep], c.diagonal()[keep].mean(), DAMPING
    out = weight.clone()
    if not mean:  # the columns that stay read nothing but zeros
        return out
    eye = torch.eye(len(keep), dtype=c.dtype, device=c.device)
    while True:
        lower, bad = torch.linalg.cholesky_ex(inner + damping * mean * eye)
        if not bad:
            break
        damping *= 10
        if damping > calibrate.MOST_DAMPING:
            raise ValueError(
                f"shrink: the matrix of inputs has no Cholesky factor, not with a damping of {damping / 10:g}"
            )
    w = weight.to(c.dtype)
    more = torch.cholesky_solve(c[keep][:, gone] @ w[:, gone].T, lower).T
    out[:, keep] = (w[:, keep] + more).to(weight.dtype)
    return out


def _spread(units: Tensor, size: int) -> Tensor:
    """The columns of units of ``size`` columns."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def cut(module: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A Linear of some outputs and inputs of ``module`` alone, of the same class, with its mask where it has one."""
    take: Callable[[Tensor], Tensor] = lambda t: t if rows is None else t[rows]
    weight = take(module.weight.detach())
    weight = weight if columns is None else weight[:, columns]
    mask = module._buffers.get(MASK)
    keep = None if mask is None else take(ops.mask_to_bool(mask, module.weight.shape[1]))
    made = copy.copy(module)  # hooks and flags stay; what it holds is its own
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    release_(made)
    made.weight = nn.Parameter(weight.clone(), module.weight.requires_grad)
    if module.bias is not None:
        made.bias = nn.Parameter(take(module.bias.detach()).clone(), module.bias.requires_grad)
    made.out_features, made.in_features = weight.shape
    if keep is not None:
        hold_(made, ops.bool_to_mask((keep if columns is None else keep[:, columns]).contiguous()))
    return made
