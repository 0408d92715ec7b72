"""torch.compile backend "fastlm": rewrites of the traced graph, then inductor.

What people wrote out, dropout, add and norm, or attention, is found by ``fastlm.swap.graph``. What swap put there is fused
across blocks here: a block's last dropout + add and the next block's first norm stand in different modules, and in the
graph that torch.compile traces they are neighbours. They become one dropout_add_norm, which also gives the residual:

    z = dropout_add_norm(x, residual, norm=None), or x + residual;  y = norm(z)    ->    y, z = dropout_add_norm(x, ...)

The results are the same bits, since y is the norm of the rounded z in both. Found through the package's entry point, so
nothing is imported before it is used.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

import fastlm.ops  # noqa: F401  (defines the operators)
from fastlm._torch import inductor
from fastlm.swap.graph import Event, rewrite
from fastlm.swap.graph.nodes import quiet, value

log = logging.getLogger("fastlm")

# Positions in the operator's schema.
_X, _RESIDUAL, _LAYERSCALE, _ROWSCALE, _SEED, _OFFSET, _P, _EPS, _WEIGHT_OFFSET, _NORM = 0, 1, 4, 5, 6, 7, 8, 9, 10, 11
_Y_DTYPE, _Z_DTYPE, _NEED_Z, _COUNT = 12, 13, 14, 15
_OPS = (torch.ops.fastlm.dropout_add_norm, torch.ops.fastlm.dropout_add_norm.default)


def compile_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="fastlm")`` calls; ``mode`` and ``options`` mean what they mean to inductor.

    ``fastlm.explain`` shows what the rewrites find; here it is logged ("fastlm", level INFO).
    """
    fired = Counter(event.pattern for event in rewrite_all(gm) if not event.why)
    log.info("fastlm.compile: %s", ", ".join(f"{n} x {what}" for what, n in fired.items()) or "nothing to rewrite")
    return inductor(gm, example_inputs, mode, options or {}, **more)  # type: ignore[no-any-return]


def rewrite_all(gm: fx.GraphModule) -> list[Event]:
    """Rewrites ``gm`` in place; returns what fired and what nearly did."""
    events = rewrite(gm)
    return [*events, *(Event("dropout + add + norm across swapped blocks", "(graph)") for _ in range(fuse(gm)))]


def fuse(gm: fx.GraphModule) -> int:
    """Fuses in place; returns how many chains."""
    count = 0
    for node in list(gm.graph.nodes):
        if _is_norm_alone(node):
            count += _fuse_one(gm.graph, node)
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def _is_op(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _OPS and len(node.args) == _COUNT


def _is_norm_alone(node: fx.Node) -> bool:
    if not _is_op(node):
        return False
    args: Sequence[Any] = node.args
    return bool(
        args[_NORM] != "none"
        and args[_P] == 0
        and all(args[i] is None for i in (_RESIDUAL, _LAYERSCALE, _ROWSCALE))
        and args[_NEED_Z] is False
    )


def _fuse_one(graph: fx.Graph, norm: fx.Node) -> int:
    z = norm.args[_X]
    # Parameters are inputs of the graph, known before everything else; one that is computed may come too late.
    parameters = [a for a in norm.args[2:4] if isinstance(a, fx.Node)]
    if not isinstance(z, fx.Node) or any(a.op not in ("placeholder", "get_attr") for a in parameters):
        return 0
    source = z.args[0] if z.target is operator.getitem and z.args[1] == 1 else z
    if _is_op(source) and source is not z:
        assert isinstance(source, fx.Node)
        args = list(source.args)
        if args[_NORM] != "none" or args[_Z_DTYPE] != norm.args[_Z_DTYPE] or args[_NEED_Z] is not True:
            return 0
    elif _is_sum(z):
        args = [z.args[1], z.args[0], *([None] * 6), 0.0, *([None] * 6)]
        args[_Z_DTYPE] = norm.args[_Z_DTYPE]
        args[_NEED_Z] = True
    else:
        return 0
    first = source if isinstance(source, fx.Node) else z
    # The norm moves up to ``first``: what it reads must be the same there.
    if value(z) is None or not quiet(first, norm, [z, *parameters]):
        return 0
    args[2:4] = norm.args[2:4]
    for i in (_EPS, _WEIGHT_OFFSET, _NORM, _Y_DTYPE):
        args[i] = norm.args[i]
    with graph.inserting_before(first):
        fused = graph.call_function(_OPS[1], tuple(args))
        new_z = graph.call_function(operator.getitem, (fused, 1))
        new_z.meta = dict(z.meta)
    if source is z:
        z.replace_all_uses_with(new_z)
        graph.erase_node(z)
    else:
        assert isinstance(source, fx.Node)
        for user in list(source.users):
            user.replace_all_uses_with(new_z if user.args[1] == 1 else fused)
            graph.erase_node(user)
        graph.erase_node(source)
    norm.replace_all_uses_with(fused)
    graph.erase_node(norm)
    return 1


def _is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two floating tensors of the same shape, dtype and device."""
    if node.op != "call_function" or node.target not in (operator.add, torch.add) or len(node.args) != 2 or node.kwargs:
        return False
    values = [a.meta.get("example_value") if isinstance(a, fx.Node) else None for a in node.args]
    if not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values):
        return False
    a, b = values
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device  # type: ignore[union-attr]
