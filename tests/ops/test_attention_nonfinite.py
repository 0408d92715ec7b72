"""NaN and infinity in attention: what sees one becomes NaN, forward and backward, as in PyTorch's; nothing hides a divergence.

Held to the reference's pattern without dropout. With dropout a dropped NaN gives v's gradient 0, not NaN times 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import fastlm
import pytest
import torch
from attention_cases import BACKENDS, BF16, F32
from paths import python_path
from torch import Tensor

op = fastlm.ops.attention
NAN, INF = float("nan"), float("inf")


def _query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    q[0, 0, -1, 5] = NAN


def _key(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    k[0, 1, 130, 0] = NAN


def _value(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    v[0, 1, 7, 3] = INF


def _bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    bias[0, 0, 0, 2] = NAN


def _infinite_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    bias[0, 0, 0, 2] = INF


def _overflow(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    q[0, 0, -1] = 1e30
    k[0, 0, 150] = 1e30


POISONS: tuple[Callable[..., None], ...] = (_query, _key, _value, _bias, _infinite_bias, _overflow)


def found(poison: Callable[..., None], queries: int, keys: int, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """out, lse and the gradients of q, k, v and bias."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 32, generator=generator).to(dtype) for n in (queries, keys, keys))
    bias = torch.zeros(1, 1, queries, keys, dtype=dtype)
    poison(q, k, v, bias)
    leaves = [q, k, v, *([bias] if "bias" in poison.__name__ else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    with fastlm.backend.use(backend):
        out, lse = op(q, k, v, bias=bias if "bias" in poison.__name__ else None, softcap=0.0, return_lse=True)
        return [out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), leaves)]


def check(backend: str) -> None:
    for poison in POISONS:
        for queries, keys in ((1, 1500), (3, 200), (70, 200)):  # pieces of a cache; dot products; tiles
            for dtype in (F32, BF16):
                name = (poison.__name__, queries, keys, dtype)
                ours, theirs = (found(poison, queries, keys, dtype, b) for b in (backend, "reference"))
                assert not theirs[0].isfinite().all(), name
                for at, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                    # lse of a row with a score of +inf is NaN, or +inf where it is not summed relative to the largest
                    assert torch.equal(a.isfinite(), b.isfinite()) if at == 1 else torch.equal(a.isnan(), b.isnan()), (
                        name
                    )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled core is missing")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_nothing_swallows_nan_or_infinity_on_any_instruction_set(isa: str) -> None:
    code = "import test_attention_nonfinite as t; t.check('cpu')"
    env = os.environ | {"FASTLM_CPU_ISA": isa, "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(-1, 2**63 - 1), (2**63 - 1, -1), (2**63 - 1, 2**63 - 1)])
def test_a_window_of_any_size_is_no_window(backend: str, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for queries, keys in ((9, 5), (5, 200)):
        q, k = torch.randn(1, 2, queries, 32, requires_grad=True), torch.randn(1, 2, keys, 32, requires_grad=True)
        with fastlm.backend.use(backend):
            limited, plain = op(q, k, k, window=window), op(q, k, k)
            assert torch.equal(limited, plain)
            for a, b in zip(*(torch.autograd.grad(out.sum(), (q, k)) for out in (limited, plain)), strict=True):
                assert torch.equal(a, b)
