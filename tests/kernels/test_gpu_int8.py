"""quantize_int8 and int8_matmul on a GPU, by the Triton kernels: the bits of the CPU, and weight-only products."""

from __future__ import annotations

import fastlm
import pytest
import torch

ops = fastlm.ops
quantize_on_gpu = pytest.mark.gpu("quantize_int8", "triton")
multiply_on_gpu = pytest.mark.gpu("int8_matmul", "triton")


@quantize_on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, dict(dim=0), dict(dim=None), dict(group=32), dict(dim=0, group=64)])
def test_quantised_bits_are_the_cpus(options, dtype):
    for shape in ((64, 4096), (33, 301), (3, 9000)):
        x = torch.randn(shape) * 10 ** torch.randn(shape)
        x[0] *= 1e-38
        for extra in ({}, dict(stochastic=True, seed=4)):
            expected = ops.quantize_int8(x.to(dtype), **options, **extra)
            with fastlm.backend.use("triton"):
                found = ops.quantize_int8(x.to(dtype).cuda(), **options, **extra)
            assert torch.equal(found[0].cpu(), expected[0])
            assert torch.equal(found[1].cpu(), expected[1])


@multiply_on_gpu
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (16, 768, 256), (33, 301, 65), (512, 3072, 768), (5, 7, 0)])
@pytest.mark.parametrize("turned", [False, True])
def test_scaled_bits_are_the_cpus(shape, turned):
    m, n, k = shape
    a, scales, bias = torch.randint(-128, 128, (m, k), dtype=torch.int8), (torch.rand(m), torch.rand(n)), torch.randn(n)
    b = torch.randint(-128, 128, (k, n) if turned else (n, k), dtype=torch.int8)
    b = b if turned else b.t()
    for dtype in (torch.float32, torch.bfloat16):
        expected = ops.int8_matmul(a, b, *scales, bias=bias, out_dtype=dtype)
        with fastlm.backend.use("triton"):
            found = ops.int8_matmul(a.cuda(), b.cuda(), *(s.cuda() for s in scales), bias=bias.cuda(), out_dtype=dtype)
            whole = ops.int8_matmul(a.cuda(), b.cuda())
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(whole.cpu(), ops.int8_matmul(a, b))


@multiply_on_gpu
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_within_the_last_place(activation):
    a, b = torch.randint(-127, 128, (64, 96), dtype=torch.int8), torch.randint(-127, 128, (96, 80), dtype=torch.int8)
    scale, bias = torch.rand(80) / 1000, torch.randn(80)
    expected = ops.int8_matmul(a, b, None, scale, bias=bias, activation=activation)
    with fastlm.backend.use("triton"):
        found = ops.int8_matmul(a.cuda(), b.cuda(), None, scale.cuda(), bias=bias.cuda(), activation=activation)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-7)


@multiply_on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_weight_only_is_near_float64(rows, group, dtype):
    x, (w, s) = torch.randn(rows, 1000).to(dtype), ops.quantize_int8(torch.randn(300, 1000), group=group)
    weight = fastlm.nn.int8.dequantize(w, s).double()
    leaf, dy = x.cuda().requires_grad_(), torch.randn(rows, 300).to(dtype)
    with fastlm.backend.use("triton"):
        y = ops.int8_matmul(leaf, w.t().cuda(), b_scale=(s.t() if group else s).cuda())
        y.backward(dy.cuda())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for found, truth in ((y.detach(), x.double() @ weight.t()), (leaf.grad, dy.double() @ weight)):
        assert (found.cpu().double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.gpu("dropout_add_norm", "triton")
@pytest.mark.parametrize("columns", [300, 4096, 16384, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_s_int8_rows_are_those_of_its_y(dtype, columns):
    x, residual = torch.randn(2, 33, columns, device="cuda").to(dtype).unbind()
    with fastlm.backend.use("triton"):
        y, z, q, scale = ops.dropout_add_norm(x, residual, p=0.1, seed=3, quantize="int8")
        plain = ops.dropout_add_norm(x, residual, p=0.1, seed=3)
        expected = ops.quantize_int8(y)
    assert torch.equal(y, plain[0])
    assert torch.equal(z, plain[1])
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
