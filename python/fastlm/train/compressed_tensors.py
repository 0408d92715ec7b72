"""An int8 model as `--to hf` writes it: the configuration of compressed-tensors, which vLLM and transformers read.

weights and activations   format "int-quantized": weight int8 [N, K], weight_scale float32 [N, 1]
weights alone             format "pack-quantized": weight_packed int32 [N, K / 4], four values with 128 added, the first
                          in the lowest bits; weight_scale float32 [N, groups]; weight_shape int64 [2]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.compress import Held

# Of each tensor: our name, theirs, the rows of each of theirs, whether it is transposed there.
Names = list[tuple[str, tuple[str, ...], list[int], bool]]


def why_not(style: str, int8: Held) -> str:
    """Why the int8 layers of a model of transformers' class `style` cannot be written so, or ""."""
    if style != "llama":
        return "the layers of transformers' GPT-2 are Conv1D, which compressed-tensors does not know"
    if int8.group and any(w.shape[1] % int8.group for w, _ in int8.layers.values()):
        return f"compressed-tensors has no short last group, and a layer's width is no multiple of {int8.group}"
    if int8.splits:
        return "compressed-tensors has no outlier columns in float"
    return ""


def overlay(int8: Held, names: Names, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts integers in the place of the float tensors of `export.to_hf`, and says so in its config."""
    ignore = ["lm_head"]
    for ours, theirs, cut, _ in names:
        path = ours.removesuffix(".weight")
        modules = [name.removesuffix(".weight") for name in theirs]
        if path not in int8.layers:
            linear = path.endswith((".qkv", ".out", ".up", ".down"))
            ignore += modules if linear and ours.endswith(".weight") else []
        elif ours != path:
            weight, scale = int8.layers[path]
            rows = cut or [weight.shape[0]]
            for module, q, s in zip(modules, weight.split(rows), scale.split(rows)):
                del tensors[f"{module}.weight"]
                tensors.update(_layer(module, q, s, int8))
    config["quantization_config"] = _config(int8, list(dict.fromkeys(ignore)))


def _layer(module: str, q: Tensor, scale: Tensor, int8: Held) -> dict[str, Tensor]:
    scale = scale if scale.dim() == 2 else scale.unsqueeze(1)
    if int8.mode == "dynamic":
        return {f"{module}.weight": q, f"{module}.weight_scale": scale}
    return {
        f"{module}.weight_packed": packed(q),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(q.shape),
    }


def packed(q: Tensor) -> Tensor:
    """int8 [N, K] as int32 [N, ceil(K / 4)]: values plus 128, the first in the lowest byte, zeros behind the last."""
    unsigned = (q.to(torch.int16) + 128).to(torch.uint8)
    filled = torch.nn.functional.pad(unsigned, (0, -q.shape[1] % 4))
    return filled.contiguous().view(torch.int32)


def _config(int8: Held, ignore: list[str]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    strategy = "group" if int8.group else "channel"
    weights = {**common, "strategy": strategy, "group_size": int8.group, "dynamic": False}
    inputs = {**common, "strategy": "token", "dynamic": True} if int8.mode == "dynamic" else None
    kind = "int-quantized" if inputs else "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": kind}},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
