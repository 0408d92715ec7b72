"""Rewrites of the graphs that torch.compile traces, before autograd: forward and backward follow from the op.

Dynamo's graph is rewritten before AOTAutograd traces the joint graph, so a pattern is found once, in the form in which
people write it, and its backward is the op's own. Inductor's pattern matcher works behind AOTAutograd and would need
each pattern a second time with its backward, for every spelling of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from fastlm.swap.graph.attention import fuse_sdpa, fuse_written, written_at
from fastlm.swap.graph.chains import dropout_at, fuse_dropout, fuse_norm, fuse_sum, sum_at
from fastlm.swap.graph.nodes import Missed, read, value, where, without_in_place
from fastlm.swap.graph.norms import norm_at

__all__ = ["Event", "rewrite"]


class Event(NamedTuple):
    """A pattern that fired, or with ``why`` one that nearly did. ``where``: module and line."""

    pattern: str
    where: str
    why: str = ""


def rewrite(gm: fx.GraphModule) -> list[Event]:
    """Rewrites ``gm`` in place, with the checkpointed regions in it; returns what fired and what nearly did."""
    events: list[Event] = []
    for inner in _regions(gm):
        without_in_place(inner.graph)
        events += _attention(inner.graph)
        events += _chains(inner.graph)
        if events:
            inner.graph.lint()
            inner.recompile()
    return events


def _regions(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and those of activation checkpointing in it. Bodies of autograd functions have backwards of their own."""
    yield gm
    for node in gm.graph.nodes:
        if node.op == "call_function" and "checkpoint" in str(node.target):
            for argument in node.args:
                inner = getattr(gm, str(argument.target), None) if isinstance(argument, fx.Node) else None
                if isinstance(inner, fx.GraphModule):
                    yield from _regions(inner)


def _attention(graph: fx.Graph) -> list[Event]:
    events = []
    for node in list(graph.nodes):
        name = read(node).name
        at = where(node)
        if name not in ("softmax", "sdpa"):
            continue
        try:
            if name == "sdpa":
                events.append(Event(fuse_sdpa(graph, node), at))
            else:
                found = written_at(node)
                if found is not None:
                    events.append(Event(fuse_written(graph, found), at))
        except Missed as missed:
            events.append(Event("SDPA" if name == "sdpa" else "attention written out", at, missed.why))
    return events


def _chains(graph: fx.Graph) -> list[Event]:
    events = []
    for node in list(graph.nodes):
        place = {n: i for i, n in enumerate(graph.nodes)}
        if node not in place:
            continue
        at = where(node)
        try:
            norm = norm_at(node)
            if norm is not None:
                events.append(Event(fuse_norm(graph, norm, place), at))
        except Missed as missed:
            events.append(Event("dropout + add + norm", at, missed.why))
    for node in list(graph.nodes):
        if read(node).name != "add":
            continue
        try:
            total = sum_at(node)
            if total is not None and total.dropout is not None:
                events.append(Event(fuse_sum(graph, total, {}), where(node)))
        except Missed:
            continue  # a sum that broadcasts; a dropout in it is told below
    for node in list(graph.nodes):
        if read(node).name != "dropout":
            continue
        at = where(node)
        try:
            dropout = dropout_at(node)
            if dropout is None:
                continue
            tensor = value(node)
            if tensor is None or tensor.device.type != "cpu" or tensor.dim() == 0:
                raise Missed("no sum follows it: alone, inductor draws it in the kernels around it", node)
            events.append(Event(fuse_dropout(graph, dropout), at))
        except Missed as missed:
            events.append(Event("dropout", at, missed.why))
    return events
