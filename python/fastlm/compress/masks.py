"""The masks of a model, and how they are held while it trains.

With its gradient masked a pruned weight's moments stay 0, and so does every step that is elementwise (AdamW, Lion, SGD).
Muon's is not: it makes whole matrices orthogonal. So the weights are masked after each step too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        """Those of a model that is whole in this process. Raises ValueError where a weight is sharded."""
        for path, module in masked(model).items():
            if sharded(module.weight):
                raise ValueError(
                    f"compress.hold: {path}.weight is sharded (a DTensor), and its mask is the whole weight's; fastlm's "
                    f"trainer holds masks of sharded weights (--mesh fsdp=N)"
                )
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


def hold(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Any]:
    """Makes any PyTorch optimizer hold a model's masks: pruned weights stay +0 and their moments 0, whatever it does.

    Two hooks of the optimizer, before and after its step, over the model's masks as they are at that step. Returns their
    handles; ``handle.remove()`` lets go. Masks may grow, and ``step(closure)`` makes gradients after the first hook: so
    moments are masked after each step too. fastlm's trainer needs no such call. Raises ValueError where nothing is masked
    or a masked weight is a DTensor.
    """
    found = Masks.of(model)
    if not found.pairs:
        raise ValueError("compress.hold: the model has no mask; prune it first")
    found.moments(optimizer.state)

    def before(*_: Any) -> None:
        Masks.of(model).gradients()

    def after(*_: Any) -> None:
        held = Masks.of(model)
        held.weights()
        held.moments(optimizer.state)

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
