"""The Triton kernels of attention, interpreted: values, gradients, masks, pieces of a decode, strides, shards, small tiles.

Few heads and short lengths, because the interpreter's time goes by operations. What holds of every backend and runs in
seconds here is the test of test_attention.py itself. Registers, spills and tensor cores are in test_offline.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import accuracy
import fastlm
import numpy as np
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch, violation
from attention_cases import (
    BF16,
    F16,
    F32,
    FEATURES,
    FEW,
    Case,
    arguments,
    compose,
    draw,
    draw_mixed,
    inputs,
    run,
    truth,
)
from fastlm import _native

pytest.importorskip("triton")
from fastlm.kernels import table
from fastlm.reference.attention import dropout_mask
from test_attention import (  # noqa: F401 - collected here, with the fixture ``backend`` of this file
    SDPA_LENGTHS,
    SDPA_OPTIONS,
    check_sdpa,
    test_expanded_keys_and_gradients_are_right,
    test_huge_and_tiny_scores,
    test_large_negative_bias_does_not_hide_a_row,
    test_out_is_laid_out_like_q,
    test_packed_sequences_draw_the_mask_of_a_batch,
    test_rows_that_attend_to_nothing_take_no_gradient_of_lse,
    test_seeds_and_generator_govern_the_mask,
    test_what_lies_behind_the_valid_part_of_a_cache_never_leaks,
)
from test_attention_contract import (  # noqa: F401
    test_double_backward_raises,
    test_empty_batches_and_lengths,
    test_lse_is_differentiable_alone,
)
from test_attention_shards import piece, ring

pytestmark = pytest.mark.interpreter
op = fastlm.ops.attention
KERNELS = ("attention_forward", "attention_decode", "attention_backward_kv", "attention_backward_q")
needs_cpu = pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")


def tiles(m: int, n: int) -> dict:
    return {"config": {"m": m, "n": n, "num_warps": 4, "num_stages": 1}}


@pytest.fixture(autouse=True)
def backend(request, monkeypatch) -> Iterator[str]:
    """Tiles of 64x64: few operations for the interpreter. Few draws are pooled, eight times as many where they break."""
    monkeypatch.setattr(accuracy, "MAX_DRAWS", 16 if request.config.getoption("--slow") else 1)
    with ExitStack() as stack:
        stack.enter_context(fastlm.backend.use("triton"))
        for kernel in KERNELS:
            stack.enter_context(table.pinned(tiles(64, 64), kernel))
        yield "triton"


def small(case: Case) -> Case:
    """The case with two heads; of grouped ones, two that share a key head."""
    if case.queries == 1:
        return replace(case, heads=8, kv_heads=8 * case.kv_heads // case.heads)
    return replace(case, heads=2, kv_heads=1 if case.kv_heads < case.heads else 2)


QUICK = (1, 3, 4, 6, 8, 10, 11, 14, 15, 16, 17, 18)


@pytest.mark.grid(fast=4)
@pytest.mark.parametrize("number", [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(len(FEATURES))
])  # fmt: skip
def test_as_exact_as_torch(number):
    case = replace(small(FEATURES[number]), dtype=(F32, BF16, F16)[number % 3])
    assert_as_exact_as_torch(lambda generator: draw(case, generator))


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("number", range(len(FEATURES)))
def test_as_exact_as_torch_in_every_dtype(number, dtype):
    case = replace(small(FEATURES[number]), dtype=dtype)
    assert_as_exact_as_torch(lambda generator: draw(case, generator))


@pytest.mark.grid(fast=6)
@pytest.mark.parametrize("option", SDPA_OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", SDPA_LENGTHS)
def test_agrees_with_sdpa(option, lengths):
    check_sdpa(Case(heads=2, kv_heads=1, queries=lengths[0], keys=lengths[1], **option))


BROADCAST = ["".join(axes) for axes in (
    "bhqk", "hqk", "bqk", "qk", "bhq", "hq", "bq", "q", "bhk", "hk", "bk", "k", "bh", "h", "b", "",
)]  # fmt: skip


@pytest.mark.grid(fast=2)
@pytest.mark.parametrize("axes", [
    pytest.param(a, marks=() if a in ("hqk", "bqk", "qk", "bq", "bhk", "k", "h", "") else pytest.mark.slow)
    for a in BROADCAST
])  # fmt: skip
def test_gradient_of_a_bias_of_every_shape(axes):
    case = Case(heads=2, kv_heads=1, queries=70, keys=40, head_size=32, bias=axes, p=0.2, window=(50, 20), softcap=9.0)
    case = replace(case, dtype=(F32, BF16)[len(axes) % 2])
    assert_as_exact_as_torch(lambda generator: draw(case, generator))


@pytest.mark.parametrize("size,dtype", [(16, BF16), (24, F32), (13, F16), (136, F32), (256, BF16)])
def test_head_sizes(size, dtype):
    case = Case(batch=1, heads=2, kv_heads=2, queries=33, keys=40, head_size=size, dtype=dtype, causal=True, p=0.1)
    assert_as_exact_as_torch(lambda generator: draw(case, generator))


def decoded(case: Case, generator: torch.Generator) -> dict[str, Result]:
    """out and lse alone: generation has no backward, and its kernel cuts the keys into pieces."""
    tensors = inputs(case, generator)
    with torch.no_grad():
        ours = op(tensors["q"], tensors["k"], tensors["v"], **arguments(case, tensors), return_lse=True)
    real, measure = truth(case, tensors), compose(case, tensors, F32)
    return {name: Result(value, measure[name], real[name]) for name, value in zip(("out", "lse"), ours, strict=True)}


GENERATION = Case(heads=16, kv_heads=4, queries=1, keys=1100, head_size=64, causal=True, valid=(1100, 530))


@pytest.mark.grid(fast=2)
@pytest.mark.parametrize("case", [
    GENERATION, replace(GENERATION, dtype=BF16), replace(GENERATION, dtype=F16, valid=(0, 1), bias="hk"),
    replace(GENERATION, heads=4, kv_heads=4, head_size=40, queries=3, alibi=True, window=(600, -1), dtype=BF16),
    *(replace(f, heads=4, kv_heads=2) for f in FEW[:3]),
    *(pytest.param(replace(f, dtype=BF16), marks=pytest.mark.slow) for f in FEW),
], ids=str)  # fmt: skip
def test_decoding_in_pieces(case):
    assert_as_exact_as_torch(lambda generator: decoded(case, generator))


@pytest.mark.parametrize("axes", ["hk", "h"])
def test_idle_rows_of_a_decoding_tile_read_nothing_outside_the_bias(axes):
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 20, 16)  # two rows of a tile of sixteen are at work
    memory = torch.full((1, 64, 1, 20 if "k" in axes else 1), float("inf"))
    memory[:, :4] = 0
    with np.errstate(invalid="raise"):  # as inf - inf would be
        out = op(q, k, k, bias=memory[:, :4])
    torch.testing.assert_close(out, op(q, k, k))


def test_piece_size_is_a_function_of_the_shape_alone():
    from fastlm.kernels.attention import piece_size

    assert piece_size(1, 10**6) == 1024  # 977 pieces
    assert [piece_size(n, 2048) for n in (1, 128, 129, 256, 10**6)] == [256, 256, 512, 512, 2048]


MUTANTS = {
    "the other alignment": lambda case, tensors: run(replace(case, causal="upper_left"), tensors),
    "a missing mask": lambda case, tensors: run(replace(case, causal=False), tensors),
    "a wrong scale": lambda case, tensors: run(replace(case, scale=0.17), tensors),
    "a stale dropout mask": lambda case, tensors: run(case, tensors | {"seed": tensors["seed"] + 1}),
    "a dropped key": lambda case, tensors: run(case, tensors | {"mask": torch.arange(case.keys) < case.keys - 1}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_rule_catches_a_wrong_kernel(name):
    case = Case(batch=1, heads=2, kv_heads=2, queries=33, keys=70, causal=True, p=0.2)

    tensors = inputs(case, torch.Generator().manual_seed(1))
    spoiled, real, measure = MUTANTS[name](case, tensors), truth(case, tensors), compose(case, tensors, F32)
    assert all(violation([Result(spoiled[n], measure[n], real[n])]) for n in ("out", "dk"))


def masks(p: float, seed: torch.Tensor, shape: tuple[int, int, int, int], **extra) -> tuple[torch.Tensor, torch.Tensor]:
    """Which probabilities are kept, seen from out and from dv; at most 64 keys and queries."""
    batch, heads, queries, keys = shape
    q, zero = torch.zeros(batch, heads, queries, 64), torch.zeros(batch, heads, keys, 64)
    v = torch.eye(keys, 64).expand(batch, heads, keys, 64).clone().requires_grad_()
    out = op(q, zero, v, dropout_p=p, seed=seed, **extra)
    (dv,) = torch.autograd.grad(out, v, torch.eye(queries, 64).expand_as(out))
    return out[..., :keys] != 0, dv[..., :queries].mT != 0


@needs_cpu
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 2**-17])
def test_mask_is_that_of_the_reference_and_of_the_cpu_forward_and_backward(p):
    seed = torch.tensor(-1234567890123456789)
    ids = torch.tensor([5, 2**31 + 7])
    whole = dropout_mask((2, 6, 160, 190), seed, p, ids)[:, 4:6, 120:153]
    for k0 in (0, 3, 100):
        shape, extra = (2, 2, 33, 60), dict(offset=(ids, 4, 120, k0))
        for kept in masks(p, seed, shape, **extra):
            assert torch.equal(kept, whole[..., k0 : k0 + 60])
        with fastlm.backend.use("cpu"):
            assert torch.equal(masks(p, seed, shape, **extra)[0], whole[..., k0 : k0 + 60])


def test_mask_does_not_depend_on_tiles_or_pieces():
    seed = torch.tensor(11)
    mask = dropout_mask((2, 4, 5, 600), seed, 0.4)
    q, k = torch.zeros(2, 4, 5, 64), torch.zeros(2, 2, 600, 64)
    v = torch.zeros(2, 2, 600, 64)
    v[:, :, 530:594] = torch.eye(64)
    for m, n in ((16, 16), (64, 64)):  # five queries: both heads of a group in one tile, the keys in pieces
        with table.pinned(tiles(m, n)):
            assert torch.equal(op(q, k, v, dropout_p=0.4, seed=seed) != 0, mask[..., 530:594])


def test_forward_and_backward_may_run_on_different_backends():
    case = Case(heads=2, kv_heads=1, p=0.3, causal=True)
    assert_as_exact_as_torch(lambda generator: draw_mixed(case, generator, ("reference", "triton")))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_that_attend_to_nothing_are_zero_and_have_no_gradient(dtype):
    q, k, v = (torch.randn(2, 2, 64, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    mask[..., :3, :] = False
    mask[..., :, 10:40] = False
    added = torch.zeros(1, 1, 64, 64, dtype=dtype).masked_fill(~mask, float("-inf")).requires_grad_()
    for bias, leaves in ((mask, (q, k, v)), (added, (q, k, v, added))):
        out, lse = op(q, k, v, bias=bias, return_lse=True)
        grads = torch.autograd.grad(out.float().square().sum() + lse[..., 3:].sum(), leaves)
        assert all(g.isfinite().all() for g in grads)
        assert not out[:, :, :3].any()
        assert not grads[0][:, :, :3].any()
        assert not grads[1][:, :, 10:40].any()
        assert (lse[:, :, :3] == float("-inf")).all()
        if bias is added:
            assert not grads[3].masked_fill(mask, 0).any()


def test_strides_and_repetition_change_no_bit():
    case = Case(batch=2, heads=2, kv_heads=1, queries=37, keys=37, causal=True, p=0.2, bias="hqk", layout="bhld")
    tensors = inputs(case, torch.Generator().manual_seed(1))
    expected = run(case, tensors)
    views = {
        "the same": lambda t: t,
        "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "length last": lambda t: t.mT.contiguous().mT,
        "every second element": lambda t: torch.stack([t, t], -1)[..., 0],
        "unaligned": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
    }
    for name, view in views.items():
        got = run(case, {k: view(v) if v.dim() == 4 else v for k, v in tensors.items()})
        for key, value in expected.items():
            assert torch.equal(got[key], value), (name, key)


def test_pieces_by_batch_and_heads_are_the_bits_of_the_whole():
    case = Case(batch=3, heads=4, kv_heads=2, queries=40, keys=70, causal=True, p=0.2, bias="bhqk", alibi=True)
    tensors = inputs(case, torch.Generator().manual_seed(7))
    whole = run(case, tensors)
    for batches, heads in ((slice(0, 1), slice(0, 2)), (slice(1, 3), slice(2, 4))):
        keys = slice(heads.start // 2, heads.stop // 2)
        for name, value in piece(case, tensors, batches, heads).items():
            expected = whole[name][batches, keys if name in ("dk", "dv") else heads]
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("case", [
    Case(batch=1, heads=2, kv_heads=1, queries=100, keys=100, causal="upper_left", p=0.2),
    Case(batch=1, heads=2, kv_heads=2, queries=100, keys=100, window=(40, 10), bias="hk", alibi=True),
], ids=str)  # fmt: skip
def test_pieces_by_queries_and_keys_give_the_whole(case):
    def pieces(generator: torch.Generator) -> dict[str, Result]:
        tensors = inputs(case, generator)
        ours = ring(case, tensors, [51, 100], [35, 100])
        measure, real = compose(case, tensors, F32), truth(case, tensors)
        return {name: Result(ours[name], measure[name], real[name]) for name in real}

    assert_as_exact_as_torch(pieces)


@pytest.mark.parametrize("m,n", [(16, 32), (32, 16)])
def test_small_tiles_obey_the_rule(m, n):
    case = Case(batch=1, heads=2, kv_heads=1, queries=40, keys=77, causal=True, window=(30, 0), p=0.2, bias="k")
    with table.pinned(tiles(m, n)):
        assert_as_exact_as_torch(lambda generator: draw(case, generator))


@pytest.mark.parametrize("queries,extra", [
    (33, {}), (3, {}), pytest.param(33, dict(dropout_p=0.5, seed=3), marks=pytest.mark.slow),
    pytest.param(3, dict(scale=2.0), marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_no_value_that_is_not_finite_is_lost(queries, extra):
    """NaN and inf in q, k and v come out where the reference's do; three queries see keys in pieces.

    Gradients may have more of them: in what pads a tile, 0 * inf is NaN for the keys that hold the inf.
    """
    keys = 40 if queries > 16 else 300
    for value in (float("nan"), float("inf"), -float("inf")):
        t = {n: torch.randn(1, 3, length, 16) for n, length in (("q", queries), ("k", keys), ("v", keys))}
        for head, (name, place) in enumerate((("q", (1, 3)), ("k", (5, 0)), ("v", (7, 2)))):
            t[name][0, head][place] = value
        results = {}
        for backend in ("reference", "triton"):
            x = {n: tensor.clone().requires_grad_() for n, tensor in t.items()}
            with fastlm.backend.use(backend), np.errstate(all="ignore"):
                out, lse = op(**x, **extra, return_lse=True)
                grads = torch.autograd.grad((out, lse), tuple(x.values()), (torch.ones_like(out), torch.ones_like(lse)))
            results[backend] = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
        for key, expected in results["reference"].items():
            got = results["triton"][key]
            if key in ("out", "lse"):
                assert torch.equal(got.isnan(), expected.isnan()), (value, key)
                assert torch.equal(got.isinf(), expected.isinf()), (value, key)
            elif not extra.get("dropout_p"):  # what is dropped is 0 here, and NaN * 0 in the reference
                assert not (got.isfinite() & ~expected.isfinite()).any(), (value, key)


def test_a_row_of_scores_that_are_no_numbers_has_no_lse():
    q, k = torch.full((1, 1, 40, 16), float("nan")), torch.randn(1, 1, 40, 16)
    out, lse = op(q, k, k, return_lse=True)
    assert out.isnan().all()
    assert lse.isnan().all()
