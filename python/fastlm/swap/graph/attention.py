"""Attention written out in a graph, and SDPA with dropout, become ``fastlm::attention``.

    softmax(softcap(scale * q @ k^T) + bias + mask) -> dropout -> @ v

Bias and mask are added, filled in (``masked_fill``, ``where``) or the input of ``baddbmm`` (ALiBi); casts stand anywhere, and
heads may be folded into the batch for ``bmm`` (BLOOM). A fill with -inf hides: a row that sees nothing is 0 then, where
softmax gives NaN. A fill with a large finite number keeps its meaning, the even row of a query that sees nothing included.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastlm.reference.attention import Options
from fastlm.swap.attention import refusal, unserved
from fastlm.swap.graph.chains import _erase, dropout_at, seed
from fastlm.swap.graph.nodes import Missed, is_float, number, quiet, read, require_private, same, uncast, value

OP = torch.ops.fastlm.attention.default
_PRODUCTS = ("matmul", "bmm")
_HIDES = 1000.0  # exp(-1000) is 0: what is filled in with less than its negative is hidden, unless all of a row is


@dataclass
class _Term:
    """Something added to the scores, or with ``fill`` put in their place where ``node`` is true."""

    node: fx.Node
    folded: bool
    fill: float | None = None
    inverted: bool = False
    negative: bool = False


@dataclass
class Written:
    """Attention as it is written out, from its softmax."""

    softmax: fx.Node
    root: fx.Node
    v: Any
    p: float
    q: Any = None
    kt: Any = None
    product: fx.Node | None = None
    scale: float = 1.0
    softcap: float = 0.0
    heads: tuple[Any, Any] | None = None  # (batch, heads) that the first axis of q folds together
    folded: bool = False
    terms: list[_Term] = field(default_factory=list)  # the last one applied first
    inside: list[fx.Node] = field(default_factory=list)


def written_at(softmax: fx.Node) -> Written | None:
    """The attention around ``softmax``; None where it is none. Raises Missed."""
    call = read(softmax)
    shape = value(softmax)
    if call.name != "softmax" or shape is None or len(shape.shape) not in (3, 4) or not is_float(softmax):
        return None
    if call.args.get("dim") not in (-1, len(shape.shape) - 1):
        return None
    below = _below(softmax)
    if below is None or not _leads(call.args.get("input")):
        return None
    _above(below, call.args["input"])
    require_private(below.inside, below.root)
    return below


def _below(node: fx.Node) -> Written | None:
    """From softmax to the product with v."""
    softmax, inside, p = node, [node], 0.0
    while True:
        onward = [u for u in node.users if _reaches_product(u, node)]
        if len(onward) != 1:
            return None
        if len(node.users) > 1:
            others = [u.name for u in node.users if u is not onward[0]]
            raise Missed(f"its probabilities are read by {', '.join(others)} too", softmax)
        user = onward[0]
        inside.append(user)
        call = read(user)
        if call.name in _PRODUCTS:
            return Written(softmax, user, call.args.get("other", call.args.get("mat2")), p, inside=inside)
        if call.name == "dropout":
            dropout = dropout_at(user)
            if dropout is not None and p:
                raise Missed("it drops twice", softmax)
            p = dropout.p if dropout is not None else p
        node = user


def _reaches_product(user: fx.Node, node: Any, depth: int = 6) -> bool:
    call = read(user)
    if call.args.get("input") is not node or depth == 0:
        return False
    if call.name in _PRODUCTS:
        return True
    passing = call.name in ("dropout", "view", "reshape") or uncast(user) is not user
    return passing and any(_reaches_product(u, user, depth - 1) for u in user.users)


def _leads(node: Any, depth: int = 12) -> bool:
    """Whether ``node`` may be scores: elementwise changes of a product."""
    call = read(node)
    if depth == 0:
        return False
    if call.name in (*_PRODUCTS, "baddbmm"):
        return True
    if uncast(node) is not node or call.name in ("view", "reshape", "masked_fill", "tanh"):
        return _leads(call.args.get("input"), depth - 1)
    if call.name in ("add", "sub", "mul", "div", "where"):
        return any(_leads(call.args.get(side), depth - 1) for side in ("input", "other"))
    return False


def _above(found: Written, node: Any) -> None:
    """From softmax's input to the product of q and k; fills ``found``."""
    final = value(found.softmax)
    assert final is not None
    found.folded = folded = len(final.shape) == 3
    while True:
        node = uncast(node, found.inside)
        call = read(node)
        found.inside.append(node)
        if call.name in _PRODUCTS:
            found.q, found.kt = call.args["input"], call.args.get("other", call.args.get("mat2"))
            break
        if call.name == "baddbmm":
            found.q, found.kt = call.args["batch1"], call.args["batch2"]
            _require_unscaled(found)
            _multiply(found, number(call.args.get("alpha", 1.0)), node)
            if number(call.args.get("beta", 1.0)) != 1.0:
                raise Missed("its baddbmm scales the bias", node)
            _require_floating(call.args["input"], found)
            found.terms.append(_Term(call.args["input"], folded))
            break
        if call.name in ("view", "reshape"):
            folded = _folding(found, node, call.args["input"], folded)
            node = call.args["input"]
        elif call.name in ("add", "sub"):
            node = _added(found, node, call.name, call.args, folded)
        elif call.name in ("masked_fill", "where"):
            node = _filled(found, node, call.name, call.args, folded)
        elif call.name in ("mul", "div"):
            node = _times(found, node, call.name, call.args)
        else:
            raise Missed(f"its scores come through {node.name}, which the op does not know", found.softmax)
    found.product = node


def _folding(found: Written, node: fx.Node, source: Any, folded: bool) -> bool:
    """A view that folds heads into the batch, or takes them apart; returns whether ``source`` is folded."""
    after, before = value(node), value(source)
    if after is None or before is None or {len(after.shape), len(before.shape)} != {3, 4}:
        raise Missed(f"its scores are reshaped by {node.name}", found.softmax)
    if not same(after.shape[-2:], before.shape[-2:]):
        raise Missed(f"its scores are reshaped by {node.name}, heads apart", found.softmax)
    if len(after.shape) == 4:
        shape = read(node).args["shape"]
        found.heads = (shape[0], shape[1])
    return len(before.shape) == 3


def _multiply(found: Written, factor: float | None, node: fx.Node) -> None:
    if factor is None:
        raise Missed("its scale is not a number", node)
    found.scale *= factor


def _require_unscaled(found: Written) -> None:
    """What is added last must be met first on the way up from softmax."""
    if found.scale != 1.0 or found.softcap:
        how = "capped" if found.softcap else "scaled"
        raise Missed(f"its scores are {how} after a mask, a bias or another cap", found.softmax)


def _sides(args: dict[str, Any]) -> tuple[Any, Any, bool]:
    """(the scores, the other side, whether the scores are on the left)."""
    left = _leads(args.get("input"))
    return (args["input"], args["other"], True) if left else (args["other"], args["input"], False)


def _added(found: Written, node: fx.Node, name: str, args: dict[str, Any], folded: bool) -> Any:
    _require_unscaled(found)
    scores, other, left = _sides(args)
    before, after, bias = value(scores), value(node), value(other)
    if len(args) != 2 or (name == "sub" and not left):
        raise Missed(f"its scores come through {node.name}, which the op does not know", found.softmax)
    if bias is None or before is None or after is None or not same(before.shape, after.shape):
        raise Missed("its bias is not a tensor that broadcasts to the scores", found.softmax)
    _require_floating(other, found)
    found.terms.append(_Term(other, folded, negative=name == "sub"))
    return scores


def _require_floating(bias: Any, found: Written) -> None:
    """The op takes a boolean bias for a mask; added, True is 1."""
    if not is_float(bias):
        raise Missed("its bias is not floating", found.softmax)


def _filled(found: Written, node: fx.Node, name: str, args: dict[str, Any], folded: bool) -> Any:
    _require_unscaled(found)
    if name == "masked_fill":
        scores, mask, fill, inverted = args["input"], args.get("mask"), number(args.get("value")), False
    else:
        scores, fill, left = _sides(args)
        mask, fill, inverted = args.get("condition"), number(fill), left
    before, after, hidden = value(scores), value(node), value(mask)
    if hidden is None or hidden.dtype != torch.bool or fill is None or fill > -_HIDES:
        raise Missed("its mask fills in something else than a number below -1000", found.softmax)
    if before is None or after is None or not same(before.shape, after.shape):
        raise Missed("its mask does not broadcast to the scores", found.softmax)
    assert isinstance(mask, fx.Node)
    if found.terms and fill != -torch.inf:
        raise Missed("its mask fills in a finite number and something is added after it", found.softmax)
    found.terms.append(_Term(mask, folded, fill, inverted))
    return scores


def _times(found: Written, node: fx.Node, name: str, args: dict[str, Any]) -> Any:
    scores, other, left = _sides(args)
    factor = number(other)
    if name == "div":
        factor = 1 / factor if factor and left else None
    passed: list[fx.Node] = []
    capped = uncast(scores, passed)
    if read(capped).name != "tanh":
        _multiply(found, factor, node)
        return scores
    _require_unscaled(found)
    inner = uncast(read(capped).args["input"], passed)
    call = read(inner)
    under = number(call.args.get("other")) if call.name in ("div", "mul") else None
    under = 1 / under if call.name == "mul" and under else under
    if factor is None or under is None or abs(factor - under) > 1e-6 * abs(under) or found.softcap:
        raise Missed("its tanh is not cap * tanh(scores / cap)", found.softmax)
    found.softcap = factor
    found.inside += [capped, inner, *passed]
    return call.args["input"]


def fuse_written(graph: fx.Graph, found: Written) -> str:
    """Rewrites. Raises Missed."""
    sources = [found.q, found.kt, found.v]
    values = [value(n) for n in sources]
    product = value(found.product)
    if any(v is None for v in values) or product is None:
        raise Missed("its tensors are not known", found.softmax)
    q, kt, v = values
    assert q is not None
    assert kt is not None
    assert v is not None
    if not (len(q.shape) == len(kt.shape) == len(v.shape) == len(product.shape)):
        raise Missed("its q, k and v have different ranks", found.softmax)
    if not same(q.shape[:-2], kt.shape[:-2]) or not same(q.shape[:-2], v.shape[:-2]):
        raise Missed("its q, k and v have different batches or heads", found.softmax)
    if not same(product.shape[:-2], q.shape[:-2]):
        raise Missed("its product broadcasts", found.softmax)
    biases = [value(t.node) for t in found.terms]
    bias = next((b for b in biases if b is not None), None)
    if product.dtype != torch.float64 and value(found.softmax).dtype == torch.float64:  # type: ignore[union-attr]
        raise Missed("its softmax is float64 and its product is not", found.softmax)
    like = torch.empty(0, dtype=product.dtype, device=q.device)
    why = unserved(like, (q.shape[-1], v.shape[-1]), bias)
    if why:
        raise Missed(why, found.softmax)
    first = found.product
    assert first is not None
    terms = [t.node for t in found.terms]
    if not quiet(first, found.root, [*sources, *terms, *found.inside]):
        raise Missed("a tensor of it is changed in place in between", found.softmax)
    with graph.inserting_before(found.root):
        out = _build(graph, found, product.dtype, len(q.shape) == 3)
    out.meta = {**found.root.meta}
    found.root.replace_all_uses_with(out)
    _erase(graph, found.inside)
    parts = ["scale", *(["softcap"] if found.softcap else [])]
    parts += ["mask" if t.fill is not None else "bias" for t in reversed(found.terms)]
    return "attention (" + ", ".join([*parts, "softmax", *(["dropout"] if found.p else [])]) + ")"


def _build(graph: fx.Graph, found: Written, dtype: torch.dtype, folded: bool) -> fx.Node:
    def call(name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_method(name, args, kwargs)

    def whole(node: fx.Node, is_folded: bool) -> fx.Node:
        """``node`` with four axes, [batch, heads, ...]."""
        tensor = value(node)
        assert tensor is not None
        if is_folded and found.heads is not None and len(tensor.shape) == 3 and not same(tensor.shape[0], 1):
            return call("unflatten", node, 0, found.heads)
        for _ in range(4 - len(tensor.shape)):
            node = call("unsqueeze", node, 0)
        return node

    def cast(new: fx.Node, old: fx.Node) -> fx.Node:
        """In the product's dtype: autocast would cast there."""
        tensor = value(old)
        return new if tensor is None or tensor.dtype == dtype else call("to", new, dtype)

    turned = read(found.kt)
    swaps = turned.name == "transpose" and {turned.args.get("dim0"), turned.args.get("dim1")} in (
        {-1, -2}, {len(value(found.kt).shape) - 1, len(value(found.kt).shape) - 2}  # type: ignore[union-attr]
    )  # fmt: skip
    swaps = swaps and quiet(found.kt, found.root, [])  # what was turned without gradients has none
    k = turned.args["input"] if swaps else None
    q, v = whole(found.q, folded), whole(found.v, folded)
    k = whole(k, folded) if k is not None else call("transpose", whole(found.kt, folded), -1, -2)
    q, k, v = (cast(new, old) for new, old in ((q, found.q), (k, found.kt), (v, found.v)))
    bias: fx.Node | None = None
    hides = False  # whether bias is boolean
    for term in reversed(found.terms):
        node = whole(term.node, term.folded)
        if term.fill is None:
            node = graph.call_function(torch.neg, (node,)) if term.negative else node
            if hides:
                bias = graph.call_function(torch.where, (bias, node, -torch.inf))
            else:
                bias = node if bias is None else graph.call_function(torch.add, (bias, node))
            hides = False
            continue
        seen = node if term.inverted else graph.call_function(torch.logical_not, (node,))
        if term.fill == -torch.inf:
            if bias is None or hides:
                bias = seen if bias is None else graph.call_function(torch.logical_and, (bias, seen))
                hides = True
            else:
                bias = graph.call_function(torch.where, (seen, bias, -torch.inf))
            continue
        if hides:
            bias = graph.call_function(torch.where, (bias, 0.0, -torch.inf))
        # A query that sees nothing has even scores, and no gradient goes to q, k or the bias from there.
        nothing = graph.call_function(torch.logical_not, (call("any", seen, -1, keepdim=True),))
        bias = graph.call_function(torch.where, (seen, 0.0 if bias is None else bias, term.fill))
        bias = call("masked_fill", bias, nothing, 0.0)
        q = call("masked_fill", q, nothing, 0.0)
        hides = False
    p = found.p if found.p * 65536 > 0.5 else 0.0
    device = value(found.q).device  # type: ignore[union-attr]
    drawn = seed(graph, device) if p > 0 else None
    options = Options(bias=bias, seed=drawn, softcap=found.softcap, scale=found.scale, p=p)  # type: ignore[arg-type]
    made = graph.call_function(OP, (q, k, v, *options, dtype, False))
    out = graph.call_function(operator.getitem, (made, 0))
    wanted = value(found.root)
    assert wanted is not None
    if wanted.dtype != dtype:
        out = call("to", out, wanted.dtype)
    if folded:
        out = call("flatten", out, 0, 1) if found.heads is not None else call("squeeze", out, 0)
    return out if _takes_any_strides(found.root) else call("contiguous", out)


def _takes_any_strides(root: fx.Node) -> bool:
    """Whether all that read the result take it however it lies (the op's lies as q does, a product's is contiguous)."""
    return all(
        read(user).name in ("transpose", "contiguous", "reshape")
        or (user.op == "call_method" and user.target in ("permute", "transpose"))
        for user in root.users
    )


def fuse_sdpa(graph: fx.Graph, node: fx.Node) -> str:
    """``F.scaled_dot_product_attention`` with dropout, which takes PyTorch off its fast kernels. Raises Missed."""
    args = read(node).args
    q, k, v = (value(args.get(name)) for name in ("query", "key", "value"))
    p = number(args.get("dropout_p", 0.0))
    if p == 0:
        raise Missed("it drops nothing: PyTorch's own kernels serve it", node)
    mask = args.get("attn_mask")
    scale = args.get("scale")
    if q is None or k is None or v is None or p is None or (mask is not None and value(mask) is None):
        raise Missed("its tensors are not known", node)
    if scale is not None and number(scale) is None:
        raise Missed("its scale is not a number", node)
    causal = bool(args.get("is_causal", False))
    why = refusal(q, k, v, value(mask), p, causal, bool(args.get("enable_gqa", False)))
    wanted = value(node)
    assert wanted is not None
    if why or not p * 65536 > 0.5:
        raise Missed(why or f"its p is {p}", node)
    with graph.inserting_before(node):
        parts = [args[name] for name in ("query", "key", "value")]
        parts = [
            t if value(t).dtype == wanted.dtype else graph.call_method("to", (t, wanted.dtype))  # type: ignore[union-attr]
            for t in parts
        ]
        for _ in range(4 - len(value(mask).shape) if mask is not None else 0):  # type: ignore[union-attr]
            mask = graph.call_method("unsqueeze", (mask, 0))
        options = Options(bias=mask, seed=seed(graph, q.device), causal=2 if causal else 0, scale=scale, p=p)  # type: ignore[arg-type]
        made = graph.call_function(OP, (*parts, *options, wanted.dtype, False))
        out = graph.call_function(operator.getitem, (made, 0))
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return "SDPA with dropout"
