"""Rows whose scores are all far from 0, as masks by large negative numbers leave them: lse alone cannot normalise them."""

from __future__ import annotations

import fastlm
import pytest
import torch
from attention_cases import BACKENDS, BF16, F16, F32
from fastlm.reference.attention import dropout_mask
from fastlm.reference.philox import keep_scale

op = fastlm.ops.attention
LOWEST = torch.finfo(F32).min
PAIRS = [(a, b) for a in BACKENDS for b in BACKENDS]


def composed(q, k, v, bias, visible, p, seed):
    """As eager models do it, in float32: the mask is added to the scores, the softmax takes the row's maximum off."""
    s = q.float() @ k.float().mT / q.shape[-1] ** 0.5 + bias.float()
    s = s.masked_fill(~visible, float("-inf"))
    kept = dropout_mask(s.shape, seed, p) * keep_scale(p) if p else 1.0
    return (s.softmax(-1) * kept) @ v.float()


@pytest.mark.parametrize("level", [-1e4, -1e7, LOWEST, torch.finfo(F16).min / 2])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("forward,backward", PAIRS)
@pytest.mark.parametrize("kind", ["all", "window", "some hidden by -inf", "dropout", "few queries"])
def test_gradients_of_rows_with_low_scores(level, dtype, forward, backward, kind):
    torch.manual_seed(0)
    queries, keys = (2, 530) if kind == "few queries" else (37, 37)
    q, k, v = (torch.randn(2, 2, n, 16).to(dtype).requires_grad_() for n in (queries, keys, keys))
    bias = torch.zeros(queries, keys)
    bias[: queries // 2 + 1] = level  # the others are as usual
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if kind == "window":
        i, j = torch.arange(queries)[:, None], torch.arange(keys)
        visible = (j <= i) & (j >= i - 7)
    if kind == "some hidden by -inf":
        visible[:, ::3] = False
        bias = bias.masked_fill(~visible, float("-inf"))
    bias = bias.requires_grad_()
    p, seed = (0.2 if kind == "dropout" else 0.0), torch.tensor(5)
    window = dict(causal=True, window=(7, -1)) if kind == "window" else {}
    with fastlm.backend.use(forward):
        out = op(q, k, v, bias=bias, dropout_p=p, seed=seed, **window)
    dout = torch.randn(out.shape)
    with fastlm.backend.use(backward):
        got = torch.autograd.grad(out, (q, k, v, bias), dout.to(dtype))
    safe = bias.detach().masked_fill(~visible, 0.0).requires_grad_()  # -inf has no gradient in the composition
    wanted = composed(q, k, v, safe, visible, p, seed)
    expected = torch.autograd.grad(wanted, (q, k, v, safe), dout)
    eps = torch.finfo(dtype).eps if abs(level) < 1e6 or dtype != F32 else 1e-6
    torch.testing.assert_close(out.float(), wanted, atol=64 * eps, rtol=64 * eps)
    # Where scores are rounded to multiples of 2**-10 (at 1e4), the order of a sum moves a probability by as much.
    close = max(64 * eps, 4e-3 if level in (-1e4, torch.finfo(F16).min / 2) else 0.0)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=close * float(b.abs().max()), rtol=close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_of_the_backward_add_up_to_one(backend):
    """dv for dout = 1 is the sum of each key's probabilities; over all keys that is the number of rows."""
    q = torch.randn(1, 1, 20, 16)
    k = torch.randn(1, 1, 300, 16)
    for level in (0.0, -1e4, -1e7, LOWEST, 1e7):
        v = torch.randn(1, 1, 300, 16, requires_grad=True)
        slopes = torch.zeros(1)
        with fastlm.backend.use(backend):
            out = op(q, k, v, bias=torch.full((20, 300), level), alibi_slopes=slopes)
            (dv,) = torch.autograd.grad(out.sum(), v)
        torch.testing.assert_close(dv.sum(2), torch.full((1, 1, 16), 20.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_beside_low_scores_takes_all(backend):
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    sinks = torch.tensor([0.5, -2.0], requires_grad=True)
    with fastlm.backend.use(backend):
        out, lse = op(q, k, v, bias=torch.full((9, 9), LOWEST), sinks=sinks, return_lse=True)
        grads = torch.autograd.grad((out, lse), (q, k, v, sinks), (torch.ones_like(out), torch.ones_like(lse)))
    assert not out.any()
    assert torch.equal(lse, sinks.detach().view(1, 2, 1).expand_as(lse))
    assert not any(g.any() for g in grads[:3])
    torch.testing.assert_close(grads[3], torch.full((2,), 9.0))
