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
from types import CellType, CodeType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple, TypeGuard

_FUTURES = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


class Unreadable(Exception):
    """A method whose source cannot be edited; the message says why."""


SELF = "fastlm_self"  # the module, as the first parameter of a helper's edited copy
CHOOSER = "_fastlm_helper"  # the method that gives a call site the edited copy
WANTED = frozenset(("scaled_dot_product_attention", "rms_norm", "layer_norm"))  # what helpers are followed for


class CallSite(NamedTuple):
    """Where a method, or a helper, calls a helper."""

    method: str
    own: str  # the method's name for the module
    call: ast.Call


class Methods:
    """The methods of ``cls`` by name: ``get`` a tree, edit it, ``change`` or ``add`` it; ``compiled`` gives functions.

    A *helper* is a function of the model's own package that its methods call by name, as ``norm(x)``. ``follow`` gives it
    a name as if it were a method; where it is changed, its callers call the changed copy, and get the module along.
    """

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.draws = 0
        self.trees: dict[str, tuple[ast.FunctionDef, FunctionType]] = {}
        self.changed: dict[str, tuple[ast.FunctionDef, FunctionType]] = {}
        self.wrappers: dict[str, CodeType] = {}  # what __init_subclass__ put around a method, by all appearance
        self.decorators: dict[str, list[FunctionType]] = {}  # what its source puts around a method, innermost last
        self.helpers: dict[str, FunctionType] = {}  # those that were changed, by the names of their copies
        self.sites: dict[str, list[CallSite]] = {}  # who calls each helper

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
            tree = parse(function, name)
            written = len(tree.decorator_list)
            self.decorators[name] = around[len(around) - written :] if written else []
            if written > len(around) or not _rewrappable([*self.decorators[name], function]):
                raise Unreadable(f"its {name} is decorated")
            tree.decorator_list = []
            self.trees[name] = (tree, function)  # type: ignore[assignment]
            if len(around) > written and isinstance(outer, FunctionType):
                self.wrappers[name] = outer.__code__
        return self.trees[name][0]

    def follow(self, site: CallSite) -> str | None:
        """The name of the helper that ``site`` calls, to ``get`` its tree by; None if it is none that can be edited."""
        if (edited := _helper_of(site.call)) is not None:
            return edited
        function = self.resolve(site.method, site.call.func)
        if not _is_helper(function, self.cls) or not _wanted_in_reach(function):
            return None
        known = (name for name, (_, f) in self.trees.items() if name in self.sites and f is function)
        name = next(known, None) or f"_fastlm_helper{len(self.sites)}_{function.__name__}"
        if name not in self.trees:
            try:
                tree = parse(function, function.__name__)
            except Unreadable:
                return None
            if tree.decorator_list or any(isinstance(n, ast.Name) and n.id == SELF for n in ast.walk(tree)):
                return None
            arguments = tree.args.posonlyargs if tree.args.posonlyargs else tree.args.args
            arguments.insert(0, ast.arg(arg=SELF))
            self.trees[name] = (tree, function)
        sites = self.sites.setdefault(name, [])
        if all(known.call is not site.call for known in sites):
            sites.append(site)
        return name

    def change(self, name: str) -> None:
        """Says that the tree of ``name`` was edited; if it is a helper's, its callers call the copy from now on."""
        self.changed[name] = self.trees[name]
        if name in self.sites:
            self.helpers[name] = self.trees[name][1]
        for method, own, call in self.sites.get(name, ()):
            if _helper_of(call) is None:
                chooser = ast.Attribute(ast.Name(own, ast.Load()), CHOOSER, ast.Load())
                call.func = ast.Call(chooser, [ast.Constant(name), call.func], [])
                self.change(method)

    def add(self, name: str, tree: ast.FunctionDef, like: str) -> None:
        """A new method with the globals, closure and defaults of method ``like``."""
        tree.name = name
        self.changed[name] = self.trees[name] = (tree, self.trees[like][1])

    def resolve(self, method: str, node: ast.expr) -> Any:
        """What a dotted name in ``method`` stands for outside of it, or None."""
        function = self.trees[method][1]
        if isinstance(node, ast.Attribute):
            base = self.resolve(method, node.value)
            return getattr(base, node.attr, None) if inspect.ismodule(base) or type(base) is SimpleNamespace else None
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


def _helper_of(call: ast.Call) -> str | None:
    """The helper whose edited copy ``call`` calls, if it was edited."""
    chosen = call.func
    if isinstance(chosen, ast.Call) and isinstance(chosen.func, ast.Attribute) and chosen.func.attr == CHOOSER:
        assert isinstance(chosen.args[0], ast.Constant)
        return str(chosen.args[0].value)
    return None


def _is_helper(function: Any, cls: type) -> TypeGuard[FunctionType]:
    """Whether ``function`` is a plain one of the package that wrote ``cls``."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return False
    home = (function.__module__ or "").split(".")[0]
    return home == cls.__module__.split(".")[0] and home not in ("torch", "fastlm")


def _wanted_in_reach(function: FunctionType) -> bool:
    """Whether ``function``, or a function of its module that it names, names one of ``WANTED``."""
    todo, done = [function], set()
    while todo:
        function = todo.pop()
        if function.__code__ in done:
            continue
        done.add(function.__code__)
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        if not WANTED.isdisjoint((*function.__code__.co_names, *(getattr(value, "__name__", "") for value in named))):
            return True
        todo += [
            value for value in named if isinstance(value, FunctionType) and value.__module__ == function.__module__
        ]
    return False


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


def parse(function: Any, name: str) -> ast.FunctionDef:
    """The tree of ``function``, which messages call ``name``. Raises Unreadable."""
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
    try:
        code = compile(text, filename, "exec", flags=like.__code__.co_flags & _FUTURES, dont_inherit=True)
    except SyntaxError as error:
        raise Unreadable(f"its {like.__name__} cannot be edited ({error.msg})") from None
    for name in ("factory", owner, tree.name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code


def _compile(cls: type, name: str, tree: ast.FunctionDef, like: FunctionType) -> FunctionType:
    tree = ast.fix_missing_locations(copy.deepcopy(tree))
    owner = like.__qualname__.split(".")[-2] if "." in like.__qualname__ else cls.__name__
    owner = owner if owner.isidentifier() else cls.__name__  # "<locals>" of a function made in another
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
