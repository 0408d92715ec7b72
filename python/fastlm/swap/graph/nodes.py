"""The nodes of a graph of torch.compile in one normal form, whatever their spelling.

Dynamo's graph, before autograd, holds calls as they were written: ``a + b``, ``torch.add(a, b)`` and ``a.add(b)`` are three
kinds of node. ``read`` gives each of them one name and named arguments, so that a pattern is written once. What is not
known has the name "". Shapes and dtypes are those of the values that Dynamo computed (``value``); sizes may be symbolic,
and two of them are equal only where that is known without a new guard.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastlm._torch import ENTER_INFERENCE, EXIT_INFERENCE, SET_GRAD_ENABLED

# Canonical name: its parameters, as those of the function and of the method (whose first one is self).
_SIGNATURES = {
    "add": ("input", "other"),
    "sub": ("input", "other"),
    "mul": ("input", "other"),
    "div": ("input", "other"),
    "pow": ("input", "exponent"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "var": ("input", "dim", "unbiased", "keepdim"),
    "std": ("input", "dim", "unbiased", "keepdim"),
    "rsqrt": ("input",),
    "sqrt": ("input",),
    "square": ("input",),
    "reciprocal": ("input",),
    "tanh": ("input",),
    "softmax": ("input", "dim", "dtype"),
    "dropout": ("input", "p", "training", "inplace"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "masked_fill": ("input", "mask", "value"),
    "where": ("condition", "input", "other"),
    "matmul": ("input", "other"),
    "bmm": ("input", "other"),
    "baddbmm": ("input", "batch1", "batch2"),
    "transpose": ("input", "dim0", "dim1"),
    "contiguous": ("input",),
    "type_as": ("input", "other"),
    "float": ("input",),
    "half": ("input",),
    "bfloat16": ("input",),
    "double": ("input",),
    "to": ("input", "dtype"),
    "type": ("input", "dtype"),
    "view": ("input", "shape"),
    "reshape": ("input", "shape"),
    "full": ("size", "fill_value"),
    "tensor": ("data",),
}
_SPELLED = {"truediv": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "bmm": "bmm"}
_MODULES = (torch, F, operator)
CASTS = ("to", "type", "float", "half", "bfloat16", "double", "type_as", "contiguous")
_SDPA = F.scaled_dot_product_attention

NAMES: dict[Any, str] = {
    getattr(module, spelled): _SPELLED.get(spelled, spelled)
    for module in _MODULES
    for spelled in (*_SIGNATURES, *_SPELLED)
    if spelled not in ("float", "half", "double", "bfloat16", "to", "type", "view", "contiguous", "type_as")
    and callable(getattr(module, spelled, None))
}
_IN_PLACE = {operator.iadd: "add", operator.isub: "sub", operator.imul: "mul", operator.itruediv: "div"}


class Call(NamedTuple):
    """A node's canonical ``name``, "" where it is unknown, and its arguments by name."""

    name: str
    args: dict[str, Any]


def read(node: Any) -> Call:
    """What ``node`` calls."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return Call("", {})
    if node.op == "call_method":
        name = _SPELLED.get(str(node.target), str(node.target))
        if name == "where":  # self is the second argument of the function
            return Call("", {})
    elif node.target is _SDPA:
        return Call("sdpa", _named(node, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")))
    else:
        try:
            name = NAMES.get(node.target, "")
        except TypeError:
            return Call("", {})
    if name not in _SIGNATURES:
        return Call("", {})
    names = _SIGNATURES[name]
    if node.target is F.softmax:
        names = ("input", "dim", "_stacklevel", "dtype")
    if name in ("view", "reshape"):
        shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return Call(name, {"input": node.args[0], "shape": tuple(shape)})  # type: ignore[arg-type]
    return Call(name, _named(node, names))


def _named(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    given = dict(zip(names, node.args))
    given.update(node.kwargs)
    if node.target is torch.dropout and "train" in given:
        given["training"] = given.pop("train")
    if len(node.args) > len(names):
        given["..."] = node.args[len(names) :]
    return given


def value(node: Any) -> Tensor | None:
    """The fake tensor that Dynamo computed for ``node``."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def is_float(node: Any) -> bool:
    found = value(node)
    return found is not None and found.is_floating_point() and not found.is_nested


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, or two shapes, are known to be equal, without a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if isinstance(a, (tuple, torch.Size)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return statically_known_true(a == b)


def number(x: Any) -> float | None:
    """The number that ``x`` is, a Python one or a tensor made of one in the graph.

    Under dynamic shapes Dynamo makes a module's eps or p an input of the graph; the op's are constants, so a guard on
    its value is the right one.
    """
    if isinstance(x, fx.Node) and isinstance(x.meta.get("example_value"), (torch.SymFloat, torch.SymInt)):
        x = x.meta["example_value"]
    if isinstance(x, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(x, bool):
        return float(x)
    call = read(x)
    if call.name == "full" and call.args.get("size") in ((), []):
        return number(call.args.get("fill_value"))
    return number(call.args.get("data")) if call.name == "tensor" else None


def uncast(node: Any, passed: list[fx.Node] | None = None) -> Any:
    """What ``node`` was before casts from one floating dtype to another, and copies; ``passed`` collects these nodes.

    A move to another device is no cast. Neither is one to or from float64, which the ops do not compute in beside other
    dtypes, or a dtype of 8 bits, whose rounding is meant.
    """
    while True:
        call = read(node)
        after, before = value(node), value(call.args.get("input"))
        if call.name not in CASTS or after is None or before is None or not _is_cast(before, after):
            return node
        if passed is not None:
            passed.append(node)
        node = call.args["input"]


def _is_cast(before: Tensor, after: Tensor) -> bool:
    if any(t.is_nested or not t.is_floating_point() for t in (before, after)) or before.device != after.device:
        return False
    pair = (before.dtype, after.dtype)
    return pair[0] == pair[1] or not any(d == torch.float64 or d.itemsize == 1 for d in pair)


@dataclass
class Missed(Exception):
    """A pattern that was nearly there: ``why`` it stays as it was, at ``node``."""

    why: str
    node: fx.Node


def outsider(inside: Iterable[fx.Node], root: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(node, its reader) of a node of ``inside``, other than ``root``, that something else reads."""
    members = {*inside, root}
    for node in members - {root}:
        for user in node.users:
            if user not in members:
                return node, user
    return None


def require_private(inside: Iterable[fx.Node], root: fx.Node) -> None:
    """Raises Missed where an intermediate result is read by something else."""
    found = outsider(inside, root)
    if found is not None:
        raise Missed(f"its intermediate result {found[0].name} is read by {found[1].name} too", root)


def storage(node: Any) -> int | None:
    found = value(node)
    try:
        return None if found is None else found.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor without a storage of its own
        return None


def changed(node: fx.Node) -> list[fx.Node]:
    """The tensors that ``node`` changes in place."""
    first = [a for a in (*node.args[:1], node.kwargs.get("input")) if isinstance(a, fx.Node)][:1]
    if node.op == "call_method":
        name = str(node.target)
        return first if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" else []
    if node.op != "call_function":
        return []
    if node.target in _IN_PLACE or node.target is operator.setitem or _asked_in_place(node):
        return first
    out = node.kwargs.get("out")
    if out is not None:
        return [a for a in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(a, fx.Node)]
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return list(node.all_input_nodes)
    name = getattr(node.target, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or (len(name) > 1 and _is_inplace_operator(node.target))
    return first if in_place else []


def _asked_in_place(node: fx.Node) -> bool:
    """Whether ``node`` is called with a true ``inplace``, by name or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    position = _inplace_position(node.target)
    return position is not None and len(node.args) > position and node.args[position] is not False


@functools.lru_cache(maxsize=1024)
def _inplace_position(function: Any) -> int | None:
    """Where ``function`` takes ``inplace``; None where it does not, or does not say."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins
        return None
    return names.index("inplace") if "inplace" in names else None


def _is_inplace_operator(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    other = ("is_", "is_not", "inv", "invert", "index", "indexOf", "itemgetter")
    return getattr(operator, name, None) is target and name.startswith("i") and name not in other


def without_in_place(graph: fx.Graph) -> None:
    """``a += b`` becomes ``a + b`` where nothing reads the old ``a``, or a view of it, afterwards.

    Not where the graph has switched gradients off: ``a`` keeps those that it had, and ``a + b`` would have none.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    modes = [True]  # whether gradients are on, with the inference modes entered
    for node in graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            modes[-1] = node.args[0] is True
        elif node.target is ENTER_INFERENCE:
            modes.append(modes[-1] and node.args[:1] == (False,))
        elif node.target is EXIT_INFERENCE and len(modes) > 1:
            modes.pop()
        if not modes[-1]:
            continue
        name = str(node.target).removesuffix("_") if node.op == "call_method" else ""
        if name not in ("add", "sub", "mul", "div", "masked_fill") or name == node.target:
            name = _IN_PLACE.get(node.target, "") if node.op == "call_function" else ""
        if not name or not isinstance(node.args[0], fx.Node) or len(node.args) + len(node.kwargs) > 3:
            continue
        target, other = node.args[0], node.args[1] if len(node.args) > 1 else None
        here, made = storage(target), value(node)
        if here is None or made is None or (isinstance(other, fx.Node) and not _keeps(target, other, name)):
            continue
        aliases = [n for n in order if order[n] < order[node] and storage(n) == here]
        owned = all(n.op in ("call_function", "call_method") for n in aliases)
        if owned and all(order[user] <= order[node] for n in aliases for user in n.users):
            node.op, node.target = "call_method", name


def _keeps(target: fx.Node, other: fx.Node, name: str) -> bool:
    """Whether ``target + other`` has the dtype and shape of ``target``, as the change in place has."""
    a, b = value(target), value(other)
    if a is None or b is None:
        return False
    fits = len(b.shape) <= len(a.shape) and all(
        same(y, x) or same(y, 1) for x, y in zip(reversed(a.shape), reversed(b.shape))
    )
    return fits and (name == "masked_fill" or torch.result_type(a, b) == a.dtype)


def switches_gradients(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (SET_GRAD_ENABLED, ENTER_INFERENCE, EXIT_INFERENCE)


def quiet(first: fx.Node, last: fx.Node, involved: Iterable[Any]) -> bool:
    """Whether nothing between the nodes changes one of ``involved`` in place, or switches gradients on or off."""
    stores = {storage(n) for n in involved} - {None}
    node = first
    while node is not last:
        node = node.next
        if node.op == "root" or switches_gradients(node) or any(storage(t) in stores for t in changed(node)):
            return node is last
    return True


def where(node: fx.Node) -> str:
    """The module and line that ``node`` comes from, for people."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = re.sub(r"^(L\[.*?\](\[\d+\])?\.?)", "", str(stack[-1][0])) if stack else ""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    lines = [line for line in lines if line.strip("^~ ")]
    return f"{path or '(model)'}: {lines[-1]}" if lines else path or node.name
