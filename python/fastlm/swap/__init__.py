"""fastlm.swap: fused kernels in place of PyTorch's, by changing the class of modules and nothing else.

``swap(model)`` asks every rule (``order.RULES``) about every module. What a rule rewrites gives the module a class made
by ``classes.py``: a subclass of its own that can be imported, pickled and copied. Parameters, hooks, names and the
module object itself stay. What looks replaceable and is not is listed with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import backend, rng
from fastlm.compress import quantize
from fastlm.swap import attention, classes, instance, seen, silent
from fastlm.swap.explain import Explanation, explain
from fastlm.swap.order import RULES
from fastlm.swap.report import Report, Row
from fastlm.swap.rules import Reason, Rewrite

__all__ = ["Explanation", "Report", "Row", "explain", "swap", "unswap"]


def swap(
    model: nn.Module,
    *,
    verify: Any = None,
    dry_run: bool = False,
    int8: str | None = None,
    include: quantize.Patterns = None,
    exclude: quantize.Patterns = None,
    group: int | None = None,
    rows: int | None = None,
    only_faster: bool = True,
) -> Report:
    """Changes modules of ``model`` to subclasses that run fastlm's ops. Swapping twice changes nothing more.

    Replaced are norms over the last axis (LayerNorm, RMSNorm, classes that compute the same, calls of their functions),
    dropout, in blocks of any structure the chain dropout, residual add, norm, and attention: where
    F.scaled_dot_product_attention is called, where it is written out, nn.MultiheadAttention, and the models of
    transformers ("sdpa" and "eager"). Results follow PyTorch's within rounding, and have PyTorch's dtypes, under autocast
    too; dropout draws other masks than ``nn.Dropout`` (see ``fastlm.rng.set``). Changes made to the model later (``p``,
    ``eval()``, hooks) hold.

    Args:
        model: any module. An error on the way leaves it as it was.
        verify: inputs of ``model`` (a tensor, a tuple of arguments, or a dict of named ones) to check the swapped model
            on, before anything changes: copies of the model run, so it needs three times its memory. In evaluation
            outputs and gradients are held to twice PyTorch's error against float64; in training the kernels to the
            reference backend with equal seeds. A rule that disagrees is left out and named in ``left``.
        dry_run: only reports what would be done.
        int8: also make linear layers int8. "dynamic" and "weight_only" are conversions, which change parameters: each layer
            becomes an ``fastlm.nn.Int8Linear`` in place, for inference or as the frozen base of adapters. "training" makes it
            an ``Int8TrainingLinear``, whose parameters stay. Embeddings, the output head and norms stay in float.
        include, exclude: of int8, patterns of paths: "blocks.*.mlp.*", "blocks.0" with all below it, or a last name, "qkv".
        group: of int8="weight_only": columns that share a scale, 32, 64 or 128; None: a whole row.
        rows, only_faster: each shape of layer is timed once with so many rows (None: 512 for "dynamic", 1 for "weight_only",
            2048 for "training"), and stays in float where int8 is slower; only_faster=False converts and times nothing.

    Returns a report that prints as a table: module, was, is, backend; and what could not be swapped, and why. After a
    forward ``report.seen`` says how often the op ran in each module, and why not.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``verify`` was given for a model that cannot be copied, or gives no tensor of floating numbers; int8 or
            what belongs to it is none of those above, or a pattern matches no linear layer.
    """
    _check(model, "swap")
    conversion = None
    if int8 is not None:
        conversion = quantize.plan(
            model, int8, include=include, exclude=exclude, group=group, rows=rows, only_faster=only_faster
        )
    elif include is not None or exclude is not None or group is not None:
        raise ValueError("fastlm.swap: include, exclude and group say which layers become int8; int8 is None")
    refused: dict[str, str] = {}
    if verify is not None:
        from fastlm.swap import verify as verifying

        refused = verifying.refused_rules(model, verify, lambda m, skip: _apply(m, skip), unswap)
    report = _apply(model, frozenset(refused), refused, dry_run)
    if conversion is not None:
        report.converted += conversion.converted
        report.rows_timed = conversion.rows
        report.left += conversion.left
        if not dry_run:
            quantize.convert(conversion)
    return report


def _apply(
    model: nn.Module,
    skip: frozenset[str] = frozenset(),
    refused: dict[str, str] | None = None,
    dry_run: bool = False,
) -> Report:
    """Swaps by all rules but ``skip``; undoes what it did if it fails."""
    report = Report()
    group = seen.Group()
    undo: list[Callable[[], None]] = []
    try:
        for path, module in list(model.named_modules()):
            _one(model, path, module, skip, report, group, undo, dry_run)
    except BaseException:
        for back in reversed(undo):
            back()
        raise
    report.left += [("", f"rule {rule!r}", why) for rule, why in (refused or {}).items()]
    if group.members and not dry_run:
        seen.watch(model, group)
    return report


def _one(
    model: nn.Module,
    path: str,
    module: nn.Module,
    skip: frozenset[str],
    report: Report,
    group: seen.Group,
    undo: list[Callable[[], None]],
    dry_run: bool,
) -> None:
    cls = type(module)
    if issubclass(cls, classes.Swapped) and any(rule.name in skip for rule, _ in classes.parts(cls)):
        own = instance.own_forward(module)
        if own and not instance.holds(module, cls):
            why = f"it stays swapped: a forward of its own ({own}) may call the swapped one"
            report.left.append((path, cls.__name__, why))
        elif not dry_run:
            undo.append(functools.partial(_swapped_again, module, cls, dict(module.__dict__)))
            _take_off(module)
            cls = type(module)
    if issubclass(cls, classes.Swapped):
        was = classes.original(cls)
        rewrites = [rule.describe(module, facts) for rule, facts in classes.parts(cls)]
    else:
        was = instance.inner_class(module)
        rewrites, reasons = _match(module, path, skip)
        report.left += [(path, cls.__name__, reason.why) for reason in reasons]
        if not rewrites:
            return
        own = instance.own_forward(module)
        if own and not instance.holds(module, cls):
            why = f"a forward of its own ({own}) stands in it, and its class's is not called; swap before that is put there"
            report.left.append((path, cls.__name__, why))
            return
        try:
            made = classes.make(was, tuple((rewrite.rule, rewrite.facts) for rewrite in rewrites))
            made = instance.around(module, made)
        except (classes.Unreadable, TypeError) as error:
            report.left.append((path, was.__name__, str(error)))
            return
        if not dry_run:
            undo.append(functools.partial(_put_back, module, cls))
            module.__class__ = made
            undo += instance.rebind(module, cls, made)
            classes.mark(module)
    report.rows += [Row(path, _name(was), r.what, *_backend(module, model, r)) for r in rewrites]
    if not dry_run:
        found = module.__dict__.setdefault(seen.ATTRIBUTE, seen.Seen(path, ", ".join(r.what for r in rewrites), group))
        if found.group is group:
            group.members.append(found)
        report.seens.append(found)


def _put_back(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    classes.forget(module)


def unswap(model: nn.Module) -> int:
    """Gives every swapped module its original class again, with its current parameters. Returns how many there were.

    A layer that ``swap(model, int8=...)`` converted is a float layer again, of the dtype it had. Its values are the
    dequantised ones: what rounding to int8 took is gone.

    What was put around modules since (FSDP2, parametrisations, accelerate's hooks) stays, around the original.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or an int8 layer of it is a subclass of ``Int8Linear`` that has no float
            form; nothing is changed then.
        RuntimeError: a module has a forward of its own that may keep the swapped one where it cannot be replaced; nothing
            is changed then.
    """
    _check(model, "unswap")
    swapped = [(path, m) for path, m in model.named_modules() if issubclass(type(m), classes.Swapped)]
    for path, module in swapped:
        own = instance.own_forward(module)
        if own and not instance.holds(module, type(module)):
            raise RuntimeError(
                f"fastlm.unswap: {path or 'the model'} has a forward of its own ({own}), which may call the swapped one; "
                f"take it off first (accelerate: remove_hook_from_module), then call unswap again; nothing was changed"
            )
    quantize.restorable(model, lambda cls: classes.original(cls) if issubclass(cls, classes.Swapped) else cls)
    for _, module in swapped:
        _take_off(module)
    rng.unset(model)
    return len(swapped) + quantize.restore(model)


def _take_off(module: nn.Module) -> None:
    """Gives a swapped module its original class again."""
    cls = type(module)
    before = classes.original(cls)
    instance.rebind(module, cls, before)
    module.__class__ = before
    classes.forget(module)


def _swapped_again(module: nn.Module, cls: type[nn.Module], state: dict[str, Any]) -> None:
    """Undoes ``_take_off``."""
    instance.rebind(module, type(module), cls)
    module.__class__ = cls
    module.__dict__.update({name: state[name] for name in classes.PUT if name in state})


def _check(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastlm.{name}: model is a {type(model).__name__}; it must be an nn.Module")


def _match(module: nn.Module, path: str, skip: frozenset[str] = frozenset()) -> tuple[list[Rewrite], list[Reason]]:
    rewrites, reasons = [], []
    if isinstance(module, torch.jit.ScriptModule):
        script = (
            "a module of TorchScript, whose code is fixed; swap the model before torch.jit.script or torch.jit.trace"
        )
        return [], [Reason(f"it is {script}")] if path == "" or _outermost(module) else []
    for rule in RULES:
        if rule.name in skip:
            continue
        found = rule.match(module, path)
        if isinstance(found, Rewrite):
            rewrites.append(found)
        elif isinstance(found, Reason):
            reasons.append(found)
    if not any(r.op == "attention" for r in rewrites) and not any("attention" in r.why.lower() for r in reasons):
        written_out = silent.reason(module)
        reasons += [written_out] if written_out is not None else []
    return rewrites, reasons


def _outermost(module: torch.jit.ScriptModule) -> bool:
    """Whether a norm, dropout or attention might be meant: an innermost module names what it was."""
    return next(module.children(), None) is None and "norm" in getattr(module, "original_name", "").lower()


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
