"""The plain GPT: both styles, cached generation, chunked loss, initial loss, recomputation."""

from __future__ import annotations

import math

import pytest
import torch
from fastlm.models.gpt import GPT, SIZES, STYLES, GPTConfig, named, rotate
from fastlm.models.loss import linear_cross_entropy


def tiny(style: str, **changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(named("nano", style, **{"layers": 2, "width": 32, "context": 16, "vocab": 50, **changes}))


@pytest.mark.parametrize("style", STYLES)
def test_a_new_model_is_as_unsure_as_chance(style: str) -> None:
    model, tokens = tiny(style), torch.randint(50, (4, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
    assert abs(float(loss) - math.log(50)) < 0.3


@pytest.mark.parametrize("style", STYLES)
def test_no_position_sees_a_later_one(style: str) -> None:
    model, tokens = tiny(style).eval(), torch.randint(50, (1, 16))
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % 50
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.equal(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kv_heads", [0, 2, 1])
def test_the_cache_generates_what_the_whole_text_does(style: str, kv_heads: int) -> None:
    model = tiny(style, kv_heads=kv_heads).eval()
    tokens = torch.randint(50, (2, 5))
    out = model.generate(tokens, 11, lambda logits: logits.argmax(-1))
    whole = tokens
    for _ in range(11):
        whole = torch.cat((whole, model(whole)[:, -1].argmax(-1)[:, None]), dim=1)
    assert torch.equal(out, whole)
    assert model.generate(tokens, 40, lambda logits: logits.argmax(-1)).shape == (2, 45)  # past the context


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    cos, sin = tiny("llama").rope(torch.arange(16))  # type: ignore[misc]
    q, k = torch.randn(1, 1, 1, 8).expand(1, 1, 16, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 16, 8)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, 0]
    for shift in (0, 1, 5):
        line = scores.diagonal(-shift)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores.diagonal(0)[0], scores.diagonal(-3)[0])


@pytest.mark.parametrize("mode", ["half", "full"])
def test_recomputation_changes_no_gradient(mode: str) -> None:
    grads = []
    for recompute in ("none", mode):
        model, tokens = tiny("gpt2", dropout=0.3), torch.arange(17).repeat(2, 1)
        model.recompute = recompute
        torch.manual_seed(7)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [1, 7, 13, 64])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.01)])
def test_chunked_loss_is_the_loss(rows: int, smoothing: float, z_loss: float) -> None:
    x = torch.randn(40, 8, requires_grad=True)
    w = torch.randn(30, 8, requires_grad=True)
    t = torch.randint(30, (40,))
    t[3] = -100
    logits = x @ w.T
    whole = torch.nn.functional.cross_entropy(logits, t, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    whole = whole + z_loss * (logits.logsumexp(-1).square() * (t != -100)).sum()
    expected = torch.autograd.grad(whole * 3, (x, w))
    loss = linear_cross_entropy(x, w, t, smoothing=smoothing, z_loss=z_loss, rows=rows)
    torch.testing.assert_close(loss, whole)
    for a, b in zip(torch.autograd.grad(loss * 3, (x, w)), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="it is 30"):
        GPTConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="context of 16"):
        tiny("gpt2")(torch.zeros(1, 17, dtype=torch.long))
    assert set(SIZES) == {"nano", "small", "124M", "350M", "1B", "7B"}
