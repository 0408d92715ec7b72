"""flash_attn's signatures over our op: positions first, lower-right causal, packed sequences."""

from __future__ import annotations

import fastlm
import pytest
import torch
import torch.nn.functional as F
from accuracy import Result, assert_as_exact_as_torch


def _sdpa(q, k, v, mask):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)


def test_values_and_gradients_with_lower_right_causal_and_window():
    i, j = torch.arange(5)[:, None] + 4, torch.arange(9)
    mask = (j <= i) & (j >= i - 3)

    def draw(generator):
        inputs = [torch.randn(s, generator=generator) for s in ((2, 5, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16))]
        upstream = torch.randn(2, 5, 4, 16, generator=generator)

        def run(function, dtype):
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            out = function(*leaves)
            return [t.detach() for t in (out, *torch.autograd.grad(out, leaves, upstream.to(dtype)))]

        ours = run(
            lambda q, k, v: fastlm.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, window_size=(3, 0)),
            torch.float32,
        )
        sdpa = lambda q, k, v: _sdpa(q, k, v, mask)
        names = ("out", "dq", "dk", "dv")
        return {n: Result(*r) for n, *r in zip(names, ours, run(sdpa, torch.float32), run(sdpa, torch.float64))}

    assert_as_exact_as_torch(draw)


def test_packed_sequences_are_those_apart():
    lengths = [3, 0, 7]
    cu = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    q, k, v = (torch.randn(10, 4, 16) for _ in range(3))
    out, lse, none = fastlm.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, causal=True, return_attn_probs=True)
    assert none is None
    assert lse.shape == (4, 10)
    apart = [
        fastlm.flash_attn_func(*(t.unsqueeze(0) for t in part), causal=True).squeeze(0)
        for part in zip(q.split(lengths), k.split(lengths), v.split(lengths))
        if part[0].shape[0]
    ]
    torch.testing.assert_close(out, torch.cat(apart))
    with pytest.raises(ValueError, match="block_table has shape"):
        fastlm.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, block_table=torch.zeros(1, 1))
