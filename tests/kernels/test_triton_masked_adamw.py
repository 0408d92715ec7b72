"""masked_adamw_ by its Triton kernel under the interpreter: the bits of the CPU's kernel."""

from __future__ import annotations

import math

import fastlm
import pytest
import torch
from fastlm import _native, ops
from torch import Tensor

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(bool(_native.missing()), reason="no compiled core to compare with"),
]

OPTIONS = {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-8}


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weight, gradient, moments, steps and mask."""
    w, g, m = (torch.randn(shape).to(dtype) for _ in range(3))
    return [w, g, m, torch.rand(shape).to(dtype), torch.tensor(6.0), ops.bool_to_mask(torch.rand(shape) < 0.5)]


def made(backend: str, drawn: list[list[Tensor]], **more) -> list[list[Tensor]]:
    out = [[t.clone() for t in one] for one in drawn]
    with fastlm.backend.use(backend):
        ops.masked_adamw_(*map(list, zip(*out, strict=True)), **(OPTIONS | more))
    return out


def same(drawn: list[list[Tensor]], **more) -> None:
    for ours, theirs in zip(made("triton", drawn, **more), made("cpu", drawn, **more), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
            assert torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.4, 0.95)], ids=str)
def test_the_bits_are_the_cpus(dtype, betas):
    drawn = [draw((9, 43), dtype), draw((3, 5, 16), dtype), draw((0, 8), dtype), draw((1100,), dtype)]
    drawn[0][1][..., 0] = drawn[0][3][..., 0] = 0.0
    drawn[1][4].fill_(0.0)
    for more in ({}, {"grad_scale": torch.tensor([3.0])}, {"found_inf": torch.zeros(1)}, {"weight_decay": 0.0}):
        same(drawn, betas=betas, **more)


def test_a_step_that_is_left_out_and_what_is_not_finite():
    drawn = [draw((6, 40)), draw((5, 7))]
    same(drawn, found_inf=torch.ones(()), grad_scale=torch.full((), 2.0))
    for w, g, m, v, _, mask in drawn:
        gone = ~ops.mask_to_bool(mask, w.shape[-1])
        for t, bad in ((w, -0.0), (g, math.nan), (m, math.inf), (v, math.nan)):
            t[gone] = bad
    same(drawn)
    ((w, _, m, v, _, mask), _) = made("triton", drawn)
    gone = ~ops.mask_to_bool(mask, 40)
    assert not any(t[gone].view(torch.int32).any() for t in (w, m, v))


def test_gradients_may_lie_otherwise_and_weights_may_not():
    drawn = [draw((16, 24))]
    drawn[0][1] = torch.randn(24, 16).T
    same(drawn)
    drawn[0][0] = torch.randn(24, 16).T
    with pytest.raises(fastlm.backend.BackendError, match="takes contiguous weights"):
        made("triton", drawn)
