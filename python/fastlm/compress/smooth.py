"""SmoothQuant (Xiao et al. 2023): outliers of activations moved into weights before both become int8.

Channel j of a norm's output is divided by s_j, which goes into the norm's weight, and column j of the linear layers that read
it is multiplied by s_j: the float function stays, and both sides are easier to quantise. With X the layers' input and W their
weights, s_j = max|X_j|^a / max|W_j|^(1 - a), rounded to a power of two, so that nothing in float is rounded anew.

Which layers read a norm is told by following its output through a real forward, not by names. A norm is smoothed only
if all that reads its output are layers that become int8; what is not smoothed is said with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlm._torch import tree_leaves, unseen_by_modes

# Calls whose result is the same rows, and those that read no value.
_SAME = ("view", "reshape", "flatten", "unflatten", "contiguous", "unsqueeze", "detach", "clone")
_ASKS = ("__get__", "size", "dim", "numel", "stride", "is_floating_point", "data_ptr", "is_contiguous", "ndimension")
AGREES = 1e-4  # by how much, of the largest output, a smoothed model may differ in float32: other orders of sums


@dataclass
class Smoothed:
    """What ``smooth`` did: ``folded``: (norm, layers, largest factor); ``left``: (layer, reason)."""

    alpha: float
    folded: list[tuple[str, tuple[str, ...], float]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


@torch.no_grad()
def smooth(model: nn.Module, batches: Sequence[Any], layers: Iterable[str], alpha: float = 0.5) -> Smoothed:
    """Smooths ``model`` in place for the linear layers at the paths ``layers``, on the activations that ``batches`` give.

    Args:
        model: called as ``model(batch)``; it runs in eval mode.
        batches: inputs of a forward each; at least one.
        layers: paths of the ``nn.Linear`` modules that are to become int8.
        alpha: how much of the difficulty moves into the weights, from 0 to 1.

    Raises:
        ValueError: alpha outside 0 ... 1, no batch, a path that is no ``nn.Linear``, or a model whose outputs hold no
            floating tensor, by which it could be checked.
        RuntimeError: the smoothed model computes something else, so that its data flow is not what was seen; the model is
            as before.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth: alpha is {alpha}; it must be from 0 to 1")
    if not batches:
        raise ValueError("smooth: batches is empty; at least one input is needed to see the activations")
    named = dict(model.named_modules())
    wanted = {path: named.get(path) for path in layers}
    if wrong := [path for path, m in wanted.items() if not isinstance(m, nn.Linear)]:
        raise ValueError(f"smooth: layers holds {wrong[0]!r}, which is no nn.Linear of the model")
    was, _ = model.training, model.eval()
    try:
        flow = _Flow(model, wanted)  # type: ignore[arg-type]
        before = flow.watch(batches)
        if not before:
            raise ValueError(
                "smooth: model gives no floating tensor (in tuples, mappings or dataclasses), so a smoothed one could not "
                "be checked against it; nothing was changed"
            )
        made = Smoothed(alpha)
        undo = _fold(named, flow, made)
        after = _outputs(model(batches[0]))
        if len(before) != len(after) or not all(_agree(a, b) for a, b in zip(before, after, strict=True)):
            for tensor, value in reversed(undo):  # a tensor that was folded twice has its first value last
                tensor.copy_(value)
            raise RuntimeError(
                "smooth: the smoothed model gives other outputs, so something reads a norm in a way that was not seen; "
                "nothing was changed"
            )
    finally:
        model.train(was)
    return made


def _fold(named: dict[str, nn.Module], flow: _Flow, made: Smoothed) -> list[tuple[Tensor, Tensor]]:
    """Folds what can be folded; returns the tensors that changed with their old values."""
    undo: list[tuple[Tensor, Tensor]] = []
    done: set[str] = set()
    for path, readers in flow.readers.items():
        mine = [reader for reader in readers if reader in flow.wanted]
        if not mine:
            continue
        others = sorted(readers - set(mine))
        if others:
            made.left += [(layer, f"its norm {path} is read by {others[0]} too") for layer in mine]
        else:
            norm, linears = named[path], [named[layer] for layer in mine]
            most = torch.stack([flow.largest[layer] for layer in mine]).amax(0)
            scale = factors(most, [m.weight for m in linears], made.alpha)  # type: ignore[misc]
            tensors = [t for t in (norm.weight, norm.bias if hasattr(norm, "bias") else None) if t is not None]
            undo += [(t, t.clone()) for t in (*tensors, *(m.weight for m in linears))]  # type: ignore[operator,misc]
            for t in tensors:
                t.div_(scale)  # type: ignore[operator]
            for m in linears:
                m.weight.mul_(scale)  # type: ignore[operator,union-attr]
            made.folded.append((path, tuple(mine), float(scale.max())))
        done.update(mine)
    made.left += [(layer, "no norm gives its input") for layer in flow.wanted if layer not in done]
    return undo


def factors(most: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s [K] of the largest magnitudes ``most`` [K] of the input and weights [N, K]; 1 for a channel that is zero in either."""
    heavy = torch.stack([w.abs().amax(0) for w in weights]).amax(0).float()
    most = most.float()
    s = most.pow(alpha) / heavy.pow(1 - alpha)
    s = torch.exp2(torch.log2(s).round())
    return torch.where((most > 0) & (heavy > 0) & s.isfinite() & (s > 0), s, 1.0).to(weights[0].dtype)


class _Flow(TorchFunctionMode):
    """Sees who reads the output of each norm: paths of linear layers, and names of functions for all else."""

    def __init__(self, model: nn.Module, wanted: dict[str, nn.Module]) -> None:
        super().__init__()
        self.model, self.wanted = model, wanted
        self.readers: dict[str, set[str]] = {}
        self.largest: dict[str, Tensor] = {}
        self._from: dict[
            int, tuple[str, Tensor]
        ] = {}  # by id: whose output, and the tensor, held so that no id is reused
        self._weights = {id(m.weight): path for path, m in model.named_modules() if isinstance(m, nn.Linear)}

    def watch(self, batches: Sequence[Any]) -> list[Tensor]:
        """Runs the batches; returns the outputs of the first."""
        hooks = [m.register_forward_hook(self._marks(path)) for path, m in self.model.named_modules() if _is_norm(m)]
        hooks += [m.register_forward_pre_hook(self._measures(path)) for path, m in self.wanted.items()]
        try:
            first: list[Tensor] = []
            for batch in batches:
                with self:
                    outputs = _outputs(self.model(batch))
                for out in outputs:
                    if id(out) in self._from:
                        self.readers[self._from[id(out)][0]].add("the model's caller")
                self._from.clear()
                first = first or outputs
        finally:
            for hook in hooks:
                hook.remove()
        return first

    def _marks(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.readers.setdefault(path, set())
            if isinstance(out, Tensor):
                self._from[id(out)] = (path, out)
            else:
                self.readers[path].add("what takes its several outputs")

        return hook

    def _measures(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            with unseen_by_modes():
                most = args[0].abs().flatten(0, -2).amax(0)
                self.largest[path] = torch.maximum(self.largest[path], most) if path in self.largest else most

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in leaves:
            if id(t) not in self._from or self._from[id(t)][1] is not t:
                continue
            norm, name = self._from[id(t)][0], getattr(func, "__name__", str(func))
            if name in _ASKS:
                continue
            if name in _SAME and isinstance(out, Tensor) and out.shape[-1:] == t.shape[-1:]:
                self._from[id(out)] = (norm, out)
                continue
            layer = next((self._weights[id(w)] for w in leaves if id(w) in self._weights), None)
            self.readers[norm].add(layer if layer is not None else f"the function {name}")
        return out


def _is_norm(module: nn.Module) -> bool:
    """Whether a module ends in a product with its weight [K] (and a sum with its bias), as norms do. What only looks so
    fails the comparison of outputs."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    plain = set(own) in ({"weight"}, {"weight", "bias"}) and all(p.dim() == 1 for p in own.values())
    return plain and not module._modules and "norm" in type(module).__name__.lower() and not module._buffers


def _outputs(out: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in order: of sequences, mappings and dataclasses in one another."""
    found: list[Tensor] = []
    for leaf in tree_leaves(dict(out) if hasattr(out, "items") else out):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif hasattr(leaf, "items"):
            found += _outputs(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _outputs([getattr(leaf, f.name) for f in fields(leaf)])
    return found


def _agree(before: Tensor, after: Tensor) -> bool:
    """Whether finite values differ by rounding alone and infinities and NaN are the same at the same places."""
    if before.shape != after.shape:
        return False
    finite = before.isfinite()
    if not torch.equal(finite, after.isfinite()):
        return False
    rest = torch.allclose(before[~finite], after[~finite], rtol=0, atol=0, equal_nan=True)
    if not rest or not finite.any():
        return rest
    old, new = before[finite].double(), after[finite].double()
    limit = max(AGREES, 4 * torch.finfo(before.dtype).eps) * float(old.abs().max())
    return float((old - new).abs().max()) <= limit
