"""attention on the backends that run here: values, gradients, masks, strides, threads, memory."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace

import fastlm
import pytest
import torch
import torch.nn.functional as F
from accuracy import Result, assert_as_exact_as_torch, violation
from attention_cases import (
    BACKENDS,
    BF16,
    F16,
    F32,
    FEATURES,
    HEAD_SIZES,
    Case,
    arguments,
    compose,
    draw,
    full_grid,
    grid,
    inputs,
    leaves,
    run,
    theirs,
    truth,
    with_gradients,
)  # fmt: skip
from fastlm.reference.attention import dropout_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import python_path

op = fastlm.ops.attention
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled core with attention")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


@pytest.mark.grid(fast=36)
@pytest.mark.parametrize("name,case", [(b, c) for b in BACKENDS for c in grid(b)], ids=lambda x: str(x))
def test_as_exact_as_torch(name, case):
    with fastlm.backend.use(name):
        assert_as_exact_as_torch(lambda generator: draw(case, generator))


# Every case of the whole grid takes hours, most of them in drawing thousands of times what has few values: that is what
# FASTLM_TEST_GRID=all runs. Else a thirtieth of the cases that have enough, and of the reference a tenth of these.
WHOLE = os.environ.get("FASTLM_TEST_GRID") == "all"
GRID = full_grid() if WHOLE else [c for c in full_grid() if min(c.queries, c.keys) >= 17][::30]
FULL = [(b, c) for b in BACKENDS for c in GRID[:: 10 if b == "reference" else 1]]


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("name,case", FULL, ids=lambda x: str(x))
def test_as_exact_as_torch_full_grid(name, case):
    with fastlm.backend.use(name):
        assert_as_exact_as_torch(lambda generator: draw(case, generator))


@needs_cpu
@settings(max_examples=20, deadline=None)
@given(
    queries=st.integers(1, 150), keys=st.integers(1, 150), head_size=st.sampled_from(HEAD_SIZES),
    group=st.sampled_from([1, 2, 4]), dtype=st.sampled_from([F32, BF16, F16]),
    causal=st.sampled_from([False, True, "upper_left"]),
    window=st.none() | st.tuples(st.integers(-1, 60), st.integers(-1, 60)), bias=st.sampled_from([None, "qk", "bhqk"]),
    alibi=st.booleans(), softcap=st.sampled_from([0.0, 5.0]), p=st.sampled_from([0.0, 0.2]),
    layout=st.sampled_from(["bhld", "blhd"]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape_and_feature_on_cpu(queries, keys, head_size, group, dtype, causal, window, bias, alibi, softcap, p,
                                      layout, seed):  # fmt: skip
    case = Case(2, 4, 4 // group, queries, keys, head_size, dtype, causal, window, bias, None, alibi, softcap, None, p,
                layout=layout)  # fmt: skip
    tensors = inputs(case, torch.Generator().manual_seed(seed))
    with fastlm.backend.use("cpu"):
        ours = run(case, tensors)
    real = truth(case, tensors)
    for name, value in ours.items():
        assert torch.equal(value.isfinite(), real[name].isfinite()), name
        alive = real["lse"].isfinite()
        if name in ("out", "dq"):
            assert not value[~alive].any(), f"{name} of a row that sees nothing"
    # Few values and one draw: the rule's statistics do not hold, a gross error would still show.
    for name, value in ours.items():
        finite = real[name].isfinite()
        error = (value.double() - real[name])[finite]
        size = real[name][finite].square().mean().sqrt() if finite.any() else 0
        assert not finite.any() or error.square().mean().sqrt() <= 16 * torch.finfo(dtype).eps * (size + 1), name


def _probabilities(backend, shape, p, seed, **extra):
    """Kept probabilities of uniform attention, read from out, and again from dv: v and dout are unit vectors."""
    batch, heads, queries, keys = shape
    size = 64
    q = torch.zeros(batch, heads, queries, size)
    forward, back = [], []
    for start in range(0, keys, size):
        v = torch.zeros(batch, heads, keys, size)
        v[:, :, range(start, min(start + size, keys)), range(min(size, keys - start))] = 1
        forward.append(op(q, torch.zeros_like(v), v, dropout_p=p, seed=seed, **extra)[..., : keys - start])
    v = torch.zeros(batch, heads, keys, size, requires_grad=True)
    out = op(q, torch.zeros_like(v), v, dropout_p=p, seed=seed, **extra)
    for start in range(0, queries, size):
        dout = torch.zeros_like(out)
        dout[:, :, range(start, min(start + size, queries)), range(min(size, queries - start))] = 1
        (dv,) = torch.autograd.grad(out, v, dout, retain_graph=True)
        back.append(dv[..., : queries - start].mT)
    return torch.cat(forward, -1), torch.cat(back, -2)


@pytest.mark.parametrize("keys", [1, 8, 13, 129, 300])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 2**-17])
def test_mask_is_the_reference_mask_forward_and_backward(backend, keys, p):
    seed = torch.tensor(-1234567890123456789)
    shape = (2, 3, 70, keys)
    mask = dropout_mask(shape, seed, p)
    for kept in _probabilities(backend, shape, p, seed):
        assert torch.equal(kept != 0, mask)


def test_mask_of_a_shard_is_a_slice_of_the_whole(backend):
    seed = torch.tensor(99)
    mask = dropout_mask((7, 9, 200, 300), seed, 0.4)
    ids = torch.tensor([5, 2])
    for k0 in (0, 64, 3, 100):
        for kept in _probabilities(backend, (2, 3, 33, 90), 0.4, seed, offset=(ids, 4, 120, k0)):
            assert torch.equal(kept != 0, mask[ids][:, 4:7, 120:153, k0 : k0 + 90])
    kept, _ = _probabilities(backend, (2, 3, 33, 90), 0.4, seed, offset=(ids, 4, None, None))
    assert torch.equal(kept != 0, mask[ids][:, 4:7, :33, :90])


def test_packed_sequences_draw_the_mask_of_a_batch(backend):
    torch.manual_seed(1)
    lengths = [17, 0, 40]
    q = torch.randn(57, 4, 32)
    cu = torch.tensor([0, 17, 17, 57], dtype=torch.int32)
    packed = op(q, q, q, cu_seqlens_q=cu, max_seqlen_q=40, max_seqlen_k=40, causal=True, dropout_p=0.3, seed=5)
    for number, (start, length) in enumerate(zip(cu.tolist(), lengths, strict=False)):
        x = q[start : start + length].transpose(0, 1)[None]
        alone = op(x, x, x, causal=True, dropout_p=0.3, seed=5, offset=(torch.tensor([number]), 0, None, None))
        torch.testing.assert_close(packed[start : start + length].transpose(0, 1)[None], alone)


def test_seeds_and_generator_govern_the_mask(backend):
    x = torch.randn(1, 2, 32, 16)
    draws = [op(x, x, x, dropout_p=0.5, seed=s) for s in (0, 1, 2**32, -1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    torch.manual_seed(5)
    first, second = (op(x, x, x, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(op(x, x, x, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.fixture
def copied(backend, monkeypatch):
    """The shapes of what a kernel's call made contiguous and was not; the reference may."""
    shapes: list[torch.Size] = []
    if backend != "reference":
        real = torch.Tensor.contiguous

        def watched(t, **options):
            if not t.is_contiguous(**options):
                shapes.append(t.shape)
            return real(t, **options)

        monkeypatch.setattr(torch.Tensor, "contiguous", watched)
    return shapes


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_inputs_give_the_same_bits_without_a_copy(backend, copied, dtype):
    case = Case(kv_heads=2, queries=37, keys=37, causal=True, bias="hqk", p=0.2, layout="bhld", dtype=dtype)
    tensors = inputs(case, torch.Generator().manual_seed(1))
    expected = run(case, tensors)
    views = {
        "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "length last": lambda t: t.mT.contiguous().mT,
        "wide rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "every second element": lambda t: torch.stack([t, t], -1)[..., 0],
        "unaligned": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
    }
    for name, view in views.items():
        strided = {k: view(v) if v.dim() == 4 else v for k, v in tensors.items()}
        copied.clear()
        got = run(case, strided)
        assert not copied, name
        if backend == "cpu":
            why = fastlm.backend.which("attention", strided["q"], strided["k"], strided["v"]).reason
            assert ("has gaps" in why) == (name in ("length last", "every second element")), name
        for key, value in expected.items():
            assert torch.equal(got[key], value), (name, key)


def test_expanded_keys_values_and_bias_are_right_without_a_copy(backend, copied):
    case = Case(kv_heads=2, queries=20, keys=24, bias="bhqk", causal=True)
    t = inputs(case, torch.Generator().manual_seed(2))
    expand = {n: t[n][:1, :1].expand_as(t[n]) for n in ("k", "v")} | {"bias": t["bias"][:1, :, :1].expand_as(t["bias"])}
    expected = run(case, t | {n: x.clone() for n, x in expand.items()})
    copied.clear()
    got = run(case, t | expand)
    assert not copied
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_expanded_keys_and_gradients_are_right(backend):
    torch.manual_seed(3)
    q = torch.randn(2, 4, 20, 16, requires_grad=True)
    k = torch.randn(2, 1, 20, 16).expand(2, 4, 20, 16)
    expected = op(q, k.clone(), k.clone(), causal=True)
    assert torch.equal(op(q, k, k, causal=True), expected)
    (a,) = torch.autograd.grad(op(q, k, k, causal=True).sum(), q)  # an expanded gradient of out
    (b,) = torch.autograd.grad(expected, q, torch.ones_like(expected))
    assert torch.equal(a, b)


def test_out_is_laid_out_like_q(backend):
    q = torch.randn(2, 9, 4, 16).transpose(1, 2)
    assert op(q, q, q).stride() == q.stride()
    contiguous = q.contiguous()
    assert op(contiguous, q, q).is_contiguous()
    (dq,) = torch.autograd.grad(op(q.requires_grad_(), q, q).sum(), q)
    assert dq.stride() == q.stride()


SDPA_OPTIONS = (
    dict(), dict(causal="upper_left"), dict(mask="qk"), dict(mask="bk", scale=0.1), dict(bias="bhqk"), dict(bias="hk"),
)  # fmt: skip
SDPA_LENGTHS = ((64, 192), (192, 64), (65, 70))


@pytest.mark.parametrize("option", SDPA_OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", SDPA_LENGTHS)
def test_agrees_with_sdpa(backend, option, lengths):
    check_sdpa(Case(queries=lengths[0], keys=lengths[1], kv_heads=2, **option))


def check_sdpa(case):
    t = inputs(case, torch.Generator().manual_seed(0))
    results = []
    for ours in (True, False):
        x = leaves(t)
        given = {**t, **x}
        if ours:
            out = op(x["q"], x["k"], x["v"], **arguments(case, given))
        else:
            out = F.scaled_dot_product_attention(
                x["q"], x["k"], x["v"], given.get("bias", given.get("mask")), is_causal=bool(case.causal),
                scale=case.scale, enable_gqa=True,
            )  # fmt: skip
        results.append(with_gradients(out, None, x, t))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("keys", [64, 192, 320])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_no_nan_where_a_mask_hides_rows_at_64_mod_128(backend, keys, dtype):
    mask = torch.ones(1, 1, keys, keys, dtype=torch.bool)
    mask[..., :3, :] = False
    mask[..., -5:, :] = False
    mask[..., :, 10:40] = False
    for bias in (mask, torch.zeros(mask.shape).masked_fill(~mask, float("-inf")).to(dtype).requires_grad_()):
        q, k, v = (torch.randn(2, 2, keys, 64, dtype=dtype, requires_grad=True) for _ in range(3))
        out, lse = op(q, k, v, bias=bias, return_lse=True)
        leaves = (q, k, v) if bias is mask else (q, k, v, bias)
        grads = torch.autograd.grad(out.float().square().sum() + lse[..., 3:-5].sum(), leaves)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in grads)
        hidden = ~mask[0, 0].any(-1)
        assert not out[:, :, hidden].any()
        assert not grads[0][:, :, hidden].any()
        assert (lse[:, :, hidden] == float("-inf")).all()
        if bias is not mask:
            assert not grads[3].masked_fill(mask, 0).any()


def test_rows_that_attend_to_nothing_take_no_gradient_of_lse(backend):
    """Ring attention with all parts hidden gives them dlse of inf or NaN."""
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, 20, 20)
    bias[..., :4, :] = float("-inf")
    bias.requires_grad_()
    out, lse = op(q, k, v, bias=bias, return_lse=True)
    for value in (float("inf"), float("nan")):
        dlse = torch.ones_like(lse)
        clean = torch.autograd.grad((out, lse), (q, k, v, bias), (torch.ones_like(out), dlse), retain_graph=True)
        dlse[..., :4] = value
        got = torch.autograd.grad((out, lse), (q, k, v, bias), (torch.ones_like(out), dlse), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
        assert not got[0][:, :, :4].any()


@pytest.mark.parametrize("size", [1e-20, 1e4, 1e18])
def test_huge_and_tiny_scores(backend, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 32, requires_grad=True) for _ in range(3))
    out, lse = op(q * size, k, v, causal=True, return_lse=True)
    grads = torch.autograd.grad(out.sum(), (k, v))
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    expected = F.scaled_dot_product_attention((q * size).double(), k.double(), v.double(), is_causal=True)
    if size != 1e18:  # there, rounding of the scores decides which key wins
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [1e-20, 1e4])
def test_gradients_of_huge_and_tiny_scores_obey_the_rule(backend, size, dtype):
    case = Case(batch=1, heads=4, kv_heads=4, queries=70, keys=70, head_size=32, causal=True, dtype=dtype)

    def one(generator):
        tensors = inputs(case, generator)
        tensors["q"] *= size
        tensors["dlse"].zero_()  # SDPA is the measure, which starts from a rounded lse, too
        real, measure = truth(case, tensors), compose(case, tensors, F32) | theirs(case, tensors, lse=False)
        return {n: Result(value, measure[n], real[n]) for n, value in run(case, tensors).items()}

    assert_as_exact_as_torch(one, seed=1)


def _ulps(got, expected):
    """The largest error in units of the last place of float32 at each expected value."""
    unit = torch.exp2(expected.abs().log2().floor() - 23)
    return ((got.double() - expected).abs() / unit).max()


@needs_cpu
def test_exponential_and_tanh_are_within_their_stated_error():
    x = torch.linspace(-80.0, -17.5, 20001)  # beside a score of 0, whose sum they do not change
    q = torch.zeros(1, len(x), 1, 16)
    q[..., 0] = 1
    k = torch.zeros(1, len(x), 2, 16)
    k[0, :, 1, 0] = x
    v = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand_as(k)
    y = torch.cat((-torch.logspace(-6, 1, 5001), torch.logspace(-6, 1, 5001)))
    with fastlm.backend.use("cpu"):
        out = op(q, k, v, scale=1.0)
        q = torch.zeros(1, len(y), 1, 16)
        q[0, :, 0, 0] = y
        _, lse = op(q, q * 0 + (torch.arange(16) == 0), q, scale=1.0, softcap=1.0, return_lse=True)
    assert _ulps(out[0, :, 0, 0], x.double().exp()) <= 1.5
    assert _ulps(lse[0, :, 0], y.double().tanh()) <= 3  # the logarithm of a sum of one


def test_large_negative_bias_does_not_hide_a_row(backend):
    q, v = torch.zeros(1, 1, 5, 16), torch.randn(1, 1, 70, 16)
    out, lse = op(q, torch.zeros_like(v), v, bias=torch.full((1, 1, 1, 70), -3e38), return_lse=True)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(out.shape))
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_lies_behind_the_valid_part_of_a_cache_never_leaks(backend, dtype):
    q, cache = torch.randn(3, 4, 2, 32).to(dtype), torch.randn(2, 3, 2, 300, 32).to(dtype)
    seqlens = torch.tensor([300, 130, 0], dtype=torch.int32)
    clean = op(q, *cache, seqlens_k=seqlens, causal=True)
    for b, n in enumerate(seqlens.tolist()):
        cache[:, b, :, n:] = float("nan")
    k, v = cache[0].requires_grad_(), cache[1].requires_grad_()
    out = op(q, k, v, seqlens_k=seqlens, causal=True)
    assert torch.equal(out, clean)
    assert not out[2].any()
    for grad in torch.autograd.grad(out.float().sum(), (k, v)):
        assert grad.isfinite().all()
        assert not grad[1, :, 130:].any()


@pytest.mark.parametrize("feature", [
    Case(kv_heads=2, causal=True, p=0.1), Case(bias="hk", keys=300), Case(bias="q", batch=3), Case(mask="qk", kv_heads=1),
    Case(lengths=((170, 200), (0, 3), (129, 129)), causal=True, alibi=True, kv_heads=2), Case(queries=1, keys=3000),
    Case(batch=1, heads=4, kv_heads=1, queries=1, keys=3000, valid=(2900,), causal=True, bias="bhk", p=0.1),
    Case(bias="bhqk"), Case(bias="h", batch=3), Case(alibi=True, window=(100, 20), softcap=5.0, p=0.1),
    Case(bias="qk", batch=3), Case(bias="hqk", kv_heads=2, batch=3), Case(bias="bqk", heads=4, kv_heads=4),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, BF16])
@needs_cpu
def test_same_bits_at_any_thread_count(feature, dtype):
    case = replace(feature, dtype=dtype, queries=feature.queries if feature.queries == 1 else 261)
    if case.keys == 65:
        case = replace(case, keys=261)
    tensors = inputs(case, torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            with fastlm.backend.use("cpu"):
                results.append(run(case, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


@needs_cpu
def test_forward_and_backward_may_run_on_different_backends():
    case = Case(p=0.3, causal=True, kv_heads=2)
    tensors = inputs(case, torch.Generator().manual_seed(4))
    real = truth(case, tensors)
    measure = compose(case, tensors, F32)
    q = tensors["q"].clone().requires_grad_()
    for forward in BACKENDS:
        for back in BACKENDS:
            with fastlm.backend.use(forward):
                out, lse = op(q, tensors["k"], tensors["v"], causal=True, dropout_p=0.3, seed=tensors["seed"],
                              return_lse=True)  # fmt: skip
            with fastlm.backend.use(back):
                (dq,) = torch.autograd.grad((out, lse), q, (tensors["dout"], tensors["dlse"]))
            assert violation([Result(dq, measure["dq"], real["dq"])]) is None


_MEMORY = """
import sys, torch, fastlm
from fastlm.train.machine import peak_memory
cpu = torch.device("cpu")
torch.set_num_threads(2)
dtype = getattr(torch, sys.argv[1])
length = int(sys.argv[3])
q, k, v = (torch.randn(1, 1, length, 64, dtype=dtype, requires_grad=True) for _ in range(3))
bias = torch.randn(1, 1, *map(int, sys.argv[2].split("x")), dtype=dtype, requires_grad=True)
small = [t[:, :, :300].detach().requires_grad_() for t in (q, k, v)]
call = lambda q, k, v, b: fastlm.ops.attention(q, k, v, bias=b, causal=True, dropout_p=0.1, seed=1).float().sum()
with fastlm.backend.use("cpu"):
    call(*small, bias[..., :300, :300].detach().requires_grad_()).backward()
    before = peak_memory(cpu)
    call(q, k, v, bias).backward()
print(peak_memory(cpu) - before)
"""


@functools.cache
def _peak(dtype, bias, length):
    """Bytes that a forward and a backward add to what the caller holds."""
    command = [sys.executable, "-c", _MEMORY, dtype, bias, str(length)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.grid(fast=1)
@needs_cpu
@pytest.mark.parametrize(
    "dtype,bias", [("float32", "1x8192"), ("bfloat16", "1x8192"), ("float32", "8192x1"), ("bfloat16", "1x1"),
                   pytest.param("float32", "8192x8192", marks=pytest.mark.slow)]
)  # fmt: skip
def test_memory_is_linear_in_the_length(dtype, bias):
    # One tensor has 2 MiB in float32; scores, a mask or an expanded bias at one byte each would have 64 MiB.
    own = 8192**2 * 4 if bias == "8192x8192" else 0  # the gradient of what was passed
    assert 2 * 2**20 < _peak(dtype, bias, 8192) - own < 48 * 2**20


@needs_cpu
def test_twice_the_length_takes_twice_the_memory():
    assert _peak("float32", "1x8192", 8192) < 2.5 * _peak("float32", "1x4096", 4096)


def _drop_row(case, tensors):
    result = run(case, tensors)
    result["out"][:, :, -1] = 0
    return result


def _drop_key(case, tensors):
    return run(replace(case, mask=None), tensors | {"mask": torch.arange(case.keys) < case.keys - 1})


SPOILED = {
    "a dropped row": _drop_row,
    "a dropped key": _drop_key,
    "a wrong scale": lambda case, tensors: run(replace(case, scale=0.1), tensors),
    "a missing mask": lambda case, tensors: run(replace(case, causal=False), tensors),
    "the other alignment": lambda case, tensors: run(replace(case, causal="upper_left"), tensors),
    "a stale dropout mask": lambda case, tensors: run(case, tensors | {"seed": tensors["seed"] + 1}),
    "dropout without its scale": lambda case, tensors: {
        n: x * 0.8 if n == "out" else x for n, x in run(case, tensors).items()
    },
    "an offset of one head": lambda case, tensors: run(case, tensors, offset=(None, 1, None, None)),
    "a missing softcap": lambda case, tensors: run(replace(case, softcap=0.0), tensors),
}


@pytest.mark.parametrize("name", SPOILED)
def test_the_rule_catches_a_wrong_kernel(name):
    case = Case(causal=True, keys=70, p=0.2, softcap=4.0)

    def wrong(generator):
        twin = torch.Generator()
        twin.set_state(generator.get_state())
        spoiled = SPOILED[name](case, inputs(case, twin))
        return {n: Result(spoiled[n], r.torch, r.reference) for n, r in draw(case, generator).items()}

    with pytest.raises(AssertionError, match=r"out: .* Replay with FASTLM_TEST_SEED=1"):
        assert_as_exact_as_torch(wrong, seed=1, again=False)


def _other(**options):
    return lambda case, tensors: run(replace(case, **options), tensors)


def _with(**change):
    return lambda case, tensors: run(case, tensors | {n: f(tensors[n]) for n, f in change.items()})


ALL = ("out", "lse", "dq", "dk", "dv", "dbias")
SPOILED_GRADIENTS = {
    "a window one wider to the left": (_other(window=(10, 3)), ALL),
    "a window one narrower to the right": (_other(window=(9, 2)), ALL),
    "the sign of ALiBi": (_with(slopes=torch.neg), ALL),
    "a bias that is not added": (_with(bias=torch.zeros_like), ALL),
    "a dropped gradient of lse": (_with(dlse=torch.zeros_like), ("dq", "dk", "dbias")),
    "lse in another unit": (lambda case, t: (r := run(case, t)) | {"lse": r["lse"] / 0.6931}, ("lse",)),
    "a gradient of bias without its last key": (
        lambda case, t: (r := run(case, t)) | {"dbias": r["dbias"] * (torch.arange(case.keys) < case.keys - 1)}, ("dbias",),
    ),
    "a gradient of bias of one batch": (
        lambda case, t: run(case, t) | {"dbias": run(case, t | {"dout": t["dout"] * _first(case), "dlse":
                                               t["dlse"] * _first(case)[..., 0]})["dbias"]}, ("dbias",),
    ),
}  # fmt: skip


SPOILED_SINKS = {
    "a sink twice as large": (lambda case, t: run(case, t | {"sinks": t["sinks"] + 0.7}), {*ALL, "dsinks"} - {"dbias"}),
    "a sink of another head": (lambda case, t: run(case, t | {"sinks": t["sinks"].roll(1)}), {*ALL, "dsinks"} - {"dbias"}),
    "a sink's gradient without that of lse": (
        lambda case, t: run(case, t) | {"dsinks": run(case, t | {"dlse": t["dlse"] * 0})["dsinks"]}, {"dsinks"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED_SINKS)
def test_the_rule_catches_wrong_sinks(backend, name):
    case = Case(kv_heads=2, keys=70, causal=True, sinks=True, p=0.1)
    tensors = inputs(case, torch.Generator().manual_seed(1))
    spoil, caught = SPOILED_SINKS[name]
    spoiled, real, measure = spoil(case, tensors), truth(case, tensors), compose(case, tensors, F32)
    assert {n for n in real if violation([Result(spoiled[n], measure[n], real[n])])} == caught


def _first(case):
    return (torch.arange(case.batch) == 0).view(-1, 1, 1, 1)


@pytest.mark.parametrize("name", SPOILED_GRADIENTS)
def test_the_rule_catches_wrong_gradients(name):
    case = Case(kv_heads=2, keys=70, window=(9, 3), bias="hqk", alibi=True, p=0.1)
    tensors = inputs(case, torch.Generator().manual_seed(1))
    spoil, caught = SPOILED_GRADIENTS[name]
    spoiled, real, measure = spoil(case, tensors), truth(case, tensors), compose(case, tensors, F32)
    assert {n for n in ALL if violation([Result(spoiled[n], measure[n], real[n])])} == set(caught)


@needs_cpu
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_obeys_the_rule(isa):
    code = (
        "import fastlm\nfrom accuracy import assert_as_exact_as_torch\nfrom attention_cases import *\n"
        "with fastlm.backend.use('cpu'):\n"
        "    few = replace(MANY, queries=1, keys=200)  # generation's own product\n"
        "    for case in (*(replace(FEATURES[n], batch=2) for n in (4, 7, 10, 18)), few):\n"
        "        for dtype in (F32, BF16):\n"
        "            assert_as_exact_as_torch(lambda g: draw(replace(case, dtype=dtype), g))\n"
    )
    env = os.environ | {"FASTLM_CPU_ISA": isa, "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_features_name_every_argument():
    """The table of features is what holds each argument on each backend; one that is missing would go untested."""
    plain = Case()
    for name in ("causal", "window", "bias", "mask", "alibi", "softcap", "scale", "p", "valid", "lengths", "kv_heads", "sinks",
                 "v_size"):  # fmt: skip
        assert any(getattr(f, name) != getattr(plain, name) for f in FEATURES), name
