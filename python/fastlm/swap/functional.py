"""Rule: ``F.rms_norm`` and ``F.layer_norm`` in the forward of a module, or in what it calls, become ``ops.norm``.

The call stays where it is and keeps its arguments; only the name is replaced, as ``attention.py`` does. What the op does
not take at a call (several axes, vectors of another dtype than the input) is PyTorch's own.
"""

from __future__ import annotations

import ast
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm.swap import norms
from fastlm.swap.attention import reached
from fastlm.swap.rules import Facts, Reason, Rewrite, Rule
from fastlm.swap.seen import ran, stepped_back
from fastlm.swap.source import CallSite, Methods, Unreadable, parse
from fastlm.swap.tensors import plain

# By their objects: somebody may put another function in the place of one later, and that one is called then.
_KINDS: dict[Any, str] = {F.rms_norm: "rms", torch.rms_norm: "rms", F.layer_norm: "layer", torch.layer_norm: "layer"}
_SPECS = {kind: norms.Spec(kind, "", "", "", "0", "promoted", "function") for kind in ("rms", "layer")}


class PlainNorm(NamedTuple):
    """What a helper computes that is nothing but a norm of its argument's last axis, without weight and bias."""

    kind: str
    eps: float | None  # None: that of the input's dtype
    calls: Callable[[], Any]  # gives the function that the helper would call now


_plain: weakref.WeakKeyDictionary[FunctionType, PlainNorm | None] = weakref.WeakKeyDictionary()


def plain_norm(function: Any) -> PlainNorm | None:
    """What ``function`` is as a norm, as ``def norm(x): return F.rms_norm(x, (x.size(-1),))``; None if it is none."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    if function not in _plain and not torch.compiler.is_compiling():
        _plain[function] = _read_plain_norm(function)
    return _plain.get(function)


def _read_plain_norm(function: FunctionType) -> PlainNorm | None:
    if len(function.__code__.co_names) > 6 or function.__closure__:  # most functions are not read further
        return None
    try:
        tree = parse(function, function.__name__)
    except Unreadable:
        return None
    parameters = [*tree.args.posonlyargs, *tree.args.args]
    others = (tree.args.vararg, tree.args.kwarg, *tree.args.kwonlyargs, *tree.decorator_list)
    body = [s for s in tree.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    if len(parameters) != 1 or any(others) or len(body) != 1 or not isinstance(body[0], ast.Return):
        return None
    call = body[0].value
    if not isinstance(call, ast.Call):
        return None

    def calls() -> Any:
        return _global(function, call.func)

    called = calls()
    kind = _KINDS.get(called) if callable(called) and _hashable(called) else None
    eps = None if kind is None else _eps_of(call, parameters[0].arg, 1e-5 if kind == "layer" else None)
    return None if kind is None or isinstance(eps, str) else PlainNorm(kind, eps, calls)


def _eps_of(call: ast.Call, x: str, eps: float | None) -> float | str | None:
    """The eps of a norm of ``x`` over its last axis without vectors; a string if ``call`` is another."""
    named = {k.arg: k.value for k in call.keywords}
    given = dict(zip(("input", "normalized_shape"), call.args)) | named
    last = f"({x}.size(-1),) ({x}.shape[-1],) [{x}.size(-1)] [{x}.shape[-1]] {x}.shape[-1:] {x}.size()[-1:]".split()
    shape, tensor = given.get("normalized_shape"), given.get("input")
    if len(call.args) > 2 or not set(given) <= {"input", "normalized_shape", "eps"} or shape is None:
        return "it gives more than its input"
    if not isinstance(tensor, ast.Name) or tensor.id != x or ast.unparse(shape).replace(" ", "") not in last:
        return "it normalises something else"
    found = given.get("eps", ast.Constant(eps))
    if isinstance(found, ast.Constant) and (found.value is None or isinstance(found.value, float)):
        return found.value
    return "its eps is computed"


def _global(function: FunctionType, node: ast.expr) -> Any:
    """What a dotted name stands for in the globals of ``function`` now, or None."""
    if isinstance(node, ast.Attribute):
        return getattr(_global(function, node.value), node.attr, None)
    return function.__globals__.get(node.id) if isinstance(node, ast.Name) else None


def plain_norm_arguments(function: Any, x: Tensor, dtype: torch.dtype) -> norms.NormArguments | None:
    """What the op gets in place of ``function`` of a sum of ``dtype`` with ``x``; None: ``function`` must be called."""
    found = plain_norm(function)
    if found is None or not plain(x) or x.dim() == 0:
        return None
    if not torch.compiler.is_compiling() and _KINDS.get(found.calls()) != found.kind:
        return None
    y_dtype = norms.output_dtype(_SPECS[found.kind], x.device, dtype, None, None)
    eps = norms.default_eps(x.device.type, dtype) if found.eps is None else found.eps
    return None if y_dtype is None else norms.NormArguments(found.kind, None, None, eps, 0.0, y_dtype)


class FunctionalNorms:
    """What edited source calls in place of ``F.rms_norm`` and ``F.layer_norm``."""

    def _fastlm_functional_norm(self, kind: str, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """``function`` is what the source names; it is asked for at each call, since others may put theirs there."""
        if _KINDS.get(function) != kind:
            why = "another function stands in its place"
        else:
            call = _layer_norm if kind == "layer" else _rms_norm
            y = call(*args, **kwargs)
            if isinstance(y, Tensor):
                ran(self)  # type: ignore[arg-type]
                return y
            why = y
        stepped_back(self, f"calls PyTorch's own {getattr(function, '__name__', 'norm')}: {why}")  # type: ignore[arg-type]
        return function(*args, **kwargs)


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor | str:
    return _norm("rms", input, normalized_shape, weight, None, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # torch.layer_norm's, without a meaning
) -> Tensor | str:
    return _norm("layer", input, normalized_shape, weight, bias, eps)


def _norm(
    kind: str, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> Tensor | str:
    """The op's result, or why it does not take this call."""
    if not plain(x, weight, bias) or x.dim() == 0:
        return "its input does not fit"
    if len(shape) != 1 or shape[0] != x.shape[-1]:
        return "it normalises over other axes than the last"
    if any(v is not None and (v.shape != x.shape[-1:] or v.device != x.device) for v in (weight, bias)):
        return "its weight or bias does not fit"
    y_dtype = norms.output_dtype(_SPECS[kind], x.device, x.dtype, weight, bias)
    if y_dtype is None:
        return "its dtypes differ"
    eps = norms.default_eps(x.device.type, x.dtype) if eps is None else eps
    return ops.norm(x, weight, bias, norm=kind, eps=eps, y_dtype=y_dtype)


def _calls(methods: Methods) -> list[tuple[CallSite, str]]:
    """The calls, each with its kind of norm."""
    found = []
    for site in reached(methods):
        function = methods.resolve(site.method, site.call.func)
        if callable(function) and _hashable(function) and function in _KINDS:
            found.append((site, _KINDS[function]))
    return found


def _hashable(value: Any) -> bool:
    return type(value).__hash__ is not None


class FunctionalNormRule(Rule):
    name = "functional_norm"
    mixin = FunctionalNorms

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        cls = type(module)
        forward = getattr(cls, "forward", None)
        if cls.__module__.startswith("torch.") or forward is None or forward is nn.Module.forward:
            return None
        if isinstance(norms.find(module), norms.Spec):  # the whole module is a norm, and served as one
            return None
        try:
            kinds = {kind for _, kind in _calls(Methods(cls))}
        except Unreadable as error:
            names = getattr(getattr(forward, "__code__", None), "co_names", ())
            return Reason(f"its norms stay: {error}") if {"rms_norm", "layer_norm"} & set(names) else None
        return self.describe(module, tuple(sorted(kinds))) if kinds else None

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        what = ", ".join(f"F.{kind}_norm" for kind in facts)
        return Rewrite(self.name, facts, f"calls of {what}", "dropout_add_norm")

    def edit(self, methods: Methods, facts: Facts) -> None:
        for (name, own, call), kind in _calls(methods):
            call.args[:0] = [ast.Constant(kind), call.func]
            call.func = ast.Attribute(ast.Name(own, ast.Load()), "_fastlm_functional_norm", ast.Load())
            methods.change(name)
