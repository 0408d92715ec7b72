"""LoRA (Hu et al. 2021): y = W x + (alpha / rank) B (A x), where W is frozen and only A [rank, in], B [out, rank] train.

A Linear becomes a LoraLinear by its class alone, so names, hooks and swap stay as they are. B starts at zero: the model
starts as the base, to the bit. The base's tensors are written once, into RUN/base; checkpoints hold the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.data.errors import InputError

BASE = "base"  # the folder of a run that holds what LoRA leaves as it was


class LoraLinear(nn.Linear):
    """A frozen Linear and its two trained factors. Input [..., in], output [..., out]."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.lora_scale


def apply(model: nn.Module, rank: int, alpha: float, targets: Iterable[str]) -> list[str]:
    """Freeze `model` and give every Linear whose last name is among `targets` its factors; returns their paths.

    `model.saved_apart` then names the tensors that checkpoints leave to the base. Raises InputError for a target that
    no Linear has; `head` is none, since the chunked loss reads its weight and not its output.
    """
    wanted = set(targets)
    linear = {path: m for path, m in model.named_modules() if type(m) is nn.Linear and path != "head"}
    names = {path.rsplit(".", 1)[-1] for path in linear}
    if not wanted or wanted - names:
        unknown = ", ".join(sorted(wanted - names)) or "nothing"
        raise InputError(f"--lora-targets names {unknown}; the model's linear layers are {', '.join(sorted(names))}")
    model.saved_apart = frozenset(model.state_dict())  # type: ignore[assignment]
    model.requires_grad_(False)
    chosen = [path for path in linear if path.rsplit(".", 1)[-1] in wanted]
    for path in chosen:
        module = linear[path]
        like = module.weight
        module.__class__ = LoraLinear
        assert isinstance(module, LoraLinear)
        module.lora_a = nn.Parameter(like.new_empty(rank, like.shape[1]))
        module.lora_b = nn.Parameter(like.new_zeros(like.shape[0], rank))
        nn.init.kaiming_uniform_(module.lora_a, a=math.sqrt(5))
        module.lora_scale = alpha / rank
    return chosen


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The base's and the adapters' tensors as those of the plain model: W + scale B A."""
    out = {name: t for name, t in tensors.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            path = name.removesuffix(".lora_a")
            out[f"{path}.weight"] = out[f"{path}.weight"] + scale * (tensors[f"{path}.lora_b"] @ a)
    return out
