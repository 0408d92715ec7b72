"""The state of a run as named tensors and plain values, and back: what a checkpoint holds.

Names are the plain model's parameter names, so fused and torch kernels, compiled and eager, and any mesh read each
other's checkpoints. A sharded parameter (DTensor) is gathered when saved and cut again when loaded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.train.checkpoint import CheckpointError
from fastlm.train.optim import Several


def _full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[no-any-return]


def _like(value: Tensor, like: Tensor) -> Tensor:
    """`value` on like's device, and cut as it is."""
    if hasattr(like, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return value.to(like.device)


def names_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once; without those that LoRA keeps apart."""
    out: dict[str, Tensor] = dict(model.named_parameters())
    kept = model.state_dict(keep_vars=True)
    out.update({name: b for name, b in model.named_buffers() if name in kept})
    apart: frozenset[str] = getattr(model, "saved_apart", frozenset())  # type: ignore[assignment]
    return {name: t for name, t in out.items() if name not in apart}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: _full(t.detach()) for name, t in names_of(model).items()}


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    own = names_of(model)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(f"{where} is of another model: it lacks {missing[:3]} and has {extra[:3]} besides")
    with torch.no_grad():
        for name, t in own.items():
            if tensors[name].shape != t.shape:
                shapes = f"{list(tensors[name].shape)}, the model needs {list(t.shape)}"
                raise CheckpointError(f"{where}: {name} is {shapes}")
            t.copy_(_like(tensors[name], t))


def optimizer_tensors(model: nn.Module, optimizer: Several) -> dict[str, Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": _full(value.detach())
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(model: nn.Module, optimizer: Several, tensors: Mapping[str, Tensor]) -> None:
    params = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, key = name.rsplit("/", 1)
        p = params[owner]
        states.setdefault(owner, {})[key] = _like(value.clone(), p) if value.shape == p.shape else value.clone()
    for part in optimizer.parts:
        for group in part.param_groups:
            for p in group["params"]:
                part.state.pop(p, None)
    for owner, state in states.items():
        p = params[owner]
        for part in optimizer.parts:
            if any(p is q for group in part.param_groups for q in group["params"]):
                fresh = {k: v.to(p.device) if k == "step" and p.is_cuda else v for k, v in state.items()}
                part.state[p] = fresh


def random_tensors() -> dict[str, Tensor]:
    """PyTorch's generators of this process; the data and the fused kernels' masks need none."""
    out = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def load_random(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def seed_all(seed: int, rank: int = 0) -> None:
    """Rank 0's seed on all ranks draws the same weights; later each rank's own makes PyTorch's dropout differ."""
    torch.manual_seed(seed + 1000003 * rank)
    random.seed(seed)


def state_values(value: Any) -> Any:
    """Numbers out of tensors, for state.json."""
    return value.item() if isinstance(value, Tensor) else value
