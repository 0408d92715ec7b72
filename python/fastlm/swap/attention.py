"""Rule: ``F.scaled_dot_product_attention`` in the forward of a module, or in methods it calls, becomes the op.

The call stays where it is and keeps its arguments; only the name is replaced, by a method that serves it with
``ops.attention`` (dropout, masks with their gradient, ``is_causal``, ``enable_gqa``, ``scale``). What the op does not take
at a call (other ranks, keys of another head size than the queries') is PyTorch's own, and so is what no kernel serves
(head sizes above 512, float64, no compiled core), because the reference keeps all the scores. Value heads may have another
size. Seeds come from ``fastlm.rng``, one place per call in the source.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import backend, ops, rng
from fastlm._torch import untraced
from fastlm.ops._library import autocast_dtype
from fastlm.swap.rules import Facts, Reason, Rewrite, Rule
from fastlm.swap.seen import ran, stepped_back
from fastlm.swap.source import CallSite, Methods, Unreadable
from fastlm.swap.tensors import plain

_NAME = "scaled_dot_product_attention"
TORCHS = F.scaled_dot_product_attention  # PyTorch's own, whatever is put in its place later


class SDPA:
    """``F.scaled_dot_product_attention`` by ``ops.attention``."""

    def _fastlm_sdpa(
        self,
        place: int,
        function: Callable[..., Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``function`` is what the source names; it is asked for at each call, since others may put theirs there.

        What serves the call instead of the op gets the arguments as they were written.
        """
        why = _why_not(*args, **kwargs) if function is TORCHS else "another function stands in its place"
        if why:
            stepped_back(self, f"calls PyTorch's own {_NAME}: {why}")  # type: ignore[arg-type]
            return function(*args, **kwargs)
        return _served(self, place, *args, **kwargs)  # type: ignore[arg-type]


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    return refusal(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)


def _served(
    module: nn.Module,
    place: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    causal = "upper_left" if is_causal else False
    return attend(module, place, query, key, value, causal=causal, bias=attn_mask, scale=scale, p=dropout_p)


def attend(
    module: nn.Module,
    place: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | str = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    p: float = 0.0,
    sinks: Tensor | None = None,
    drawn: tuple[Any, Any] | None = None,
) -> Tensor:
    """``ops.attention`` with the seed of ``module``'s ``place``, or with one ``drawn`` before."""
    ran(module)
    seed = offset = None
    if p > 0:
        seed, offset = drawn or draw(module, place, query)
    out = ops.attention(
        query, key, value, causal=causal, bias=bias, scale=scale, softcap=softcap, dropout_p=p, seed=seed,
        offset=offset, sinks=sinks,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def draw(module: nn.Module, place: int, query: Tensor) -> tuple[Any, Any]:
    """Seed and offset of the dropout of ``module``'s ``place``."""
    seed, ids = rng.batch(module, place, query.shape[0], query.device)
    return seed, None if ids is None else (ids, getattr(module, rng.FIRST_HEAD, 0), None, None)


def refusal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, is_causal: bool, enable_gqa: bool) -> str:
    """Why the op does not take what ``F.scaled_dot_product_attention`` was given, or ""."""
    if not isinstance(q, Tensor):
        return "it is being traced by torch.fx"
    shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}" if not q.is_nested else "nested tensors"
    if not plain(q, k, v, None if mask is None or mask.dtype == torch.bool else mask):
        return "its tensors are nested or not floating"
    if not all(x.dim() == 4 for x in (q, k, v)) or q.shape[3] == 0 or v.shape[3] == 0:
        return f"the op takes [batch, heads, length, head size], not {shapes}"
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        return f"the op takes one batch, values for each key and keys of q's head size, not {shapes}"
    groups = k.shape[1] == 1 or (enable_gqa and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0)
    if k.shape[1] != q.shape[1] and not groups:  # one key head is broadcast, as PyTorch does
        return f"its heads do not fit: {shapes}"
    if not q.dtype == k.dtype == v.dtype and autocast_dtype(q.device) is None:
        return f"its dtypes differ: {q.dtype}, {k.dtype} and {v.dtype}"
    if not 0 <= p < 1:
        return f"its dropout is {p}"
    if mask is not None and is_causal:
        return "it got a mask with is_causal"
    if mask is not None and (mask.dim() > 4 or mask.device != q.device):
        return f"its mask has shape {list(mask.shape)} on {mask.device}"
    return unserved(q, (q.shape[3], v.shape[3]), mask)


def unserved(x: Tensor, head_sizes: tuple[int, int], mask: Tensor | None) -> str:
    """Why no kernel serves attention of ``x``'s device and dtype, only the reference that keeps all scores, or "".

    ``head_sizes``: of the keys, and of the values. Nothing is refused while a backend is forced.
    """
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype
    keys, values = head_sizes
    return _unserved(x.device, dtype, int(keys), int(values), None if mask is None else mask.dtype)


def _unserved(device: torch.device, dtype: torch.dtype, keys: int, values: int, mask: torch.dtype | None) -> str:
    return "" if backend.forced() else _asked(device, dtype, keys, values, mask)


# Under torch.compile it is asked once, while tracing. torch.compiler.assume_constant_result sets this mark, and imports the
# compiler, which takes a second that `import fastlm` does not have.
_unserved._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # every call asks; what decides is few
def _asked(device: torch.device, dtype: torch.dtype, keys: int, values: int, mask: torch.dtype | None) -> str:
    with untraced():
        q, v = (torch.empty(1, 1, 1, size, device=device, dtype=dtype) for size in (keys, values))
        bias = None if mask is None else torch.empty(1, 1, 1, 1, device=device, dtype=mask)
        return why_reference(backend.which("attention", q, q, v, bias=bias))


def why_reference(choice: backend.Choice) -> str:
    """Why no kernel serves, or ""."""
    if choice.backend != "reference" or not choice.rejected:
        return ""
    return "no kernel serves it: " + "; ".join(f"not {name}, {why}" for name, why in choice.rejected)


def reached(methods: Methods) -> Iterator[CallSite]:
    """Every call in forward, in the methods that forward reaches on self, and in the helpers that those call."""
    names, at = ["forward"], 0
    while at < len(names):
        name = names[at]
        at += 1
        try:
            tree = methods.get(name)
        except Unreadable:
            if name == "forward":
                raise
            continue
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        own = arguments[0].arg if arguments else ""
        if not own or _rebound(tree, own):
            continue  # an edit could not name the module
        for node in list(ast.walk(tree)):
            if not isinstance(node, ast.Call):
                continue
            target = node.func
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == own:
                helper = target.attr
                found = helper in methods.trees or callable(getattr(methods.cls, helper, None))
                if found and helper not in names and not hasattr(nn.Module, helper):
                    names.append(helper)
            site = CallSite(name, own, node)
            followed = methods.follow(site)
            if followed is not None and followed not in names:
                names.append(followed)
            yield site


def _rebound(tree: ast.FunctionDef, own: str) -> bool:
    """Whether ``own`` stands for something else in a part of ``tree``: a lambda's parameter, a loop's variable."""
    parameters = [a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)]
    stored = any(isinstance(n, ast.Name) and n.id == own and not isinstance(n.ctx, ast.Load) for n in ast.walk(tree))
    return stored or parameters.count(own) > 1


def _calls(methods: Methods) -> list[CallSite]:
    return [site for site in reached(methods) if methods.resolve(site.method, site.call.func) is TORCHS]


class AttentionRule(Rule):
    name = "attention"
    mixin = SDPA

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        cls = type(module)
        if cls.__module__.startswith("torch."):
            return None
        forward = getattr(cls, "forward", None)
        if forward is None or forward is nn.Module.forward:
            return None
        try:
            return self.describe(module, ()) if _calls(Methods(cls)) else None
        except Unreadable as error:
            code = getattr(forward, "__code__", None)
            return Reason(f"its attention stays: {error}") if code is not None and _NAME in code.co_names else None

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        return Rewrite(self.name, facts, "attention", "attention", (1, 1, 16, 64), 3)

    def edit(self, methods: Methods, facts: Facts) -> None:
        for name, own, call in _calls(methods):
            call.args[:0] = [ast.Constant(methods.place()), call.func]
            call.func = ast.Attribute(ast.Name(own, ast.Load()), "_fastlm_sdpa", ast.Load())
            methods.change(name)
