"""prune_mask: which weights stay, one bit each; and what is done with such masks.

The public functions ``prune_mask``, ``apply_mask_``, ``mask_and``, ``mask_count``, ``mask_to_bool`` and ``bool_to_mask``.
Nothing here has a gradient. Schemas and fake kernels are in ``_prune_mask_arguments.py``, the maths in
``fastlm.reference.prune_mask``; a backend's module of that name has a function for each, which ``backend.run`` calls by its
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastlm import backend
from fastlm.ops._library import FLOATS, check_tensor, sharded
from fastlm.ops._prune_mask_arguments import (
    OP,
    apply_operator,
    arguments,
    bool_to_mask,
    check_mask,
    count_operator,
    mask_to_bool,
    whole_masks,
)

__all__ = ["apply_mask_", "bool_to_mask", "mask_and", "mask_count", "mask_to_bool", "prune_mask"]


@overload
def prune_mask(
    score: Tensor, *, sparsity: float | None = None, pattern: str = "unstructured", dim: int = -1,
    scope: str = "tensor", magnitude: bool = False, scale: Tensor | None = None, check: bool = False,
) -> Tensor: ...  # fmt: skip
@overload
def prune_mask(
    score: Sequence[Tensor], *, sparsity: float | None = None, pattern: str = "unstructured", dim: int = -1,
    scope: str = "tensor", magnitude: bool = False, scale: Sequence[Tensor] | None = None, check: bool = False,
) -> list[Tensor]: ...  # fmt: skip
def prune_mask(
    score: Tensor | Sequence[Tensor],
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    dim: int = -1,
    scope: str = "tensor",
    magnitude: bool = False,
    scale: Tensor | Sequence[Tensor] | None = None,
    check: bool = False,
) -> Tensor | list[Tensor]:
    """A mask of what stays when the lowest scores go, bit-packed. The same bits on every backend and thread count.

    Args:
        score: [..., C], any strides; float32, bfloat16 or float16 (float64 on the reference backend). Or a list of such.
            Of equal scores the lowest flat index goes first; -0 equals +0. DTensors, which may be cut along any axis, give
            masks placed as they are: counts travel, scores do not (``prune_mask_parts``).
        sparsity: the part that goes, 0 to 1: exactly round(sparsity * count) elements (rows, columns, blocks). None for
            n:m patterns, which fix it.
        pattern: "unstructured"; "n:m" (n of m adjacent ones stay, m <= 32; Mishra et al. 2021); "2:4t" (2:4 along rows and
            columns at once; Hubara et al. 2021); "row", "column" or "block:RxC" of a matrix, by the sums of scores.
        dim: the dimension along which n:m groups, and slices of scope "row", run.
        scope: what one count is of: each "tensor", each "row" (slice along dim), or "global": all tensors of the list
            with one threshold. The last two are for "unstructured".
        magnitude: compare |score|.
        scale: float32 [C]: compare |score| * scale, Wanda's |w| * ||x|| (Sun et al. 2023), which is written nowhere.
        check: raise for a NaN on a GPU too, which waits for the device. On a CPU a NaN always raises; elsewhere it is the
            lowest score.

    Returns:
        uint8 [..., ceil(C/8)], packed along the last dimension, least significant bit first, 1 = keep, padding bits 0;
        of a list a list.

    Raises:
        TypeError, ValueError: naming the argument, what it was and must be.
        fastlm.backend.BackendError: a forced backend that cannot serve.
    """
    options: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern, "dim": dim, "scope": scope}
    options |= {"magnitude": magnitude, "check": check}
    if sharded(score) or (isinstance(score, (list, tuple)) and sharded(*score)):
        from fastlm.ops import _dtensor

        scales = [] if scale is None else [scale] if isinstance(scale, Tensor) else list(scale)
        masks = _dtensor.prune_mask([score] if isinstance(score, Tensor) else score, scales, **options)
        return masks[0] if isinstance(score, Tensor) else masks
    masks = whole_masks(score, scale=scale, **options)
    return masks[0] if isinstance(score, Tensor) else masks


def apply_mask_(weight: Tensor, mask: Tensor) -> Tensor:
    """Sets ``weight`` [..., C] to exactly +0 where ``mask`` uint8 [..., ceil(C/8)] is 0, in place; returns ``weight``.

    Autograd does not see it, like an optimizer's step: a leaf that requires a gradient is changed too, and a backward
    that saved it raises. float32, bfloat16, float16 or float64, any strides. A DTensor takes the whole's mask, or one placed
    as it is. Raises TypeError or ValueError.
    """
    if sharded(weight):
        from fastlm.ops import _dtensor

        mask = _dtensor.own_mask(weight, mask)
        apply_mask_(weight.detach().to_local(), mask)  # type: ignore[attr-defined]
        return weight
    check_tensor(weight, "weight", "apply_mask_", dtypes=FLOATS, required=True)
    if weight.dim() == 0:
        raise ValueError("apply_mask_: weight has no dimension; it must be [..., C]")
    check_mask(mask, "mask", "apply_mask_", weight.shape, weight.device)
    apply_operator(weight.detach(), mask)
    return weight


def mask_and(first: Tensor, second: Tensor) -> Tensor:
    """The mask that keeps what both keep: uint8, both of one shape. Raises TypeError or ValueError."""
    check_mask(first, "first", "mask_and")
    check_tensor(
        second, "second", "mask_and", dtypes=(torch.uint8,), shape=first.shape, device=first.device, required=True
    )
    return first & second


def mask_count(mask: Tensor) -> Tensor:
    """How many elements a mask keeps, int64 [] on its device. Raises TypeError or ValueError."""
    check_mask(mask, "mask", "mask_count")
    out: Tensor = count_operator(mask)
    return out


def _example(device: str) -> dict[str, Any]:
    return {"score": torch.empty(8, 64, device=device), "sparsity": 0.5}


backend.register(OP, arguments, _example)
