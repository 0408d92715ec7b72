"""The state of a run as named tensors and plain values, and back: what a checkpoint holds.

Names are the plain model's parameter names, so fused and torch kernels, compiled and eager, and any mesh read each
other's checkpoints. What a process holds is given as pieces of those tensors (parallel.Layout): it writes its own and
reads its own, and no process ever holds another's.
"""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.train.checkpoint import CheckpointError, Stored
from fastlm.train.optim import Several
from fastlm.train.parallel import Layout
from fastlm.train.pieces import Piece, label, plain_name
from fastlm.train.ranks import Ranks, SingleProcess


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers() if name in kept}


def model_pieces(layout: Layout) -> dict[str, Piece]:
    """Parameters and persistent buffers by name, tied ones once; without those that LoRA keeps apart."""
    out = tensor_pieces(layout, layout.params)
    out.update({n: Piece.whole(b) for n, b in _buffers(layout.model).items()})
    apart: frozenset[str] = getattr(layout.model, "saved_apart", frozenset())  # type: ignore[assignment]
    return {name: piece for name, piece in out.items() if plain_name(name) not in apart}


def tensor_pieces(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """The pieces of tensors that are cut as the parameters of the same names."""
    return {
        k: piece for name, t in tensors.items() for k, piece in label(name, layout.pieces(name, t.detach())).items()
    }


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The same of a model that no mesh has cut, whole."""
    return {name: piece.tensor for name, piece in model_pieces(Layout(model, SingleProcess())).items()}


def _compare(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], where: object) -> None:
    """CheckpointError unless names and shapes are the same."""
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(f"{where} is of another model: it lacks {missing[:3]} and has {extra[:3]} besides")
    for name, shape in own.items():
        if given[name] != shape:
            raise CheckpointError(f"{where}: {name} is {list(given[name])}, the model needs {list(shape)}")


def fill(pieces: Mapping[str, Piece], stored: Stored, elsewhere: frozenset[str] = frozenset()) -> None:
    """Read the pieces out of stored tensors of the same names; CheckpointError where they are of another model.

    `elsewhere` are names of tensors that other stages hold."""
    given = {n: stored.shape(n) for n in stored.names() if n not in elsewhere}
    _compare({plain_name(n): p.shape for n, p in pieces.items()}, given, stored)
    with torch.no_grad():
        for name, piece in pieces.items():
            piece.tensor.copy_(stored.read(plain_name(name), piece.offset, tuple(piece.tensor.shape)))


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Whole tensors by name, which come from `where`, into a model that no mesh has cut."""
    own = model_tensors(model)
    _compare({n: tuple(t.shape) for n, t in own.items()}, {n: tuple(t.shape) for n, t in tensors.items()}, where)
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(tensors[name])


def optimizer_pieces(layout: Layout, optimizer: Several) -> dict[str, Piece]:
    states = optimizer.state
    out: dict[str, Piece] = {}
    for name, p in layout.params.items():
        for key, value in sorted(states.get(p, {}).items()):  # in one order, whatever order a resume read them in
            if isinstance(value, Tensor):
                cut = value.shape == p.shape and value.dim() > 0
                out |= label(f"{name}/{key}", layout.pieces(name, value) if cut else [layout.scalar(name, value)])
    return out


def load_optimizer(layout: Layout, optimizer: Several, stored: Stored) -> None:
    held = {id(p): part for part in optimizer.parts for group in part.param_groups for p in group["params"]}
    for part in optimizer.parts:
        part.state.clear()
    for full in stored.names():
        name, key = full.rsplit("/", 1)
        if name in layout.elsewhere:
            continue
        p = layout.params[name]
        if stored.shape(full) == layout.shape(name) and p.dim() > 0:
            value = torch.empty_like(p.detach())
            for piece in layout.pieces(name, value):
                piece.tensor.copy_(stored.read(full, piece.offset, tuple(piece.tensor.shape)))
        else:
            value = stored.read(full).to(p.device if key != "step" or p.is_cuda else "cpu")
        held[id(p)].state[p][key] = value


def random_tensors(rank: int) -> dict[str, Piece]:
    """The generators of this process: PyTorch's, and Python's and numpy's, which one's own loss may draw from. The data
    and the fused kernels' masks need none."""
    out = {f"{rank}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        out[f"{rank}/cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        out[f"{rank}/mps"] = torch.mps.get_rng_state()
    for name, value in (("python", random.getstate()), ("numpy", np.random.get_state(legacy=False))):
        text = json.dumps(value, default=lambda array: array.tolist())
        out[f"{rank}/{name}"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return {name: Piece.whole(t) for name, t in out.items()}


def load_random(stored: Stored, rank: int) -> bool:
    """This rank's generators as they were; False where the checkpoint is of fewer ranks and has none for it."""
    if f"{rank}/cpu" not in stored.names():
        return False
    torch.set_rng_state(stored.read(f"{rank}/cpu"))
    if f"{rank}/cuda" in stored.names() and torch.cuda.is_available():
        torch.cuda.set_rng_state(stored.read(f"{rank}/cuda"))
    if f"{rank}/mps" in stored.names() and torch.backends.mps.is_available():
        torch.mps.set_rng_state(stored.read(f"{rank}/mps"))
    if f"{rank}/python" in stored.names():  # an earlier version saved neither
        version, numbers, gauss = json.loads(stored.read(f"{rank}/python").numpy().tobytes())
        random.setstate((version, tuple(numbers), gauss))
        found = json.loads(stored.read(f"{rank}/numpy").numpy().tobytes())
        found["state"] = {k: np.array(v, np.uint32) if k == "key" else v for k, v in found["state"].items()}
        np.random.set_state(found)
    return True


def surroundings(ranks: Ranks) -> dict[str, Any]:
    """What must be the same, besides configuration and kernels, for a resume to be exact."""
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    return {"ranks": ranks.size, "threads": torch.get_num_threads(), "versions": versions}


def moved(saved: Mapping[str, Any], ranks: Ranks) -> list[str]:
    """What differs of them from those of a checkpoint, as `name: then -> now`."""
    flat = lambda found: {k: found.get(k) for k in ("ranks", "threads")} | dict(found.get("versions", {}))
    then, now = flat(saved), flat(surroundings(ranks))
    return [f"{name}: {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]


def seed_all(seed: int, rank: int = 0) -> None:
    """Rank 0's seed on all ranks draws the same weights; later each rank's own makes PyTorch's dropout differ."""
    torch.manual_seed(seed + 1000003 * rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
