"""fastlm.nn.Attention: what it computes, packed and with a cache, and that it is a module like any other."""

from __future__ import annotations

import copy
import pickle

import fastlm
import pytest
import torch
import torch.nn.functional as F
from accuracy import Result, assert_as_exact_as_torch
from fastlm.nn.attention import alibi_slopes

W, H, B, L = 48, 6, 2, 13
STYLES = {
    "plain": {},
    "causal, grouped": dict(causal=True, kv_heads=2),
    "multi-query, head size, no bias": dict(kv_heads=1, head_size=16, bias=False),
    "window": dict(causal=True, window=(4, 0)),
    "softcap, scale": dict(softcap=2.0, scale=0.5),
    "alibi": dict(causal=True, alibi=True),
    "rotary": dict(causal=True, rotary=10000.0, kv_heads=3),
    "rotary, partial, interleaved": dict(rotary=500.0, rotary_size=4, interleaved=True),
    "qk-norm": dict(qk_norm=True, rotary=10000.0, causal=True),
}


def make(style, **options):
    module = fastlm.nn.Attention(W, H, **(STYLES[style] | options))
    if module.q_norm is not None:
        torch.nn.init.normal_(module.q_norm, 1.0, 0.3)
        torch.nn.init.normal_(module.k_norm, 1.0, 0.3)
    return module


def turn(x, module):
    """Rotary positions as models write them: spread tables and a rotated half."""
    r = module.rotary_size
    angle = torch.outer(torch.arange(x.shape[2]).float(), module.rotary ** (-torch.arange(0, r, 2).float() / r))
    spread = (lambda t: t.repeat_interleave(2, -1)) if module.interleaved else (lambda t: torch.cat((t, t), -1))
    c, s = spread(angle.cos()).to(x.dtype), spread(angle.sin()).to(x.dtype)
    y = x[..., :r]
    if module.interleaved:
        half = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    else:
        half = torch.cat((-y[..., r // 2 :], y[..., : r // 2]), -1)
    return torch.cat((y * c + half * s, x[..., r:]), -1)


def compose(module, x, mask=None):
    """The module in plain torch, with its parameters."""
    G, D = module.kv_heads, module.head_size
    q, k, v = module.qkv(x).view(*x.shape[:2], H + 2 * G, D).transpose(1, 2).split((H, G, G), 1)
    if module.q_norm is not None:
        q, k = (F.rms_norm(t, (D,), w, module.eps) for t, w in ((q, module.q_norm), (k, module.k_norm)))
    if module.rotary is not None:
        q, k = turn(q, module), turn(k, module)
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    scores = q @ k.mT * (module.scale or D**-0.5)
    if module.softcap:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    if module.alibi:
        scores = scores - alibi_slopes(H)[:, None, None].to(x.dtype) * (i - j).abs()
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    hidden = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    if module.causal:
        hidden |= j > i
    if module.window:
        hidden |= j < i - module.window[0]
    y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return module.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_as_exact_as_the_composition(style, masked):
    def draw(generator):
        module = make(style)
        x, dy = torch.randn(2, B, L, W, generator=generator)
        mask = torch.randn(B, 1, L, L, generator=generator) if masked else None
        results = []
        for run, kind in (
            (lambda m, x, b: m(x, mask=b), torch.float32),
            (compose, torch.float32),
            (compose, torch.float64),
        ):
            one = copy.deepcopy(module).to(kind)
            leaf = x.to(kind).clone().requires_grad_()
            y = run(one, leaf, None if mask is None else mask.to(kind))
            y.backward(dy.to(kind))
            # Gradients of a key's bias are rounding alone, and small parameters are pooled.
            results.append({"y": y.detach(), "dx": leaf.grad, "dqkv": one.qkv.weight.grad, "dout": one.out.weight.grad})
            if one.q_norm is not None:
                results[-1]["dnorm"] = torch.cat((one.q_norm.grad, one.k_norm.grad))
        return {n: Result(*(r[n] for r in results)) for n in results[0]}

    assert_as_exact_as_torch(draw, seed=1)


@pytest.mark.parametrize("style", STYLES)
def test_packed_sequences_are_each_their_own(style):
    module = make(style)
    lengths = [5, 0, 1, 9]
    x = torch.randn(sum(lengths), W, requires_grad=True)
    cu = torch.tensor([0, 5, 5, 6, 15], dtype=torch.int32)
    y = module(x, cu_seqlens=cu)
    torch.testing.assert_close(module(x, cu_seqlens=cu, max_seqlen=9), y)
    parts = [module(part.unsqueeze(0)).squeeze(0) for part in x.split(lengths) if len(part)]
    torch.testing.assert_close(y, torch.cat(parts))
    got, expected = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, torch.cat(parts)))
    torch.testing.assert_close(got, expected)


CACHED = [name for name, style in STYLES.items() if style.get("causal")]


@pytest.mark.parametrize("style", CACHED)
@pytest.mark.parametrize("pieces", [(7, 1, 1, 1, 1, 1, 1), (1,) * L, (L,), (4, 5, 3, 1)], ids=str)
@torch.no_grad()
def test_decoding_equals_the_whole(style, pieces):
    module = make(style)
    x = torch.randn(B, L, W)
    cache = module.new_cache(B, 20)
    assert cache.size == 20
    pointer = cache.k.data_ptr()
    for _ in range(2):
        torch.testing.assert_close(torch.cat([module(part, cache=cache) for part in x.split(pieces, 1)], 1), module(x))
        assert cache.seqlens.tolist() == [L] * B
        cache.reset()
        cache.k.fill_(7.0)  # what is not valid is not read
    assert cache.k.data_ptr() == pointer


@pytest.mark.parametrize("style", CACHED)
@torch.no_grad()
def test_prompts_of_different_lengths_share_a_cache(style):
    module = make(style)
    x, lengths = torch.randn(B, L, W), torch.tensor([4, 9])
    cache = module.new_cache(B, 16)
    first = module(x, cache=cache, lengths=lengths)
    assert cache.seqlens.tolist() == [4, 9]
    more = torch.randn(B, 2, W)
    second = module(more, cache=cache)
    for i, n in enumerate(lengths.tolist()):
        whole = module(torch.cat((x[i : i + 1, :n], more[i : i + 1]), 1))
        torch.testing.assert_close(first[i, :n], whole[0, :n])
        torch.testing.assert_close(second[i], whole[0, n:])


@torch.no_grad()
def test_one_compiled_graph_decodes_many_tokens():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = make("rotary").eval()
    x, cache = torch.randn(B, L, W), module.new_cache(B, L)
    step = torch.compile(lambda x: module(x, cache=cache), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.cat([step(x[:, i : i + 1]) for i in range(L)], 1), module(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_shared_table_and_given_positions():
    module = make("rotary")
    x = torch.randn(B, L, W)
    rope = module.rope(torch.arange(40))
    assert torch.equal(module(x, rope=rope), module(x))
    places = torch.arange(L).expand(B, L)
    torch.testing.assert_close(module(x, positions=places), module(x))
    torch.testing.assert_close(module(x, positions=places + 9), module(x), rtol=1e-4, atol=1e-5)  # only distances count
    torch.testing.assert_close(module(x, positions=torch.tensor([9, 9]), rope=rope), module(x, positions=places + 9))
    assert not torch.allclose(module(x, positions=places * 2), module(x))


def test_a_shard_of_the_heads_draws_the_masks_of_the_whole():
    """What tensor parallelism leaves on a rank: some heads, and ``rng.FIRST_HEAD``."""
    whole = make("causal, grouped", dropout=0.5, bias=False)
    x = torch.randn(B, L, W)
    fastlm.rng.set(whole, 1, 2, [3, 4])
    expected, size, total = whole(x), whole.head_size, 0
    q, k, v = whole.qkv.weight.view(-1, size, W).split((H, 2, 2))
    for rank in range(2):
        part = fastlm.nn.Attention(W, H // 2, kv_heads=1, head_size=size, causal=True, dropout=0.5, bias=False)
        with torch.no_grad():
            heads = slice(rank * H // 2, (rank + 1) * H // 2)
            part.qkv.weight.copy_(torch.cat((q[heads], k[rank : rank + 1], v[rank : rank + 1])).flatten(0, 1))
            part.out.weight.copy_(whole.out.weight.view(W, H, size)[:, heads].flatten(1))
        fastlm.rng.set(part, 1, 2, [3, 4])
        setattr(part, fastlm.rng.FIRST_HEAD, rank * H // 2)
        total = total + part(x)
    torch.testing.assert_close(total, expected)


@torch.no_grad()
def test_a_cache_has_the_dtype_of_attention_and_is_never_converted():
    module = make("rotary")
    x = torch.randn(B, L, W)
    wide = module.new_cache(B, 20)
    assert wide.k.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cache = module.new_cache(B, 20)
        assert cache.k.dtype == torch.bfloat16
        parts = torch.cat([module(part, cache=cache) for part in x.split((9, 4), 1)], 1)
        torch.testing.assert_close(parts, module(x), rtol=5e-2, atol=5e-2)
        with pytest.raises(TypeError, match=r"cache.k is torch.float32 .*; they must be torch.bfloat16"):
            module(x, cache=wide)
    with pytest.raises(TypeError, match=r"cache.k is torch.bfloat16 .*; they must be torch.float32"):
        module(x, cache=cache)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_what_does_not_fit_a_cache_raises_when_compiled_too(compiler):
    torch._dynamo.reset()
    module = make("causal, grouped")
    x = torch.randn(B, 4, W)
    cache = module.new_cache(B, 6)
    call = torch.compile(lambda x: module(x, cache=cache), fullgraph=True, backend=compiler)
    first = call(x)
    torch.testing.assert_close(first, module(x))
    assert cache.seqlens.tolist() == [4, 4]
    before = cache.k.clone()
    with pytest.raises(RuntimeError, match="KVCache: what is read does not fit"):
        call(x)
    assert torch.equal(cache.k, before)


def test_dropout_follows_the_samples_and_training():
    module = make("causal, grouped", dropout=0.5)
    x = torch.randn(4, L, W)
    assert fastlm.rng.set(module, 1, 2, [3, 4, 5, 6]) == 1
    whole = module(x)
    fastlm.rng.set(module, 1, 2, [5, 6])
    torch.testing.assert_close(module(x[2:]), whole[2:])
    fastlm.rng.set(module, 1, 3, [5, 6])
    assert not torch.allclose(module(x[2:]), whole[2:])
    cu = torch.tensor([0, L, 2 * L], dtype=torch.int32)
    fastlm.rng.set(module, 1, 2, [5, 6])
    torch.testing.assert_close(module(x[2:].flatten(0, 1), cu_seqlens=cu).view(2, L, W), whole[2:])
    assert torch.equal(module.eval()(x), module(x))


def test_copies_state_and_compiling():
    torch._dynamo.reset()
    module = make("qk-norm")
    assert sorted(module.state_dict()) == ["k_norm", "out.bias", "out.weight", "q_norm", "qkv.bias", "qkv.weight"]
    x = torch.randn(B, L, W)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert "heads=6" in repr(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2)
    half = copy.deepcopy(module).bfloat16()
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=5e-2, atol=5e-2)


def test_slopes_are_those_of_the_paper():
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9))
    torch.testing.assert_close(alibi_slopes(6), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kv_heads is 4; it must divide heads, 6"):
        fastlm.nn.Attention(W, H, kv_heads=4)
    with pytest.raises(ValueError, match="width is 50; it must be a multiple of heads"):
        fastlm.nn.Attention(50, H)
    with pytest.raises(ValueError, match="rotary_size is 3"):
        fastlm.nn.Attention(W, H, rotary=1e4, rotary_size=3)
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        fastlm.nn.Attention(W, H, dropout=1.0)
    module = make("rotary")
    x = torch.randn(B, L, W)
    with pytest.raises(ValueError, match=r"x has shape \[13, 48\]; it must be \[B, L, 48\]"):
        module(x[0])
    with pytest.raises(ValueError, match="lengths was given without cache"):
        module(x, lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="mask was given with cu_seqlens"):
        module(x[0], mask=x, cu_seqlens=torch.tensor([0, L], dtype=torch.int32))
    cache = module.new_cache(B, 15)
    with pytest.raises(RuntimeError, match="keeps no gradients"):
        module(x, cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"cache.k has shape \[2, 3, 15, 8\]"):
            module(x[:1], cache=cache)
        with pytest.raises(ValueError, match="cache was given with cu_seqlens"):
            module(x[0], cache=cache, cu_seqlens=torch.tensor([0, L], dtype=torch.int32))
        with pytest.raises(ValueError, match="causal=False"):
            make("plain")(x, cache=make("plain").new_cache(B, 15))
        module(x, cache=cache)
        with pytest.raises(ValueError, match="13 of 15 positions are taken and 3 more do not fit"):
            module(x[:, :3], cache=cache)
    with pytest.raises(ValueError, match="rotary=None"):
        make("plain").rope(torch.arange(3))
