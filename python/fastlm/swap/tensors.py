"""Which tensors a swapped module may hand to an op."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

import torch
from torch import Tensor

log = logging.getLogger("fastlm")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBERS = re.compile(r"(?<!\w)\d[\d., ]*")  # not those of a name, as of a class or dtype
_told: set[str] = set()


def plain(*tensors: Tensor | None) -> bool:
    """Whether the ops take these: floating and not nested. A DTensor that lies as an op cannot serve it raises there."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):  # a proxy of torch.fx
            return False
        if tensor.dtype not in _FLOATS or tensor.is_nested:
            return False
    return True


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """What runs within is no part of a graph that torch.jit.trace is making."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def tell(what: str) -> None:
    """Logs ``what`` once, whatever numbers are in it: a decoder's shapes are others at each step."""
    if torch.compiler.is_compiling():
        return
    kind = _NUMBERS.sub("", what)
    if kind not in _told:
        _told.add(kind)
        log.warning("fastlm.swap: %s", what)
