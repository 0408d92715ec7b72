"""What the functions of prune_mask share: operators, checks of arguments, and masks to booleans and back.

Below ``prune_mask.py``, which has the public functions, and ``prune_mask_parts.py`` and ``_dtensor.py``, which call them for
parts of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.ops._library import FLOATS, LIBRARY, check_tensor
from fastlm.reference.prune_mask import parse

OP = "prune_mask"
SCOPES = ("tensor", "row", "global")


def define(
    name: str, schema: str, function: str, fake: Callable[..., Any],
    written: Callable[..., Sequence[Tensor]] = lambda *args: (),
) -> Callable[..., Any]:  # fmt: skip
    """The operator ``fastlm::<name>``, which runs ``function`` of a backend's prune_mask. ``written``: what it changes."""

    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        out = backend.run(OP, function, first.device, args)
        for t in written(*args):
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)  # a kernel writes behind PyTorch's back
        return out

    LIBRARY.define(name + schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
    found: Callable[..., Any] = getattr(torch.ops.fastlm, name)
    return found


def _mask_like(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8)


prune_operator = define(
    OP,
    "(Tensor[] scores, Tensor[] scales, float? sparsity, str pattern, int dim, str scope, bool magnitude, bool check)"
    " -> Tensor[]",
    "forward",
    lambda scores, *options: [_mask_like(s) for s in scores],
)
apply_operator = define(
    "apply_mask_",
    "(Tensor(a!) weight, Tensor mask) -> ()",
    "apply",
    lambda weight, mask: None,
    lambda weight, mask: (weight,),
)
count_operator = define(
    "mask_count", "(Tensor mask) -> Tensor", "count", lambda mask: mask.new_empty((), dtype=torch.int64)
)
_unpack = define(
    "mask_to_bool",
    "(Tensor mask, SymInt columns) -> Tensor",
    "unpack",
    lambda mask, columns: mask.new_empty((*mask.shape[:-1], columns), dtype=torch.bool),
)
_pack = define("bool_to_mask", "(Tensor keep) -> Tensor", "pack", _mask_like)


def check_sparsity(sparsity: float | None, kind: str, pattern: str) -> float | None:
    """``sparsity`` as a float. Raises TypeError or ValueError where it is none that goes with the pattern."""
    if kind in ("n:m", "2:4t"):
        if sparsity is not None:
            raise ValueError(f"{OP}: sparsity is {sparsity}; with pattern {pattern!r}, which fixes it, it must be None")
        return None
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"{OP}: sparsity is a {type(sparsity).__name__}; with pattern {pattern!r} it must be a float")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{OP}: sparsity is {sparsity}; it must be between 0 and 1")
    return float(sparsity)


def _check_shape(score: Tensor, name: str, kind: str, pattern: str, dim: int) -> None:
    if score.dim() == 0:
        raise ValueError(f"{OP}: {name} has no dimension; it must have one at least")
    if kind in ("row", "column", "block", "2:4t") and score.dim() != 2:
        raise ValueError(f"{OP}: {name} has shape {list(score.shape)}; pattern {pattern!r} is for matrices")
    if kind == "2:4t" and (score.shape[0] % 4 or score.shape[1] % 4):
        raise ValueError(f"{OP}: {name} has shape {list(score.shape)}; pattern '2:4t' needs multiples of 4")
    if not -score.dim() <= dim < score.dim():
        dims = score.dim()
        raise ValueError(
            f"{OP}: dim is {dim}; for {name} of shape {list(score.shape)} it must be {-dims} to {dims - 1}"
        )


def arguments(
    score: Tensor | Sequence[Tensor],
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    dim: int = -1,
    scope: str = "tensor",
    magnitude: bool = False,
    scale: Tensor | Sequence[Tensor] | None = None,
    check: bool = False,
) -> tuple[torch.device, tuple[Any, ...]]:
    """Checks a public call and turns it into the schema's arguments."""
    if not isinstance(pattern, str):
        raise TypeError(f"{OP}: pattern is a {type(pattern).__name__}; it must be a str")
    kind = parse(pattern)[0]
    if scope not in SCOPES:
        raise ValueError(f"{OP}: scope is {scope!r}; it must be one of {', '.join(SCOPES)}")
    if scope != "tensor" and kind != "unstructured":
        raise ValueError(f"{OP}: scope is {scope!r}; with pattern {pattern!r} it must be 'tensor'")
    sparsity = check_sparsity(sparsity, kind, pattern)
    one = isinstance(score, Tensor)
    if not one and not isinstance(score, (list, tuple)):
        raise TypeError(f"{OP}: score is a {type(score).__name__}; it must be a tensor or a list of tensors")
    scores: list[Tensor] = [score] if isinstance(score, Tensor) else list(score)
    if not scores:
        raise TypeError(f"{OP}: score is an empty list; it must be a tensor or a list of tensors")
    for i, s in enumerate(scores):
        name = "score" if one else f"score[{i}]"
        check_tensor(s, name, OP, dtypes=FLOATS, device=scores[0].device if i else None, required=True)
        _check_shape(s, name, kind, pattern, dim)
    scales: list[Tensor] = [] if scale is None else [scale] if isinstance(scale, Tensor) else list(scale)
    if scales and not magnitude:
        raise ValueError(f"{OP}: scale is given; it needs magnitude=True, since it multiplies |score|")
    if scales and len(scales) != len(scores):
        raise ValueError(f"{OP}: scale is of {len(scales)} tensors; it must be of {len(scores)}, one for each score")
    for s, t in zip(scores, scales, strict=False):
        check_tensor(t, "scale", OP, dtypes=(torch.float32,), device=s.device, shape=s.shape[-1:], required=True)
    options = (sparsity, pattern, dim, scope, bool(magnitude), bool(check))
    return scores[0].device, ([s.detach() for s in scores], [t.detach() for t in scales], *options)


def check_mask(mask: Tensor, name: str, op: str, shape: Sequence[int] | None = None, device: Any = None) -> None:
    check_tensor(mask, name, op, dtypes=(torch.uint8,), device=device, required=True)
    if mask.dim() == 0:
        raise ValueError(f"{op}: {name} has no dimension; it must be [..., ceil(C/8)]")
    if shape is not None and tuple(mask.shape) != (*shape[:-1], (shape[-1] + 7) // 8):
        wanted = [*shape[:-1], (shape[-1] + 7) // 8]
        raise ValueError(f"{op}: {name} has shape {list(mask.shape)}; for {list(shape)} it must be {wanted}")


def whole_masks(score: Tensor | Sequence[Tensor], **options: Any) -> list[Tensor]:
    """``prune_mask`` of tensors that are whole in the process."""
    _, args = arguments(score, **options)
    masks: list[Tensor] = prune_operator(*args)
    return masks


def mask_to_bool(mask: Tensor, columns: int) -> Tensor:
    """bool [..., columns], True = keep, of a mask [..., ceil(columns/8)]. Raises TypeError or ValueError."""
    check_mask(mask, "mask", "mask_to_bool")
    if isinstance(columns, bool) or not isinstance(columns, (int, torch.SymInt)):
        raise TypeError(f"mask_to_bool: columns is a {type(columns).__name__}; it must be an int")
    if columns < 0 or (columns + 7) // 8 != mask.shape[-1]:
        last = mask.shape[-1]
        raise ValueError(
            f"mask_to_bool: columns is {columns}; for a mask of {last} bytes a row it must be {max(8 * last - 7, 0)} to "
            f"{8 * last}"
        )
    out: Tensor = _unpack(mask, columns)
    return out


def bool_to_mask(keep: Tensor) -> Tensor:
    """The mask uint8 [..., ceil(C/8)] of bool [..., C], True = keep. Raises TypeError or ValueError."""
    check_tensor(keep, "keep", "bool_to_mask", dtypes=(torch.bool,), required=True)
    if keep.dim() == 0:
        raise ValueError("bool_to_mask: keep has no dimension; it must be [..., C]")
    out: Tensor = _pack(keep)
    return out
