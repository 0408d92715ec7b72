"""The arguments of dropout_add_norm that are checked apart: the rows' numbers in the whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OP = "dropout_add_norm"


def offset_tensor(offset: int | Tensor | None, x: Tensor, device: torch.device) -> Tensor | None:
    if offset is None:
        return None
    if isinstance(offset, int) and not isinstance(offset, bool):
        if not 0 <= offset < 2**63:
            raise ValueError(f"{OP}: offset is {offset}; it must be a row number, 0 to 2**63 - 1")
        return torch.full((), offset, dtype=torch.int64, device=device)
    rows = math.prod(x.shape[:-1])
    if not isinstance(offset, Tensor):
        raise TypeError(f"{OP}: offset is a {type(offset).__name__}; it must be None, an int or an int64 tensor")
    if offset.dtype != torch.int64 or offset.device != device or (offset.dim() != 0 and offset.shape != (rows,)):
        raise ValueError(
            f"{OP}: offset is a {offset.dtype} tensor of shape {list(offset.shape)} on {offset.device}; it must be "
            f"int64 on {device}, a scalar (the first global row) or [{rows}] (a global row number for each row of x)"
        )
    return offset
