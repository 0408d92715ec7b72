"""masked_adamw_: a step of AdamW and the masks of what it changed, in one pass.

The public function, schema and fake kernel; it is one more function of prune_mask's backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops._library import check_tensor
from fastlm.ops._prune_mask_arguments import check_mask, define

OP = "masked_adamw_"

_adamw = define(
    OP,
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps,"
    " Tensor[] masks, float lr, float beta1, float beta2, float eps, float weight_decay, Tensor? grad_scale,"
    " Tensor? found_inf) -> ()",
    "adamw",
    lambda *args: None,
    lambda params, grads, exp_avgs, exp_avg_sqs, steps, masks, lr, beta1, beta2, eps, weight_decay, scale, found: (
        *params, *(grads if scale is not None else ()), *exp_avgs, *exp_avg_sqs, *steps
    ),
)  # fmt: skip


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """A step of AdamW (Loshchilov and Hutter 2019) in place, after which what the masks prune is exactly +0.

    The numbers are those of PyTorch's fused AdamW followed by ``apply_mask_`` of each weight and both its moments. On a CPU
    it is one pass, and nothing of a pruned weight's gradient, not even a NaN, gets into it.

    Args:
        params: weights [..., C] of one dtype and device: float32, bfloat16, float16 (float64 on the reference).
        grads, exp_avgs, exp_avg_sqs: of each weight its gradient and moments, of its shape and dtype.
        steps: float32 [] of each weight, on its device (of a CPU's, there): the steps so far. Raised by one.
        masks: uint8 [..., ceil(C/8)] of each weight, as of ``prune_mask``.
        lr, betas, eps, weight_decay: as ``torch.optim.AdamW``'s.
        grad_scale: float32 [1] or []: gradients are divided by it, in place.
        found_inf: float32 [1] or []: where it is 1 nothing happens but that the masks are held.

    Raises:
        TypeError, ValueError: naming the argument, what it was and must be.
        fastlm.backend.BackendError: a forced backend that cannot serve.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    for name, tensors in (*lists.items(), ("masks", masks)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{OP}: {name} is a {type(tensors).__name__}; it must be a list of tensors")
        if len(tensors) != len(params):
            raise ValueError(f"{OP}: {name} has {len(tensors)} tensors; it must have {len(params)}, as params")
    if not params:
        return
    for i, p in enumerate(params):
        check_tensor(p, f"params[{i}]", OP, device=params[0].device if i else None, required=True)
        if p.dtype != params[0].dtype or p.dim() == 0:
            raise ValueError(
                f"{OP}: params[{i}] is {p.dtype} of shape {list(p.shape)}; it must be {params[0].dtype} [..., C]"
            )
        for name in ("grads", "exp_avgs", "exp_avg_sqs"):
            check_tensor(
                lists[name][i], f"{name}[{i}]", OP, shape=p.shape, device=p.device, dtypes=(p.dtype,), required=True
            )
        check_tensor(steps[i], f"steps[{i}]", OP, shape=(), device=p.device, dtypes=(torch.float32,), required=True)
        check_mask(masks[i], f"masks[{i}]", OP, p.shape, p.device)
    _check_numbers(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
    for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        check_tensor(scalar, name, OP, dtypes=(torch.float32,))
        if scalar is not None and scalar.numel() != 1:
            raise ValueError(f"{OP}: {name} has shape {list(scalar.shape)}; it must be one element")
    moved: list[Any] = [t if t is None else t.reshape(()).to(params[0].device) for t in (grad_scale, found_inf)]
    plain = [[t.detach() for t in tensors] for tensors in lists.values()]
    _adamw(*plain, list(masks), float(lr), *map(float, betas), float(eps), float(weight_decay), *moved)


def _check_numbers(**numbers: float) -> None:
    for name, x in numbers.items():
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"{OP}: {name} is a {type(x).__name__}; it must be a float")
        if not x >= 0 or (name.startswith("beta") and x >= 1):
            raise ValueError(f"{OP}: {name} is {x}; it must be at least 0{' and below 1' * name.startswith('beta')}")
