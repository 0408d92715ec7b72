"""DTensors in the ops: every rank's kernel runs on its own part and draws its part of the whole's dropout mask.

Served are tensors that are sharded where the op works on each part by itself, with everything else replicated:
dropout_add_norm by rows (every axis but the last), attention and rotary by batch and heads. Any other placement would need
a collective that nobody asked for, and raises. All arguments but the DTensors themselves (seed, offset, positions, lengths,
masks) are those of the whole. Nothing is redistributed; only a seed that is to be drawn is sent to the ranks. prune_mask takes
any axis: what ranks tell each other are counts.

The public functions come here when `_library.sharded` has found a DTensor, so that nobody else imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fastlm.ops._attention_arguments import Offset, bias_4d, check_shapes, offset_parts, slopes_float32
from fastlm.ops._library import check_tensor, seed_tensor
from fastlm.ops._norm_arguments import offset_tensor
from fastlm.ops._prune_mask_arguments import bool_to_mask, check_mask, mask_to_bool
from fastlm.ops.prune_mask_parts import Part, prune_mask_parts


def _placed(tensor: Any) -> str:
    return f"placed {tuple(tensor.placements)}" if isinstance(tensor, DTensor) else "a plain tensor"


class _Layout:
    """How the leading argument of a call lies on its mesh, and what of the others belongs to this rank's part of it.

    `served` names the axes that may be sharded, by what they count."""

    def __init__(self, op: str, name: str, x: Tensor, served: dict[int, str]) -> None:
        kinds = " or ".join(f"{what} (Shard({axis}))" for axis, what in served.items())
        self.must = f"sharded by {kinds}, or replicated"
        if not isinstance(x, DTensor):
            raise ValueError(f"{op}: {name} is a plain tensor beside DTensors; it must be a DTensor, {self.must}")
        self.op, self.name, self.x = op, name, x
        self.mesh, self.placements = x.device_mesh, x.placements
        self.parts = {axis: (0, size) for axis, size in enumerate(x.shape)}  # (first, number) of this rank
        self.shards = dict.fromkeys(self.parts, 1)
        here = self.mesh.get_coordinate()
        if here is None:
            raise ValueError(f"{op}: {name} lies on a mesh that this rank is not part of")
        for axis, placement in enumerate(self.placements):
            if type(placement) is Replicate:
                continue
            if type(placement) is not Shard or placement.dim not in served:
                raise ValueError(f"{op}: {name} is {_placed(x)}; it must be {self.must}")
            first, number = self.parts[placement.dim]
            each = -(-number // self.mesh.size(axis))
            low = min(each * here[axis], number)
            self.parts[placement.dim] = (first + low, min(each, number - low))
            self.shards[placement.dim] *= self.mesh.size(axis)
        self.local = x.to_local()
        if self.local.shape != torch.Size([number for _, number in self.parts.values()]):
            raise ValueError(
                f"{op}: {name}'s part on this rank has shape {list(self.local.shape)}; it must be the even share of "
                f"{list(x.shape)} that torch.distributed.tensor.distribute_tensor gives"
            )

    def alike(self, name: str, tensor: Tensor | None, shape: Sequence[int] | None = None) -> Tensor | None:
        """This rank's part of a tensor that must lie as the leading one does."""
        if tensor is None:
            return None
        same = isinstance(tensor, DTensor) and tensor.device_mesh == self.mesh and tensor.placements == self.placements
        if not same:
            raise ValueError(
                f"{self.op}: {name} is {_placed(tensor)}; it must be placed as {self.name} is, {self.placements}"
            )
        assert isinstance(tensor, DTensor)
        if shape is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{self.op}: {name} has shape {list(tensor.shape)}; it must be {list(shape)}")
        return tensor.to_local()

    def weight(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """A replicated tensor, whose gradient is the sum over the ranks that hold different parts of the leading one."""
        if tensor is None:
            return None
        if not self._replicated(tensor):
            raise ValueError(f"{self.op}: {name} is {_placed(tensor)}; it must be a DTensor replicated over the mesh")
        assert isinstance(tensor, DTensor)
        grads = [Partial() if isinstance(p, Shard) else Replicate() for p in self.placements]
        return tensor.to_local(grad_placements=grads)

    def whole(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """A tensor that every rank has whole: replicated, or a plain one without a gradient."""
        if not isinstance(tensor, Tensor) or (not isinstance(tensor, DTensor) and not tensor.requires_grad):
            return tensor
        return self.weight(name, tensor)

    def _replicated(self, tensor: Tensor) -> bool:
        alike = isinstance(tensor, DTensor) and tensor.device_mesh == self.mesh
        return alike and all(type(p) is Replicate for p in tensor.placements)  # type: ignore[attr-defined]

    def seed(self, seed: int | Tensor | None) -> int | Tensor:
        """One seed on all ranks; what has to be drawn is the first rank's."""
        if seed is not None:
            found = self.whole("seed", seed) if isinstance(seed, Tensor) else seed
            assert found is not None
            return found
        drawn = seed_tensor(None, self.local.device, self.op)
        for axis in range(self.mesh.ndim):
            group = self.mesh.get_group(axis)
            dist.broadcast(drawn, dist.get_global_rank(group, 0), group=group)
        return drawn

    def cut(self, tensor: Tensor, axis: int, at: int) -> Tensor:
        """This rank's part, along the leading tensor's `axis`, of a whole tensor whose axis `at` corresponds to it."""
        return tensor if tensor.shape[at] == 1 else tensor.narrow(at, *self.parts[axis])

    def give(self, local: Tensor, shape: Sequence[int], placements: Sequence[Placement] | None = None) -> Tensor:
        """The whole of which each rank has made its part, laid out as that is."""
        stride, size = [0] * len(shape), 1
        for axis in sorted(range(len(shape)), key=lambda a: (local.stride(a), -a)):
            stride[axis], size = size, size * shape[axis]
        placements = self.placements if placements is None else placements
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )


def dropout_add_norm(
    run: Callable[..., Any],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    p: float,
    layerscale: Tensor | None,
    rowscale: Tensor | None,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    training: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """`fastlm.ops.dropout_add_norm`, which is `run`, of rows of DTensors."""
    rows = {axis: "rows" if axis else "batch" for axis in range(x.dim() - 1)}
    layout = _Layout("dropout_add_norm", "x", x, rows)
    if training and p > 0:
        seed = layout.seed(seed)
        device = layout.local.device
        numbers, step = torch.zeros((1,) * len(rows), dtype=torch.int64, device=device), 1
        for axis in reversed(rows):
            first, number = layout.parts[axis]
            own = torch.arange(first, first + number, device=device) * step
            numbers = numbers + own.view(-1, *(1,) * (len(rows) - 1 - axis))
            step *= x.shape[axis]
        given = layout.whole("offset", offset) if isinstance(offset, Tensor) else offset
        placed = offset_tensor(given, x, device)
        numbers = numbers.reshape(-1)
        offset = numbers if placed is None else placed[numbers] if placed.dim() else placed + numbers
    found = run(
        layout.local,
        layout.alike("residual", residual, x.shape),
        layout.weight("weight", weight),
        layout.weight("bias", bias),
        p=p,
        layerscale=layout.weight("layerscale", layerscale),
        rowscale=layout.alike("rowscale", rowscale, x.shape[:-1]),
        seed=seed,
        offset=offset,
        training=training,
        **options,
    )

    def give(local: Tensor) -> Tensor:
        if local is layout.local:
            return x
        return layout.give(local, x.shape if local.dim() == x.dim() else x.shape[:-1])  # int8 rows have a scale each

    return tuple(map(give, found)) if isinstance(found, tuple) else give(found)


def attention(
    run: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    offset: Offset | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlens_k: Tensor | None,
    return_lse: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastlm.ops.attention`, which is `run`, of DTensors sharded by batch and heads; packed ones by heads."""
    packed, device = cu_seqlens_q is not None or cu_seqlens_k is not None, q.device
    check_shapes(q, k, v, packed)
    layout = _Layout("attention", "q", q, {1: "heads"} if packed else {0: "batch", 1: "heads"})
    if k.shape[1] % layout.shards[1]:
        raise ValueError(
            f"{layout.op}: k has {k.shape[1]} heads and q is {_placed(q)}; they must be a multiple of the "
            f"{layout.shards[1]} ranks over which heads are sharded"
        )
    cu_seqlens_q, cu_seqlens_k = layout.whole("cu_seqlens_q", cu_seqlens_q), layout.whole("cu_seqlens_k", cu_seqlens_k)
    sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    bias, alibi_slopes = layout.whole("bias", bias), layout.whole("alibi_slopes", alibi_slopes)
    seqlens_k, sinks = layout.whole("seqlens_k", seqlens_k), layout.whole("sinks", sinks)
    if bias is not None and not packed:
        bias = bias_4d(bias, q, k, device)
        bias = layout.cut(layout.cut(bias, 0, 0), 1, 1)
    if alibi_slopes is not None:
        alibi_slopes = slopes_float32(alibi_slopes, sequences, q.shape[1], device)
        alibi_slopes = alibi_slopes.narrow(-1, *layout.parts[1])
        if alibi_slopes.dim() == 2 and not packed:
            alibi_slopes = alibi_slopes.narrow(0, *layout.parts[0])
    if sinks is not None:
        check_tensor(sinks, "sinks", layout.op, shape=(q.shape[1],))
        sinks = sinks.narrow(0, *layout.parts[1])
    if seqlens_k is not None and not packed:
        check_tensor(seqlens_k, "seqlens_k", layout.op, shape=(q.shape[0],), dtypes=(torch.int32, torch.int64))
        seqlens_k = seqlens_k.narrow(0, *layout.parts[0])
    if dropout_p > 0:
        seed = layout.seed(seed)
    if dropout_p > 0 or offset is not None:
        if isinstance(offset, (tuple, list)) and len(offset) == 4:
            offset = (layout.whole("offset's batch_ids", offset[0]), *offset[1:])
        ids, head0, q0, k0 = offset_parts(offset, sequences, device)
        if not packed:
            ids = torch.arange(sequences, device=device) if ids is None else ids
            ids = ids.narrow(0, *layout.parts[0])
        offset = (ids, head0 + layout.parts[1][0], q0, k0)
    found = run(
        layout.local,
        layout.alike("k", k),
        layout.alike("v", v),
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        offset=offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqlens_k=seqlens_k,
        return_lse=return_lse,
        **options,
    )
    shape = (*q.shape[:-1], v.shape[-1])
    if not return_lse:
        return layout.give(found, shape)
    if not packed:
        return layout.give(found[0], shape), layout.give(found[1], q.shape[:3])
    heads = [Shard(0) if isinstance(p, Shard) else p for p in layout.placements]  # lse is [heads, tokens]
    return layout.give(found[0], shape), layout.give(found[1], (q.shape[1], q.shape[0]), heads)


def rotary(
    run: Callable[..., Any], x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None, **options: Any
) -> Tensor:
    """`fastlm.ops.rotary`, which is `run`, of DTensors sharded by batch and heads; packed ones by heads."""
    packed = x.dim() == 3
    layout = _Layout("rotary", "x", x, {1: "heads"} if packed else {0: "batch", 1: "heads"})
    cos, sin, positions = (layout.whole(name, t) for name, t in (("cos", cos), ("sin", sin), ("positions", positions)))  # type: ignore[assignment]
    if positions is not None and not packed and positions.dim() and positions.shape[0] == x.shape[0]:
        positions = positions.narrow(0, *layout.parts[0])
    return layout.give(run(layout.local, cos, sin, positions=positions, **options), x.shape)


# ---------------------------------------------------------------------------------------------------- pruning masks


def _boxes(scores: Sequence[Tensor]) -> list[_Layout]:
    return [
        _Layout("prune_mask", f"score[{i}]", x, {a: f"axis {a}" for a in range(x.dim())}) for i, x in enumerate(scores)
    ]


def _parts(layouts: Sequence[_Layout], scales: Sequence[Tensor] = ()) -> list[Part]:
    out = []
    for i, layout in enumerate(layouts):
        groups = [layout.mesh.get_group(a) for a, p in enumerate(layout.placements) if isinstance(p, Shard)]
        offset = tuple(first for first, _ in layout.parts.values())
        scale = layout.whole("scale", scales[i]) if scales else None
        if scale is not None:
            check_tensor(scale, "scale", layout.op, dtypes=(torch.float32,), shape=layout.x.shape[-1:])
            scale = scale.narrow(0, *layout.parts[layout.x.dim() - 1])
        out.append(Part(layout.local.detach(), tuple(layout.x.shape), offset, tuple(groups), scale))
    return out


def _mask_shape(layout: _Layout) -> tuple[int, ...]:
    """Of the whole mask. ValueError where a rank's columns are no whole bytes of it."""
    *rows, columns = layout.x.shape
    parts = layout.shards[len(rows)]
    if parts > 1 and -(-columns // parts) % 8:
        raise ValueError(
            f"{layout.op}: {layout.name} has {columns} columns, sharded over {parts} ranks; each must hold a multiple of 8 "
            f"columns, since a byte of the mask holds 8 (fastlm.ops.prune_mask_parts takes any)"
        )
    return (*rows, (columns + 7) // 8)


def prune_mask(scores: Sequence[Tensor], scales: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """`fastlm.ops.prune_mask` of DTensors cut along any axes: masks placed as their scores are."""
    layouts = _boxes(scores)
    shapes = [_mask_shape(layout) for layout in layouts]
    masks = prune_mask_parts(_parts(layouts, scales), **options)
    return [layout.give(mask, shape) for layout, mask, shape in zip(layouts, masks, shapes, strict=True)]


def whole_masks(scores: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """`prune_mask` of DTensors, as plain masks of the wholes on every rank. Bits travel; columns may be cut anywhere."""
    layouts, out = _boxes(scores), []
    for layout, mask in zip(layouts, prune_mask_parts(_parts(layouts), **options), strict=True):
        columns = layout.x.shape[-1]
        if layout.shards[layout.x.dim() - 1] == 1:
            placed = layout.give(mask, (*layout.x.shape[:-1], (columns + 7) // 8))
            out.append(placed.full_tensor())  # type: ignore[attr-defined]
        else:
            keep = layout.give(mask_to_bool(mask, layout.local.shape[-1]), layout.x.shape)
            out.append(bool_to_mask(keep.full_tensor()))  # type: ignore[attr-defined]
    return out


def own_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """This rank's part of the mask of a DTensor: of a plain (or replicated) one of the whole, or one placed as `weight`."""
    layout = _Layout("apply_mask_", "weight", weight, {a: f"axis {a}" for a in range(weight.dim())})
    if isinstance(mask, DTensor) and not layout._replicated(mask):
        check_mask(mask, "mask", layout.op, weight.shape)
        _mask_shape(layout)
        local = layout.alike("mask", mask)
        assert local is not None
        return local
    found: Tensor = mask.to_local() if isinstance(mask, DTensor) else mask
    check_mask(found, "mask", layout.op, weight.shape, layout.local.device)
    *rows, last = layout.parts
    for axis in rows:
        found = found.narrow(axis, *layout.parts[axis])
    if layout.shards[last] > 1:
        found = bool_to_mask(mask_to_bool(found, weight.shape[-1]).narrow(-1, *layout.parts[last]).contiguous())
    return found
