"""Modules whose ``forward`` is not (only) their class's: what must follow when their class changes, and what cannot.

Libraries put a forward of their own into a module (accelerate's hooks) and keep the old one, bound to the module, to call
it. A bound method is a pair of function and object, so it does not notice a new class. ``rebind`` finds such methods, in
the module's attributes, in closures and partials, and binds those of the new class in their place.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

_DEPTH = 4  # of wrappers in wrappers

_Put = Callable[[Any], None]


def own_forward(module: nn.Module) -> str:
    """The name of what stands in for the class's forward in ``module``, or ""."""
    found = module.__dict__.get("forward")
    if found is None or getattr(found, "__func__", None) is getattr(type(module), "forward", None):
        return ""
    return getattr(found, "__qualname__", None) or type(found).__name__


def holds(module: nn.Module, cls: type) -> bool:
    """Whether a method of ``cls``, bound to ``module``, is kept where ``rebind`` finds it."""
    return next(_bound(module, cls), None) is not None


def rebind(module: nn.Module, old: type, new: type) -> list[Callable[[], None]]:
    """Binds methods of ``new`` where ``module`` keeps those of ``old``; returns what undoes each."""
    undo: list[Callable[[], None]] = []
    for method, put in list(_bound(module, old)):
        name = method.__name__
        if getattr(new, name, None) is not None:
            put(types.MethodType(getattr(new, name), module))
            undo.append(functools.partial(put, method))
    return undo


def _bound(module: nn.Module, cls: type) -> Iterator[tuple[types.MethodType, _Put]]:
    """(bound method, what puts another one in its place) of the methods of ``cls`` that ``module`` keeps."""
    for name, value in list(module.__dict__.items()):
        yield from _within(value, functools.partial(module.__dict__.__setitem__, name), module, cls, _DEPTH)


def _within(value: Any, put: _Put, module: nn.Module, cls: type, depth: int) -> Iterator[tuple[types.MethodType, _Put]]:
    if isinstance(value, types.MethodType):
        if value.__self__ is module and getattr(cls, value.__name__, None) is value.__func__:
            yield value, put
        return
    if depth == 0:
        return
    if isinstance(value, functools.partial):
        for at, part in ((None, value.func), *enumerate(value.args), *value.keywords.items()):
            yield from _within(part, functools.partial(_put_in_partial, value, at), module, cls, depth - 1)
    wrapped = (
        getattr(value, "__wrapped__", None) if isinstance(value, (types.FunctionType, functools.partial)) else None
    )
    if wrapped is not None:
        yield from _within(wrapped, functools.partial(setattr, value, "__wrapped__"), module, cls, depth - 1)
    yield from _of_function(value, module, cls, depth)


def _put_in_partial(partial: functools.partial[Any], at: int | str | None, part: Any) -> None:
    """Changes ``partial`` itself, which others may hold: its function (None), or an argument by place or name."""
    function, args, keywords = partial.func, list(partial.args), dict(partial.keywords)
    if at is None:
        function = part
    elif isinstance(at, int):
        args[at] = part
    else:
        keywords[at] = part
    partial.__setstate__((function, tuple(args), keywords, partial.__dict__))  # type: ignore[attr-defined]


def _of_function(value: Any, module: nn.Module, cls: type, depth: int) -> Iterator[tuple[types.MethodType, _Put]]:
    if not isinstance(value, types.FunctionType):
        return
    for cell in value.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
        yield from _within(content, functools.partial(setattr, cell, "cell_contents"), module, cls, depth - 1)


def inner_class(module: nn.Module) -> type[nn.Module]:
    """The class below the one that torch's parametrizations made for ``module``, else its class."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) and cls.__name__.startswith("Parametrized") else cls


def around(module: nn.Module, inner: type[nn.Module]) -> type[nn.Module]:
    """The class of ``module`` with ``inner`` in the place of ``inner_class(module)``.

    A parametrization's class has the parametrized class as its one base, to which torch goes back when it is removed.
    """
    cls = type(module)
    if inner_class(module) is cls:
        return inner
    kept = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__", "__doc__", "__module__")}
    made: type[nn.Module] = type(cls)(cls.__name__, (inner,), {**kept, "__module__": cls.__module__})  # type: ignore[misc]
    return made
