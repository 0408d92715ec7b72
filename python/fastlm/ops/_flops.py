"""Formulas for ``torch.utils.flop_counter``: attention counts as F.scaled_dot_product_attention does, masks left out.

They are registered when that module is imported, and not before: it imports triton, which decides at its own import
whether kernels are interpreted. The other ops multiply no matrices, and PyTorch counts nothing for their like.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlm.reference.attention import Options

_COUNTER = "torch.utils.flop_counter"


def _pairs(q: Tensor, k: Tensor, options: Options) -> int:
    """Queries times keys, summed over batch, or over packed sequences, and heads."""
    cu_q, cu_k = options.cu_seqlens_q, options.cu_seqlens_k
    if cu_q is None or cu_k is None:
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if type(cu_q) is not Tensor or cu_q.device.type == "meta":  # lengths are not known: the longest each
        return (cu_q.shape[0] - 1) * q.shape[1] * options.max_seqlen_q * options.max_seqlen_k
    return int((cu_q.diff().long() * cu_k.diff().long()).sum()) * q.shape[1]


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any, out_val: Any = None) -> int:
    """Two products: of q and k, of the probabilities and v."""
    return 2 * _pairs(q, k, Options.of(options)) * (q.shape[-1] + v.shape[-1])


def _backward(
    dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, rest: Any, *options: Any,
    out_val: Any = None,
) -> int:  # fmt: skip
    """Five products: the scores again, the gradients of the probabilities, of v, of q and of k."""
    return 2 * _pairs(q, k, Options.of(options)) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _register(counter: ModuleType) -> None:
    ops = torch.ops.fastlm
    counter.register_flop_formula([ops.attention, ops.attention_forward], get_raw=True)(_forward)
    counter.register_flop_formula(ops.attention_backward, get_raw=True)(_backward)


class _AtImport(importlib.abc.MetaPathFinder):
    """Calls ``_register`` when the flop counter is imported, and goes away."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Registers the formulas, now or as soon as there is something to register them with."""
    counter = sys.modules.get(_COUNTER)
    if counter is None:
        sys.meta_path.insert(0, _AtImport())
    else:
        _register(counter)
