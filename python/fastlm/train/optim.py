"""Optimizers and learning-rate schedules.

AdamW is PyTorch's fused one. Lion: Chen et al. 2023. Muon: Jordan 2024, momentum made orthogonal by a quintic
Newton-Schulz iteration, for the matrices of the blocks; embeddings, head and vectors stay with AdamW.
Every optimizer leaves parameters and state as they were in a step whose `found_inf` is 1, without a sync.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.data.errors import InputError
from fastlm.train.config import OptimConfig

if TYPE_CHECKING:
    from fastlm.train.parallel import Layout


def rate(config: OptimConfig, step: int) -> float:
    """The learning rate of step 0, 1, ... as a part of the peak."""
    rise = config.rise
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(config.steps - rise, 1)
    low = config.min_lr
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return 1 - (1 - low) * min(done, 1.0)
    if config.schedule == "wsd":
        left = (config.steps - step) / max(config.fall, 1)
        return low + (1 - low) * max(min(left, 1.0), 0.0)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _Own(torch.optim.Optimizer):
    """What Lion and Muon share: `found_inf` and `step` over groups that `update` changes."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            if params:
                self.update(group, params)

    def keep(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf.to(new.device) > 0, old, new)

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError


class Lion(_Own):
    """p -= lr (sign(b1 m + (1 - b1) g) + decay p);  m = b2 m + (1 - b2) g."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        b1, b2 = group["betas"]
        for p in params:
            g, m = p.grad, self.state[p]["momentum"]
            assert g is not None
            move = torch.sign(m.lerp(g, 1 - b1)) + group["weight_decay"] * p
            p.copy_(self.keep(p - group["lr"] * move, p))
            m.copy_(self.keep(m.lerp(g, 1 - b2), m))


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """Matrices [..., m, n] moved towards U V^T of their SVD: five steps of X <- aX + (bA + cA^2)X with A = X X^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(_Own):
    """Nesterov momentum made orthogonal, scaled by sqrt(max(1, rows / columns)). Equal shapes go as one batch.

    A projection that is several matrices in one (queries, keys and values; gate and up) is cut into `parts` first.
    Of a sharded parameter each rank keeps its rows of the momentum; the matrix is gathered, and made orthogonal as a whole.
    """

    def __init__(self, params: Iterable[Any], layout: Layout, lr: float, momentum: float, weight_decay: float) -> None:
        self.layout, self.names = layout, {id(p): n for n, p in layout.params.items()}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": ()})

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        shapes: dict[torch.Size, list[tuple[Tensor, int]]] = defaultdict(list)
        moved: list[list[Tensor]] = []  # of each parameter the parts of its step
        beta = group["momentum"]
        for p in params:
            m, g = self.state[p]["momentum"], p.grad
            assert g is not None
            new = m.lerp(g, 1 - beta)
            m.copy_(self.keep(new, m))
            whole = self.layout.whole(self.names[id(p)], g.lerp(new, beta))
            moved.append([])
            for move in whole.split(group["parts"] or whole.shape[0]):
                shapes[move.shape].append((move, len(moved) - 1))
        for shape, pairs in shapes.items():
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            moves = orthogonal(torch.stack([move for move, _ in pairs])) * scale
            for move, (_, index) in zip(moves, pairs):
                moved[index].append(move)
        for p, parts in zip(params, moved):
            move = self.layout.own(self.names[id(p)], torch.cat(parts))
            p.copy_(self.keep(p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * move, p))


class Several:
    """Optimizers that act as one: Muon for the matrices, AdamW for the rest."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return {p: state for part in self.parts for p, state in part.state.items()}

    def set_found_inf(self, found: Tensor) -> None:
        for part in self.parts:
            part.found_inf = found  # type: ignore[attr-defined]

    def set_rate(self, part: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["peak"] * part

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def decays(name: str, p: Tensor) -> bool:
    return p.ndim >= 2


def make(model: nn.Module, config: OptimConfig, layout: Layout) -> Several:
    """The optimizer of the configuration over what this process holds of a model's parameters, tied ones once."""
    named = list(layout.parameters())
    parts: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        matrices = [(n, p) for n, p in named if p.ndim == 2 and ".blocks." in f".{n}"]
        if not matrices:
            raise InputError(
                "--optimizer muon is for the matrices of modules named `blocks`, and this model has none: "
                "name its blocks so, or choose adamw or lion"
            )
        chosen = {id(p) for _, p in matrices}
        named = [(n, p) for n, p in named if id(p) not in chosen]
        groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        modules = dict(model.named_modules())
        for n, p in matrices:
            owner = modules.get(n.rsplit(".", 2)[0])
            groups[_parts(n, layout.shape(n)[0], owner)].append(p)
        parts.append(
            Muon(
                [{"params": ps, "parts": cut, "peak": config.muon_lr} for cut, ps in groups.items()],
                layout,
                lr=config.muon_lr,
                momentum=0.95,
                weight_decay=config.weight_decay,
            )
        )
    rest = [
        {
            "params": [p for n, p in named if decays(n, p) == decay],
            "weight_decay": config.weight_decay if decay else 0.0,
            "peak": config.lr,
        }
        for decay in (True, False)
    ]
    rest = [group for group in rest if group["params"]]
    if config.optimizer == "lion":
        parts.append(Lion(rest, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay))
    elif rest:
        parts.append(torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, eps=1e-8, fused=True))
    return Several(*parts)


def _parts(name: str, rows: int, owner: nn.Module | None) -> tuple[int, ...]:
    """How a fused projection's rows divide into matrices of their own."""
    if name.endswith("qkv.weight") and hasattr(owner, "kv_heads"):
        heads, kv_heads = int(owner.heads), int(owner.kv_heads)  # type: ignore[union-attr,arg-type]
        size = rows // (
            heads + 2 * kv_heads
        )  # a rank of tp=N knows its own heads alone: the proportions are the whole's
        return (heads * size, kv_heads * size, kv_heads * size)
    if name.endswith("up.weight") and getattr(owner, "gated", False):
        return (rows // 2, rows // 2)
    return ()
