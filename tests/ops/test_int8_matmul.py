"""int8_matmul on the backends that run here: exact integers, bits of the scaled result, weight-only, gradients."""

from __future__ import annotations

import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch
from fastlm import _native
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")),
    pytest.param("triton", marks=[pytest.mark.interpreter, pytest.mark.slow]),  # quickly in tests/kernels
]
op, quantize = fastlm.ops.int8_matmul, fastlm.ops.quantize_int8


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


def integers(*shape: int, least: int = -128) -> Tensor:
    return torch.randint(least, 128, shape, dtype=torch.int8)


def exact(a: Tensor, b: Tensor) -> Tensor:
    """The product in int64: the truth."""
    return a.to(torch.int64) @ b.to(torch.int64)


def laid_out(matrix: Tensor, kind: str) -> Tensor:
    """The same values at an offset of one byte, by strides: "row", "column", "both" axes strided, "expanded" not here."""
    rows, columns = matrix.shape
    if kind == "column":
        return laid_out(matrix.t(), "row").t()
    if kind == "both":
        base = matrix.new_zeros(2 * rows + 1, 3 * columns + 1)
        view = base[1 : 2 * rows + 1 : 2, 1 : 3 * columns + 1 : 3]
    else:
        view = matrix.new_zeros(rows * (columns + 3) + 1)[1:].view(rows, columns + 3)[:, :columns]
    view.copy_(matrix)
    return view


@pytest.mark.parametrize(
    "layouts",
    [("row", "column"), ("row", "row"), ("column", "row"), ("column", "column"), ("both", "both")],
    ids="-".join,
)
def test_exact_for_every_layout(backend, layouts):
    for m, n, k in ((1, 1, 1), (3, 5, 7), (17, 33, 65), (16, 64, 128), (70, 129, 257), (2, 3, 1000)):
        a, b = integers(m, k), integers(k, n)
        out = op(laid_out(a, layouts[0]), laid_out(b, layouts[1]))
        assert out.dtype == torch.int32
        assert out.is_contiguous()
        assert torch.equal(out, exact(a, b).int())


def test_empty_products(backend):
    for m, n, k in ((0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0)):
        out = op(integers(m, k), integers(k, n))
        assert out.shape == (m, n)
        assert not out.any()
    y = op(integers(3, 0), integers(0, 2), torch.ones(3), bias=torch.tensor([1.0, 2.0]))
    assert torch.equal(y, torch.tensor([[1.0, 2.0]]).expand(3, 2))
    assert op(torch.randn(0, 4), integers(4, 3)).shape == (0, 3)


def scaled(acc: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The definition, each step rounded on its own."""
    y = acc.float() * a_scale.unsqueeze(1)
    y = y * b_scale
    return (y if bias is None else y + bias.float()).to(out_dtype)


@pytest.mark.parametrize("out_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 257), (5, 70, 96), (37, 129, 200)], ids=str)
def test_the_scaled_result_is_the_definition_bit_for_bit(backend, shape, out_dtype):
    m, n, k = shape
    a, b, a_scale, b_scale = integers(m, k), integers(n, k).t(), torch.rand(m) / 64, torch.rand(n) / 64
    for bias in (None, torch.randn(n), torch.randn(n).to(BF16)):
        y = op(a, b, a_scale, b_scale, bias=bias, out_dtype=out_dtype)
        assert torch.equal(y, scaled(exact(a, b), a_scale, b_scale, bias, out_dtype))
    one = torch.tensor(0.37)
    assert torch.equal(op(a, b, one, one), scaled(exact(a, b), one.expand(m), one.expand(n), None, F32))
    assert torch.equal(op(a, b, a_scale.view(-1, 1), b_scale.view(1, -1)), op(a, b, a_scale, b_scale))
    assert torch.equal(op(a, b, None, b_scale), exact(a, b).float() * b_scale)
    assert torch.equal(op(a, b, a_scale), exact(a, b).float() * a_scale.unsqueeze(1))


def test_no_fused_multiply_add(backend):
    """With a fused multiply-add the sum below would not cancel to exactly what two roundings give."""
    a, b = integers(64, 96), integers(96, 80)
    acc, scale = exact(a, b), torch.rand(80)
    bias = -(acc.float()[0] * scale)
    y = op(a, b, None, scale, bias=bias)
    assert not y[0].any()
    fused = (acc.double() * scale.double() + bias.double()).float()
    assert fused[0].any()


functions = {
    "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_far_from_zero(backend, activation):
    """Beyond where the exponential overflows, to infinities and NaN: int8 products and weight-only ones."""
    far = [*range(80, 111), 88.376, 88.72, 88.73, 200, 1e4, 1e19, 1e30, 1e38, 3e38, float("inf")]
    x = torch.tensor([float(v) for v in far], dtype=F32)
    x = torch.cat((x, -x, torch.tensor([0.0, -0.0, float("nan")])))
    expected = functions[activation](x.double()).float()
    nothing = torch.zeros(1, 1, dtype=torch.int8), torch.zeros(1, len(x), dtype=torch.int8)
    for a in (nothing[0], nothing[0].float()):
        y = op(a, nothing[1], bias=x, activation=activation, out_dtype=F32)[0]
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_as_exact_as_torch(backend, activation):

    def draw(generator):
        a = torch.randint(-127, 128, (33, 64), dtype=torch.int8, generator=generator)
        b = torch.randint(-127, 128, (64, 65), dtype=torch.int8, generator=generator)
        a_scale, b_scale = torch.rand(33, generator=generator) / 100, torch.rand(65, generator=generator) / 100
        bias = torch.randn(65, generator=generator)
        y = scaled(exact(a, b), a_scale, b_scale, bias, F32)
        ours = op(a, b, a_scale, b_scale, bias=bias, activation=activation)
        return {"y": Result(ours, functions[activation](y), functions[activation](y.double()))}

    assert_as_exact_as_torch(draw)


@pytest.mark.grid(fast=30)
@pytest.mark.parametrize("backend", BACKENDS[:2], indirect=True)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 3, 16, 37])
def test_weight_only_as_exact_as_torch(backend, rows, group, dtype):
    k, n = 200, 67

    def draw(generator):
        a = torch.randn(rows, k, generator=generator).to(dtype)
        weight, scale = quantize(torch.randn(n, k, generator=generator), group=group or None)
        bias = torch.randn(n, generator=generator).to(dtype)
        dout = torch.randn(rows, n, generator=generator).to(dtype)
        spread = scale.repeat_interleave(group, 1)[:, :k] if group else scale.unsqueeze(1)
        leaf, learned = a.clone().requires_grad_(), bias.clone().requires_grad_()
        y = op(leaf, weight.t(), b_scale=scale.t() if group else scale, bias=learned)
        ours = [y, *torch.autograd.grad(y, (leaf, learned), dout)]
        assert [t.dtype for t in ours] == [dtype] * 3
        found = []
        for wide in (F32, torch.float64):
            w = weight.to(wide) * spread.to(wide)
            found.append([a.to(wide) @ w.t() + bias.to(wide), dout.to(wide) @ w, dout.to(wide).sum(0)])
        theirs = [t.to(dtype) for t in found[0]]
        return {
            k: Result(a.detach(), b, c) for k, a, b, c in zip(("y", "da", "dbias"), ours, theirs, found[1], strict=True)
        }

    assert_as_exact_as_torch(draw)


def sqnr(found: Tensor, truth: Tensor) -> float:
    """Signal to quantisation noise, dB."""
    return float(10 * torch.log10(truth.double().square().sum() / (found.double() - truth.double()).square().sum()))


@pytest.mark.parametrize(("k", "floors"), [(768, (38.8, 37.2, 41.8)), (4096, (37.8, 36.3, 40.7))])
def test_signal_to_noise(backend, k, floors):
    x, w = torch.randn(256, k), torch.randn(256, k)
    truth = x.double() @ w.double().t()
    (xq, xs), (wq, ws) = quantize(x), quantize(w)
    tensor, one = quantize(x, dim=None)
    assert sqnr(op(xq, wq.t(), xs, ws), truth) >= floors[0]
    assert sqnr(op(tensor, wq.t(), one, ws), truth) >= floors[1]
    assert sqnr(op(x, wq.t(), b_scale=ws), truth) >= floors[2]
    cut = torch.trunc(x / xs.unsqueeze(1)).to(torch.int8), torch.trunc(w / ws.unsqueeze(1)).to(torch.int8)
    assert sqnr(op(cut[0], cut[1].t(), xs, ws), truth) < floors[0]  # the floor catches truncation
    dy = torch.randn(256, 256)
    dq, ds = quantize(dy)
    turned, columns = quantize(w, dim=0)
    assert sqnr(op(dq, turned, ds, columns), dy.double() @ w.double()) >= 37


def test_activation_with_gradient_and_autocast(backend):
    a, (w, s) = torch.randn(5, 40, requires_grad=True), quantize(torch.randn(7, 40))
    y = op(a, w.t(), b_scale=s, activation="gelu")
    expected = torch.nn.functional.gelu(a @ (w.float() * s.unsqueeze(1)).t())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), a)[0] for t in (y, expected)))
    with torch.autocast("cpu", torch.bfloat16):
        assert op(a, w.t(), b_scale=s).dtype == BF16
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(torch.autograd.grad(op(a, w.t()).square().sum(), a, create_graph=True)[0].sum(), a)


@pytest.mark.parametrize("backend", BACKENDS[:2], indirect=True)
def test_opcheck_and_compile(backend):
    torch._dynamo.reset()
    (a, sa), (w, s) = quantize(torch.randn(5, 70)), quantize(torch.randn(9, 70))
    (g, gs), x = quantize(torch.randn(9, 70), group=32), torch.randn(5, 70, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    for args in [
        (a, w.t(), sa, s, None, "gelu", BF16), (a, w.t(), None, None, None, "none", torch.int32),
        (a, w.t(), sa, s, bias, "none", F32), (x, w.t(), None, s, bias, "none", F32),
        (x, g.t(), None, gs.t(), None, "none", F32),
    ]:  # fmt: skip
        torch.library.opcheck(torch.ops.fastlm.int8_matmul.default, args)

    def linear(x: Tensor) -> Tensor:
        q, scale = quantize(x * 2)
        return op(q, w.t(), scale, s, bias=bias, activation="silu")

    graphs = []
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g.forward)
    with torch.no_grad():
        for rows in (5, 6, 64):
            x = torch.randn(rows, 70)
            assert torch.equal(compiled(x), linear(x))
    assert len(graphs) == 1


I8, ONES = integers(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((I8.int(), I8.t()), {}, TypeError, "a is int32"),
        ((I8, I8.t().float()), {}, TypeError, "b is float32"),
        ((I8[0], I8.t()), {}, ValueError, r"a has shape \[4\]; it must be \[M, K\]"),
        ((I8, I8), {}, ValueError, r"b has shape \[3, 4\]; its rows must be as many as a of shape \[3, 4\] has columns"),
        ((I8, I8.t(), torch.ones(4)), {}, ValueError, r"a_scale has shape \[4\]; .* with M = 3"),
        ((I8, I8.t(), ONES.double()), {}, TypeError, "a_scale is float64"),
        ((I8, I8.t(), ONES, torch.ones(2)), {}, ValueError, r"b_scale has shape \[2\]"),
        ((I8, I8.t(), ONES, torch.ones(2, 3)), {}, ValueError, r"b_scale has shape \[2, 3\].*G one of 1, 1, 1"),
        ((integers(3, 40), integers(40, 3), ONES, torch.ones(2, 3)), {}, ValueError, "with an int8 a"),
        ((I8.float(), I8.t(), ONES), {}, ValueError, "a_scale was given with a floating a"),
        ((I8, I8.t(), ONES, ONES.clone().requires_grad_()), {}, ValueError, "b_scale requires a gradient"),
        ((I8, I8.t(), ONES), dict(bias=torch.ones(4)), ValueError, r"bias has shape \[4\]; it must be \[3\]"),
        ((I8, I8.t(), ONES), dict(activation="relu"), ValueError, "activation is 'relu'"),
        ((I8, I8.t(), ONES), dict(activation=["gelu"]), ValueError, r"activation is \['gelu'\]; it must be None"),
        ((I8, I8.t()), dict(activation="gelu"), ValueError, "activation was given with an int32 result"),
        ((I8, I8.t()), dict(bias=ONES), ValueError, "bias was given with an int32 result"),
        ((I8, I8.t(), ONES), dict(out_dtype=torch.int32), TypeError, "out_dtype is torch.int32"),
        ((integers(1, 131072), integers(131072, 1)), {}, ValueError, "K is 131072; it must be at most 131071"),
    ],
)  # fmt: skip
def test_bad_input_is_named(args, options, error, message):
    with pytest.raises(error, match=message):
        op(*args, **options)
