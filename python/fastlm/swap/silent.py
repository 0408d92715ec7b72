"""Attention that no rule serves gets a reason, not silence: by what its methods call, or by the name of its class."""

from __future__ import annotations

import dis
import inspect
import re
from types import CodeType, FunctionType

from torch import nn

from fastlm.swap.rules import Reason

_NAMED = re.compile("(attention|attn)$", re.IGNORECASE)
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul__")


def reason(module: nn.Module) -> Reason | None:
    """Why the attention of ``module`` stays: it is written out in its class's methods, or is of another kind."""
    if written_out(module):
        return Reason(
            "its attention is written out in matmuls and a softmax, which no rule of swap knows; it stays PyTorch's"
        )
    return None if type(module).__module__.startswith("torch.") else _by_name(module)


def written_out(module: nn.Module) -> bool:
    """Whether the methods of its class name a softmax and products, as attention does that is written out."""
    cls = type(module)
    if cls.__module__.startswith("torch."):
        return False
    softmaxes, products = _count(cls)
    child = any(isinstance(m, nn.Softmax) for m in module.children())
    return bool(softmaxes or child) and products >= (1 if "attention" in cls.__name__.lower() else 2)


def _by_name(module: nn.Module) -> Reason | None:
    """Of a class that is called attention, and holds no other such class, which may be what attends."""
    if [m for m in module.modules() if _NAMED.search(type(m).__name__)] != [module]:
        return None
    return Reason("it is attention by its name, and calls none that a rule of swap knows; it stays as it is")


def _count(cls: type) -> tuple[int, int]:
    """How often the methods of ``cls``, and the functions of its module that they call, name softmax and products."""
    softmaxes = products = 0
    todo = [f for base in cls.__mro__ if not base.__module__.startswith("torch.") for f in base.__dict__.values()]
    done: set[CodeType] = set()
    while todo:
        function = todo.pop()
        if isinstance(function, CodeType):
            code, home = function, {}
        elif isinstance(function, FunctionType):
            inner = inspect.unwrap(function)
            code, home = inner.__code__, inner.__globals__
        else:
            continue
        if code in done:
            continue
        done.add(code)
        for step in dis.get_instructions(code):
            name = step.argval if isinstance(step.argval, str) else ""
            softmaxes += "softmax" in name.lower()
            products += name in _PRODUCTS or (step.opname == "BINARY_OP" and step.argrepr == "@")
            if step.opname == "LOAD_GLOBAL" and isinstance(home.get(name), FunctionType):
                if home[name].__module__ == cls.__module__:
                    todo.append(home[name])
    return softmaxes, products
