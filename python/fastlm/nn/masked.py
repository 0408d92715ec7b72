"""A Linear whose weight is held at zero where a mask says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops

MASK = "weight_mask"


class MaskedLinear(nn.Linear):
    """``nn.Linear`` with a mask: ``weight`` [out, in] is exactly +0 where the buffer ``weight_mask`` is 0.

    The weight keeps its key and its zeros, so the forward is ``nn.Linear``'s. ``weight_mask`` is uint8
    [out, ceil(in/8)], one bit a weight as of ``fastlm.ops.prune_mask``, and one more key of the state_dict: without it
    the state_dict is the plain Linear's. Loading applies the mask that was loaded. An optimizer knows nothing of masks:
    ``fastlm.compress.hold(optimizer, model)``, or ``apply_mask_()`` after each step.
    """

    weight_mask: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None):
        super().__init__(in_features, out_features, bias, device, dtype)
        hold_(self, ops.bool_to_mask(torch.ones(out_features, in_features, dtype=torch.bool, device=device)))

    def apply_mask_(self) -> None:
        """Sets the weights whose bit is 0 to +0 again; of a weight that is a DTensor this process's part."""
        if not self.weight.is_meta:
            ops.apply_mask_(self.weight, self.weight_mask)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, metadata, *args)
        if metadata.get("assign_to_params_buffers") and f"{prefix}weight" in state and not self.weight.is_meta:
            # the weight is the caller's own tensor, which a mask must not change
            self.weight = nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
        self.apply_mask_()

    def extra_repr(self) -> str:
        if self.weight_mask.is_meta:
            return super().extra_repr()
        kept = int(ops.mask_count(self.weight_mask))
        return f"{super().extra_repr()}, kept={kept} of {self.in_features * self.out_features}"


def hold_(module: nn.Linear, mask: Tensor) -> None:
    """Gives a Linear its mask and applies it. A plain Linear becomes a MaskedLinear by its class alone.

    Raises ValueError for a mask of another shape than the weight's.
    """
    wanted = (module.weight.shape[0], (module.weight.shape[1] + 7) // 8)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != wanted:
        raise ValueError(
            f"MaskedLinear: mask is {mask.dtype} of shape {list(mask.shape)}; for a weight of "
            f"{list(module.weight.shape)} it must be uint8 of {list(wanted)}"
        )
    if MASK in module._buffers:
        module._buffers[MASK] = mask
    else:
        module.register_buffer(MASK, mask)
    if type(module) is nn.Linear:
        module.__class__ = MaskedLinear
    if not module.weight.is_meta:
        ops.apply_mask_(module.weight, mask)


def release_(module: nn.Linear) -> None:
    """Takes the mask away; the zeros stay."""
    module._buffers.pop(MASK, None)
    module._non_persistent_buffers_set.discard(MASK)
    if type(module) is MaskedLinear:
        module.__class__ = nn.Linear  # type: ignore[assignment]
