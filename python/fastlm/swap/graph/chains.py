"""Dropout, residual add and norm in a graph become one dropout_add_norm; dropout and add alone one with ``norm=None``.

    z = residual + dropout(x);  y = norm(z)    ->    y, z = dropout_add_norm(x, residual, ...)

The dropout may be missing, the sum may be read by others too, and floating casts may stand between. The op computes in
float32 and rounds z to the dtype that the sum had, y to the norm's.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastlm.swap.graph.nodes import Missed, is_float, number, quiet, read, require_private, same, uncast, value
from fastlm.swap.graph.norms import Norm

OP = torch.ops.fastlm.dropout_add_norm.default


@dataclass
class Dropout:
    """An active F.dropout of ``x`` with probability ``p``."""

    node: fx.Node
    x: fx.Node
    p: float


@dataclass
class Sum:
    """``residual + dropout(x)``; ``inside``: the dropout and casts that go with it."""

    node: fx.Node
    x: fx.Node
    residual: fx.Node
    dropout: Dropout | None
    inside: list[fx.Node] = field(default_factory=list)


def dropout_at(node: Any) -> Dropout | None:
    """The dropout that ``node`` is; None for another node, and where it drops nothing. Raises Missed."""
    call = read(node)
    if call.name != "dropout" or not is_float(node) or not call.args.get("training", True):
        return None
    x, p = call.args.get("input"), number(call.args.get("p", 0.5))
    if not isinstance(x, fx.Node) or p is None or call.args.get("inplace"):
        raise Missed("its dropout is in place" if call.args.get("inplace") else "its p is not a number", node)
    if p == 0:
        return None
    if not 0 < p < 1:
        raise Missed(f"its p is {p}", node)
    return Dropout(node, x, p)


def sum_at(node: Any) -> Sum | None:
    """The sum of two floating tensors of one shape that ``node`` is. Raises Missed where the sum broadcasts."""
    call = read(node)
    if call.name != "add" or len(call.args) != 2 or not is_float(node):
        return None
    a, b = call.args["input"], call.args["other"]
    wide, left, right = value(node), value(a), value(b)
    if left is None or right is None or not is_float(a) or not is_float(b):
        return None
    assert wide is not None
    if len(wide.shape) == 0 or left.device != right.device:
        return None
    if not (same(left.shape, wide.shape) and same(right.shape, wide.shape)):
        raise Missed(f"its sum broadcasts {list(left.shape)} and {list(right.shape)}", node)
    for x, residual in ((b, a), (a, b)) if a is not b else ():  # one dropout added to itself has one mask
        passed: list[fx.Node] = []
        source = uncast(x, passed)
        dropout = dropout_at(source)
        if dropout is not None and all(len(n.users) == 1 for n in (*passed, source)):
            return Sum(node, dropout.x, residual, dropout, [*passed, source])
    return Sum(node, b, a, None)


def fuse_norm(graph: fx.Graph, norm: Norm, place: dict[fx.Node, int]) -> str:
    """Rewrites ``norm`` with the sum before it; returns what was fused. Raises Missed."""
    found = sum_at(norm.x)
    if found is None:
        lone = dropout_at(norm.x)
        if lone is None:
            raise Missed("what it normalises is not a sum: a norm alone is left to inductor", norm.root)
        found = Sum(lone.node, lone.x, None, lone, [])  # type: ignore[arg-type]
    require_private(norm.inside, norm.root)
    parameters = [p for p in (norm.weight, norm.bias) if isinstance(p, fx.Node)]
    late = [p for p in parameters if place.get(p, len(place)) > place[found.node]]
    if late:
        raise Missed(f"its parameter {late[0].name} is computed after the sum", norm.root)
    involved = [found.node, found.x, found.residual, *norm.inside, *norm.passed, *found.inside, *parameters]
    moved = (*found.inside, found.node, *norm.passed)
    first = min((n for n in moved if n in place), key=place.__getitem__)
    if not quiet(first, norm.root, involved):
        raise Missed("a tensor of it is changed in place in between", norm.root)
    y, z = _insert(graph, found, norm)
    found.node.replace_all_uses_with(z)
    assert y is not None
    norm.root.replace_all_uses_with(y)
    _erase(graph, [*norm.inside, found.node, *found.inside])
    added = "add + " if found.residual is not None else ""
    return ("dropout + " if found.dropout is not None else "") + added + f"{norm.kind} norm"


def fuse_sum(graph: fx.Graph, found: Sum, place: dict[fx.Node, int]) -> str:
    """Rewrites dropout and add without a norm. Raises Missed."""
    assert found.dropout is not None
    if not quiet(found.dropout.node, found.node, [found.x, found.residual, found.node]):
        raise Missed("a tensor of it is changed in place in between", found.node)
    _, z = _insert(graph, found, None)
    found.node.replace_all_uses_with(z)
    _erase(graph, [found.node, *found.inside])
    return "dropout + add"


def fuse_dropout(graph: fx.Graph, found: Dropout) -> str:
    """Rewrites a dropout alone."""
    alone = Sum(found.node, found.x, None, found, [])  # type: ignore[arg-type]
    _, z = _insert(graph, alone, None)
    found.node.replace_all_uses_with(z)
    _erase(graph, [found.node])
    return "dropout"


def seed(graph: fx.Graph, device: torch.device) -> fx.Node:
    """A seed from torch's default generator, as ``seed=None`` draws it."""
    return graph.call_function(torch.randint, (-(2**63), 2**63 - 1, ()), {"dtype": torch.int64, "device": device})


def _insert(graph: fx.Graph, found: Sum, norm: Norm | None) -> tuple[fx.Node | None, fx.Node]:
    """The op before the sum; returns its y and z."""
    total = value(found.node)
    assert total is not None
    y_dtype = value(norm.root).dtype if norm is not None else total.dtype  # type: ignore[union-attr]
    p = found.dropout.p if found.dropout is not None and found.dropout.p * 65536 > 0.5 else 0.0
    with graph.inserting_before(found.node):
        drawn = seed(graph, total.device) if p > 0 else None
        options = (
            (norm.weight, norm.bias, None, None, drawn, None, p, norm.eps, norm.weight_offset, norm.kind)
            if norm is not None
            else (None, None, None, None, drawn, None, p, 0.0, 0.0, "none")
        )
        fused = graph.call_function(OP, (found.x, found.residual, *options, y_dtype, total.dtype, True))
        y = graph.call_function(operator.getitem, (fused, 0)) if norm is not None else None
        z = graph.call_function(operator.getitem, (fused, 1))
    fused.meta = {k: v for k, v in found.node.meta.items() if k != "example_value"}
    z.meta = dict(found.node.meta)
    if y is not None and norm is not None:
        y.meta = dict(norm.root.meta)
    return y, z


def _erase(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Takes out what nothing reads any more, readers first."""
    left = list(dict.fromkeys(nodes))
    while True:
        gone = [n for n in left if not n.users]
        if not gone:
            return
        for node in gone:
            graph.erase_node(node)
            left.remove(node)
