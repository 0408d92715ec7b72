"""swap: attention written out in products and a softmax runs on the op, and what the op has no meaning for stays as it is."""

from __future__ import annotations

import copy
import math
import pickle

import fastlm
import pytest
import torch
import torch.nn.functional as F
from torch import nn

BATCH, LENGTH, HEADS, SIZE = 2, 9, 4, 8
WIDTH = HEADS * SIZE


class Written(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.qkv, self.drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Dropout(p)
        self.softmax, self.slopes = nn.Softmax(dim=-1), nn.Parameter(torch.rand(HEADS, 1, LENGTH))
        self.register_buffer("seen", torch.ones(LENGTH, LENGTH).tril().bool())

    def heads(self, x):
        return (t.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for t in self.qkv(x).split(WIDTH, 2))

    def forward(self, x, mask=None):
        y = self.attend(*self.heads(x), mask)
        return y.transpose(1, 2).reshape(*x.shape[:2], WIDTH)


class Masked(Written):
    def attend(self, q, k, v, mask):
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.seen[: q.size(2), : q.size(2)] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        return self.drop(att) @ v


class Added(Written):
    def attend(self, q, k, v, mask):
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(SIZE)
        if mask is not None:
            scores = scores + mask
        probs = self.drop(self.softmax(scores))
        return torch.matmul(probs, v)


class Lowest(Written):
    def attend(self, q, k, v, mask):
        scores = q.matmul(k.mT)
        scores.mul_(SIZE**-0.5)
        scores = torch.where(self.seen, scores, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype).matmul(v)


class Positions(Written):
    def attend(self, q, k, v, mask):
        scores = q @ k.transpose(2, 3)
        scores *= SIZE**-0.5
        scores += self.slopes
        return scores.softmax(dim=-1).type_as(v) @ v


class Flat(Written):
    def attend(self, q, k, v, mask):
        q, k, v = (t.reshape(-1, LENGTH, SIZE) for t in (q, k, v))
        weights = F.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3, dim=-1)
        return torch.bmm(F.dropout(weights, self.drop.p, self.training), v).view(BATCH, HEADS, LENGTH, SIZE)


class Softcapped(Written):
    def attend(self, q, k, v, mask):
        return (torch.tanh(q @ k.mT / 20) * 20).softmax(-1) @ v


class Returned(Written):
    def attend(self, q, k, v, mask):
        self.weights = (q @ k.mT * 0.3).softmax(-1)
        return self.weights @ v * self.weights.std()


class Gated(Written):
    def attend(self, q, k, v, mask):
        weights = (q @ k.mT).softmax(-1)
        return (weights * self.slopes.sigmoid()) @ v


SERVED = (Masked, Added, Lowest, Positions, Flat)
KEPT = {Softcapped: "tanh", Returned: "std", Gated: "mul"}


def make(style, p=0.0):
    torch.manual_seed(0)
    return style(p), torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)


def results(model, x, *more):
    out = model(x, *more)
    wanted = [x, *(p for p in model.parameters())]
    return [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("style", [*SERVED, *KEPT])
def test_results_and_gradients_are_the_originals(style):
    model, x = make(style)
    expected = results(model, x)
    report = fastlm.swap(model)
    for got, known in zip(results(model, x), expected, strict=True):
        if known is not None:
            torch.testing.assert_close(got, known, rtol=1e-4, atol=1e-5)
    row = next(row for row in report.seen if "attention (written out)" in row.now)
    assert row.ran == (style in SERVED or style is Returned)
    assert not row.why if style in SERVED else KEPT[style] in str(row.why).lower()
    fastlm.unswap(model)
    assert torch.equal(model(x), expected[0])


@pytest.mark.parametrize("shape", [(BATCH, 1, 1, LENGTH), (1, HEADS, LENGTH, LENGTH), (LENGTH,)])
def test_masks_that_are_added(shape):
    model, x = make(Added)
    mask = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(model(x, mask).square().sum(), (x, mask))
    report = fastlm.swap(model)
    got = torch.autograd.grad(model(x, mask).square().sum(), (x, mask))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert report.seen[0].ran == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("style", SERVED)
def test_sixteen_bits_lose_no_more_than_twice_what_pytorch_loses(style, autocast, dtype):
    model, x = make(style)
    exact = copy.deepcopy(model).double()(x.double())
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    outs = []
    with torch.autocast("cpu", dtype, enabled=autocast):
        outs.append(model(x))
        report = fastlm.swap(model)
        outs.append(model(x))
    assert outs[0].dtype == outs[1].dtype
    plain, ours = ((out.double() - exact).square().mean().sqrt() for out in outs)
    assert ours <= 2 * plain + torch.finfo(dtype).eps * exact.square().mean().sqrt()
    assert [row.ran for row in report.seen if "attention (written out)" in row.now] == [1]


@pytest.mark.parametrize("style", [Masked, Added])
def test_dropout_follows_the_samples(style):
    model, x = make(style, p=0.5)
    plain = model.eval()(x)
    fastlm.swap(model.train())
    fastlm.rng.set(model, 1, 2, [5, 6])
    whole = model(x)
    assert not torch.allclose(whole, plain)
    fastlm.rng.set(model, 1, 2, [6])
    torch.testing.assert_close(model(x[1:]), whole[1:])
    fastlm.rng.set(model, 1, 3, [6])
    assert not torch.allclose(model(x[1:]), whole[1:])
    fastlm.rng.unset(model)
    many = torch.stack([model(x) for _ in range(400)]).mean(0)
    assert (many - plain).abs().mean() < 0.1 * plain.abs().mean()


def test_copies_pickles_and_compiles():
    model, x = make(Masked)
    fastlm.swap(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_leave_the_module_are_numbers():
    model, x = make(Returned)
    expected = model(x)
    weights = model.weights
    fastlm.swap(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model.weights.shape == weights.shape
    torch.testing.assert_close(model.weights + 0, weights)
    assert torch.equal(model.weights.argmax(-1), weights.argmax(-1))
    assert model.weights.requires_grad
    assert model.weights[0, 0, 0].tolist() == pytest.approx(weights[0, 0, 0].tolist())


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Foreign(nn.Module):
    def forward(self, q, k, v):
        return Own.apply(q @ k.mT).softmax(-1) @ v


def test_a_function_of_autograd_raises_and_loses_no_gradient():
    model = Foreign()
    q, k, v = (torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
    fastlm.swap(model)
    with pytest.raises(RuntimeError, match="unswap"):
        model(q, k, v).sum().backward()


class InPlace(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.mT
        q.zero_()
        return scores.softmax(-1) @ v


def test_queries_changed_in_place_meanwhile_raise():
    model = InPlace()
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    fastlm.swap(model)
    with pytest.raises(RuntimeError, match="in place"):
        model(q, k, v)


# Ways to write attention that a rewrite may get wrong: each is compared with itself, unswapped.


class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.gate = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.randn(LENGTH))

    def switched_off(self, q, k, v):
        with torch.no_grad():
            scores = q @ k.mT * 0.35
        return scores.softmax(-1) @ v

    def softmax_off(self, q, k, v):
        scores = q @ k.mT
        with torch.no_grad():
            weights = scores.softmax(-1)
        return weights @ v

    def other_product(self, q, k, v):
        with torch.no_grad():
            h = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        return torch.tanh(h + self.gate).view(*q.shape[:2], LENGTH, LENGTH) @ v

    def hidden_rows(self, q, k, v):
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        hidden[2] = True
        return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v

    def hidden_twice(self, q, k, v):
        scores = (q @ k.mT).masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), float("-inf"))
        padding = torch.arange(LENGTH) < 3
        return scores.masked_fill(padding, -1e9).softmax(-1) @ v

    def aliased(self, q, k, v):
        scores = q @ k.mT
        other = scores.float()
        other *= 0.35
        return scores.softmax(-1) @ v

    def squared(self, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ weights @ v

    def in_buffer(self, q, k, v):
        buffer = torch.empty(*q.shape[:-1], LENGTH)
        with torch.no_grad():
            scores = q @ k.mT
            torch.softmax(scores, -1, out=buffer)
        return buffer @ v

    def learned(self, q, k, v):
        return (q @ k.mT * self.scale).softmax(-1) @ v

    def cut(self, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return (weights[..., :4] @ v[..., :4, :]) + weights[..., 4:] @ v[..., 4:, :]


@pytest.mark.parametrize("way", [name for name, f in vars(Unusual).items() if not name.startswith("_")])
def test_unusual_ways_keep_their_numbers_and_gradients(way):
    kind = type(way, (Unusual,), {"forward": getattr(Unusual, way)})
    torch.manual_seed(0)
    model = kind()
    found = []
    q, k, v = (torch.randn(2, HEADS, LENGTH, SIZE) for _ in range(3))
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = model(*leaves)
        grads = torch.autograd.grad(out.square().sum(), (*leaves, model.gate), allow_unused=True)
        found.append((out, *grads))
        fastlm.swap(model)
    for got, expected in zip(found[1], found[0], strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_inference_mode_and_autocast_that_is_switched_on_the_way():
    model, x = make(Masked)
    expected = model(x)
    fastlm.swap(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


class Switched(nn.Module):
    def forward(self, q, k, v):
        with torch.autocast("cpu", enabled=False):
            scores = q.float() @ k.float().mT
        return torch.tanh(scores / 4).softmax(-1) @ v


def test_scores_keep_the_autocast_of_their_product():
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, HEADS, LENGTH, SIZE) for _ in range(3))
    model = Switched()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(q, k, v)
        fastlm.swap(model)
        assert torch.equal(model(q, k, v), expected)


class Twice(nn.Module):
    def forward(self, q, k, v):
        weights = F.dropout((q @ k.mT).softmax(-1), 0.5, True)
        return weights @ v, weights @ v


def test_weights_that_are_used_twice_have_one_mask():
    q, k, v = (torch.randn(2, HEADS, LENGTH, SIZE) for _ in range(3))
    model = Twice()
    fastlm.swap(model)
    first, second = model(q, k, v)
    assert torch.equal(first, second)
    assert not torch.equal(model(q, k, v)[0], first)


class Changing(nn.Module):
    def forward(self, q, k, v):
        mask = torch.zeros(LENGTH, LENGTH)
        scores = q @ k.mT + mask
        mask[:, 1:] = -5.0
        return (scores + mask).softmax(-1) @ v


def test_masks_changed_in_place_meanwhile_raise():
    model = Changing()
    fastlm.swap(model)
    with pytest.raises(RuntimeError, match="in place"):
        model(*(torch.randn(2, HEADS, LENGTH, SIZE) for _ in range(3)))


def test_gradients_of_the_softmax_can_be_asked_for():
    model, x = make(Added)
    seen = []
    model.softmax.register_full_backward_hook(lambda m, given, got: seen.append(got[0].shape))
    fastlm.swap(model)
    model(x).sum().backward()
    assert seen == [(BATCH, HEADS, LENGTH, LENGTH)]


class Leaking(nn.Module):
    def forward(self, q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights


def test_weights_out_of_a_reentrant_checkpoint_raise():
    model = Leaking()
    fastlm.swap(model)
    q, k, v = (torch.randn(2, HEADS, LENGTH, SIZE, requires_grad=True) for _ in range(3))
    _, weights = torch.utils.checkpoint.checkpoint(model, q, k, v, use_reentrant=True)
    with pytest.raises(RuntimeError, match="unswap"):
        weights.sum().backward()


def test_a_float32_softmax_under_autocast_is_served():
    model, x = make(Lowest)
    report = fastlm.swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert report.seen[0].ran == 1


class LinearAttention(nn.Module):
    """Attention by its name that multiplies keys by values first: no softmax, so no rule may take it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).split(WIDTH, 2)
        return q @ (k.mT @ v)


class AroundAttn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = LinearAttention()

    def forward(self, x):
        return self.inner(x)


def test_attention_that_is_none_of_the_known_kinds_is_named_once():
    model = nn.Sequential(AroundAttn(), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    report = fastlm.swap(model)
    assert [(path, name) for path, name, _ in report.left] == [("0.inner", "LinearAttention")]
    assert "attention by its name" in str(report)
