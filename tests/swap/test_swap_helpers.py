"""swap: norms and attention that are called as functions, in forward or through helpers of the model's own module."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import fastlm
import pytest
import torch
import torch.nn.functional as F
from torch import nn


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def windowed(q, k, v, window):
    length = q.size(2)
    if window < 0 or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    mask = (columns <= rows) & (rows - columns <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attend(q, k, v, causal=False, window_size=(-1, -1)):
    assert causal
    return windowed(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window_size[0]).transpose(1, 2)


kernels = SimpleNamespace(attend=attend)


class Attention(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.qkv, self.out, self.window = nn.Linear(32, 64, bias=False), nn.Linear(32, 32, bias=False), window

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 8, 8).split((4, 2, 2), 2)
        y = kernels.attend(norm(q), norm(k), v, causal=True, window_size=(self.window, 0))
        return self.out(y.flatten(2))


class Block(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.attn, self.up, self.down = Attention(window), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        x = x + self.attn(norm(x))
        return x + self.down(F.relu(self.up(norm(x))).square())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, 32), nn.ModuleList((Block(-1), Block(4)))
        self.weight, self.bias = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(32))

    def forward(self, tokens):
        x = norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return F.layer_norm(x, x.shape[-1:], self.weight, bias=self.bias, eps=1e-4) @ self.embed.weight.T


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def outputs(model, tokens):
    out = model(tokens)
    return out, torch.autograd.grad(out.square().mean(), list(model.parameters()))


def test_results_and_gradients_follow_torch(model):
    tokens = torch.randint(50, (3, 17))
    out, grads = outputs(model, tokens)
    report = fastlm.swap(model)
    assert not report.left
    got, got_grads = outputs(model, tokens)
    torch.testing.assert_close(got, out, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    ran = {row.module: row.ran for row in report.seen}
    assert ran == {"": 2, "blocks.0": 2, "blocks.0.attn": 3, "blocks.1": 2, "blocks.1.attn": 3}
    assert [row.now for row in report.rows if row.module == "blocks.0"] == ["fused: add + norm", "calls of F.rms_norm"]
    assert not any(row.why for row in report.seen)
    assert fastlm.unswap(model) == 5
    assert type(model) is Model
    assert torch.equal(model(tokens), out)


def test_copies_pickles_and_compiles_whole(model):
    tokens = torch.randint(50, (2, 9))
    fastlm.swap(model)
    expected = model(tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtypes(model, dtype):
    tokens = torch.randint(50, (2, 9))
    kinds = []
    for _ in range(2):
        handles = [m.register_forward_hook(lambda m, a, y: kinds.append(y.dtype)) for m in model.modules()]
        with torch.autocast("cpu", dtype):
            out = model(tokens)
        kinds.append(out.dtype)
        for handle in handles:
            handle.remove()
        fastlm.swap(model)
    assert kinds[: len(kinds) // 2] == kinds[len(kinds) // 2 :]


def test_a_helper_that_is_replaced_later_is_called(model, monkeypatch):
    tokens = torch.randint(50, (2, 9))
    fastlm.swap(model)
    monkeypatch.setitem(globals(), "norm", lambda x: 2 * x)
    swapped = model(tokens)
    fastlm.unswap(model)
    torch.testing.assert_close(swapped, model(tokens), rtol=1e-3, atol=1e-3)


def test_a_function_of_torch_that_is_replaced_later_is_called(model, monkeypatch):
    tokens = torch.randint(50, (2, 9))
    report = fastlm.swap(model)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape: 2 * x)
    swapped = model(tokens)
    assert any("another function stands in its place" in why for row in report.seen for why, _ in row.why)
    fastlm.unswap(model)
    torch.testing.assert_close(swapped, model(tokens), rtol=1e-3, atol=1e-3)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return F.layer_norm(x, (4, 8), self.weight) + F.rms_norm(x, (8,), self.weight[0].double())


def test_what_the_op_does_not_take_is_torchs_own():
    model, x = Odd(), torch.randn(3, 4, 8)
    expected = model(x)
    report = fastlm.swap(model)
    assert torch.equal(model(x), expected)
    assert [why for row in report.seen for why, _ in row.why] == [
        "calls PyTorch's own layer_norm: it normalises over other axes than the last",
        "calls PyTorch's own rms_norm: its dtypes differ",
    ]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        x = norm(x)
        x = x + self.linear(x)
        return norm(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_an_eps_that_is_not_given_is_pytorchs(dtype, scale):
    torch.manual_seed(0)
    model, x = Normed().to(dtype), (scale * torch.randn(4, 16)).to(dtype)
    expected, plain = model(x), torch.nn.RMSNorm(16, dtype=dtype)
    expected_plain = plain(x)
    fastlm.swap(model)
    fastlm.swap(plain)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(plain(x), expected_plain, rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=tolerance, atol=tolerance)


def made_norm(eps):
    def norm(x):
        return F.layer_norm(x, (16,), eps=eps)

    return norm


inner_norm = made_norm(1e-6)


class Odder(nn.Module):
    def forward(self, x):
        return inner_norm(x) + sum((lambda self: F.layer_norm(self, (16,)))(part) for part in (x, 2 * x))


class Nameless(nn.Module):
    def forward(*args):
        return inner_norm(args[1])


@pytest.mark.parametrize("kind", [Odder, Nameless])
def test_functions_made_in_others_and_names_bound_twice_are_left_or_served(kind):
    model, x = kind(), torch.randn(3, 16)
    expected = model(x)
    fastlm.swap(model)
    torch.testing.assert_close(model(x), expected)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8)

    def forward(self, x):
        x = self.norm(x + F.dropout(self.linear(x), 0.5, self.training))
        return self.drop(x)


def test_a_dropout_that_is_replaced_later_is_called(monkeypatch):
    model, x = Dropping(), torch.randn(3, 8)
    fastlm.swap(model)
    monkeypatch.setattr(F, "dropout", lambda x, p, training=True, inplace=False: 3 * x)
    swapped = model(x)
    fastlm.unswap(model)
    torch.testing.assert_close(swapped, model(x))
