"""dropout_add_norm(quantize="int8"): the bits of quantize_int8 of its own y, its gradients, and the layers that read them."""

from __future__ import annotations

from dataclasses import replace

import fastlm
import pytest
import torch
from dropout_add_norm_cases import BF16, F16, F32, FEATURES, MIXED, SHAPES, Case, inputs
from fastlm import _native
from fastlm.nn import DropoutAddNorm, Int8Linear, Int8TrainingLinear
from fastlm.ops.dropout_add_norm import _arguments
from torch import Tensor, nn
from torch.library import opcheck

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")),
    pytest.param("triton", marks=[pytest.mark.interpreter, pytest.mark.slow]),  # quickly in tests/kernels
]
op = fastlm.ops.dropout_add_norm
CASES = [replace(f, shape=(37, 91), dtype=d) for f in FEATURES if f.norm for d in (F32, BF16, F16)]
CASES += [replace(Case(p=0.2, layerscale=True), shape=s, dtype=d) for s in SHAPES if s[-1] < 20000 for d in (F32, BF16)]
CASES += [replace(m, shape=(9, 1031)) for m in MIXED]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; NaN as NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def call(case: Case, t: dict[str, Tensor], **more) -> tuple[Tensor, ...]:
    out = op(
        t["x"], t.get("residual"), t.get("weight"), t.get("bias"), norm=case.norm, p=case.p, eps=case.eps,
        weight_offset=case.weight_offset, layerscale=t.get("layerscale"), rowscale=t.get("rowscale"),
        residual_dtype=case.residual_dtype, return_residual=case.return_residual, seed=t["seed"], **more,
    )  # fmt: skip
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_those_of_quantize_int8_and_the_rest_is_as_without(backend, case):
    t = inputs(case, torch.Generator().manual_seed(torch.randint(2**31, ()).item()))
    *plain, q, scale = call(case, t, quantize="int8")
    for found, expected in zip(plain, call(case, t), strict=True):
        assert torch.equal(found, expected)
    expected_q, expected_scale = fastlm.ops.quantize_int8(plain[0])
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    assert q.is_contiguous()
    assert q.abs().max() == 127


def test_rows_of_zeros_tiny_huge_and_no_numbers(backend):
    x = torch.randn(7, 70)
    x[0] = 1  # a constant row has the norm 0
    x[1, 5], x[2, 69] = torch.nan, torch.inf
    weight = torch.randn(70)
    for factor, most in ((1.0, 127), (1e-30, 127), (1e-39, 0), (1e30, 127)):
        y, q, scale = op(x, None, weight * factor, quantize="int8", return_residual=False)
        expected = fastlm.ops.quantize_int8(y)
        assert torch.equal(q, expected[0])
        assert same(scale, expected[1])
        assert scale[0] == 0
        assert scale[1:3].isnan().all()
        assert q.abs().amax(1).tolist() == [0, 0, 0, *[most] * 4]


def test_strided_and_empty_inputs(backend):
    x, residual = torch.randn(2, 6, 10, 33)
    seed = torch.tensor(3)
    expected = op(x, residual, p=0.3, seed=seed, quantize="int8")
    for view in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        found = op(view(x), view(residual), p=0.3, seed=seed, quantize="int8")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for shape in ((0, 8), (3, 0, 8), (8,)):
        y, z, q, scale = op(torch.randn(shape), torch.randn(shape), quantize="int8")
        assert y.shape == z.shape == q.shape == shape
        assert scale.shape == shape[:-1]
        assert (q.dtype, scale.dtype) == (torch.int8, F32)


@pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")
def test_same_bits_at_any_thread_count():
    x = torch.randn(301, 768)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            found.append(op(x, x, p=0.2, seed=1, quantize="int8"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_gradients_are_those_without(backend):
    case = Case(p=0.2, layerscale=True)
    t = inputs(case, torch.Generator().manual_seed(0))
    leaves = [t[n].requires_grad_() for n in ("x", "residual", "weight", "bias", "layerscale")]
    grads = []
    for more in ({}, {"quantize": "int8"}):
        y, z, *rows = call(case, t, **more)
        assert not any(r.requires_grad for r in rows)
        grads.append(torch.autograd.grad((y, z), leaves, (t["dy"], t["dz"])))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_opcheck(backend):
    t = inputs(Case((3, 5, 24), layerscale=True), torch.Generator().manual_seed(0))
    leaves = {n: t[n].requires_grad_() for n in ("x", "residual", "weight", "bias", "layerscale")}
    _, args = _arguments(**leaves, p=0.3, seed=t["seed"], quantize="int8")
    opcheck(torch.ops.fastlm.dropout_add_norm_int8.default, args)


def test_autocast_quantises_what_it_gives(backend):
    x, residual = torch.randn(8, 32).bfloat16(), torch.randn(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, z, q, scale = op(x, residual, quantize="int8")
    assert (y.dtype, z.dtype) == (BF16, F32)
    expected = fastlm.ops.quantize_int8(y)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])


def test_which_asks_for_what_runs():
    x = torch.randn(4, 8)
    assert (
        fastlm.backend.which("dropout_add_norm", x, quantize="int8").backend
        == fastlm.backend.which("quantize_int8", x).backend
    )
    with fastlm.backend.use("cuda"), pytest.raises(fastlm.backend.BackendError, match="cuda"):
        fastlm.backend.which("dropout_add_norm", x, quantize="int8")


# ------------------------------------------------------------------------------------------- layers that read the rows


def layers() -> dict[str, nn.Module]:
    plain = nn.Linear(72, 40)
    training = Int8TrainingLinear(72, 40)
    training.load_state_dict(plain.state_dict())
    return {"dynamic": Int8Linear.from_linear(plain), "training": training}


@pytest.mark.parametrize("kind", ["dynamic", "training"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_layer_that_takes_the_rows_gives_the_same_bits(kind, dtype):
    norm, layer = DropoutAddNorm(72, quantize="int8").to(dtype), layers()[kind]
    assert "quantize='int8'" in repr(norm)
    x, residual = torch.randn(2, 3, 5, 72).to(dtype).unbind()
    x.requires_grad_()
    y, _, q, scale = norm(x, residual)
    found, expected = layer(y, (q, scale)), layer(y)
    assert torch.equal(found, expected)
    leaves = [x, *norm.parameters(), *layer.parameters()]
    dy = torch.randn(3, 5, 40).to(dtype)
    for a, b in zip(*(torch.autograd.grad(o, leaves, dy, retain_graph=True) for o in (found, expected)), strict=True):
        assert torch.equal(a, b)


def test_the_layer_reads_the_rows_and_quantises_nothing(monkeypatch):
    layer, x = layers()["dynamic"], torch.randn(5, 72)
    q, scale = fastlm.ops.quantize_int8(x)
    calls = []
    real = fastlm.ops.quantize_int8
    monkeypatch.setattr(fastlm.ops, "quantize_int8", lambda *a, **k: calls.append(a) or real(*a, **k))
    other = layer(x, (-q, scale))  # what is read is what is given
    assert not calls
    torch.testing.assert_close(other - layer.bias, layer.bias - layer(x))
    assert len(calls) == 1


def test_rows_that_cannot_be_xs_are_named():
    layer, x = layers()["dynamic"], torch.randn(5, 72)
    q, scale = fastlm.ops.quantize_int8(x)
    with pytest.raises(
        ValueError, match=r"values of rows have shape \[4, 72\]; for x of shape \[5, 72\] they must have \[5, 72\]"
    ):
        layer(x, (q[:4], scale))
    with pytest.raises(ValueError, match=r"scales of rows have shape \[5, 1\]"):
        layer(x, (q, scale[:, None]))
    with pytest.raises(TypeError, match=r"values of rows are torch\.float32"):
        layer(x, (x, scale))
    with pytest.raises(ValueError, match="mode 'weight_only', which reads x itself"):
        Int8Linear.from_linear(nn.Linear(72, 40), mode="weight_only")(x, (q, scale))


def test_one_graph_from_the_norm_through_the_layer():
    norm, layer = DropoutAddNorm(72, p=0.0, quantize="int8"), layers()["dynamic"]

    def block(x, residual):
        y, z, q, scale = norm(x, residual)
        return layer(y, (q, scale)) + layer(y, (q, scale)), z

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 17):
        x, residual = torch.randn(2, rows, 72).unbind()
        x.requires_grad_()
        found, expected = compiled(x, residual), block(x, residual)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        grads = [torch.autograd.grad(o[0].sum() + o[1].sum(), x)[0] for o in (found, expected)]
        assert torch.equal(*grads)
