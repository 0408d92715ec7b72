"""Whether a function of a model computes and does nothing else, as far as its bytecode tells.

An attention function that was recognised by its results is not called again. That is right only if nobody would notice:
it must not record what it sees, and must not read what may change later.
"""

from __future__ import annotations

import dis
import inspect
import sys
from types import CodeType, FunctionType, ModuleType
from typing import Any

_CONSTANT = (int, float, complex, str, bytes, bool, type(None))
_BUILTINS = frozenset(
    ("int", "float", "bool", "len", "min", "max", "range", "isinstance", "getattr", "hasattr", "tuple", "list", "dict")
    + ("zip", "enumerate", "abs", "sum", "type", "str", "ValueError", "RuntimeError", "TypeError")
)
_WRITES = frozenset(("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "STORE_DEREF", "IMPORT_NAME"))
_LIBRARIES = ("torch", "math", "typing", "einops", "numpy")


def is_own(function: Any, module: str, name: str) -> bool:
    """Whether ``function`` is the one that the source of ``module`` defines as ``name``: not a wrapper that looks like it."""
    home = sys.modules.get(module)
    if home is None or not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return False
    code = function.__code__
    return code.co_name == name and code.co_filename == home.__file__ and not function.__closure__


def reads(function: Any) -> frozenset[str] | None:
    """The names of the arguments that ``function`` reads, keys of its ``**kwargs`` among them; None: it may read any."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return frozenset(named)
    if not isinstance(function, FunctionType) or rest in function.__code__.co_cellvars:
        return None
    steps = [i for i in dis.get_instructions(function) if i.opname not in ("CACHE", "PUSH_NULL", "RESUME", "PRECALL")]
    for at, step in enumerate(steps):
        if step.argval != rest or not step.opname.startswith("LOAD_FAST"):
            if isinstance(step.argval, tuple) and rest in step.argval:  # two loads in one instruction (Python 3.13)
                return None
            continue
        after = [s.argval for s in steps[at + 1 : at + 3]]  # kwargs.get("key"
        if len(after) < 2 or after[0] != "get" or not isinstance(after[1], str):
            return None
        named.add(after[1])
    return frozenset(named)


def impure(function: Any, seen: tuple[Any, ...] = ()) -> str:
    """What ``function`` does besides computing from its arguments, or ""."""
    if not isinstance(function, FunctionType):
        return f"{getattr(function, '__name__', type(function).__name__)} is no plain Python function"
    name = function.__name__
    if hasattr(function, "__wrapped__") or function.__closure__:
        return f"{name} is wrapped or a closure"
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if not all(_constant(value) for value in defaults):
        return f"{name} has a default value that may change"
    code = function.__code__
    first = code.co_varnames[0] if code.co_argcount else ""
    steps = [i for i in dis.get_instructions(function) if i.opname != "CACHE"]
    for step in steps:
        if step.opname in _WRITES:
            return f"{name} sets or imports {step.argval}"
        method = step.opname == "LOAD_METHOD" or (step.opname == "LOAD_ATTR" and "NULL|self" in step.argrepr)
        if method and (not seen or first in ("module", "self")) and _called_on(steps, step, first):
            return f"{name} calls {first}.{step.argval}"
    if any(isinstance(constant, CodeType) for constant in code.co_consts):
        return f"{name} defines functions"
    for used in _globals_of(code):
        if used not in function.__globals__:
            if used not in _BUILTINS:
                return f"{name} uses {used}"
            continue
        value = function.__globals__[used]
        if isinstance(value, ModuleType):
            if value.__name__.split(".")[0] not in _LIBRARIES:
                return f"{name} uses {used}"
        elif isinstance(value, FunctionType) and not value.__module__.startswith("torch."):
            if value is not function and value not in seen and (why := impure(value, (*seen, function))):
                return why
        elif not _constant(value) and getattr(value, "__module__", "").split(".")[0] not in (*_LIBRARIES, "builtins"):
            return f"{name} uses {used}"
    return ""


def _constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_constant(v) for v in value)
    return isinstance(value, _CONSTANT) or type(value).__module__ == "torch"


def _globals_of(code: CodeType) -> set[str]:
    return {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _called_on(steps: list[dis.Instruction], method: dis.Instruction, first: str) -> bool:
    """Whether the object of a method call is ``first``, or an attribute of it other than its tensor of sinks."""
    at = next(i for i, s in enumerate(steps) if s is method) - 1
    attribute = ""
    while at >= 0 and steps[at].opname == "LOAD_ATTR":
        attribute, at = steps[at].argval, at - 1
    loaded = at >= 0 and steps[at].opname.startswith("LOAD_FAST") and steps[at].argval == first
    return loaded and not (attribute == "sinks" and method.argval in ("reshape", "view", "expand", "unsqueeze"))
