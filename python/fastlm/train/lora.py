"""LoRA (Hu et al. 2021): y = W x + (alpha / rank) B (A x), where W is frozen and only A [rank, in], B [out, rank] train.

A Linear becomes a LoraLinear by its class alone, so names, hooks and swap stay as they are; an Int8Linear, a quarter of
the memory, becomes a LoraInt8Linear. B starts at zero: the model starts as the base, to the bit. The base's tensors are
written once, into RUN/base; checkpoints hold the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm.data.errors import InputError
from fastlm.nn import Int8Linear
from fastlm.nn.int8 import Int8Rows
from fastlm.nn.masked import MASK, MaskedLinear

BASE = "base"  # the folder of a run that holds what LoRA leaves as it was
INT8 = "int8.json"  # in it, of an int8 base: what its tensors do not tell


class LoraLinear(nn.Linear):
    """A frozen Linear and its two trained factors. Input [..., in], output [..., out]."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        if MASK in self._buffers:  # of a pruned base: what is added keeps its zeros, as `merged` will
            keep = ops.mask_to_bool(self._buffers[MASK], self.in_features)  # type: ignore[arg-type]
            added = (self.lora_b @ self.lora_a) * self.lora_scale
            return F.linear(x, self.weight + added * keep, self.bias)
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.lora_scale


class LoraInt8Linear(Int8Linear):
    """A frozen Int8Linear and its two trained factors, which are float. Input [..., in], also as int8 ``rows``, output
    [..., out]."""

    float_class = LoraLinear
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor, rows: Int8Rows | None = None) -> Tensor:
        if MASK in self._buffers:
            added = self.lora_b @ self.lora_a * ops.mask_to_bool(self._buffers[MASK], self.in_features)  # type: ignore[arg-type]
            return super().forward(x, rows) + F.linear(x, added) * self.lora_scale
        return super().forward(x, rows) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.lora_scale


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LoraLinear,
    MaskedLinear: LoraLinear,
    Int8Linear: LoraInt8Linear,
}


def apply(model: nn.Module, rank: int, alpha: float, targets: Iterable[str]) -> list[str]:
    """Freeze `model` and give every Linear whose last name is among `targets` its factors; returns their paths.

    `model.saved_apart` then names the tensors that checkpoints leave to the base. Raises InputError for a target that
    no Linear has; `head` is none, since the chunked loss reads its weight and not its output.
    """
    wanted = set(targets)
    linear = {path: m for path, m in model.named_modules() if type(m) in ADAPTED and path != "head"}
    names = {path.rsplit(".", 1)[-1] for path in linear}
    if not wanted or wanted - names:
        unknown = ", ".join(sorted(wanted - names)) or "nothing"
        raise InputError(f"--lora-targets names {unknown}; the model's linear layers are {', '.join(sorted(names))}")
    model.saved_apart = frozenset(model.state_dict())  # type: ignore[assignment]
    model.requires_grad_(False)
    chosen = [path for path in linear if path.rsplit(".", 1)[-1] in wanted]
    for path in chosen:
        module: Any = linear[path]
        dtype = module.float_dtype if isinstance(module, Int8Linear) else module.weight.dtype
        like, (rows, columns) = module.weight.new_empty(0, dtype=dtype), module.weight.shape
        module.__class__ = ADAPTED[type(module)]
        module.lora_a = nn.Parameter(like.new_empty(rank, columns))
        module.lora_b = nn.Parameter(like.new_zeros(rows, rank))
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
            if f"{path}.{MASK}" in tensors:
                ops.apply_mask_(out[f"{path}.weight"], tensors[f"{path}.{MASK}"])
    return out
