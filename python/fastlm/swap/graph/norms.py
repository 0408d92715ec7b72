"""Norms over the last axis in a graph: F.layer_norm, F.rms_norm, and both written by hand, casts between.

By hand: ``x * rsqrt(mean(x**2) + eps)`` or ``x / sqrt(...)`` (RMSNorm), ``(x - mean(x)) * rsqrt(var(x) + eps)`` with
``var(unbiased=False)`` or the mean of the squares (LayerNorm); then, in any order with casts, a weight or 1 + weight,
and a bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastlm.swap.graph.nodes import Missed, is_float, number, read, same, uncast, value


@dataclass
class Norm:
    """A norm of ``x`` that ends at ``root``; ``inside``: the nodes it is made of, ``root`` among them.

    ``passed``: casts on the way to ``x``, the weight and the bias that others may read, or change in place.
    """

    kind: str
    x: fx.Node
    root: fx.Node
    eps: float
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    weight_offset: float = 0.0
    inside: list[fx.Node] = field(default_factory=list)
    passed: list[fx.Node] = field(default_factory=list)


def norm_at(node: fx.Node) -> Norm | None:
    """The norm whose first recognisable node is ``node``: a call, or the root of the variance. Raises Missed."""
    call = read(node)
    if call.name in ("layer_norm", "rms_norm"):
        return _called(node, call.name, call.args)
    if call.name in ("rsqrt", "sqrt"):
        return _by_hand(node)
    return None


def _called(node: fx.Node, name: str, args: dict[str, Any]) -> Norm | None:
    x, shape = args.get("input"), args.get("normalized_shape")
    if not isinstance(x, fx.Node) or not is_float(x):
        return None
    if not isinstance(shape, (tuple, list)) or len(shape) != 1:
        raise Missed(f"it normalises over the shape {shape}, the op over the last axis", node)
    wide = value(x)
    assert wide is not None
    eps = args.get("eps", 1e-5 if name == "layer_norm" else None)
    eps = torch.finfo(wide.dtype).eps if eps is None else number(eps)
    if eps is None:
        raise Missed("its eps is not a number", node)
    inside = [node]
    source = uncast(x, inside)
    return Norm(name.removesuffix("_norm"), source, node, eps, args.get("weight"), args.get("bias"), inside=inside)


def _last(args: dict[str, Any], rank: int) -> bool:
    """Whether ``dim`` is the last axis, and kept."""
    dim = args.get("dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return dim in (-1, rank - 1) and not isinstance(dim, bool) and args.get("keepdim") is True


def _square_of(node: Any) -> Any:
    """x of ``x**2``, however it is written, or None."""
    call = read(node)
    if call.name == "square":
        return call.args["input"]
    if call.name == "pow" and call.args.get("exponent") in (2, 2.0):
        return call.args["input"]
    if call.name == "mul" and call.args.get("input") is call.args.get("other"):
        return call.args["input"]
    return None


def _by_hand(root: fx.Node) -> Norm | None:
    inside, passed = [root], list[fx.Node]()
    plus = read(root).args.get("input")
    call = read(plus)
    if call.name != "add" or not isinstance(plus, fx.Node) or not is_float(plus):
        return None
    inside.append(plus)
    spread, eps = call.args.get("input"), number(call.args.get("other"))
    if eps is None:
        spread, eps = call.args.get("other"), number(call.args.get("input"))
    if eps is None or not isinstance(spread, fx.Node) or not is_float(spread):
        return None
    call = read(spread)
    rank = len(value(spread).shape)  # type: ignore[union-attr]
    if call.name not in ("mean", "var") or not _last(call.args, rank):
        return None
    inside.append(spread)
    if call.name == "var":
        if not _is_biased(spread):
            raise Missed("its variance divides by columns - 1, LayerNorm's by columns", spread)
        kind, x = "layer", call.args["input"]
        centred: fx.Node | None = None
    else:
        square = call.args["input"]
        of = _square_of(square)
        if not isinstance(of, fx.Node):
            return None
        inside.append(square)
        source = _centre(of, passed, inside)
        kind, x, centred = ("rms", of, of) if source is None else ("layer", source, of)
    end, weight, inside = _scaled(root, kind, x, centred, inside, passed)
    norm = Norm(kind, x, end, eps, inside=inside, passed=passed)
    if weight is not None:
        norm.weight, norm.weight_offset = _weight(weight, passed)
    _parameters(norm)
    norm.x = uncast(x, passed)
    return norm


def _is_biased(node: fx.Node) -> bool:
    args = read(node).args
    correction = args.get("correction", 1)
    return args.get("unbiased") is False or (args.get("unbiased") is None and correction == 0)


def _centre(node: Any, passed: list[fx.Node], inside: list[fx.Node] | None = None) -> Any:
    """x of ``x - mean(x)``, or None."""
    call = read(node)
    mean = read(call.args.get("other"))
    found = value(node)
    if call.name != "sub" or mean.name != "mean" or found is None or not _last(mean.args, len(found.shape)):
        return None
    if uncast(mean.args["input"], passed) is not uncast(call.args["input"], passed):
        return None
    if inside is not None:
        inside += [node, call.args["other"]]
    return call.args["input"]


def _scaled(
    root: fx.Node, kind: str, x: fx.Node, centred: fx.Node | None, inside: list[fx.Node], passed: list[fx.Node]
) -> tuple[fx.Node, fx.Node | None, list[fx.Node]]:
    """The node that multiplies by ``root`` = rsqrt, or divides by sqrt; and the weight, if that was applied before."""
    power = root
    if read(root).name == "sqrt":
        users = list(root.users)
        if len(users) == 1 and read(users[0]).name == "reciprocal":
            power = users[0]
            inside.append(power)
    divide = read(power).name == "sqrt"
    for user in power.users:
        call = read(user)
        if call.name != ("div" if divide else "mul"):
            continue
        sides = [call.args.get("input"), call.args.get("other")]
        if divide and sides[1] is not power:
            continue
        above: list[fx.Node] = []
        numerator, weight = _unweighted(sides[0] if sides[1] is power else sides[1], above)
        if centred is not None and uncast(numerator, passed) is uncast(centred, passed):
            return user, weight, [*inside, *above, user]
        if kind == "layer" and centred is None:
            source = _centre(numerator, passed, above)
            if source is not None and uncast(source, passed) is uncast(x, passed):
                return user, weight, [*inside, *above, user]
    raise Missed(
        f"the inverse root of its {'variance' if kind == 'layer' else 'mean square'} scales another tensor", root
    )


def _unweighted(node: Any, above: list[fx.Node]) -> tuple[Any, fx.Node | None]:
    """(x, w) of ``w * x`` with a vector w; (node, None) of another node."""
    call = read(node)
    whole = value(node)
    for name, other in (("input", "other"), ("other", "input")):
        vector = value(call.args.get(name))
        if call.name == "mul" and vector is not None and whole is not None and vector.dim() == 1 < whole.dim():
            above.append(node)
            return call.args[other], call.args[name]  # type: ignore[return-value]
    return node, None


def _parameters(norm: Norm) -> None:
    """Follows ``norm.root`` through casts to its weight and bias."""
    columns = value(norm.root).shape[-1]  # type: ignore[union-attr]
    rank = len(value(norm.root).shape)  # type: ignore[union-attr]
    while len(norm.root.users) == 1:
        user = next(iter(norm.root.users))
        call = read(user)
        if uncast(user) is not user and call.args.get("input") is norm.root:
            norm.root = user
            norm.inside.append(user)
            continue
        sides = [call.args.get("input"), call.args.get("other")]
        if call.name not in ("mul", "add") or norm.root not in sides or len(call.args) != 2:
            return
        other = sides[1] if sides[0] is norm.root else sides[0]
        vector = value(other)
        if (
            vector is None
            or not is_float(other)
            or len(vector.shape) != 1
            or rank < 2
            or not same(vector.shape[0], columns)
        ):
            return
        if call.name == "add" and norm.bias is None:
            norm.bias = uncast(other, norm.passed)
        elif call.name == "mul" and norm.weight is None and norm.bias is None:
            norm.weight, norm.weight_offset = _weight(other, norm.passed)  # type: ignore[arg-type]
        else:
            return
        norm.root = user
        norm.inside.append(user)


def _weight(node: fx.Node, passed: list[fx.Node]) -> tuple[fx.Node, float]:
    """(w, offset) of ``w`` or ``1 + w``."""
    source = uncast(node, passed)
    call = read(source)
    if call.name == "add" and len(call.args) == 2:
        for name, other in (("input", "other"), ("other", "input")):
            below: list[fx.Node] = []
            inner = uncast(call.args[name], below)
            if number(call.args[other]) == 1.0 and isinstance(inner, fx.Node) and is_float(inner):
                passed += [source, *below]
                return inner, 1.0
    return source, 0.0
