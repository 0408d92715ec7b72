"""quantize_int8: symmetric 8-bit numbers with one scale for each row, column, tensor or group.

The public function, the schema and the fake kernel. The maths is in ``fastlm.reference.quantize_int8``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.ops._library import Op, check_tensor, seed_tensor
from fastlm.reference.quantize_int8 import scale_shape

OP = "quantize_int8"
GROUPS = (32, 64, 128)


def _fake(x, dim, group, seed, check, transpose):
    q = x.new_empty(x.shape[::-1], dtype=torch.int8) if transpose else torch.empty_like(x, dtype=torch.int8)
    return q, x.new_empty(scale_shape(x.shape, dim, group), dtype=torch.float32)


def _prepare(direction: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, check = args[0], args[4]
    if check and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{OP}: x holds {bad} of {x.numel()} elements that are NaN or infinite; all must be finite")
    return args


_operators = Op(
    OP, "(Tensor x, int? dim, int group, Tensor? seed, bool check, bool transpose) -> (Tensor, Tensor)", None,
    _fake, None, None, _prepare,
)  # fmt: skip


def _arguments(
    x: Tensor,
    *,
    dim: int | None = -1,
    group: int | None = None,
    check: bool = False,
    stochastic: bool = False,
    seed: int | Tensor | None = None,
    transpose: bool = False,
) -> tuple[torch.device, tuple[Any, ...]]:
    """Checks a public call and turns it into the schema's arguments."""
    check_tensor(x, "x", OP, required=True)
    if dim is not None:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"{OP}: dim is a {type(dim).__name__}; it must be an int, or None for one scale in all")
        if not -x.dim() <= dim < x.dim():
            raise ValueError(
                f"{OP}: dim is {dim}; for x of shape {list(x.shape)} it must be None or "
                + (f"from {-x.dim()} to {x.dim() - 1}" if x.dim() else "left at None")
            )
    if group is not None and (not isinstance(group, int) or group not in GROUPS):
        raise ValueError(f"{OP}: group is {group!r}; it must be None, 32, 64 or 128")
    if group is not None and dim is None:
        raise ValueError(f"{OP}: group is {group} with dim None; groups lie along an axis, so name it with dim")
    if transpose and x.dim() != 2:
        raise ValueError(f"{OP}: x has shape {list(x.shape)}; with transpose=True it must be [rows, columns]")
    if seed is not None and not stochastic:
        raise ValueError(f"{OP}: seed was given with stochastic=False, which draws nothing; pass one, or leave it out")
    numbers = seed_tensor(seed, x.device, OP) if stochastic else None
    return x.device, (x, dim, group or 0, numbers, bool(check), bool(transpose))


def quantize_int8(
    x: Tensor,
    *,
    dim: int | None = -1,
    group: int | None = None,
    check: bool = False,
    stochastic: bool = False,
    seed: int | Tensor | None = None,
    transpose: bool = False,
) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit numbers: ``scale = max|x| / 127`` and ``q = clamp(rint(x / scale), -127, 127)``, the same bits on
    every backend and instruction set.

    Args:
        x: any shape and strides; float32, bfloat16 or float16 (float64 on the reference backend, taken in float32).
        dim: the axis along which elements share a scale: -1 gives one for each row, 0 one for each column of a matrix.
            None: one scale for all of x.
        group: 32, 64 or 128: elements along ``dim`` share a scale in groups of so many; the last one may be short.
        check: raise ValueError where x holds a NaN or an infinity. It waits for the device. Without it the scale of such
            a line is NaN and its q 0, so that all that is computed from it shows as NaN.
        stochastic: round up with the probability of the fraction, so that q * scale has x as its mean; the random
            numbers are Philox's and depend on the seed and the element's place alone.
        seed: of ``stochastic``: None (drawn from torch's default generator of the device), an int, or an int64 tensor of
            one element on x's device.
        transpose: x [R, C] gives q [C, R], contiguous; scale is as without it.

    Returns:
        q: int8, x's shape and, where x is dense, strides.
        scale: float32, x's shape without ``dim`` (with ``group``: with the number of groups there; ``dim`` None: []).
        A line of zeros, or of max|x| / 127 below 2**-126, gives zeros and the scale 0. Neither has a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what it was and must be.
        fastlm.backend.BackendError: a forced backend that cannot serve.

    Source: per-row ("token-wise") scales as in LLM.int8() (Dettmers et al. 2022), without its outliers.
    """
    _, args = _arguments(x, dim=dim, group=group, check=check, stochastic=stochastic, seed=seed, transpose=transpose)
    q, scale = _operators(*args)
    return q, scale


def _example(device: str) -> dict[str, Any]:
    return {"x": torch.empty(64, 768, device=device)}


backend.register(OP, _arguments, _example)
