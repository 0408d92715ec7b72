"""Rule: in the forward of any module, dropout, residual add and norm in a row become one dropout_add_norm.

The source of the forward is read as a syntax tree, and of each sum is asked: is one side a dropout that nothing else
reads (called in place, or one line above, or at the end of a helper method)? Is the sum, or its only reader, a norm? The
tree is edited accordingly and compiled again; all other code, control flow included, stays as it is.

    x = x + self.drop(self.attn(self.norm1(x)))     ->  y, x = self._fastlm_both(0, self.norm2, self.drop, residual=x,
    x = x + self.drop(self.mlp(self.norm2(x)))                                  x=self.attn(self.norm1(x)))
                                                        x = self._fastlm_add(1, self.drop, residual=x, x=self.mlp(y))

The facts of this rule are which attributes are norms and dropouts; at each call ``chain.py`` looks at them again.
"""

from __future__ import annotations

import ast
import copy
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastlm.swap import norms
from fastlm.swap.chain import Chains
from fastlm.swap.dropout import DropoutForward
from fastlm.swap.flow import Flow, Value, between, changes_nothing, follows
from fastlm.swap.functional import plain_norm
from fastlm.swap.rules import Facts, Reason, Rewrite, Rule
from fastlm.swap.source import Methods, Unreadable

_ADDS = (torch.add,)


class BlockRule(Rule):
    name = "block"
    mixin = Chains

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        cls = type(module)
        if cls.forward is nn.Module.forward or isinstance(module, (nn.Dropout, nn.Sequential, nn.ModuleList)):
            return None
        written = next(c for c in cls.__mro__ if "forward" in c.__dict__)  # FSDP2's subclasses come from torch
        if written.__module__.startswith("torch.") and "Transformer" not in written.__name__:
            return None
        has_norms = any(_is_norm(child) for child in module.children())
        try:
            methods = Methods(cls)
            facts = _facts(methods, module)
        except Unreadable as error:
            return Reason(f"its chains stay apart: {error}") if has_norms else None
        done = _trial(cls, facts)
        if isinstance(done, str):
            return Reason(f"its chains stay apart: {done}") if has_norms else None
        if not done:
            return None
        return self.describe(module, facts)

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        cls = getattr(type(module), "_fastlm_original", type(module))
        done = _trial(cls, facts)
        assert isinstance(done, tuple)
        counted = Counter(done)
        what = ", ".join(label if n == 1 else f"{n} x {label}" for label, n in counted.items())
        norm = next((f.split("=")[1] for f in facts if f.startswith("norm=")), "")
        weights = [p.shape[-1] for p in _attribute(module, norm).parameters()] if norm else []
        return Rewrite(self.name, facts, f"fused: {what}", "dropout_add_norm", (1, weights[0] if weights else 64), 2)

    def edit(self, methods: Methods, facts: Facts) -> None:
        _edit(methods, facts)


def _attribute(module: nn.Module, path: str) -> nn.Module:
    found = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _is_norm(module: object) -> bool:
    if not isinstance(module, nn.Module):
        return False
    return isinstance(module, norms.NormForward) or isinstance(norms.find(module), norms.Spec)


def _is_dropout(module: object) -> bool:
    plain = isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward and not module.inplace
    return plain or isinstance(module, DropoutForward)


def _self_path(node: ast.expr, self_name: str) -> str | None:
    """The path "a.b" of ``self.a.b``, or None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == self_name else None


def _self_of(tree: ast.FunctionDef) -> str:
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    if not arguments:
        raise Unreadable("its forward has no self")
    return arguments[0].arg


def _helpers(methods: Methods, name: str = "forward", seen: tuple[str, ...] = ()) -> tuple[str, ...]:
    """``forward`` and the methods of the class that it calls on self, each once; those that cannot be read left out."""
    seen = (*seen, name)
    tree = methods.get(name)
    own = _self_of(tree)
    for node in ast.walk(tree):
        path = _self_path(node.func, own) if isinstance(node, ast.Call) else None
        if path is None or "." in path or path in seen or hasattr(nn.Module, path):
            continue
        if getattr(methods.cls, path, None) is not None:
            try:
                seen = _helpers(methods, path, seen)
            except Unreadable:
                methods.trees.pop(path, None)
    return seen


def _facts(methods: Methods, module: nn.Module) -> Facts:
    """Which attributes that the forward calls are norms ("norm=path") and dropouts ("drop=path")."""
    facts: set[str] = set()
    for name in _helpers(methods):
        tree = methods.get(name)
        for node in ast.walk(tree):
            path = _self_path(node.func, _self_of(tree)) if isinstance(node, ast.Call) else None
            if path is None:
                continue
            try:
                target = _attribute(module, path)
            except AttributeError:
                continue
            if _is_norm(target):
                facts.add(f"norm={path}")
            elif _is_dropout(target):
                facts.add(f"drop={path}")
    return tuple(sorted(facts))


_trials: weakref.WeakKeyDictionary[type, dict[Facts, tuple[str, ...] | str]] = weakref.WeakKeyDictionary()


def _trial(cls: type, facts: Facts) -> tuple[str, ...] | str:
    """What an edit would fuse, or why it cannot be made."""
    cache = _trials.setdefault(cls, {})
    if facts not in cache:
        methods = Methods(cls)
        try:
            cache[facts] = _edit(methods, facts)
            methods.compiled()
        except Unreadable as error:
            cache[facts] = str(error)
    return cache[facts]


def _edit(methods: Methods, facts: Facts) -> tuple[str, ...]:
    labels: list[str] = []
    for name in _helpers(methods):
        tree = methods.get(name)
        found = _Editor(methods, name, tree, facts, dry=True).run()
        whole: list[str] = []
        for parameter in _optional(tree):
            version = copy.deepcopy(tree)
            _specialise(version, parameter)
            better = _Editor(methods, name, version, facts, dry=True).run()
            if _norms_in(better) > 2 * _norms_in(found):  # the branch that stays whole has those of ``found`` again
                _specialise(tree, parameter)
                whole = found  # are there twice now, of which one runs
                break
        done = _Editor(methods, name, tree, facts).run()
        if done:
            methods.change(name)
            labels += (Counter(done) - Counter(whole)).elements()
    return tuple(labels)


def _norms_in(labels: list[str]) -> int:
    return sum("norm" in label for label in labels)


def _optional(tree: ast.FunctionDef) -> list[str]:
    """Parameters that a top-level ``if`` compares with None and that are never assigned."""
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    parameters = {a.arg for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)} - assigned
    found = [_compared_with_none(s.test) for s in tree.body if isinstance(s, ast.If)]
    return [f[0] for f in dict.fromkeys(found) if f is not None and f[0] in parameters]


def _compared_with_none(test: ast.expr) -> tuple[str, bool] | None:
    """(name, whether the test is true for None) of ``name is None`` and ``name is not None``."""
    if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and len(test.ops) == 1:
        right = test.comparators[0]
        if isinstance(right, ast.Constant) and right.value is None and isinstance(test.ops[0], (ast.Is, ast.IsNot)):
            return test.left.id, isinstance(test.ops[0], ast.Is)
    return None


def _specialise(tree: ast.FunctionDef, parameter: str) -> None:
    """``body`` -> ``if parameter is not None: body; else: body without the branches for it``: straight lines appear."""
    without: list[ast.stmt] = []
    for s in copy.deepcopy(tree.body):
        compared = _compared_with_none(s.test) if isinstance(s, ast.If) else None
        if compared is not None and compared[0] == parameter:
            assert isinstance(s, ast.If)
            without += s.body if compared[1] else s.orelse
        else:
            without.append(s)
    test = ast.parse(f"{parameter} is not None", mode="eval").body
    tree.body = [ast.If(test=test, body=tree.body, orelse=without or [ast.Pass()])]


@dataclass
class _Peeled:
    """A branch with its dropout taken off: what to add instead, and edits to make first."""

    x: ast.expr
    dropout: ast.expr
    statement: ast.stmt | None = None  # the assignment of x, whose dropout goes


class _Editor:
    """Finds and rewrites the chains of one method. With ``dry`` it works on a copy and defines nothing."""

    def __init__(self, methods: Methods, name: str, tree: ast.FunctionDef, facts: Facts, dry: bool = False) -> None:
        self.methods, self.name, self.facts, self.dry = methods, name, set(facts), dry
        self.tree = copy.deepcopy(tree) if dry else tree
        self.own = _self_of(tree)
        self.flow = Flow(self.tree)
        self.labels: list[str] = []
        self.places: list[ast.Constant] = []

    def run(self) -> list[str]:
        adds = [node for node in ast.walk(self.tree) if self._sides(node) is not None and node in self.flow.where]
        for add in reversed(adds):  # ast.walk gives outer nodes first: inner sums are rewritten before outer ones
            assert isinstance(add, ast.expr)
            self._rewrite(add)
        for node in list(ast.walk(self.tree)):
            if isinstance(node, ast.Call) and node in self.flow.where:
                dropout = self._functional_dropout(node)
                if dropout is not None:
                    self._put(node, "drop", [dropout[0], *dropout[1].elts], {})
                    self.labels.append("dropout")
        if not self.dry:
            self._number(self.tree)
        return self.labels

    def _number(self, node: ast.AST) -> None:
        """Numbers the places in the order of the source."""
        if node in self.places:
            assert isinstance(node, ast.Constant)
            node.value = self.methods.place()
        for child in ast.iter_child_nodes(node):
            self._number(child)

    def _sides(self, node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return node.left, node.right
        if isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords:
            if self.methods.resolve(self.name, node.func) in _ADDS:
                return node.args[0], node.args[1]
        return None

    def _is(self, kind: str, node: ast.AST) -> bool:
        """Whether ``node`` is a call of a norm or dropout of the facts with one argument."""
        if (
            not isinstance(node, ast.Call)
            or len(node.args) != 1
            or node.keywords
            or isinstance(node.args[0], ast.Starred)
        ):
            return False
        path = _self_path(node.func, self.own)
        if path is not None:
            return f"{kind}={path}" in self.facts
        return kind == "norm" and plain_norm(self.methods.resolve(self.name, node.func)) is not None

    def _functional_dropout(self, node: ast.expr) -> tuple[ast.expr, ast.Tuple] | None:
        """(input, (p, training)) of a call of ``F.dropout``."""
        if not isinstance(node, ast.Call) or self.methods.resolve(self.name, node.func) is not F.dropout:
            return None
        given: dict[str, ast.expr] = dict(zip(("input", "p", "training", "inplace"), node.args))
        given |= {k.arg: k.value for k in node.keywords if k.arg is not None}
        inplace = given.get("inplace", ast.Constant(False))
        if (
            "input" not in given
            or any(isinstance(a, ast.Starred) for a in node.args)
            or None in {k.arg for k in node.keywords}
        ):
            return None
        if not (isinstance(inplace, ast.Constant) and inplace.value is False):
            return None
        p, training = given.get("p", ast.Constant(0.5)), given.get("training", ast.Constant(True))
        return given["input"], ast.Tuple(elts=[p, training], ctx=ast.Load())

    def _peel(self, node: ast.expr) -> _Peeled | None:
        """``node`` without its outermost dropout, if it has one that only this reader sees."""
        if self._is("drop", node):
            assert isinstance(node, ast.Call)
            return _Peeled(node.args[0], copy.deepcopy(node.func))
        functional = self._functional_dropout(node)
        if functional is not None:
            return _Peeled(*functional)
        if isinstance(node, ast.Name) and node in self.flow.value_of:
            value = self.flow.value_of[node]
            statement, lines, _ = self.flow.where[node]
            made_here = (
                value.statement is not None and value.lines is lines and follows(lines, value.statement, statement)
            )
            if made_here and value.uses == [node] and not isinstance(value.expression, ast.Name):
                assert value.expression is not None
                assert value.statement is not None
                if not changes_nothing(between(lines, value.statement, statement)):
                    return None  # the dropout would move down over lines that may change its input in place
                inner = self._peel(value.expression)
                if inner is not None and inner.statement is None:
                    return _Peeled(inner.x, inner.dropout, value.statement)
        if isinstance(node, ast.Call):
            return self._peel_helper(node)
        return None

    def _peel_helper(self, node: ast.Call) -> _Peeled | None:
        """A call of a method of the class whose last act is a dropout becomes a call of its twin without."""
        path = _self_path(node.func, self.own)
        if path is None or path not in self.methods.trees or path == self.name or self.methods.decorators.get(path):
            return None
        twin = copy.deepcopy(self.methods.get(path))
        returns = [n for n in ast.walk(twin) if isinstance(n, ast.Return)]
        if len(returns) != 1 or twin.body[-1] is not returns[0] or returns[0].value is None:
            return None
        if _self_of(twin) != self.own:
            return None
        editor = _Editor(self.methods, path, twin, tuple(self.facts))
        peeled = editor._peel(returns[0].value)
        if peeled is None or not _depends_on_self_alone(peeled.dropout, self.own):
            return None
        editor._take(peeled)
        if peeled.statement is None:
            returns[0].value = peeled.x
        name = f"_fastlm_before_dropout_of_{path}"
        if not self.dry:
            self.methods.add(name, twin, path)
        call = copy.copy(node)
        call.func = ast.Attribute(value=ast.Name(id=self.own, ctx=ast.Load()), attr=name, ctx=ast.Load())
        return _Peeled(call, peeled.dropout)

    def _take(self, peeled: _Peeled) -> None:
        """Takes the dropout off the assignment in which it stands."""
        if peeled.statement is not None:
            peeled.statement.value = peeled.x  # type: ignore[attr-defined]
            self.flow.parent[peeled.x] = peeled.statement

    def _rewrite(self, add: ast.expr) -> None:
        sides = self._sides(add)
        assert sides is not None
        statement, lines, skippable = self.flow.where[add]
        peeled = None
        for x, residual in (sides[::-1], sides):  # noqa: B007  (the branch is most often the right side)
            peeled = self._peel(x)
            if peeled is not None:
                break
        norm = self._norm_of(add, statement, lines, skippable)
        if peeled is None and norm is None:
            return
        if peeled is None:
            residual, x = sides  # nothing to tell them apart, and for a plain sum nothing to gain
        first = x is sides[0]
        branch, dropout = (x, ast.Constant(None)) if peeled is None else (peeled.x, peeled.dropout)
        if peeled is not None and peeled.statement is not None:
            self._take(peeled)
            branch = x
        parts = {"x": branch, "residual": residual}
        if not first:
            parts = {"residual": residual, "x": branch}  # evaluated in the order in which they stood
        label = ("dropout + " if peeled is not None else "") + "add"
        if norm is None:
            self._put(add, "add", [dropout], parts)
            self.labels.append(label)
            return
        call, value = norm
        self.labels.append(label + " + norm")
        if value is None:  # norm(sum), and no one else reads the sum
            self.flow.replace(call, self._call("norm", [copy.deepcopy(call.func), dropout], parts))
            return
        name = f"fastlm_y{len(self.labels)}"
        made = self._call("both", [copy.deepcopy(call.func), dropout], parts)
        assert isinstance(statement, (ast.Assign, ast.AnnAssign))
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        names = ast.Tuple(elts=[ast.Name(id=name, ctx=ast.Store()), target], ctx=ast.Store())
        if len(value.uses) == 1:  # the norm is the sum's only reader
            made = self._call("norm", [copy.deepcopy(call.func), dropout], parts)
            assignment = ast.Assign(targets=[ast.Name(id=name, ctx=ast.Store())], value=made)
        else:
            assignment = ast.Assign(targets=[names], value=made)
        self.flow.parent[made] = assignment
        lines[next(i for i, s in enumerate(lines) if s is statement)] = assignment
        for other, (s, where, skip) in list(self.flow.where.items()):
            if s is statement:
                self.flow.where[other] = (assignment, where, skip)
        self.flow.replace(call, ast.Name(id=name, ctx=ast.Load()))

    def _norm_of(
        self, add: ast.expr, statement: ast.stmt, lines: list[ast.stmt], skippable: bool
    ) -> tuple[ast.Call, Value | None] | None:
        """The norm of this sum: (its call, None) where it is called on the sum itself, (its call, the sum's value) later."""
        parent = self.flow.parent[add]
        if self._is("norm", parent):
            assert isinstance(parent, ast.Call)
            return parent, None
        value = self.flow.assigned.get(statement)
        if value is None or value.expression is not add or skippable or value.mutated:
            return None
        for use in value.uses:
            call = self.flow.parent[use] if use is not None else None
            if use is None or call is None or not self._is("norm", call):
                continue
            assert isinstance(call, ast.Call)
            later, there, may_skip = self.flow.where[use]
            if there is lines and not may_skip and follows(lines, statement, later):
                passed = {*between(lines, statement, later), later}
                return (call, value) if self._only_read(value, passed, call) else None
        return None

    def _only_read(self, value: Value, statements: set[ast.stmt], norm: ast.Call) -> bool:
        """Whether nothing in ``statements`` can change ``value`` in place, the norm's own reading left out.

        A function or module that gets it may (``F.relu(x, inplace=True)``), and so may who holds a view of it
        (``x[:, 0].fill_(0)``). Arithmetic and questions of shape do not.
        """
        known = [use for use in value.uses if use is not None]
        if len(known) < len(value.uses):  # it also flows where Flow does not follow: is that here?
            compound = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)
            names = [n for s in statements for n in ast.walk(s) if isinstance(n, ast.Name)]
            here = [n for n in names if self.flow.value_of.get(n) is value and not self._renames(n)]
            if any(isinstance(s, compound) for s in statements) or any(n not in known for n in here):
                return False
        for use in known:
            parent = self.flow.parent[use]
            if parent is norm or not any(_contains(s, use) for s in statements):
                continue
            reads = isinstance(parent, (ast.BinOp, ast.UnaryOp, ast.Compare))
            if isinstance(parent, ast.Tuple):  # returned beside the norm
                reads = isinstance(self.flow.parent[parent], ast.Return)
            if isinstance(parent, ast.keyword):  # of a sum that is rewritten already
                made = self.flow.parent[parent]
                reads = isinstance(made, ast.Call) and getattr(made.func, "attr", "").startswith("_fastlm_")
            if isinstance(parent, ast.Attribute):
                called = isinstance(self.flow.parent[parent], ast.Call)
                reads = parent.attr in (("size", "dim", "numel") if called else ("shape", "dtype", "device", "ndim"))
            if not reads:
                return False
        return True

    def _renames(self, node: ast.Name) -> bool:
        """Whether ``node`` stands in ``other = node``, which is no use."""
        parent = self.flow.parent[node]
        return isinstance(parent, (ast.Assign, ast.AnnAssign)) and parent.value is node

    def _call(self, method: str, before: list[ast.expr], parts: dict[str, ast.expr]) -> ast.Call:
        place = ast.Constant(0)
        if not any(isinstance(b, ast.Constant) and b.value is None for b in before):  # without dropout it draws nothing
            self.places.append(place)
        call = ast.Call(
            func=ast.Attribute(value=ast.Name(id=self.own, ctx=ast.Load()), attr=f"_fastlm_{method}", ctx=ast.Load()),
            args=[place, *before],
            keywords=[ast.keyword(arg=name, value=value) for name, value in parts.items()],
        )
        for node in (call, *call.keywords):  # parts may be rewritten in their turn
            for child in ast.iter_child_nodes(node):
                self.flow.parent[child] = node
        return call

    def _put(self, old: ast.expr, method: str, before: list[ast.expr], parts: dict[str, ast.expr]) -> None:
        self.flow.replace(old, self._call(method, before, parts))


def _contains(statement: ast.stmt, node: ast.AST) -> bool:
    return any(n is node for n in ast.walk(statement))


def _depends_on_self_alone(node: ast.expr, own: str) -> bool:
    return all(n.id == own for n in ast.walk(node) if isinstance(n, ast.Name))
