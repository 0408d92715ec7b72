"""prune_mask of tensors that lie on several processes: counts travel, scores do not.

The threshold is found as a kernel finds it (``kernels/prune_mask.py``): a score's key is an integer of 32 bits in its order,
and three passes count how the keys spread over 2,048 bins, each within the bin found before. Every process counts its own
scores, in 64 bits; these counts are summed over the processes. So 48 KiB a tensor travel, and all tensors of a call travel
together. Of the scores that equal the threshold the lowest flat indices of the whole go: where only some of them do, one
count for each row of the whole travels too.

The masks are the bits that one process makes of the whole tensors. The host waits for each sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm import backend
from fastlm.ops._library import check_tensor
from fastlm.ops._prune_mask_arguments import OP, SCOPES, check_sparsity, whole_masks
from fastlm.reference.prune_mask import LOWEST, keys, nan_message, parse, pruned_of, values

SHIFTS = (21, 10, 0)  # the lowest bit that each pass tells apart
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 1 << 18  # elements whose keys are made at once


@dataclass(frozen=True)
class Part:
    """What this process holds of a tensor: a box of it.

    Args:
        score: the box, float32, bfloat16 or float16, any strides; empty where this process holds nothing.
        shape: of the whole.
        offset: where the box begins in the whole, an index for each dimension.
        groups: process groups (None: the default one). Over their product the boxes tile the whole, so there is one for
            each dimension of a mesh along which the tensor is cut. Without any the box is the whole.
        scale: float32 of the box's columns, as of ``prune_mask``.
    """

    score: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    groups: tuple[Any, ...] = ()
    scale: Tensor | None = None

    def rows(self) -> Tensor:
        """int64: the number in the whole of each of the box's rows (slices along the last dimension)."""
        found = torch.zeros((), dtype=torch.int64, device=self.score.device)
        for size, first, count in zip(self.shape[:-1], self.offset[:-1], self.score.shape[:-1], strict=True):
            found = found.unsqueeze(-1) * size + torch.arange(first, first + count, device=found.device)
        return found.reshape(-1)

    def whole_groups(self, dim: int, size: int) -> bool:
        """Whether groups of ``size`` along ``dim`` (0: all of it is one) lie whole in one box each."""
        first, count, all_ = self.offset[dim], self.score.shape[dim], self.shape[dim]
        size = size or max(all_, 1)
        return not self.score.numel() or (first % size == 0 and (count % size == 0 or first + count == all_))


def prune_mask_parts(
    parts: Sequence[Part],
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    dim: int = -1,
    scope: str = "tensor",
    magnitude: bool = False,
    check: bool = False,
) -> list[Tensor]:
    """``prune_mask`` of tensors of which each process holds a part. Every process calls it, with its parts in one order.

    The masks are the very bits of ``prune_mask`` on the whole tensors. Sums of counts travel (48 KiB a tensor), scores do
    not. Patterns of rows, columns and blocks are not served; n:m, 2:4t and scope "row" are where each group lies whole in
    one process.

    Args:
        parts: of each tensor what this process holds.
        sparsity, pattern, dim, scope, magnitude, check: as of ``prune_mask``.

    Returns:
        Of each part its own mask, uint8 [..., ceil(C/8)] for C columns of the box, packed from the box's first column on.

    Raises:
        TypeError, ValueError: naming the argument, what it was and must be. What the scores raise, all processes raise.
        fastlm.backend.BackendError: a forced backend that cannot serve.
    """
    kind, _, m = parse(pattern)
    sparsity = check_sparsity(sparsity, kind, pattern)
    if scope not in SCOPES:
        raise ValueError(f"{OP}: scope is {scope!r}; it must be one of {', '.join(SCOPES)}")
    if scope != "tensor" and kind != "unstructured":
        raise ValueError(f"{OP}: scope is {scope!r}; with pattern {pattern!r} it must be 'tensor'")
    if not magnitude and any(p.scale is not None for p in parts):
        raise ValueError(f"{OP}: scale is given; it needs magnitude=True, since it multiplies |score|")
    if kind in ("row", "column", "block"):
        raise ValueError(
            f"{OP}: pattern is {pattern!r}, whose sums are of whole tensors; parts take unstructured, n:m, 2:4t"
        )
    _check_parts(parts)
    options: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern, "dim": dim, "scope": scope, "check": check}
    if parts and all(not p.groups and tuple(p.score.shape) == tuple(p.shape) for p in parts):
        scales = [p.scale for p in parts if p.scale is not None]
        if len(scales) in (0, len(parts)):
            return whole_masks([p.score for p in parts], scale=scales or None, magnitude=magnitude, **options)
    if kind == "unstructured" and scope != "row":
        assert sparsity is not None
        return _Selection(parts, magnitude, check).run(sparsity, scope == "global")
    for i, part in enumerate(parts):
        along = {"2:4t": (-2, -1)}.get(kind, (dim,))
        size = {"2:4t": 4, "n:m": m}.get(kind, 0)
        if not all(-len(part.shape) <= d < len(part.shape) and part.whole_groups(d, size) for d in along):
            raise ValueError(
                f"{OP}: parts[{i}] is a box of shape {list(part.score.shape)} at {list(part.offset)} of "
                f"{list(part.shape)}; groups of {pattern if kind != 'unstructured' else 'a row'} must not be cut by it"
            )
    return [whole_masks(p.score, scale=p.scale, magnitude=magnitude, **options)[0] for p in parts]


def _check_parts(parts: Sequence[Part]) -> None:
    for i, part in enumerate(parts):
        name, x = f"parts[{i}]", part.score
        check_tensor(x, f"{name}.score", OP, dtypes=DTYPES, device=parts[0].score.device if i else None, required=True)
        box = list(zip(part.offset, x.shape, part.shape, strict=False))
        if not len(part.offset) == x.dim() == len(part.shape) > 0 or any(a < 0 or a + n > m for a, n, m in box):
            raise ValueError(
                f"{OP}: {name} is a box of shape {list(x.shape)} at {list(part.offset)}; it must lie in the whole, of shape "
                f"{list(part.shape)}"
            )
        check_tensor(part.scale, f"{name}.scale", OP, dtypes=(torch.float32,), shape=x.shape[-1:], device=x.device)


def _first(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The first bin up to which ``wanted`` lie, and how many lie below it."""
    upto = counts.cumsum(0)
    at = min(int((upto < wanted).sum()), len(upto) - 1)
    return at, int(upto[at] - counts[at])


class _Selection:
    """Of the wholes of some parts the lowest go."""

    def __init__(self, parts: Sequence[Part], magnitude: bool, check: bool) -> None:
        self.parts, self.magnitude, self.check = parts, magnitude, check
        self.sizes = [torch.Size(part.shape).numel() for part in parts]

    def run(self, sparsity: float, together: bool) -> list[Tensor]:
        """The masks where the lowest round(sparsity * count) of each whole go, or of all ``together``."""
        if not self.parts:
            return []
        each = [list(range(len(self.parts)))] if together else [[i] for i in range(len(self.parts))]
        gone = [pruned_of(sparsity, sum(self.sizes[i] for i in at)) for at in each]  # of what is not decided yet
        low = [LOWEST] * len(self.parts)  # where the range of keys begins in which a part's threshold lies
        for shift in SHIFTS:
            args = [(part, low[i], shift, self.check) for i, part in enumerate(self.parts)]
            own = torch.stack([self._backend("spread", *a) for a in args])
            every = self._sum(own).cpu()
            if shift == SHIFTS[0]:
                self._check_counts(every)
            for k, at in enumerate(each):
                bin, below = _first(every[at, 1:].sum(0), gone[k])
                gone[k] -= below
                for i in at:
                    low[i] += bin << shift
        masks = []
        for at, left in zip(each, gone, strict=True):
            for i in at:
                bin = 1 + low[i] % (1 << SHIFTS[1])
                equal = int(every[i, bin])
                ties = min(left, equal)
                left -= ties
                masks.append(
                    self._backend("cut", self.parts[i], low[i], self._own(i, low[i], ties, equal, int(own[i, bin])))
                )
        return masks

    def _backend(self, function: str, part: Part, *args: Any) -> Tensor:
        found: Tensor = backend.run(
            OP, function, part.score.device, (part.score.detach(), part.scale, self.magnitude, *args)
        )
        return found

    def _sum(self, own: Tensor) -> Tensor:
        """Counts [parts, ...] over the processes. Parts cut over the same groups travel together."""
        out = torch.empty_like(own)
        for groups in dict.fromkeys(part.groups for part in self.parts):
            at = [i for i, part in enumerate(self.parts) if part.groups == groups]
            some = own[at]
            for group in groups:
                dist.all_reduce(some, group=group)
            out[at] = some
        return out

    def _check_counts(self, every: Tensor) -> None:
        """Raises ValueError, on all processes, for NaN (on a GPU where ``check``) and for boxes that do not tile a whole."""
        nan = every[:, 0].tolist()
        for i, (bad, found) in enumerate(zip(nan, every[:, 1:].sum(1).tolist(), strict=True)):
            if bad:
                raise ValueError(nan_message(i, len(self.parts), bad))
            if found != self.sizes[i]:
                raise ValueError(
                    f"{OP}: the boxes of parts[{i}] hold {found} scores on all processes of its groups; the whole, of shape "
                    f"{list(self.parts[i].shape)}, has {self.sizes[i]}"
                )

    def _own(self, i: int, key: int, ties: int, equal: int, own: int) -> int:
        """Of the ``own`` scores of this process that equal the threshold how many go, where ``ties`` of all ``equal`` do."""
        part = self.parts[i]
        if ties in (0, equal) or not part.groups:
            return min(ties, own)
        rows, numbers = self._equal_by_row(part, key), part.rows()
        found = torch.zeros(torch.Size(part.shape[:-1]).numel(), dtype=torch.int64, device=rows.device)
        found[numbers] = rows
        for group in part.groups:
            dist.all_reduce(found, group=group)
        row, before = _first(found, ties)
        inside = rows[numbers == row].sum().view(1, 1)
        here = torch.cat([torch.full_like(inside, part.offset[-1]), inside], 1)  # [processes, (first column, how many)]
        for group in part.groups:
            others = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
            dist.all_gather(others, here, group=group)
            here = torch.cat(others)
        left = ties - before - int(here[here[:, 0] < part.offset[-1], 1].sum())
        return int(rows[numbers < row].sum()) + min(max(left, 0), int(inside))

    def _equal_by_row(self, part: Part, key: int) -> Tensor:
        """int64: of each of the box's rows how many scores have this key."""
        x = part.score.detach().reshape(part.score.shape[:-1].numel(), part.score.shape[-1])
        out = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        step = max(PIECE // max(x.shape[1], 1), 1)
        for at in range(0, x.shape[0], step):
            found = keys(values(x[at : at + step], part.scale, self.magnitude))
            out[at : at + step] = (found.clamp_(min=LOWEST) == key).sum(-1)
        return out
