"""rotary: rotary positions (Su et al. 2021), one read and one write, forward and backward.

The public function, the schema, the fake kernels and autograd. The maths is in ``fastlm.reference.rotary``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.ops._library import Op, check_tensor, sharded

OP = "rotary"
_OPTIONS = "Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor"


def _fake(x, *options):
    return torch.empty_like(x)


def _prepare(direction: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Checks the values of positions where that does not wait for a device."""
    x, cos, _, positions = args[:4]
    if direction == "forward" and positions is not None and positions.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max()) + (x.shape[2] - 1 if positions.dim() < 2 else 0)
        if x.numel() and (low < 0 or high >= cos.shape[0]):
            raise ValueError(
                f"{OP}: positions reach from {low} to {high}; each must be between 0 and {cos.shape[0] - 1}, the last "
                f"row of cos and sin"
            )
    return args


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, positions, interleaved, inverse):
        ctx.save_for_backward(cos, sin, positions)
        ctx.options = (interleaved, inverse)
        return _operators.forward(x, cos, sin, positions, interleaved, inverse)

    @staticmethod
    def backward(ctx: Any, dout):
        return _operators.backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_operators = Op(OP, f"(Tensor x, {_OPTIONS}", f"(Tensor dout, {_OPTIONS}", _fake, _fake, _Rotary, _prepare)


def _arguments(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[torch.device, tuple[Any, ...]]:
    """Checks a public call and turns it into the schema's arguments: x [B, H, L, D]."""
    check_tensor(x, "x", OP, required=True)
    device = x.device
    if x.dim() not in (3, 4):
        raise ValueError(f"{OP}: x has shape {list(x.shape)}; it must be [B, H, L, D], or [T, H, D] packed")
    tables = (torch.float32, torch.float64)
    check_tensor(cos, "cos", OP, device=device, dtypes=tables, required=True)
    if cos.dim() != 2 or cos.shape[1] == 0 or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"{OP}: cos has shape {list(cos.shape)}; it must be [positions, R / 2] with R even and at most x's head "
            f"size, {x.shape[-1]}"
        )
    check_tensor(sin, "sin", OP, shape=cos.shape, device=device, dtypes=(cos.dtype,), required=True)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad:
            raise ValueError(f"{OP}: {name} requires a gradient, which is not computed; pass {name}.detach()")
    packed = x.dim() == 3
    batch, length = (1, x.shape[0]) if packed else (x.shape[0], x.shape[2])
    if positions is not None:
        check_tensor(positions, "positions", OP, device=device, dtypes=(torch.int64, torch.int32))
        fits = ((), (length,)) if packed else ((), (batch,), (batch, length))
        if tuple(positions.shape) not in fits:
            allowed = f"[] or [{length}]" if packed else f"[], [{batch}] or [{batch}, {length}]"
            raise ValueError(f"{OP}: positions has shape {list(positions.shape)}; it must be {allowed}")
        positions = positions.to(torch.int64)
        if packed and positions.dim() == 1:
            positions = positions.unsqueeze(0)
    elif length > cos.shape[0]:
        raise ValueError(f"{OP}: cos has {cos.shape[0]} rows (shape {list(cos.shape)}); x has {length} positions")
    if cos.shape[0] == 0 and x.numel():
        raise ValueError(f"{OP}: cos has shape {list(cos.shape)}; it must have a row for each position")
    if packed:
        x = x.transpose(0, 1).unsqueeze(0)
    return device, (x, cos.contiguous(), sin.contiguous(), positions, bool(interleaved), bool(inverse))


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    """Turns pairs of channels of queries or keys by the angle of their position (Su et al. 2021).

    Args:
        x: [B, H, L, D], any strides (a transposed view of [B, L, H, D] is not copied), or packed [T, H, D]; float32,
            bfloat16 or float16 (float64 on the reference backend).
        cos, sin: [positions, R / 2], float32; R <= D, and channels behind R stay as they are. No gradient.
        positions: None: 0 ... L - 1. Else int64 or int32 on x's device: [] or [B], the position of the first row (the
            length of a cache), or [B, L] (packed: [T]), the position of each. On a CPU a position outside the table
            raises; on a GPU, where looking would wait for the device, it is taken for the nearest one inside.
        interleaved: pairs are (0, 1), (2, 3) ... as in GPT-J; else (0, R/2), (1, R/2 + 1) ... as in Llama.
        inverse: turn back.

    A DTensor x is served where it is sharded by batch or heads (packed: by heads); the other arguments are the whole's.

    Returns:
        A tensor of x's shape, dtype and, where x is dense, strides.

    Raises:
        TypeError, ValueError: naming the argument, what it was and must be.
        fastlm.backend.BackendError: a forced backend that cannot serve.
        RuntimeError: on double backward.
    """
    if sharded(x, cos, sin, positions):
        from fastlm.ops import _dtensor

        return _dtensor.rotary(rotary, x, cos, sin, positions=positions, interleaved=interleaved, inverse=inverse)
    _, args = _arguments(x, cos, sin, positions=positions, interleaved=interleaved, inverse=inverse)
    out: Tensor = _operators(*args)
    return out.squeeze(0).transpose(0, 1) if x.dim() == 3 else out


def _example(device: str) -> dict[str, Any]:
    table = torch.empty(64, 32, device=device)
    return {"x": torch.empty(1, 4, 64, 64, device=device), "cos": table, "sin": table}


backend.register(OP, _arguments, _example)
