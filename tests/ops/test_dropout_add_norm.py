"""dropout_add_norm on the backends that run here: values, gradients, masks, strides, tracing, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import accuracy
import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch, violation
from dropout_add_norm_cases import BF16, F16, F32, Case, draw, grid, inputs, run
from fastlm import _native
from fastlm.ops.dropout_add_norm import _arguments
from fastlm.reference.dropout_add_norm import dropout_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

BACKENDS = ["reference"] + (
    ["cpu"] if not _native.missing() and fastlm.backend.module("dropout_add_norm", "cpu")[0] else []
)
op = fastlm.ops.dropout_add_norm


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


@pytest.mark.grid(fast=36)
@pytest.mark.parametrize(
    "name,case", [pytest.param(name, case, id=f"{name}-{case}") for name in BACKENDS for case in grid()]
)
def test_as_exact_as_torch(name, case, monkeypatch):
    if name == "reference":  # one code for all shapes: the long test below pools its gradients of one element
        monkeypatch.setattr(accuracy, "MAX_DRAWS", min(accuracy.MAX_DRAWS, 128))
    with fastlm.backend.use(name):
        assert_as_exact_as_torch(lambda generator: draw(case, generator), seed=None)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("case", [case for case in grid() if case.shape == (1, 1)], ids=str)
def test_gradients_of_one_element_are_as_exact_on_the_reference(case):
    """4,096 draws, for each has one element."""
    with fastlm.backend.use("reference"):
        assert_as_exact_as_torch(lambda generator: draw(case, generator))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 2100), norm=st.sampled_from(["layer", "rms", None]),
    p=st.sampled_from([0.0, 0.1, 0.99]), dtype=st.sampled_from([F32, BF16, F16]), residual=st.booleans(),
    layerscale=st.booleans(), rowscale=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled core")
def test_any_shape_and_feature_on_cpu(rows, columns, norm, p, dtype, residual, layerscale, rowscale, seed):
    case = Case((rows, columns), dtype, norm, p, residual, layerscale=layerscale, rowscale=rowscale)
    with fastlm.backend.use("cpu"):
        assert_as_exact_as_torch(lambda generator: draw(case, generator), seed=seed)


@pytest.mark.parametrize("columns", [1, 8, 13, 128, 1000])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.999, 1 - 2**-17])
def test_mask_is_the_reference_mask(backend, columns, p):
    x = torch.ones(57, columns)
    seed = torch.tensor(-1234567890123456789)
    z = op(x, norm=None, p=p, seed=seed)
    assert torch.equal(z != 0, dropout_mask(57, columns, seed, None, p))


def test_mask_of_a_shard_is_a_slice_of_the_whole(backend):
    x, seed = torch.ones(64, 40), torch.tensor(99)
    whole = op(x, norm=None, p=0.4, seed=seed)
    assert torch.equal(op(x[16:48], norm=None, p=0.4, seed=seed, offset=16), whole[16:48])
    assert torch.equal(op(x[:7], norm=None, p=0.4, seed=seed, offset=torch.tensor(5)), whole[5:12])
    rows = torch.randperm(64)
    assert torch.equal(op(x, norm=None, p=0.4, seed=seed, offset=rows), whole[rows])


def test_offset_reaches_past_32_bits(backend):
    x, seed = torch.ones(6, 64), torch.tensor(7)
    start = 2**32 - 3
    far = op(x, norm=None, p=0.5, seed=seed, offset=start)
    assert torch.equal(far != 0, dropout_mask(6, 64, seed, torch.tensor(start), 0.5))
    assert not torch.equal(far[3:], op(x, norm=None, p=0.5, seed=seed)[:3])


def test_seeds_and_generator_govern_the_mask(backend):
    x = torch.ones(32, 64)
    draws = [op(x, norm=None, p=0.5, seed=s) for s in (0, 1, 2**32, -1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    torch.manual_seed(5)
    first = op(x, norm=None, p=0.5)
    second = op(x, norm=None, p=0.5)
    torch.manual_seed(5)
    assert torch.equal(op(x, norm=None, p=0.5), first)
    assert not torch.equal(first, second)


def test_dropout_keeps_the_share_it_says(backend):
    kept = (op(torch.ones(2000, 1000), norm=None, p=0.3, seed=1) != 0).double().mean().item()
    assert abs(kept - 0.7) < 5 * (0.21 / 2e6) ** 0.5


@pytest.mark.parametrize("columns", [16, 33, 768])
def test_y_is_the_norm_of_the_residual_it_returns(backend, columns):
    for dtype in (F32, BF16):
        x, residual = torch.randn(2, 50, columns).to(dtype)
        weight, bias = torch.randn(2, columns)
        y, z = op(x, residual, weight, bias, p=0.2, seed=3)
        assert torch.equal(y, fastlm.ops.norm(z, weight, bias))


def test_strided_inputs_give_the_same_bits_and_are_not_copied(backend, monkeypatch):
    case = Case((6, 10, 33), p=0.3)
    tensors = inputs(case, torch.Generator().manual_seed(1))
    expected = run(case, tensors)
    copied = []
    if backend != "reference":
        real = torch.Tensor.contiguous
        monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, **kw: copied.append(t.shape) or real(t, **kw))
    views = {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
        "wide rows": lambda t: torch.stack([t, t], -2)[..., 0, :],
        "every second column": lambda t: torch.stack([t, t], -1)[..., 0],
    }
    for name, view in views.items():
        strided = {k: view(v) if v.dim() == 3 else v for k, v in tensors.items()}
        copied.clear()
        got = run(case, strided)
        assert not copied, name
        for key, value in expected.items():
            assert torch.equal(got[key], value), (name, key)
    many = torch.randn(3, 2, 5, 2, 33)  # more axes than the kernels take are copied, with the same result
    permuted = many.permute(3, 0, 2, 1, 4)
    packed = permuted.clone(memory_format=torch.contiguous_format)
    assert torch.equal(op(permuted, seed=1, p=0.1)[0], op(packed, seed=1, p=0.1)[0])
    row = torch.randn(33)
    y = op(row.expand(6, 10, 33), row.expand(6, 10, 33), seed=1, p=0.1)[0]
    assert torch.equal(y, op(row.repeat(6, 10, 1), row.repeat(6, 10, 1), seed=1, p=0.1)[0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1, 1), (8,)])
def test_empty_and_one_row(backend, shape):
    case = Case(shape, p=0.1, layerscale=True)
    got = run(case, inputs(case, torch.Generator().manual_seed(0)))
    assert got["y"].shape == shape
    assert got["dweight"].shape == shape[-1:]
    if 0 in shape:
        assert torch.equal(got["dweight"], torch.zeros(shape[-1]))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled core")
@pytest.mark.parametrize("columns", [1, 24, 768, 5000])
def test_same_bits_at_any_thread_count(columns):
    case = Case((301, columns), p=0.2, layerscale=True, rowscale=True)
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
        assert all(torch.equal(other[k], v) for k, v in results[0].items())


def test_forward_and_backward_may_run_on_different_backends():
    case = Case((64, 96), p=0.3)
    tensors = inputs(case, torch.Generator().manual_seed(4))
    x = tensors["x"].clone().requires_grad_()
    grads = {}
    for forward in BACKENDS:
        for back in BACKENDS:
            with fastlm.backend.use(forward):
                y, _ = op(x, tensors["residual"], tensors["weight"], tensors["bias"], p=0.3, seed=1)
            with fastlm.backend.use(back):
                grads[forward, back] = torch.autograd.grad(y, x, tensors["dy"])[0]
    with fastlm.backend.use("reference"):
        wide = {k: v.double() for k, v in tensors.items() if v.is_floating_point()}
        x = wide["x"].clone().requires_grad_()
        y, _ = op(x, wide["residual"], wide["weight"], wide["bias"], p=0.3, seed=1)
        truth = torch.autograd.grad(y, x, wide["dy"])[0]
    first = grads["reference", "reference"]
    for got in grads.values():
        assert torch.equal(got == 0, truth == 0), "the same mask"
        assert violation([Result(got, first, truth)]) is None


def test_gradcheck_of_the_reference_in_float64():
    generator = torch.Generator().manual_seed(0)
    for case in (Case((4, 9), p=0.3, layerscale=True, rowscale=True), Case((4, 9), norm="rms", weight_offset=1.0),
                 Case((4, 9), norm=None, p=0.5, layerscale=True)):  # fmt: skip
        tensors = {k: v.double() if v.is_floating_point() else v for k, v in inputs(case, generator).items()}
        names = [n for n in ("x", "residual", "weight", "bias", "layerscale") if n in tensors]

        def call(*values, case=case, tensors=tensors, names=names):
            t = dict(zip(names, values, strict=True))
            return op(t["x"], t.get("residual"), t.get("weight"), t.get("bias"), norm=case.norm, p=case.p,
                      weight_offset=case.weight_offset, layerscale=t.get("layerscale"),
                      rowscale=tensors.get("rowscale"), seed=tensors["seed"])  # fmt: skip

        with fastlm.backend.use("reference"):
            assert torch.autograd.gradcheck(call, [tensors[n].requires_grad_() for n in names])


@pytest.mark.parametrize("case", [Case(p=0.3, layerscale=True), Case(norm="rms", bias=False), Case(norm=None, p=0.1),
                                  Case(residual=False, return_residual=False)], ids=str)  # fmt: skip
def test_opcheck(backend, case):
    t = inputs(replace(case, shape=(3, 5, 24)), torch.Generator().manual_seed(0))
    leaves = {n: t[n].requires_grad_() for n in ("x", "residual", "weight", "bias", "layerscale") if n in t}
    _, args = _arguments(**leaves, norm=case.norm, p=case.p, seed=t["seed"], return_residual=case.return_residual)
    opcheck(torch.ops.fastlm.dropout_add_norm.default, args)


def test_compiles_whole_with_dynamic_shapes_and_once_for_all_seeds(backend):
    def block(x, residual, weight, seed):
        y, z = op(x, residual, weight, norm="rms", p=0.25, seed=seed)
        return y * 2, z

    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for rows, columns, seed in ((4, 32, 1), (9, 64, 2), (17, 40, 3)):
        x, residual = torch.randn(rows, columns), torch.randn(rows, columns)
        weight = torch.randn(columns, requires_grad=True)
        x.requires_grad_()
        expected = block(x, residual, weight, torch.tensor(seed))
        got = compiled(x, residual, weight, torch.tensor(seed))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        got_grad, expected_grad = (torch.autograd.grad(o[0].sum() + o[1].sum(), (x, weight)) for o in (got, expected))
        assert all(torch.equal(a, b) for a, b in zip(got_grad, expected_grad, strict=True))
    assert counter.frame_count <= 2


def test_autocast_gives_its_dtype_and_keeps_the_residual_stream(backend):
    x, residual = torch.randn(8, 32).bfloat16(), torch.randn(8, 32)
    weight = torch.randn(32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = op(x, residual, weight)
        assert (y.dtype, z.dtype) == (BF16, F32)
        assert op(residual, return_residual=False).dtype == BF16
    y.sum().backward()
    assert weight.grad.dtype == F32


def test_activation_checkpointing_recomputes_the_same_mask(backend):
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(16, 48, requires_grad=True)
    weight = torch.randn(48, requires_grad=True)
    grads = []
    for wrap in (False, True):
        torch.manual_seed(3)
        f = lambda x: op(x, x, weight, p=0.5, return_residual=False).square()
        out = checkpoint(f, x, use_reentrant=False) if wrap else f(x)
        torch.manual_seed(17)  # what runs between forward and backward must not matter
        grads.append(torch.autograd.grad(out.sum(), (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_only_the_gradients_asked_for_and_no_residual_written(backend):
    x, residual = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    weight = torch.randn(16)
    y = op(x, residual, weight, p=0.1, seed=1, return_residual=False)
    y.sum().backward()
    assert x.grad is not None
    assert residual.grad is None
    plain = torch.randn(4, 16)
    assert op(plain, norm="rms")[1].data_ptr() == plain.data_ptr(), "the residual of a plain norm is x itself"


def test_double_backward_raises(backend):
    x = torch.randn(4, 8, requires_grad=True)
    grad = torch.autograd.grad(op(x, return_residual=False).square().sum(), x, create_graph=False)
    assert grad[0].shape == x.shape
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(op(x, return_residual=False).square().sum(), x, create_graph=True)[0].sum().backward()


X = torch.randn(4, 8)
BAD = [
    (dict(x=torch.ones(4, 8, dtype=torch.int32)), TypeError, r"x is int32; it must be one of float32"),
    (dict(x=[1.0]), TypeError, r"x is a list; it must be a tensor"),
    (dict(x=None), TypeError, r"x is a NoneType; it must be a tensor"),
    (dict(x=torch.eye(4).to_sparse()), ValueError, r"x has layout torch.sparse_coo; it must be a dense tensor"),
    (dict(eps=-1.0), ValueError, r"eps is -1.0; it must be at least 0 and finite"),
    (dict(eps=float("nan")), ValueError, r"eps is nan"),
    (dict(x=torch.tensor(1.0)), ValueError, r"x has shape \[\]"),
    (dict(x=torch.ones(4, 0)), ValueError, r"at least one column"),
    (dict(residual=torch.ones(4, 7)), ValueError, r"residual has shape \[4, 7\]; it must be \[4, 8\]"),
    (dict(weight=torch.ones(4)), ValueError, r"weight has shape \[4\]; it must be \[8\]"),
    (dict(bias=torch.ones(1, 8)), ValueError, r"bias has shape \[1, 8\]; it must be \[8\]"),
    (dict(layerscale=torch.ones(8, dtype=torch.int64)), TypeError, r"layerscale is int64"),
    (dict(rowscale=torch.ones(8)), ValueError, r"rowscale has shape \[8\]; it must be \[4\]"),
    (dict(rowscale=torch.ones(4, requires_grad=True)), ValueError, r"rowscale requires a gradient"),
    (dict(residual=torch.ones(4, 8, device="meta")), ValueError, r"residual is on meta; it must be on cpu"),
    (dict(p=1.0), ValueError, r"p is 1.0; it must be at least 0 and below 1"),
    (dict(p=-0.1), ValueError, r"p is -0.1"),
    (dict(p="0.1"), TypeError, r"p is a str"),
    (dict(norm="batch"), ValueError, r"norm is 'batch'"),
    (dict(norm=None, weight=torch.ones(8)), ValueError, r"weight was given with norm None"),
    (dict(quantize="int4"), ValueError, r"quantize is 'int4'; it must be None or \"int8\""),
    (dict(quantize="int8", norm=None), ValueError, r"quantize is 'int8' with norm None"),
    (dict(p=0.1, seed=1.5), TypeError, r"seed is a float"),
    (dict(p=0.1, seed=2**63), ValueError, r"seed is 9223372036854775808; it must fit into 64 bits"),
    (dict(p=0.1, seed=torch.tensor([1, 2])), ValueError, r"seed is a torch.int64 tensor of shape \[2\]"),
    (dict(p=0.1, offset=torch.arange(3)), ValueError, r"offset is a torch.int64 tensor of shape \[3\]"),
    (dict(p=0.1, offset=0.5), TypeError, r"offset is a float"),
    (dict(p=0.1, offset=-1), ValueError, r"offset is -1; it must be a row number"),
    (dict(p=0.1, offset=2**70), ValueError, r"offset is 1180591620717411303424; it must be a row number"),
    (dict(residual_dtype=torch.int8), TypeError, r"residual_dtype is torch.int8"),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=[f"{next(iter(b[0]))}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        op(**(dict(x=X) | change))


def test_forced_backend_that_cannot_serve_raises():
    with fastlm.backend.use("cuda"), pytest.raises(fastlm.backend.BackendError, match="'cuda' is forced and cannot"):
        op(X)
    with pytest.raises(ValueError, match="it must be one of reference, cpu, triton, cuda"), fastlm.backend.use("gpu"):
        pass
    code = "import torch, fastlm; fastlm.ops.norm(torch.ones(2, 4))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTLM_BACKEND": "nope"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "FASTLM_BACKEND is 'nope'; it must be one of" in done.stderr


def test_which_tells_backend_and_reason():
    choice = fastlm.backend.which("dropout_add_norm", X.double())
    assert choice.backend == "reference"
    if "cpu" in BACKENDS:
        assert "float64" in str(choice)
        assert fastlm.backend.which("dropout_add_norm", X).backend == "cpu"
        strided = fastlm.backend.which("dropout_add_norm", torch.randn(8, 4).t())
        assert strided.backend == "cpu"
        assert "stride" in strided.reason
        permuted = torch.randn(3, 2, 5, 2, 8).permute(3, 0, 2, 1, 4)  # no two of its leading axes make one
        assert "copied whole first: x" in fastlm.backend.which("dropout_add_norm", permuted).reason
        assert "copied" not in fastlm.backend.which("dropout_add_norm", permuted[0]).reason
    with pytest.raises(ValueError, match="op is 'nope'"):
        fastlm.backend.which("nope", X)


def test_a_fall_to_another_backend_is_logged_once(caplog):
    fastlm.backend._logged.clear()
    with caplog.at_level("WARNING", logger="fastlm"):
        for _ in range(3):
            op(X.double())
    assert len([r for r in caplog.records if "reference serves" in r.getMessage()]) == 1


SPOILED = {
    "a dropped row": lambda y, case, tensors: torch.cat((y[:-1], torch.zeros_like(y[-1:]))),
    "a wrong epsilon": lambda y, case, tensors: run(replace(case, eps=2e-5), tensors)["y"],
    "a missing scale": lambda y, case, tensors: run(replace(case, norm="rms", bias=False), tensors)["y"],
    "a stale mask": lambda y, case, tensors: run(case, tensors | {"seed": tensors["seed"] + 1})["y"],
    "an offset of one row": lambda y, case, tensors: run(case, tensors, offset=torch.tensor(1))["y"],
    "an unscaled branch": lambda y, case, tensors: run(case, {k: v for k, v in tensors.items() if k != "layerscale"})[
        "y"
    ],
}


@pytest.mark.parametrize("name", SPOILED)
def test_the_rule_catches_a_wrong_kernel(name):
    case = Case((64, 96), p=0.2, layerscale=True)

    def wrong(generator):
        twin = torch.Generator()
        twin.set_state(generator.get_state())
        tensors = inputs(case, twin)
        good = draw(case, generator)["y"]
        return {"y": Result(SPOILED[name](good.ours, case, tensors), good.torch, good.reference)}

    with pytest.raises(AssertionError, match=r"y: .* Replay with FASTLM_TEST_SEED=1"):
        assert_as_exact_as_torch(wrong, seed=1, again=False)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sums_are_rounded_to_nearest_even(backend, dtype):
    x, residual = torch.randn(2, 64, 200).to(dtype).unbind()
    x[0, 0], x[0, 1], x[0, 2] = float("inf"), float("nan"), 1e-7
    residual[0, 3:5] = torch.tensor([1.0, 1.0])
    x[0, 3:5] = torch.tensor([2.0**-8, 3 * 2.0**-8]) if dtype == BF16 else torch.tensor([2.0**-11, 3 * 2.0**-11])
    expected = (residual.float() + x.float()).to(dtype)
    assert torch.equal(op(x, residual, norm=None).nan_to_num(99), expected.nan_to_num(99))
