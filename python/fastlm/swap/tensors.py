"""Which tensors a swapped module may hand to an op."""

from __future__ import annotations

import logging
import re

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


def tell(what: str) -> None:
    """Logs ``what`` once, whatever numbers are in it: a decoder's shapes are others at each step."""
    if torch.compiler.is_compiling():
        return
    kind = _NUMBERS.sub("", what)
    if kind not in _told:
        _told.add(kind)
        log.warning("fastlm.swap: %s", what)
