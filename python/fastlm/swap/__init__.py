"""fastlm.swap: fused kernels in place of PyTorch's, by changing the class of modules and nothing else.

``swap(model)`` asks every rule (``rules.RULES``) about every module. What a rule rewrites gives the module a class made
by ``classes.py``: a subclass of its own that can be imported, pickled and copied. Parameters, hooks, names and the
module object itself stay. What looks replaceable and is not is listed with the reason.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm import backend, rng
from fastlm.swap import attention, blocks, classes, dropout, interface, multihead, norms  # noqa: F401  (they register their rules)
from fastlm.swap.explain import Explanation, explain
from fastlm.swap.report import Report, Row
from fastlm.swap.rules import RULES, Reason, Rewrite

__all__ = ["Explanation", "Report", "Row", "explain", "swap", "unswap"]


def swap(model: nn.Module) -> Report:
    """Changes modules of ``model`` to subclasses that run fastlm's ops. Swapping twice changes nothing more.

    Replaced are norms over the last axis (LayerNorm, RMSNorm and classes that compute the same), dropout, in blocks of
    any structure the chain dropout, residual add, norm, and attention: where F.scaled_dot_product_attention is called,
    nn.MultiheadAttention, and the models of transformers ("sdpa" and "eager"). Results follow PyTorch's within rounding;
    dropout draws other masks than ``nn.Dropout`` (see ``fastlm.rng.set``). Changes made to the model later (``p``,
    ``eval()``, hooks) hold.

    Returns a report that prints as a table: module, was, is, backend; and what could not be swapped, and why.

    Raises TypeError if ``model`` is not an ``nn.Module``.
    """
    _check(model, "swap")
    report = Report()
    original: type[nn.Module]
    for path, module in model.named_modules():
        cls = type(module)
        if issubclass(cls, classes.Swapped):
            original = classes.original(cls)
            rewrites = [rule.describe(module, facts) for rule, facts in classes.parts(cls)]
        else:
            rewrites, reasons = _match(module, path)
            report.left += [(path, type(module).__name__, reason.why) for reason in reasons]
            if not rewrites:
                continue
            original = cls
            try:
                module.__class__ = classes.make(cls, tuple((rewrite.rule, rewrite.facts) for rewrite in rewrites))
            except (classes.Unreadable, TypeError) as error:
                report.left.append((path, original.__name__, str(error)))
                continue
        report.rows += [Row(path, _name(original), r.what, *_backend(module, model, r)) for r in rewrites]
    return report


def unswap(model: nn.Module) -> int:
    """Gives every swapped module its original class again, with its current parameters. Returns how many there were.

    Raises TypeError if ``model`` is not an ``nn.Module``.
    """
    _check(model, "unswap")
    count = 0
    for module in model.modules():
        cls = type(module)
        if issubclass(cls, classes.Swapped):
            module.__class__ = classes.original(cls)
            count += 1
    rng.unset(model)
    return count


def _check(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastlm.{name}: model is a {type(model).__name__}; it must be an nn.Module")


def _match(module: nn.Module, path: str) -> tuple[list[Rewrite], list[Reason]]:
    rewrites, reasons = [], []
    for rule in RULES:
        found = rule.match(module, path)
        if isinstance(found, Rewrite):
            rewrites.append(found)
        elif isinstance(found, Reason):
            reasons.append(found)
    return rewrites, reasons


def _name(cls: type) -> str:
    return cls.__name__ if cls.__module__.startswith("torch.nn") else f"{cls.__module__}.{cls.__name__}"


def _backend(module: nn.Module, model: nn.Module, rewrite: Rewrite) -> tuple[str, str]:
    """What ``backend.which`` says of a small call with the parameters' device and dtype."""
    like = next((p for p in (*module.parameters(), *model.parameters()) if p.is_floating_point()), None)
    device = like.device if like is not None else torch.device("cpu")
    if device.type == "meta":
        return "?", "the model is on the meta device"
    x: Tensor = torch.empty(rewrite.example, device=device, dtype=like.dtype if like is not None else None)
    try:
        choice = backend.which(rewrite.op, *((x,) * rewrite.inputs))
    except backend.BackendError as error:
        return "none", str(error)
    if rewrite.op == "attention" and (why := attention.why_reference(choice)):
        return "torch", f"PyTorch's own attention runs: {why}"
    return choice.backend, "; ".join([choice.reason, *(f"not {name}: {why}" for name, why in choice.rejected)])
