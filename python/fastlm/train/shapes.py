"""A model's shape as flags say it: --shapes of layers that differ, and fields that the shape leaves to others."""

from __future__ import annotations

import re
from typing import Any

from fastlm.data.errors import InputError
from fastlm.models.gpt import GPTConfig


def parsed(text: str) -> tuple[tuple[int, ...], ...]:
    """The layers of --shapes; InputError for what it cannot be."""
    layers = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}/[0-9]{1,9}", layer) for layer in layers):
        raise InputError(
            f"--shapes must be heads/kv-heads/hidden of each layer, such as 4/4/352,2/2/128; it is {text!r}"
        )
    return tuple(tuple(map(int, layer.split("/"))) for layer in layers)


def told_shape(shape: GPTConfig) -> dict[str, Any]:
    """Fields that say of a model what its configuration leaves to others; None where layers differ, which --shapes tells."""
    differ = bool(shape.shapes)
    return {
        "kv_heads": None if differ else shape.kv_heads or shape.heads,
        "hidden": None if differ else shape.mlp_width,
        "head_size": shape.size,
        "shapes": shapes_text(shape),
    }


def shapes_text(shape: GPTConfig) -> str:
    """`--shapes` of a model."""
    return ",".join("/".join(map(str, layer)) for layer in shape.shapes)
