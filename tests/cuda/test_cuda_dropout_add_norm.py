"""dropout_add_norm on a GPU, by the Triton and the CUDA kernels: values, masks, determinism, strides, streams, graphs,
large tensors, opcheck, compilation, autocast. What each backend passes is the evidence that `fastlm bench --status` tells.
"""

from __future__ import annotations

import fastlm
import pytest
import torch
from accuracy import assert_as_exact_as_torch
from dropout_add_norm_cases import BF16, F16, F32, Case, draw, grid, inputs, run
from fastlm.ops.dropout_add_norm import _arguments
from fastlm.reference.dropout_add_norm import dropout_mask

op = fastlm.ops.dropout_add_norm
RICH = Case((64, 1024), p=0.2, layerscale=True, rowscale=True)


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param("triton", marks=pytest.mark.gpu("dropout_add_norm", "triton")),
        pytest.param("cuda", marks=pytest.mark.gpu("dropout_add_norm", "cuda")),
    ],
)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


def _inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    return inputs(case, torch.Generator().manual_seed(seed), "cuda")


@pytest.mark.parametrize("case", grid(), ids=str)
def test_as_exact_as_torch(case):
    assert_as_exact_as_torch(lambda generator: draw(case, generator, "cuda"))


@pytest.mark.parametrize("columns", [768, 4096, 8192, 8200, 16384, 65544])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_training_widths(columns, dtype):
    case = Case((300, columns), dtype, p=0.1)
    assert_as_exact_as_torch(lambda generator: draw(case, generator, "cuda"))


@pytest.mark.parametrize("columns", [1, 8, 13, 264, 9000, 66000])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_mask_is_the_reference_mask(columns, dtype):
    seed = torch.tensor(-1234567890123456789, device="cuda")
    rows = torch.tensor([5, 2**40, 0, -1, 7], device="cuda")
    for offset in (None, torch.tensor(2**32 - 2, device="cuda"), rows):
        z = op(torch.ones(5, columns, dtype=dtype, device="cuda"), norm=None, p=0.4, seed=seed, offset=offset)
        assert torch.equal(z != 0, dropout_mask(5, columns, seed, offset, 0.4))


@pytest.mark.parametrize("shape", [(8192, 768), (1000, 4096), (40, 20000), (7, 70000)], ids=str)
def test_same_bits_every_time(shape):
    for dtype in (F32, BF16):
        case = Case(shape, dtype, p=0.1, layerscale=True)
        tensors = _inputs(case)
        first = run(case, tensors)
        for _ in range(3):
            assert all(torch.equal(value, first[name]) for name, value in run(case, tensors).items())


def test_strides_change_no_bit():
    case = Case((6, 10, 1032), p=0.3)
    for dtype in (F32, BF16):
        tensors = _inputs(Case((6, 10, 1032), dtype, p=0.3))
        expected = run(case, tensors)
        views = {
            "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            "columns first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
            "every second column": lambda t: torch.stack([t, t], -1)[..., 0],
            "unaligned": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].reshape(t.shape),
        }
        for name, view in views.items():
            got = run(case, {k: view(v) if v.dim() == 3 else v for k, v in tensors.items()})
            for key, value in expected.items():
                assert torch.equal(got[key], value), (name, key)


def test_other_streams():
    tensors = _inputs(RICH)
    expected = run(RICH, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            got = run(RICH, tensors)
    stream.synchronize()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("columns", [1024, 20000])
def test_graph_replays_with_new_values_and_seeds(columns):
    x, residual = torch.randn(2, 64, columns, device="cuda").unbind()
    weight = torch.randn(columns, device="cuda", requires_grad=True)
    dy = torch.randn(64, columns, device="cuda")
    seed = torch.tensor(1, device="cuda")

    def step():
        y, z = op(x, residual, weight, norm="rms", p=0.3, seed=seed)
        return y, z, torch.autograd.grad(y, weight, dy)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (1, 2, -5):
        seed.fill_(value)
        x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_nothing_waits_for_the_device():
    tensors = _inputs(RICH)
    run(RICH, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(RICH, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_current_device_stays_on_any_of_the_gpus():
    for number in range(torch.cuda.device_count()):
        x = torch.randn(8, 64, device=f"cuda:{number}")
        y = op(x, return_residual=False)
        assert torch.allclose(y, torch.nn.functional.layer_norm(x, (64,)), atol=1e-5)
        assert torch.cuda.current_device() == 0


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    rows, columns = 2**21 + 8, 1024
    x = torch.randn(64, columns, device="cuda", dtype=BF16).repeat(rows // 64 + 1, 1)[:rows].requires_grad_()
    weight = torch.randn(columns, device="cuda")
    y = op(x, None, weight, p=0.1, seed=3, return_residual=False)
    tail = op(x[-64:].detach(), None, weight, p=0.1, seed=3, offset=rows - 64, return_residual=False)
    assert torch.equal(y[-64:], tail)
    dy = torch.randn(64, columns, device="cuda", dtype=BF16)
    dx = torch.autograd.grad(y, x, dy.repeat(rows // 64 + 1, 1)[:rows])[0]
    part = x[-64:].detach().requires_grad_()
    out = op(part, None, weight, p=0.1, seed=3, offset=rows - 64, return_residual=False)
    last = dy.repeat(2, 1)[rows % 64 : rows % 64 + 64]
    assert torch.equal(dx[-64:], torch.autograd.grad(out, part, last)[0])


def test_opcheck_passes():
    tensors = _inputs(Case((6, 64), p=0.3))
    leaves = {name: tensors[name].requires_grad_() for name in ("x", "residual", "weight", "bias")}
    _, arguments = _arguments(**leaves, p=0.3, seed=tensors["seed"])
    torch.library.opcheck(torch.ops.fastlm.dropout_add_norm.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break_to_the_same_bits(dynamic):
    tensors = _inputs(Case((16, 256), p=0.3))
    x, residual, weight, bias = (tensors[k] for k in ("x", "residual", "weight", "bias"))
    call = lambda x, seed: op(x * 2, residual, weight, bias, p=0.3, seed=seed)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for value in (1, 2):
        seed = torch.tensor(value, device="cuda")
        assert all(torch.equal(a, b) for a, b in zip(compiled(x, seed), call(x, seed), strict=True))


def test_autocast_gives_its_dtype_and_keeps_the_residual():
    tensors = _inputs(Case((16, 256), p=0.3))
    with torch.autocast("cuda", BF16):
        y, z = op(tensors["x"].to(BF16), tensors["residual"], tensors["weight"], tensors["bias"], p=0.3, seed=1)
    assert (y.dtype, z.dtype) == (BF16, F32)
    plain, _ = op(tensors["x"].to(BF16).float(), tensors["residual"], tensors["weight"], tensors["bias"], p=0.3, seed=1)
    assert torch.equal(y, plain.to(BF16))


def test_forward_and_backward_may_run_on_different_backends(backend):
    tensors = _inputs(Case((64, 1024), p=0.3))
    grads = []
    for forward, backward in ((backend, backend), (backend, "reference"), ("reference", backend)):
        x = tensors["x"].clone().requires_grad_()
        with fastlm.backend.use(forward):
            y, _ = op(x, tensors["residual"], tensors["weight"], tensors["bias"], p=0.3, seed=tensors["seed"])
        with fastlm.backend.use(backward):
            grads.append(torch.autograd.grad(y, x, tensors["dy"])[0])
    for other in grads[1:]:
        assert torch.equal(other == 0, grads[0] == 0)
        assert torch.allclose(other, grads[0], rtol=1e-4, atol=1e-5)
