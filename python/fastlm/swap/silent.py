"""Attention that no rule serves: a module that multiplies, takes a softmax and multiplies again gets a reason, not silence."""

from __future__ import annotations

import dis
import inspect
from types import CodeType, FunctionType

from torch import nn

from fastlm.swap.rules import Reason

_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul__")


def reason(module: nn.Module) -> Reason | None:
    """Why the attention of ``module`` stays, where it is written out in its class's methods."""
    cls = type(module)
    if cls.__module__.startswith("torch."):
        return None
    softmaxes, products = _count(cls)
    child = any(isinstance(m, nn.Softmax) for m in module.children())
    if not (softmaxes or child) or products < (1 if "attention" in cls.__name__.lower() else 2):
        return None
    return Reason(
        "its attention is written out in matmuls and a softmax, which no rule of swap knows; it stays PyTorch's"
    )


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
