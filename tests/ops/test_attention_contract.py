"""attention as a citizen of PyTorch: schema, tracing, autocast, recomputation, shapes without elements, bad input."""

from __future__ import annotations

from dataclasses import replace

import fastlm
import pytest
import torch
from attention_cases import BACKENDS, BF16, F32, Case, arguments, inputs, leaves
from fastlm.ops.attention import _arguments, _backend_arguments
from torch.library import opcheck

op = fastlm.ops.attention


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


OPCHECKED = [
    Case(p=0.2, causal=True, kv_heads=2), Case(bias="hk"), Case(mask="qk", softcap=2.0), Case(valid=(3, 20)),
    Case(lengths=((3, 9), (0, 1))), Case(sinks=True, v_size=24), Case(sinks=True, v_size=8, lengths=((3, 9), (0, 1))),
]  # fmt: skip


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(backend, case):
    case = replace(case, queries=9, keys=24, head_size=16)
    t = inputs(case, torch.Generator().manual_seed(0))
    x = leaves(t)
    _, args = _arguments(x["q"], x["k"], x["v"], **arguments(case, {**t, **x}))
    opcheck(torch.ops.fastlm.attention.default, args)


def test_compiles_whole_with_dynamic_shapes_and_once_for_all_seeds(backend):
    def block(q, k, v, bias, seed):
        out, lse = op(q, k, v, causal=True, window=(30, -1), bias=bias, dropout_p=0.25, seed=seed, return_lse=True)
        return out.transpose(1, 2).flatten(2) * 2, lse

    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    # Sizes differ from each other in the first call: dynamo takes equal ones for one symbol.
    for batch, queries, keys, seed in ((5, 9, 12, 1), (3, 17, 30, 2), (4, 40, 50, 3)):
        q = torch.randn(batch, queries, 4, 16).transpose(1, 2).requires_grad_()
        k, v = (torch.randn(batch, 2, keys, 16, requires_grad=True) for _ in range(2))
        bias = torch.randn(4, 1, keys, requires_grad=True)
        expected = block(q, k, v, bias, torch.tensor(seed))
        got = compiled(q, k, v, bias, torch.tensor(seed))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        grads = [torch.autograd.grad(o[0].sum() + o[1].sum(), (q, k, v, bias)) for o in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


def test_packed_sequences_compile(backend):
    torch._dynamo.reset()
    f = lambda q, cu: op(q, q, q, cu_seqlens_q=cu, causal=True)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for ends in ([0, 3, 10], [0, 0, 7, 20]):
        q, cu = torch.randn(ends[-1], 4, 16), torch.tensor(ends, dtype=torch.int32)
        assert torch.equal(compiled(q, cu), f(q, cu))


def test_autocast_casts_float32(backend):
    q, k = torch.randn(1, 2, 20, 16, requires_grad=True), torch.randn(1, 2, 20, 16)
    with torch.autocast("cpu", BF16):
        out = op(q, k, k.bfloat16(), causal=True)
    assert out.dtype == BF16
    assert torch.equal(out, op(q.bfloat16(), k.bfloat16(), k.bfloat16(), causal=True))
    out.sum().backward()
    assert q.grad.dtype == F32


def test_activation_checkpointing_recomputes_the_same_mask(backend):
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(1, 2, 40, 16, requires_grad=True)
    grads = []
    for wrap in (False, True):
        torch.manual_seed(3)
        f = lambda x: op(x, x, x, dropout_p=0.5).square()
        out = checkpoint(f, x, use_reentrant=False) if wrap else f(x)
        torch.manual_seed(17)
        grads.append(torch.autograd.grad(out.sum(), x)[0])
    assert torch.equal(*grads)


def test_lse_is_differentiable_alone(backend):
    q, k = (torch.randn(1, 2, 30, 16, requires_grad=True) for _ in range(2))
    _, lse = op(q, k, torch.randn(1, 2, 30, 16), return_lse=True)
    got = torch.autograd.grad(lse.sum(), (q, k))
    expected = torch.autograd.grad((q @ k.mT / 4).logsumexp(-1).sum(), (q, k))
    torch.testing.assert_close(got, expected)


def test_double_backward_raises(backend):
    x = torch.randn(1, 1, 8, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(op(x, x, x).square().sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("shape", [(0, 4, 5, 16), (2, 4, 0, 16)])
def test_empty_batches_and_lengths(backend, shape):
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], 2, 7, 16, requires_grad=True)
    out, lse = op(q, k, k, return_lse=True)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k))
    assert [g.shape for g in grads] == [q.shape, k.shape]
    assert not grads[1].any()


Q = torch.randn(2, 4, 6, 16)
K = torch.randn(2, 2, 9, 16)
P = torch.randn(10, 4, 16)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
packed = dict(q=P, k=P, v=P, cu_seqlens_q=CU)
BAD = [
    (dict(q=[1.0]), TypeError, r"q is a list; it must be a tensor"),
    (dict(q=Q.int()), TypeError, r"q is int32; it must be one of float32"),
    (dict(q=Q[0]), ValueError, r"q has shape \[4, 6, 16\]; it must be \[batch, heads, length, head size\]"),
    (dict(k=K.bfloat16()), TypeError, r"k is torch.bfloat16 and q is torch.float32"),
    (dict(v=K[:, :, :8]), ValueError, r"v has shape \[2, 2, 8, 16\]; it must be \[2, 2, 9, 16\] like k, but"),
    (dict(k=K[..., :8], v=K[..., :8]), ValueError, r"k has shape \[2, 2, 9, 8\]; its last axis must be .* 16"),
    (dict(k=K[:1], v=K[:1]), ValueError, r"k has shape \[1, 2, 9, 16\]; its batch must be q's, 2"),
    (dict(q=Q[:, :3]), ValueError, r"k has 2 heads .*; q's 3 must be a multiple"),
    (dict(k=K.to("meta")), ValueError, r"k is on meta; it must be on cpu"),
    (dict(causal="lower"), ValueError, r"causal is 'lower'; it must be False, True or \"upper_left\""),
    (dict(window=5), TypeError, r"window is 5; it must be None or \(left, right\)"),
    (dict(window=(-2, 0)), ValueError, r"window is \(-2, 0\); each side must be at least 0, or -1"),
    (dict(bias=torch.zeros(6, 8)), ValueError, r"bias has shape \[6, 8\]; it must be broadcastable to \[2, 4, 6, 9\]"),
    (dict(bias=torch.zeros(6, 9).int()), TypeError, r"bias is int32"),
    (dict(alibi_slopes=torch.ones(2)), ValueError, r"alibi_slopes has shape \[2\]; it must be \[4\] or \[2, 4\]"),
    (dict(alibi_slopes=torch.ones(4, requires_grad=True)), ValueError, r"alibi_slopes requires a gradient"),
    (dict(sinks=torch.ones(2)), ValueError, r"sinks has shape \[2\]; it must be \[4\]"),
    (dict(sinks=torch.ones(4).int()), TypeError, r"sinks is int32"),
    (dict(v=K[..., :0]), ValueError, r"v has shape \[2, 2, 9, 0\]; its head size must be at least 1"),
    (dict(softcap=-1.0), ValueError, r"softcap is -1.0; it must be finite in float32 and not negative"),
    (dict(causal=[]), ValueError, r"causal is \[\]; it must be False, True or"),
    (dict(scale=1e39), ValueError, r"scale is 1e\+39; it must be finite in float32"),
    (dict(scale=float("nan")), ValueError, r"scale is nan"),
    (dict(scale="1"), TypeError, r"scale is a str"),
    (dict(dropout_p=1.0), ValueError, r"dropout_p is 1.0; it must be at least 0 and below 1"),
    (dict(dropout_p=0.1, seed=1.5), TypeError, r"seed is a float"),
    (dict(offset=(None, 0)), TypeError, r"offset is .*; it must be None or \(batch_ids, head0, q0, k0\)"),
    (dict(offset=(None, 0, 1, None)), ValueError, r"both or none must be None"),
    (dict(offset=(None, -1, 0, 0)), ValueError, r"offset's head0 is -1"),
    (dict(offset=(torch.arange(3), 0, 0, 0)), ValueError, r"batch_ids has shape \[3\]; it must be \[2\]"),
    (dict(seqlens_k=torch.ones(3).int()), ValueError, r"seqlens_k has shape \[3\]; it must be \[2\]"),
    (dict(seqlens_k=torch.tensor([3, 10])), ValueError, r"seqlens_k is \[3, 10\]; each must be between 0 and the 9 keys"),
    (dict(seqlens_k=torch.tensor([2**32 + 3, 3])), ValueError, r"seqlens_k is \[4294967299, 3\]; each must be between 0"),
    (packed | dict(cu_seqlens_q=torch.tensor([0, 2**32 + 4, 10])), ValueError, r"with lengths \[4294967300, -4294967290\]"),
    (dict(max_seqlen_q=4), ValueError, r"max_seqlen_q is 4 without cu_seqlens_q"),
    (dict(cu_seqlens_k=CU), ValueError, r"it must be \[T, heads, head size\] with cu_seqlens"),
    (packed | dict(cu_seqlens_q=None, cu_seqlens_k=CU), ValueError, r"cu_seqlens_k was given without cu_seqlens_q"),
    (packed | dict(cu_seqlens_q=CU.float()), TypeError, r"cu_seqlens_q is float32"),
    (packed | dict(cu_seqlens_q=CU[:1]), ValueError, r"cu_seqlens_q has shape \[1\]; it must be \[sequences \+ 1\]"),
    (packed | dict(cu_seqlens_q=CU + 1), ValueError, r"cu_seqlens_q runs from 1 to 11"),
    (packed | dict(cu_seqlens_q=torch.tensor([0, 11, 10])), ValueError, r"lengths \[11, -1\]"),
    (packed | dict(cu_seqlens_q=torch.tensor([0, 4, 9])), ValueError, r"end at the number of packed tokens, 10"),
    (packed | dict(max_seqlen_q=5), ValueError, r"max_seqlen_q is 5, and cu_seqlens_q has a sequence of 6"),
    (packed | dict(bias=torch.zeros(10, 10)), ValueError, r"bias was given with cu_seqlens"),
    (packed | dict(k=P[:9], v=P[:9]), ValueError, r"k packs 9 tokens and q 10"),
]  # fmt: skip


@pytest.mark.parametrize("change,error,message", BAD, ids=[f"{list(b[0])[-1]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        op(**(dict(q=Q, k=K, v=K) | change))


def test_which_tells_backend_and_reason():
    assert fastlm.backend.which("attention", Q.double(), K.double(), K.double()).backend == "reference"
    if "cpu" in BACKENDS:
        assert fastlm.backend.which("attention", Q, K, K, causal=True).backend == "cpu"


def test_which_says_why_other_devices_run_the_reference():
    _, args = _backend_arguments(Q, K, K)
    choice = fastlm.backend.choose("attention", "forward", torch.device("mps"), args)
    assert choice.backend == "reference"
    assert choice.reason == "next in order"
    ((name, why),) = choice.rejected
    assert name == "triton"
    assert "serve CUDA tensors; these are on mps" in why or "triton is not installed" in why


SMALL = Case(heads=2, kv_heads=2, queries=5, keys=6, head_size=3, dtype=torch.float64)


@pytest.mark.parametrize("case", [replace(SMALL, **options) for options in (
    dict(kv_heads=1, causal=True, softcap=2.0, window=(3, -1)), dict(bias="bhqk", alibi=True, p=0.3),
    dict(bias="hk", valid=(6, 2), scale=0.7), dict(bias="q", p=0.2, causal="upper_left"), dict(mask="bqk"),
    dict(lengths=((4, 6), (0, 2), (3, 1)), causal=True, kv_heads=1, p=0.2),
    dict(sinks=True, v_size=2, causal=True, queries=6, keys=4, p=0.2),
)], ids=str)  # fmt: skip
def test_gradcheck_of_the_reference(case):
    """Of both outputs, in float64, by finite differences."""
    tensors = inputs(case, torch.Generator().manual_seed(1))
    x = leaves(tensors)

    def call(*values):
        given = {**tensors, **dict(zip(x, values, strict=True))}
        out, lse = op(given["q"], given["k"], given["v"], **arguments(case, given), return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # differences of infinities are no gradients

    with fastlm.backend.use("reference"):
        assert torch.autograd.gradcheck(call, tuple(x.values()), fast_mode=False)
