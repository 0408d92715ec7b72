"""rotary on a GPU, by the Triton kernel: values, gradients, strides, clamped positions, and decoding in a CUDA graph."""

from __future__ import annotations

import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch
from fastlm.reference import rotary as reference

pytestmark = pytest.mark.gpu("rotary", "triton")
op = fastlm.ops.rotary
CASES = [
    ((2, 12, 1024, 64), 32),
    ((1, 3, 333, 128), 64),
    ((2, 2, 17, 80), 20),
    ((1, 1, 1, 8), 4),
    ((2, 3, 50, 130), 65),
]


def draw(shape, half, dtype, interleaved, placed, generator):
    x = torch.randn(shape, generator=generator).cuda().to(dtype)
    angle = torch.rand(2 * shape[2], half, generator=generator, dtype=torch.float64).cuda() * 100
    places = torch.randint(0, 2 * shape[2], (shape[0], shape[2]), generator=generator).cuda() if placed else None
    dy = torch.randn(shape, generator=generator).cuda().to(dtype)
    tables = [t.float() for t in (angle.cos(), angle.sin())]
    leaf = x.clone().requires_grad_()
    with fastlm.backend.use("triton"):
        y = op(leaf, *tables, positions=places, interleaved=interleaved)
        y.backward(dy)
    theirs = [reference.forward(t, *tables, places, interleaved, i) for t, i in ((x, False), (dy, True))]
    truth = [reference.forward(t.double(), *tables, places, interleaved, i) for t, i in ((x, False), (dy, True))]
    return {n: Result(o, t, r) for n, o, t, r in zip(("y", "dx"), (y.detach(), leaf.grad), theirs, truth)}


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "half"), CASES)
def test_as_exact_as_torch(shape, half, dtype, interleaved, placed):
    assert_as_exact_as_torch(lambda g: draw(shape, half, dtype, interleaved, placed, g))


def test_strides_change_no_bit_and_positions_stay_inside():
    x = torch.randn(2, 70, 5, 64, device="cuda", dtype=torch.bfloat16)
    tables = torch.randn(2, 70, 32, device="cuda").unbind()
    with fastlm.backend.use("triton"):
        y = op(x.transpose(1, 2), *tables)
        assert y.stride() == x.transpose(1, 2).stride()
        assert torch.equal(y, op(x.transpose(1, 2).contiguous(), *tables))
        far = torch.tensor([[-5] * 69 + [2**40]] * 2, device="cuda")
        near = torch.tensor([[0] * 69 + [69]] * 2, device="cuda")
        assert torch.equal(
            op(x.transpose(1, 2), *tables, positions=far), op(x.transpose(1, 2), *tables, positions=near)
        )


@torch.no_grad()
def test_one_captured_graph_decodes_many_tokens():
    module = fastlm.nn.Attention(256, 4, kv_heads=2, causal=True, rotary=10000.0, device="cuda").eval()
    x = torch.randn(2, 40, 256, device="cuda")
    whole = module(x)
    cache, token = module.new_cache(2, 64), x[:, :1].clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            module(token, cache=cache)
    torch.cuda.current_stream().wait_stream(side)
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(token, cache=cache)
    cache.reset()
    outs = []
    for i in range(40):
        token.copy_(x[:, i : i + 1])
        graph.replay()
        outs.append(y.clone())
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-3, atol=1e-3)
