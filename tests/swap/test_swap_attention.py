"""swap: models that call F.scaled_dot_product_attention run on the op, with their masks, causality and dropout."""

from __future__ import annotations

import copy
import logging
import pickle

import fastlm
import pytest
import torch
import torch.nn.functional as F
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.swap import tensors
from torch import nn


class Attention(nn.Module):
    def __init__(self, p: float = 0.0):
        super().__init__()
        self.qkv, self.p = nn.Linear(32, 64), p

    def split(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 8, 8).transpose(1, 2).split((4, 2, 2), 1)
        return q, k, v

    def forward(self, x, mask=None, causal=False):
        q, k, v = self.split(x)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, p, causal, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


def test_results_and_gradients_follow_torch():
    torch.manual_seed(0)
    model = Attention()
    x = torch.randn(3, 20, 32)
    mask = torch.randn(3, 1, 20, 20)
    cases = [(None, False), (None, True), (mask, False), (mask > 0, False)]
    expected = [torch.autograd.grad(model(x, *c).sum(), model.qkv.weight)[0] for c in cases]
    outs = [model(x, *c) for c in cases]
    report = fastlm.swap(model)
    assert "attention" in str(report)
    assert any(row.now == "attention" for row in report.rows)
    for case, grad, out in zip(cases, expected, outs, strict=True):
        torch.testing.assert_close(model(x, *case), out, rtol=1e-4, atol=1e-5)
        got = torch.autograd.grad(model(x, *case).sum(), model.qkv.weight)[0]
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)
    fastlm.unswap(model)
    assert type(model) is Attention


def test_survives_copies_and_compiles_whole():
    torch._dynamo.reset()
    model = Attention().eval()
    fastlm.swap(model)
    x = torch.randn(2, 10, 32)
    expected = model(x, causal=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, causal=True), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, causal=True), expected)


def test_masks_follow_the_samples_not_the_batch():
    model = Attention(p=0.5)
    fastlm.swap(model)
    x = torch.randn(4, 10, 32)
    fastlm.rng.set(model, 1, 2, [10, 11, 12, 13])
    whole = model(x)
    fastlm.rng.set(model, 1, 2, [12, 13])
    assert torch.equal(model(x[2:]), whole[2:])
    fastlm.rng.set(model, 1, 3, [12, 13])
    assert not torch.equal(model(x[2:]), whole[2:])


@pytest.mark.parametrize("style", [{}, dict(kv_heads=2, norm="rms", position="rotary")])
def test_gpt(style):
    model = GPT(GPTConfig(**style)).eval()
    tokens = torch.randint(256, (2, 33))
    expected = model(tokens)
    report = fastlm.swap(model)
    assert sum(row.now == "attention" for row in report.rows) == 4
    got = model(tokens)
    first = lambda y: y[0] if isinstance(y, tuple) else y
    torch.testing.assert_close(first(got), first(expected), rtol=1e-3, atol=1e-4)


def test_what_the_op_does_not_take_is_torchs_and_said(caplog):
    class Flat(nn.Module):
        def forward(self, q, v):
            return F.scaled_dot_product_attention(q, q, v)

    model = Flat()
    q, v = torch.randn(4, 9, 16), torch.randn(4, 9, 8)
    expected = model(q, v)
    fastlm.swap(model)
    tensors._told.clear()
    with caplog.at_level(logging.WARNING, "fastlm"):
        assert torch.equal(model(q, v), expected)
    assert "a Flat calls PyTorch's own scaled_dot_product_attention: the op takes [batch" in caplog.text


class Values(nn.Module):
    def forward(self, q, k, v, mask=None, causal=False, gqa=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


@pytest.mark.parametrize(("size", "heads"), [(24, 4), (5, 4), (40, 2), (7, 1)])
def test_value_heads_of_another_size(size, heads):
    model = Values()
    swapped = Values()
    report = fastlm.swap(swapped)
    inputs = [torch.randn(2, 4, 9, 16), torch.randn(2, heads, 9, 16), torch.randn(2, heads, 9, size)]
    bias = torch.randn(2, 1, 9, 9)
    for more in ((None, True, True), (bias, False, True)):
        results = []
        for module, dtype in ((swapped, torch.float32), (model, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in inputs]
            out = module(*leaves, more[0] if more[0] is None else more[0].to(dtype), *more[1:])
            assert out.shape == (2, 4, 9, size)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for ours, truth in zip(*results):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)
    assert [row.ran for row in report.seen] == [2]


def test_a_function_in_its_place_gets_what_was_written(monkeypatch):
    got = []

    def narrow(q, k, v, is_causal):
        got.append(is_causal)
        return v

    class Written(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    model = Written()
    fastlm.swap(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", narrow)
    q = torch.randn(1, 2, 3, 4)
    assert model(q) is q
    assert got == [True]


class Square(nn.Module):
    """Attention of what it is given with itself, four heads of ``size``."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4 * size))

    def forward(self, x, mask=None):
        q = (x * self.scale).unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, mask, 0.0, mask is None)


def _no_reference(*args):
    raise AssertionError("the reference materialises the scores")


@pytest.mark.parametrize("size,dtype", [(520, torch.float32), (16, torch.float64)])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_no_kernel_serves_is_torchs_and_said(caplog, monkeypatch, size, dtype, compiled):
    torch._dynamo.reset()
    model = Square(size).to(dtype)
    x = torch.randn(2, 9, 4 * size, dtype=dtype)
    expected = model(x)
    (row,) = fastlm.swap(model).rows
    monkeypatch.setattr("fastlm.reference.attention.forward", _no_reference)
    tensors._told.clear()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with caplog.at_level(logging.WARNING, "fastlm"):
        assert torch.equal(call(x), expected)
    if not compiled:
        assert "a Square calls PyTorch's own scaled_dot_product_attention: no kernel serves it" in caplog.text
    if dtype == torch.float64:
        assert row.backend == "torch"
        assert "PyTorch's own attention runs: no kernel serves it: not cpu, " in row.why
    with fastlm.backend.use("reference"), pytest.raises(AssertionError, match="materialises"):
        model(x)


def test_without_a_compiled_core_torchs_own_runs(monkeypatch):
    from fastlm.swap import attention

    monkeypatch.setattr("fastlm.cpu.attention._C", None)
    monkeypatch.setattr("fastlm.reference.attention.forward", _no_reference)
    attention._asked.cache_clear()
    try:
        model, mha = Square(8), nn.MultiheadAttention(32, 4, batch_first=True)
        x = torch.randn(2, 9, 32)
        run = lambda: (model(x), mha(x, x, x, need_weights=False)[0])
        expected = run()
        report = [*fastlm.swap(model).rows, *fastlm.swap(mha).rows]
        assert [row.backend for row in report] == ["torch"] * 2
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        attention._asked.cache_clear()


def test_a_reason_is_told_once_whatever_the_shapes(caplog):
    model = Square(520)
    fastlm.swap(model)
    tensors._told.clear()
    with caplog.at_level(logging.WARNING, "fastlm"):
        for number in range(1, 5):
            tensors.tell(f"a Block2 got [{number}, 4], [1, {number}] of float32")
            tensors.tell(f"a Block3 got [{', '.join('4' * number)}], [1, 5] of float32")
            tensors.tell(f"a Block3 got [{number}], [5] of float64")
    assert [r.getMessage().split()[2] for r in caplog.records] == ["Block2", "Block3", "Block3"]
    assert len(tensors._told) == 3


def test_distributed_tensors_are_the_ops():
    """A group of one process is enough to make such tensors; test_dtensor.py has two."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    class Direct(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    model = Direct()
    q = torch.randn(1, 2, 5, 8)
    fastlm.swap(model)
    expected = model(q)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        assert torch.equal(model(distribute_tensor(q, mesh, [Shard(1)])).to_local(), expected)
        with pytest.raises(ValueError, match=r"attention: q is placed \(Shard\(dim=2\),\)"):
            model(distribute_tensor(q, mesh, [Shard(2)]))
    finally:
        torch.distributed.destroy_process_group()
