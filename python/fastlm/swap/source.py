"""The source of a class's methods as syntax trees, to edit and compile again.

An edited method keeps the globals, the closure (``super()`` included) and the defaults of the original, so it does in
all else what the original does. Its text can be read: ``inspect.getsource(type(module).forward)``.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import itertools
import linecache
import textwrap
from types import CellType, CodeType, FunctionType
from typing import Any

_FUTURES = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


class Unreadable(Exception):
    """A method whose source cannot be edited; the message says why."""


class Methods:
    """The methods of ``cls`` by name: ``get`` a tree, edit it, ``change`` or ``add`` it; ``compiled`` gives functions."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.draws = 0
        self.trees: dict[str, tuple[ast.FunctionDef, FunctionType]] = {}
        self.changed: dict[str, tuple[ast.FunctionDef, FunctionType]] = {}
        self.wrappers: dict[str, CodeType] = {}  # what __init_subclass__ put around a method, by all appearance
        self.decorators: dict[str, list[FunctionType]] = {}  # what its source puts around a method, innermost last

    def place(self) -> int:
        """The number of a new place that draws random numbers."""
        self.draws += 1
        return self.draws - 1

    def get(self, name: str) -> ast.FunctionDef:
        """The tree of method ``name``, one and the same for all who ask. Raises Unreadable."""
        if name not in self.trees:
            function = outer = inspect.getattr_static(self.cls, name, None)
            around: list[Any] = []
            while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
                around.append(function)
                function = function.__wrapped__
            tree = _parse(function, name)
            written = len(tree.decorator_list)
            self.decorators[name] = around[len(around) - written :] if written else []
            if written > len(around) or not _rewrappable([*self.decorators[name], function]):
                raise Unreadable(f"its {name} is decorated")
            tree.decorator_list = []
            self.trees[name] = (tree, function)  # type: ignore[assignment]
            if len(around) > written and isinstance(outer, FunctionType):
                self.wrappers[name] = outer.__code__
        return self.trees[name][0]

    def change(self, name: str) -> None:
        """Says that the tree of ``name`` was edited."""
        self.changed[name] = self.trees[name]

    def add(self, name: str, tree: ast.FunctionDef, like: str) -> None:
        """A new method with the globals, closure and defaults of method ``like``."""
        tree.name = name
        self.changed[name] = (tree, self.trees[like][1])

    def resolve(self, method: str, node: ast.expr) -> Any:
        """What a dotted name in ``method`` stands for outside of it, or None."""
        function = self.trees[method][1]
        if isinstance(node, ast.Attribute):
            base = self.resolve(method, node.value)
            return getattr(base, node.attr, None) if inspect.ismodule(base) else None
        if not isinstance(node, ast.Name) or node.id in function.__code__.co_varnames:
            return None
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        if node.id in cells:
            try:
                return cells[node.id].cell_contents
            except ValueError:
                return None
        return function.__globals__.get(node.id)

    def check(self, made: type) -> None:
        """Raises Unreadable if a method edited in class ``made`` lost a wrapper that it had (and got none anew)."""
        for name in self.changed:
            if name in self.wrappers and made.__dict__[name].__code__ is not self.wrappers[name]:
                raise Unreadable(f"its {name} is wrapped by a decorator")

    def compiled(self) -> dict[str, FunctionType]:
        """The changed and added methods as functions."""
        made = {}
        for name, (tree, like) in self.changed.items():
            made[name] = _compile(self.cls, name, tree, like)
            old = like
            for wrapper in reversed(self.decorators.get(name, [])):
                made[name], old = _rewrap(wrapper, old, made[name]), wrapper
        return made


def _rewrappable(chain: list[Any]) -> bool:
    """Whether each function of ``chain`` holds the next one in its closure, and so can be put around another one."""
    return all(_cells(outer).count(inner) == 1 for outer, inner in itertools.pairwise(chain))


def _cells(function: FunctionType) -> list[Any]:
    return [_content(cell) for cell in function.__closure__ or ()]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _rewrap(wrapper: FunctionType, old: FunctionType, new: FunctionType) -> FunctionType:
    """``wrapper``, which a decorator put around ``old``, around ``new``."""
    cells = tuple(CellType(new) if _content(cell) is old else cell for cell in wrapper.__closure__ or ())
    made = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, cells)
    made.__kwdefaults__ = wrapper.__kwdefaults__
    made.__dict__.update(wrapper.__dict__, __wrapped__=new)
    for attribute in ("__annotations__", "__doc__", "__module__", "__qualname__"):
        setattr(made, attribute, getattr(wrapper, attribute))
    return made


def _parse(function: Any, name: str) -> ast.FunctionDef:
    if not isinstance(function, FunctionType):
        raise Unreadable(f"its {name} is not a plain Python function")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise Unreadable(f"the source of its {name} cannot be read ({error})") from None
    if not isinstance(tree, ast.FunctionDef) or tree.name != function.__name__:
        raise Unreadable(f"the source of its {name} is not a plain def")
    for node in ast.walk(tree):
        if isinstance(node, (ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal, ast.Match)):
            raise Unreadable(f"its {name} contains {type(node).__name__}")
        if isinstance(node, ast.Name) and node.id in ("locals", "eval", "exec"):
            raise Unreadable(f"its {name} calls {node.id}")
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    tree.returns = None
    bare = copy.copy(tree)
    bare.decorator_list = []
    code = _code(bare, function, "<check>", "Check")
    same = code.co_varnames[: code.co_argcount] == function.__code__.co_varnames[: function.__code__.co_argcount]
    if not same or not set(code.co_names) <= set(function.__code__.co_names):
        raise Unreadable(f"the source of its {name} is not what runs (edited or rewritten since)")
    return tree


def _code(tree: ast.FunctionDef, like: FunctionType, filename: str, owner: str) -> CodeType:
    """The code object of ``tree`` compiled where ``like`` stood: in a class (for mangled names), free names free."""
    free = [name for name in like.__code__.co_freevars if name != "__class__"]
    text = f"def factory({', '.join(free)}):\n    class {owner}:\n" + textwrap.indent(ast.unparse(tree), " " * 8) + "\n"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    code = compile(text, filename, "exec", flags=like.__code__.co_flags & _FUTURES, dont_inherit=True)
    for name in ("factory", owner, tree.name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code


def _compile(cls: type, name: str, tree: ast.FunctionDef, like: FunctionType) -> FunctionType:
    tree = ast.fix_missing_locations(copy.deepcopy(tree))
    owner = like.__qualname__.split(".")[-2] if "." in like.__qualname__ else cls.__name__
    code = _code(tree, like, f"<fastlm.swap {cls.__module__}.{cls.__qualname__}.{name} {id(cls):x}>", owner)
    cells = dict(zip(like.__code__.co_freevars, like.__closure__ or ()))
    try:
        closure = tuple(cells[free] for free in code.co_freevars)
    except KeyError as error:
        raise Unreadable(f"its {like.__name__} refers to {error.args[0]}, which was not a free name before") from None
    function = FunctionType(code, like.__globals__, name, like.__defaults__, closure)
    function.__kwdefaults__ = like.__kwdefaults__
    function.__annotations__ = dict(like.__annotations__)
    function.__doc__ = like.__doc__
    function.__module__ = like.__module__
    return function
