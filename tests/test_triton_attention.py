"""The Triton kernels of attention, interpreted: values, gradients, masks, pieces of a decode, strides, small tiles.

Few heads and short lengths, because the interpreter's time goes by operations. Registers, spills and tensor cores are in
test_offline.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import fastlm
import pytest
import torch
from accuracy import Result, violation
from attention_cases import BF16, F16, F32, FEATURES, Case, compose, inputs, run, truth

pytest.importorskip("triton")
from fastlm.kernels import table
from fastlm.reference.attention import dropout_mask

pytestmark = pytest.mark.interpreter
op = fastlm.ops.attention
KERNELS = ("attention_forward", "attention_decode", "attention_backward_kv", "attention_backward_q")


@pytest.fixture(autouse=True)
def _forced():
    """Tiles of 64x64: few operations for the interpreter."""
    with ExitStack() as stack:
        stack.enter_context(fastlm.backend.use("triton"))
        for kernel in KERNELS:
            stack.enter_context(table.pinned(_tiles(64, 64), kernel))
        yield


def _tiles(m: int, n: int) -> dict:
    return {"config": {"m": m, "n": n, "num_warps": 4, "num_stages": 1}}


def _broken(case: Case, spoiled: Case | None = None) -> dict[str, str]:
    """What breaks the rule in one draw, of the outputs with as many finite values as its statistics need."""
    tensors = inputs(case, torch.Generator().manual_seed(torch.seed() % 2**32))
    ours, real, measure = run(spoiled or case, tensors), truth(case, tensors), compose(case, tensors, F32)
    assert ours.keys() == real.keys()
    broken = {}
    for name, value in ours.items():
        assert torch.equal(value.isfinite(), real[name].isfinite()), name
        if real[name].isfinite().sum() >= 4096:
            why = violation([Result(value, measure[name], real[name])])
            if why:
                broken[name] = why
    return broken


def _small(case: Case) -> Case:
    heads = 2 * case.heads // case.kv_heads if case.kv_heads < case.heads else 2
    return replace(case, heads=min(heads, 4), kv_heads=2 if case.kv_heads > 1 else 1, batch=len(case.valid or (1,)))


QUICK = (1, 3, 4, 6, 8, 11, 14, 18)


@pytest.mark.parametrize("number", [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(len(FEATURES))
])  # fmt: skip
def test_as_exact_as_torch(number):
    case = replace(_small(FEATURES[number]), dtype=(F32, BF16, F16)[number % 3])
    # The rule's thresholds hold for many draws pooled; a single draw may break them by chance, two in a row do not.
    broken = _broken(case)
    assert not broken or not (broken := _broken(case)), broken


def test_the_rule_catches_a_wrong_kernel():
    case = Case(batch=1, heads=2, kv_heads=2, causal=True, keys=70)
    assert "out" in _broken(case, replace(case, causal="upper_left"))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_is_the_reference_mask_forward_and_backward(p):
    seed = torch.tensor(-1234567890123456789)
    ids = torch.tensor([5])
    mask = dropout_mask((6, 6, 160, 190), seed, p)[5:6, 4:6, 120:153]
    for k0 in (0, 3, 100):
        q, zero = torch.zeros(1, 2, 33, 64), torch.zeros(1, 2, 60, 64)
        v = torch.eye(60, 64).expand(1, 2, 60, 64).clone().requires_grad_()
        out = op(q, zero, v, dropout_p=p, seed=seed, offset=(ids, 4, 120, k0))
        (dv,) = torch.autograd.grad(out, v, torch.eye(33, 64).expand_as(out))
        expected = mask[..., k0 : k0 + 60]
        assert torch.equal(out[..., :60] != 0, expected)
        assert torch.equal(dv[..., :33].mT != 0, expected)


def test_decoding_in_pieces_equals_the_reference():
    q = torch.randn(2, 4, 1, 32)
    k, v = torch.randn(2, 2, 2, 1100, 32)
    seqlens = torch.tensor([1100, 530], dtype=torch.int32)
    out, lse = op(q, k, v, seqlens_k=seqlens, causal=True, return_lse=True)
    with fastlm.backend.use("reference"):
        expected, expected_lse = op(q, k, v, seqlens_k=seqlens, causal=True, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.slow
def test_decoding_in_pieces_in_bfloat16_obeys_the_rule():
    case = Case(heads=32, kv_heads=16, queries=1, keys=1100, head_size=64, dtype=BF16, causal=True, valid=(1100, 530))
    broken = _broken(case)
    assert not broken or not (broken := _broken(case)), broken


def test_rows_that_a_bias_hides_are_zero_and_have_no_gradient():
    q, k, v = (torch.randn(1, 2, 64, 32, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, 64, 64)
    bias[..., :3, :] = float("-inf")
    bias.requires_grad_()
    out, lse = op(q, k, v, bias=bias, return_lse=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, bias))
    assert all(g.isfinite().all() for g in grads)
    assert not out[:, :, :3].any()
    assert not grads[0][:, :, :3].any()
    assert (lse[:, :, :3] == float("-inf")).all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
def test_empty_batches_and_lengths(shape):
    batch, heads, queries, keys = shape
    q = torch.randn(batch, heads, queries, 16, requires_grad=True)
    k = torch.randn(batch, heads, keys, 16, requires_grad=True)
    out = op(q, k, k)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k)))


def test_strided_inputs_give_the_same_values():
    case = Case(batch=1, heads=2, kv_heads=1, queries=37, keys=37, causal=True, p=0.2, layout="bhld")
    tensors = inputs(case, torch.Generator().manual_seed(1))
    expected = run(case, tensors)
    for view in (lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, t], -1)[..., 0]):
        got = run(case, {k: view(v) if v.dim() == 4 else v for k, v in tensors.items()})
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=name)


def test_small_tiles_give_the_same_values():
    case = Case(batch=1, heads=2, kv_heads=1, queries=40, keys=77, causal=True, window=(30, 0), p=0.2)
    tensors = inputs(case, torch.Generator().manual_seed(2))
    expected = run(case, tensors)
    with table.pinned(_tiles(16, 32)):
        for name, value in run(case, tensors).items():
            torch.testing.assert_close(value, expected[name], msg=name)
