"""The int8 layers of a model as plain tensors, and back: what a file of a compressed model holds beside its float tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.nn import Int8Linear
from fastlm.nn import int8 as layers
from fastlm.nn.int8 import Split
from fastlm.nn.masked import MASK, MaskedLinear, release_


@dataclass(frozen=True)
class Held:
    """Int8 layers by path: weight int8 [N, K] and scales float32 [N] or [N, groups]. ``mode``: as of ``Int8Linear``.
    ``splits``: of those with outlier columns these, int64 [k], and the weight there, [N, k]."""

    mode: str
    group: int | None
    layers: dict[str, tuple[Tensor, Tensor]] = field(repr=False)
    splits: dict[str, Split] = field(default_factory=dict, repr=False)

    def facts(self) -> dict[str, Any]:
        """What tensors do not tell, for a file beside them; ``of`` reads it."""
        return {"mode": self.mode, "group": self.group}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Held:
        """The int8 layers among named tensors. Raises ValueError where scales lack, or facts are no mode and group."""
        mode, group = facts.get("mode"), facts.get("group")
        layers.check_mode(str(mode), group)
        found = {}
        for name, t in tensors.items():
            if name.endswith(".weight") and t.dtype == torch.int8:
                scale = tensors.get(f"{name}_scale")
                if scale is None or scale.dtype != torch.float32:
                    raise ValueError(f"{name} is int8 and has no float32 {name}_scale beside it")
                found[name.removesuffix(".weight")] = (t, scale)
        splits = {}
        for path, (weight, _) in found.items():
            columns, beside = tensors.get(f"{path}.outliers"), tensors.get(f"{path}.outlier_weight")
            if columns is None:
                continue
            if columns.dtype != torch.int64 or beside is None or beside.shape != (weight.shape[0], *columns.shape):
                raise ValueError(f"{path}.outliers are no columns with an outlier_weight beside them")
            splits[path] = (columns, beside)
        return cls(str(mode), group, found, splits)

    def into(self, model: nn.Module) -> None:
        """Makes the linear layers at these paths Int8Linear with these values; they need not be quantised again. A mask
        that one has stays beside them.

        Raises ValueError for a path that is no linear layer of this shape.
        """
        named = dict(model.named_modules())
        for path, (weight, _) in self.layers.items():
            module = named.get(path)
            if (
                not isinstance(module, nn.Linear)
                or type(module) not in (nn.Linear, MaskedLinear)
                or module.weight.shape != weight.shape
            ):
                raise ValueError(f"{path} is int8 {list(weight.shape)}, and no linear layer of that shape in the model")
        for path, values in self.layers.items():
            module = named[path]
            assert isinstance(module, nn.Linear)
            mask = module._buffers.get(MASK)
            release_(module)
            layers.convert_(module, self.mode, self.group, values, self.splits.get(path))
            if mask is not None:
                module.register_buffer(MASK, mask)

    def floats(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` as those of the float model: each int8 weight times its scales, and outlier columns in their places."""
        out = {}
        for name, t in tensors.items():
            path, _, kind = name.rpartition(".")
            if path not in self.layers or kind == "bias" or kind == MASK:
                out[name] = t
            elif kind == "weight":
                out[name] = layers.joined(layers.dequantize(*self.layers[path]), self.splits.get(path))
        return out


def held(model: nn.Module) -> Held | None:
    """The int8 layers of a model; None where it has none. Raises ValueError where they are not of one mode and group."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, Int8Linear)}
    kinds = {(m.mode, m.group) for m in found.values()}
    if not found:
        return None
    if len(kinds) > 1:
        raise ValueError(f"the model's int8 layers are of {len(kinds)} kinds, {sorted(map(str, kinds))}; one is needed")
    ((mode, group),) = kinds
    splits = {path: split for path, m in found.items() if (split := layers.split_of(m)) is not None}
    return Held(mode, group, {path: (m.weight, m.weight_scale) for path, m in found.items()}, splits)
