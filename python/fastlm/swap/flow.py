"""Which value each name in a function stands for, as far as straight lines of statements tell.

A *value* is what one assignment to one name, or one parameter, gave. ``Flow`` knows for each value the expression that
made it and all its uses, and for each expression its statement, the list that statement stands in, and whether it may
be skipped. Branches and loops are not followed: a name assigned within one is a new, unknown value afterwards, and what
flowed into it counts as used. So a rewrite that trusts these uses may miss a chance and cannot miss a use.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

Lines = list[ast.stmt]


@dataclass(eq=False)
class Value:
    """``expression`` is None where it is unknown. ``statement``: the assignment; ``lines``: the list it stands in."""

    expression: ast.expr | None = None
    statement: ast.stmt | None = None
    lines: Lines | None = None
    uses: list[ast.Name | None] = field(default_factory=list)  # None: flows somewhere unknown
    mutated: bool = False  # an element or attribute of it is assigned


class Flow:
    """The values of ``function``. Trees must not change while a Flow is in use, but for what its user keeps track of."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.function = function
        self.value_of: dict[ast.Name, Value] = {}  # of each load of a local name
        self.assigned: dict[ast.stmt, Value] = {}  # by each assignment to one name
        self.parent: dict[ast.AST, ast.AST] = {}
        self.where: dict[ast.expr, tuple[ast.stmt, Lines, bool]] = {}  # statement, its list, whether it may be skipped
        self._captured: set[str] = set()
        for node in ast.walk(function):
            for child in ast.iter_child_nodes(node):
                self.parent[child] = node
            if isinstance(node, (ast.Lambda, ast.FunctionDef, ast.ClassDef)) and node is not function:
                self._captured |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        arguments = function.args
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        names += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        self._lines(function.body, {a.arg: Value() for a in names})

    def _lines(self, lines: Lines, env: dict[str, Value]) -> None:
        for statement in lines:
            self._statement(statement, lines, env)

    def _statement(self, s: ast.stmt, lines: Lines, env: dict[str, Value]) -> None:
        if isinstance(s, (ast.Assign, ast.AnnAssign)) and s.value is not None:
            self._expression(s.value, s, lines, env)
            targets = s.targets if isinstance(s, ast.Assign) else [s.target]
            if len(targets) == 1 and isinstance(targets[0], ast.Name) and targets[0].id not in self._captured:
                if isinstance(s.value, ast.Name) and s.value.id in env:
                    value = env[targets[0].id] = env[s.value.id]  # another name for the same value: no use
                    value.uses.remove(s.value)
                else:
                    self.assigned[s] = env[targets[0].id] = Value(s.value, s, lines)
            else:
                for target in targets:
                    self._forget(target, s, lines, env)
        elif isinstance(s, (ast.If, ast.While, ast.For, ast.Try, ast.With)):
            self._compound(s, lines, env)
        else:
            for child in ast.iter_child_nodes(s):
                if isinstance(child, ast.expr):
                    self._expression(child, s, lines, env)
            for target in [s.target] if isinstance(s, ast.AugAssign) else getattr(s, "targets", []):
                self._forget(target, s, lines, env)
            if isinstance(s, (ast.FunctionDef, ast.ClassDef)):
                for node in ast.walk(s):
                    if isinstance(node, ast.Name) and node.id in env:
                        env[node.id].uses.append(None)
                env[s.name] = Value()

    def _forget(self, target: ast.expr, s: ast.stmt, lines: Lines, env: dict[str, Value]) -> None:
        """A target that is not one fresh name: what it names is unknown from here, and what it changed counts as used."""
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                if node.id in env and (isinstance(node.ctx, ast.Load) or isinstance(s, ast.AugAssign)):
                    env[node.id].uses.append(None)
                    env[node.id].mutated = True
                if isinstance(node.ctx, ast.Store):
                    env[node.id] = Value()

    def _compound(self, s: ast.stmt, lines: Lines, env: dict[str, Value]) -> None:
        if isinstance(s, ast.With):
            for item in s.items:
                self._expression(item.context_expr, s, lines, env)
                if item.optional_vars is not None:
                    self._forget(item.optional_vars, s, lines, env)
            self._lines(s.body, env)
            return
        if isinstance(s, (ast.If, ast.While)):
            self._expression(s.test, s, lines, env)
        elif isinstance(s, ast.For):
            self._expression(s.iter, s, lines, env)
        changed = {n.id for n in ast.walk(s) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        if not isinstance(s, ast.If):  # a loop or try: a name may hold either value already inside
            self._merge(changed, env)
        bodies: list[Lines] = [getattr(s, name, []) for name in ("body", "orelse", "finalbody")]
        bodies += [handler.body for handler in getattr(s, "handlers", [])]
        for body in bodies:
            inner = dict(env)
            self._lines(body, inner)
            self._merge(changed, inner)
        self._merge(changed, env)

    @staticmethod
    def _merge(changed: set[str], env: dict[str, Value]) -> None:
        for name in changed:
            if name in env:
                env[name].uses.append(None)
            env[name] = Value()

    def _expression(
        self, e: ast.expr, s: ast.stmt, lines: Lines, env: dict[str, Value], skippable: bool = False
    ) -> None:
        self.where[e] = (s, lines, skippable)
        if isinstance(e, ast.Name) and e.id in env:
            self.value_of[e] = env[e.id]
            env[e.id].uses.append(e if isinstance(e.ctx, ast.Load) and not skippable else None)
        inner_scope = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        for node in ast.iter_child_nodes(e):
            inside = skippable or isinstance(e, inner_scope)
            inside = inside or (isinstance(e, ast.IfExp) and node is not e.test)
            inside = inside or (isinstance(e, ast.BoolOp) and node is not e.values[0])
            if isinstance(node, ast.keyword):
                node = node.value
            if isinstance(node, ast.comprehension):
                for part in (node.target, node.iter, *node.ifs):
                    self._expression(part, s, lines, env, True)
            elif isinstance(node, ast.arguments):
                for default in (*node.defaults, *node.kw_defaults):
                    if default is not None:
                        self._expression(default, s, lines, env, True)
            elif isinstance(node, ast.expr):
                self._expression(node, s, lines, env, inside)

    def replace(self, old: ast.expr, new: ast.expr) -> None:
        """Puts ``new`` where ``old`` stands."""
        parent = self.parent[old]
        for name, content in ast.iter_fields(parent):
            if content is old:
                setattr(parent, name, new)
            elif isinstance(content, list):
                for i, item in enumerate(content):
                    if item is old:
                        content[i] = new
        self.parent[new] = parent
        self.where[new] = self.where[old]
        for child in ast.iter_child_nodes(new):
            self.parent[child] = new


def follows(lines: Lines, first: ast.stmt, second: ast.stmt) -> bool:
    """Whether both statements stand in ``lines``, ``second`` after ``first``."""
    places = [[i for i, s in enumerate(lines) if s is statement] for statement in (first, second)]
    return bool(places[0] and places[1] and places[0][0] < places[1][0])


def between(lines: Lines, first: ast.stmt, second: ast.stmt) -> Lines:
    """The statements of ``lines`` after ``first`` and before ``second``."""
    places = [next(i for i, s in enumerate(lines) if s is statement) for statement in (first, second)]
    return lines[places[0] + 1 : places[1]]


def changes_nothing(statements: Lines) -> bool:
    """Whether no tensor can be changed in place by ``statements``: plain assignments to names, without any call."""
    for statement in statements:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Pass)):
            return False
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(not isinstance(t, ast.Name) for t in targets if t is not None):
            return False
        if any(isinstance(node, ast.Call) for node in ast.walk(statement)):
            return False
    return True
