"""``swap(model, verify=inputs)``: the swapped model beside the original, on copies, before the model itself changes.

In evaluation, where nothing is dropped, the outputs and gradients of both are held against a float64 copy: the swapped
one's error may be twice the original's and a unit in the last place. In training mode the kernels are held to the reference
backend, which draws the same masks from the same seeds. Errors are relative to each tensor's largest number and pooled over
all gradients, since a vector of few elements breaks any such rule by chance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import backend
from fastlm.swap.order import RULES

_Swap = Callable[[nn.Module, frozenset[str]], Any]
Found = dict[str, list[Tensor]]


def refused_rules(model: nn.Module, inputs: Any, swap: _Swap, unswap: Callable[[nn.Module], int]) -> dict[str, str]:
    """The rules that must not be applied to ``model``, each with what its results were. Leaves ``model`` as it is.

    Gradients are taken wherever it is called, under ``torch.no_grad`` too; each run gets inputs of its own. A swapped
    copy that raises disagrees. Raises ValueError if the model or the inputs cannot be copied, or the model gives no
    floating tensor, and what the original raises.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _refused(model, inputs, swap, unswap)


def _refused(model: nn.Module, inputs: Any, swap: _Swap, unswap: Callable[[nn.Module], int]) -> dict[str, str]:
    args, kwargs = _arguments(inputs)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        original = _copy(model)
        unswap(original)
        names = {rule.name for rule in RULES}
        truth = _run(_copy(original).double(), _wide(args), _wide(kwargs), train=False)
        plain = _run(_copy(original), args, kwargs, train=False)

        def disagrees(applied: set[str]) -> str:
            twin = _copy(original)
            swap(twin, frozenset(names - applied))
            try:
                why = _compare(_run(twin, args, kwargs, train=False), plain, truth)
                return why or _training(twin, args, kwargs, plain, truth)
            except Exception as error:  # noqa: BLE001  (told in the report, whatever it is)
                return f"the swapped model raised {type(error).__name__}: {error}"

        whole = disagrees(names)
        if not whole:
            return {}
        refused = {}
        for name in sorted(names):
            if why := disagrees({name}):
                refused[name] = f"verify: undone, since {why}"
        if (why := disagrees(names - set(refused))) or not refused:
            refused = dict.fromkeys(names, f"verify: undone with all others, since together {why or whole}")
    return refused


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"fastlm.swap: verify needs a copy of the model, and copying it failed: {error}") from error


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` made to what its tuples, lists and dicts hold."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_each(v, change) for v in value)
    return {k: _each(v, change) for k, v in value.items()} if isinstance(value, dict) else change(value)


def _wide(value: Any) -> Any:
    return _each(value, lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x)


def _own(value: Any) -> Any:
    """A copy that a run may change, and accumulate gradients in."""

    def copied(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().clone().requires_grad_(x.requires_grad)
        try:
            return copy.deepcopy(x)
        except Exception as error:
            raise ValueError(f"fastlm.swap: verify needs a copy of the inputs, and copying failed: {error}") from error

    return _each(value, copied)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _run(model: nn.Module, args: Any, kwargs: Any, train: bool) -> Found:
    """Outputs, and the gradients of one weighted sum of them."""
    model.train(train)
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(0)
    outputs = list(_tensors(model(*_own(args), **_own(kwargs))))
    if not outputs:
        raise ValueError("fastlm.swap: verify needs a model that returns floating tensors; it returned none")
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for out in outputs:
        if out.requires_grad:
            weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
            loss = loss + (out.double() * weight).mean()
    if loss.requires_grad:
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {"outputs": [out.detach() for out in outputs], "gradients": grads}


def _errors(found: list[Tensor], truth: list[Tensor]) -> tuple[float, float]:
    """(root mean square, largest) of the errors, each relative to the largest number of its tensor.

    A tensor that is nothing beside the others (a bias before a batch norm) is rounding alone, and is held to theirs.
    """
    total, count, largest = 0.0, 0, 0.0
    floor = 1e-3 * max((t[t.isfinite()].abs().max().item() for t in truth if t.isfinite().any()), default=0.0)
    for ours, exact in zip(found, truth):
        finite = exact.isfinite()
        scale = max(exact[finite].abs().max().item(), floor) if finite.any() else 0.0
        if scale == 0:
            continue
        error = (ours.double() - exact.double())[finite].abs() / scale
        if not error.isfinite().all():
            return float("inf"), float("inf")
        total, count = total + error.square().sum().item(), count + error.numel()
        largest = max(largest, error.max().item())
    return (total / max(count, 1)) ** 0.5, largest


def _compare(ours: Found, plain: Found, truth: Found, factor: float = 2.0) -> str:
    for kind in ("outputs", "gradients"):
        if [t.shape for t in ours[kind]] != [t.shape for t in plain[kind]]:
            return f"its {kind} have other shapes than the original's"
        if [t.dtype for t in ours[kind]] != [t.dtype for t in plain[kind]]:
            return f"its {kind} have other dtypes than the original's"
        if not ours[kind]:
            continue
        unit = max(torch.finfo(t.dtype).eps for t in ours[kind])
        got, known = _errors(ours[kind], truth[kind]), _errors(plain[kind], truth[kind])
        for name, a, b in zip(("root mean square", "largest"), got, known):
            if a > factor * b + unit:
                return f"the {name} error of its {kind} is {a:.1e} of their size, PyTorch's {b:.1e}"
    return ""


def _training(twin: nn.Module, args: Any, kwargs: Any, plain: Found, truth: Found) -> str:
    """Why the kernels disagree with the reference backend in training mode, or ""."""
    kernels = _run(twin, args, kwargs, train=True)
    with backend.use("reference"):
        reference = _run(twin, args, kwargs, train=True)
    for kind in ("outputs", "gradients"):
        if not kernels[kind]:
            continue
        unit = max(torch.finfo(t.dtype).eps for t in kernels[kind])
        got, usual = _errors(kernels[kind], reference[kind])[0], _errors(plain[kind], truth[kind])[0]
        if got > 8 * usual + unit and got > 4 * _trained_error(twin, args, kwargs, reference, kind):
            return f"in training its {kind} are {got:.1e} of their size from those of the reference backend"
    return ""


def _trained_error(twin: nn.Module, args: Any, kwargs: Any, reference: Found, kind: str) -> float:
    """The reference backend's own error in training, where statistics of the batch (BatchNorm) may magnify rounding.

    0 where it cannot be told: a dropout that was not swapped draws other masks in float64.
    """
    with backend.use("reference"):
        exact = _run(_copy(twin).double(), _wide(args), _wide(kwargs), train=True)
    error = _errors(reference[kind], exact[kind])[0]
    return error if error < 1e-2 else 0.0
