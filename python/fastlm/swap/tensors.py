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


def _dtensor() -> type | None:
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return DTensor


_DTENSOR = _dtensor()


def plain(*tensors: Tensor | None) -> bool:
    """Whether the ops take these: floating, not nested, and not DTensors, for which they have no sharding rule."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS or tensor.is_nested:
            return False
        if _DTENSOR is not None and isinstance(tensor, _DTENSOR):
            tell("a module of a swapped class got a DTensor: PyTorch's own ops serve it")
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
