"""The masks of a model, and how they are held while it trains.

With its gradient masked a pruned weight's moments stay 0, and so does every step that is elementwise (AdamW, Lion, SGD).
Muon's is not: it makes whole matrices orthogonal. So the weights are masked after each step too. PyTorch's fused AdamW
leaves masked weights to ``ops.masked_adamw_``, which does all of this in its one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.nn import Int8Linear
from fastlm.nn.masked import MASK, hold_
from fastlm.ops._library import sharded


def masked(model: nn.Module) -> dict[str, nn.Linear]:
    """The modules of a model that have a mask, by path."""
    return {path: m for path, m in model.named_modules() if MASK in m._buffers and isinstance(m, nn.Linear)}


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model by their key in its state_dict: ``path.weight_mask``, uint8 [out, ceil(in/8)]."""
    return {(f"{path}.{MASK}" if path else MASK): m._buffers[MASK] for path, m in masked(model).items()}  # type: ignore[misc]


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Named tensors without the masks among them, and the masks."""
    found = {name: t for name, t in tensors.items() if name.rpartition(".")[2] == MASK}
    return {name: t for name, t in tensors.items() if name not in found}, found


def floats(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors, those of floating dtypes as float32. With a mask among ``masks`` they are 0 where it says so, float32 ones
    in place: a checkpoint holds what a mask hides while a run still chooses."""
    out = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    for name, mask in masks.items():
        weight = name.removesuffix("_mask")
        if weight in out and out[weight].is_floating_point():
            ops.apply_mask_(out[weight], mask)
    return out


def attach(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Gives a model masks by the keys of ``masks`` and applies them. Int8 layers, frozen at zero there, keep one beside them.

    Raises ValueError for a key that names no Linear, or a mask of another shape than its weight's.
    """
    modules = dict(model.named_modules())
    for key, mask in found.items():
        path = key.removesuffix(MASK).rstrip(".")
        module = modules.get(path)
        if isinstance(module, Int8Linear):
            module.register_buffer(MASK, mask.to(module.weight.device))
            continue
        if not isinstance(module, nn.Linear):
            raise ValueError(f"compress.attach: {key!r} names no linear layer of the model")
        hold_(module, mask.to(module.weight.device))


class Masks:
    """Pairs of a parameter and its mask (or what a process holds of both), held by hand around an optimizer's step."""

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.pairs = list(pairs)

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """Those of a model. Weights that are DTensors have masks of their wholes."""
        return cls((m.weight, m._buffers[MASK]) for m in masked(model).values())  # type: ignore[misc]

    def gradients(self) -> None:
        """Before clipping and the step: gradients of pruned weights are 0."""
        for p, mask in self.pairs:
            if p.grad is not None:
                ops.apply_mask_(p.grad, mask)

    def weights(self) -> None:
        """After the step: pruned weights are +0."""
        for p, mask in self.pairs:
            ops.apply_mask_(p, mask)

    def moments(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """After masks have changed: what an optimizer's ``state`` keeps of pruned weights is 0."""
        for p, mask in self.pairs:
            for value in state.get(p, {}).values():
                if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point():
                    ops.apply_mask_(value, mask)


class OnePass:
    """Two hooks by which an AdamW leaves weights with a mask to ``ops.masked_adamw_``. ``pairs()``: these and their masks.

    They serve PyTorch's own fused AdamW, not a closure. ``done`` are the weights of the last step that was served.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        self.pairs = pairs
        self.done: dict[
            Tensor, tuple[Tensor, Tensor] | None
        ] = {}  # by weight its gradient and mask, until it is served
        self.handles = [optimizer.register_step_pre_hook(self.before), optimizer.register_step_post_hook(self.after)]

    def before(self, optimizer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Takes the gradients away, so that the optimizer leaves these weights alone."""
        self.done = {}
        if len(args) > 1 or kwargs or not _one_pass(optimizer):
            return
        served = {p for group in optimizer.param_groups for p in group["params"]}
        for p, mask in self.pairs():
            g = p.grad
            if (
                p in served
                and g is not None
                and g.layout == torch.strided
                and g.dtype == p.dtype
                and _placed_alike(p, g)
            ):
                self.done[p] = (g, mask)
                p.grad = None

    @torch.no_grad()
    def after(self, optimizer: Any, *_: Any) -> None:
        """The step of these weights."""
        for group in optimizer.param_groups if self.done else ():
            params = [p for p in group["params"] if p in self.done]
            given = [found for p in params if (found := self.done[p]) is not None]
            for p, pair in zip(params, given, strict=True):
                p.grad = pair[0]
                if not optimizer.state[p]:
                    optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    for name in ("exp_avg", "exp_avg_sq"):
                        optimizer.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            states = [optimizer.state[p] for p in params]
            for dtype in {(p.dtype, p.device) for p in params}:
                at = [i for i, p in enumerate(params) if (p.dtype, p.device) == dtype]
                kept = ("exp_avg", "exp_avg_sq", "step")
                exp_avgs, exp_avg_sqs, steps = ([local(states[i][name]) for i in at] for name in kept)
                ops.masked_adamw_(
                    [local(params[i]) for i in at],
                    [local(given[i][0]) for i in at],
                    exp_avgs,
                    exp_avg_sqs,
                    steps,
                    [own(params[i], given[i][1]) for i in at],
                    lr=float(group["lr"]),  # numpy's numbers too, which a scheduler may leave
                    betas=(float(group["betas"][0]), float(group["betas"][1])),
                    eps=float(group["eps"]),
                    weight_decay=float(group["weight_decay"]),
                    grad_scale=getattr(optimizer, "grad_scale", None),
                    found_inf=getattr(optimizer, "found_inf", None),
                )
        self.done = dict.fromkeys(self.done)  # the gradients are the caller's to drop


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor: of a DTensor its part, which shares its memory."""
    return t.detach().to_local() if sharded(t) else t  # type: ignore[attr-defined]


def own(weight: Tensor, mask: Tensor) -> Tensor:
    """The mask of ``local(weight)``, of the whole's."""
    if not sharded(weight):
        return mask
    from fastlm.ops import _dtensor

    return _dtensor.own_mask(weight, mask)


def _placed_alike(p: Tensor, g: Tensor) -> bool:
    return getattr(p, "placements", None) == getattr(g, "placements", None)


def _one_pass(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``masked_adamw_`` makes this optimizer's step: that of PyTorch's fused AdamW with plain options."""
    if type(optimizer) is not torch.optim.AdamW:
        return False
    other = ("amsgrad", "maximize", "capturable", "differentiable")
    return all(
        group["fused"]
        and not any(group[name] for name in other)
        and not any(isinstance(x, Tensor) for x in (group["lr"], *group["betas"]))
        for group in optimizer.param_groups
    )


def hold(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Any]:
    """Makes any PyTorch optimizer hold a model's masks: pruned weights stay +0 and their moments 0, whatever it does.

    Hooks of the optimizer, before and after its step, over the model's masks as they are at that step. Returns their
    handles; ``handle.remove()`` lets go. ``torch.optim.AdamW(..., fused=True)`` updates and masks in one pass. With others
    gradients are masked before the step, and weights and moments after it, since masks may grow and ``step(closure)`` makes
    gradients after the first hook. Weights may be DTensors (FSDP2, tensor parallelism); each process masks its part. fastlm's
    trainer needs no such call. Raises ValueError where nothing is masked.
    """
    found = Masks.of(model)
    if not found.pairs:
        raise ValueError("compress.hold: the model has no mask; prune it first")
    found.moments(optimizer.state)
    one_pass = OnePass(optimizer, lambda: Masks.of(model).pairs)

    def rest() -> Masks:
        return Masks(pair for pair in Masks.of(model).pairs if pair[0] not in one_pass.done)

    def before(*_: Any) -> None:
        rest().gradients()

    def after(*_: Any) -> None:
        held = rest()
        held.weights()
        held.moments(optimizer.state)

    own = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    return [*one_pass.handles, *own]
