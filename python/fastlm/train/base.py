"""The model that a run starts from, made of named tensors; and its shape alone, from a folder's config and headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlm import compress
from fastlm.compress import Held
from fastlm.data.errors import InputError
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.train import checkpoint, export, state

DTYPES = {label: dtype for dtype, label in checkpoint.DTYPES.items()}


def build(shape: GPTConfig, tensors: Mapping[str, Tensor], int8: Held | None, where: object) -> GPT:
    """A GPT of these tensors, which come from `where`, masks among them. Layers of `int8` hold its integers, whose names and
    scales are among the tensors: no float matrix is ever made of them.

    Raises CheckpointError or InputError where shape and tensors do not belong together.
    """
    tensors, masks = compress.split(tensors)
    model = GPT(shape) if int8 is None else _around(shape, int8, where)
    if tensors:
        state.load_model(model, tensors, where)
    compress.attach(model, masks)
    return model


def _around(shape: GPTConfig, int8: Held, where: object) -> GPT:
    """A model with these int8 layers, whose other parameters hold nothing yet."""
    with torch.device("meta"):
        model = GPT(shape)
    try:
        int8.into(model)
    except ValueError as error:
        raise InputError(f"{where} is of another model: {error}") from None
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones once
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if p not in made:
                    made[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                module._parameters[name] = made[p]
    return model


def read_shape(path: Path) -> tuple[GPTConfig, Held | None]:
    """The shape of the model that `export.read_model` would read, and its int8 layers as meta tensors. No weight is read.

    Raises InputError for a folder that is no run, checkpoint or exported folder, or a model that the plain GPT cannot be.
    """
    run, config, shape = export.described(path)
    from safetensors import SafetensorError, safe_open

    file = run / "model.safetensors"
    try:
        facts = config["compressed"]["int8"] if run == path and config.get("compressed") else None
        if facts is None:
            return shape, None
        with safe_open(file, "pt") as found:
            slices = {name: found.get_slice(name) for name in found.keys()}  # noqa: SIM118
            dtypes = {name: DTYPES[one.get_dtype()] for name, one in slices.items()}
            tensors = {n: torch.empty(one.get_shape(), dtype=dtypes[n], device="meta") for n, one in slices.items()}
        return shape, Held.of(tensors, facts)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
