"""quantize_int8 on the backends that run here: bits, extremes, layouts, tracing, bad input."""

from __future__ import annotations

import fastlm
import numpy as np
import pytest
import torch
from fastlm import _native
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")),
    pytest.param("triton", marks=[pytest.mark.interpreter, pytest.mark.slow]),  # quickly in tests/kernels
]
op = fastlm.ops.quantize_int8


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


def by_hand(x: Tensor, dim: int | None, group: int | None) -> tuple[Tensor, Tensor]:
    """The definition in numpy, one line at a time: the oracle, independent of reference/quantize_int8.py."""
    values = x.float().numpy()
    if dim is None:
        lines, shape = values.reshape(1, -1), values.shape
    else:
        moved = np.moveaxis(values, dim, -1)
        lines, shape = moved.reshape(-1, moved.shape[-1]), moved.shape
    q, scales = np.zeros(lines.shape, np.int8), []
    for i, line in enumerate(lines):
        step = group or len(line)
        for begin in range(0, len(line), step):
            part = line[begin : begin + step]
            most = np.float32(np.abs(part).max())
            scale = most / np.float32(127)
            if not np.isfinite(most):
                scale = np.float32("nan")
            elif scale < np.float32(2.0**-126):
                scale = np.float32(0)
            else:
                q[i, begin : begin + step] = np.clip(np.rint(part / scale), -127, 127)
            scales.append(scale)
    q = torch.from_numpy(q.reshape(shape))
    found = torch.from_numpy(np.array(scales, np.float32))
    if dim is None:
        return q, found.reshape(())
    found = found.reshape(*shape[:-1], -1)
    return q.movedim(-1, dim), found.movedim(-1, dim) if group else found.squeeze(-1)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; NaN as NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize(
    ("shape", "dim"), [((37, 300), -1), ((130, 33), 0), ((3, 5, 97), 1), ((7,), 0), ((2, 3, 4, 65), -1)]
)
def test_the_definition_bit_for_bit(backend, shape, dim, group, dtype):
    x = (torch.randn(shape) * 10 ** torch.randn(shape)).to(dtype)
    q, scale = op(x, dim=dim, group=group)
    expected = by_hand(x, dim, group)
    assert torch.equal(q, expected[0])
    assert same(scale, expected[1])


def test_one_scale_for_all(backend):
    for shape in ((), (1,), (37, 91), (2, 3, 129)):
        x = torch.randn(shape)
        q, scale = op(x, dim=None)
        expected = by_hand(x, None, None)
        assert torch.equal(q, expected[0])
        assert same(scale, expected[1])


@pytest.mark.parametrize("dim", [-1, 0])
def test_extreme_rows(backend, dim):
    lines = torch.randn(6, 200)
    lines[0] = 0
    lines[1] *= 1e-30
    lines[2] *= 1e30
    lines[3] *= 1e-38  # below the least normal scale
    lines[4, 7] = torch.nan
    lines[5, 9] = -torch.inf
    x = lines if dim else lines.t().contiguous()
    q, scale = op(x, dim=dim)
    expected = by_hand(x, dim, None)
    assert torch.equal(q, expected[0])
    assert same(scale, expected[1])
    assert scale[0] == 0
    assert scale[3] == 0
    assert scale[4:].isnan().all()
    most = q.abs().amax(dim)
    assert most.tolist() == [0, 127, 127, 0, 0, 0]


def test_extreme_tensors(backend):
    for value, most in ((0.0, 0), (1e-30, 127), (1e30, 127), (1e-38, 0), (torch.inf, 0), (torch.nan, 0)):
        x = torch.full((3, 70), value)
        x[1] /= 2
        q, scale = op(x, dim=None)
        expected = by_hand(x, None, None)
        assert torch.equal(q, expected[0])
        assert same(scale, expected[1])
        assert q.abs().max() == most


def test_ties_go_to_even(backend):
    halves = torch.arange(-126.5, 127.5)
    x = torch.cat((halves, torch.tensor([127.0]))).unsqueeze(0)
    q, scale = op(x)
    assert scale.item() == 1
    assert torch.equal(q[0, :-1].float(), halves.round())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strides_change_no_bit(backend, dtype):
    x = torch.randn(19, 45).to(dtype)
    for dim in (-1, 0):
        q, scale = op(x, dim=dim)
        views = [x.t().contiguous().t(), torch.stack((x, x), -1)[..., 0], torch.cat((x, x), 1)[:, :45],
                 torch.cat((x.flatten()[:1], x.flatten()))[1:].view(19, 45)]  # fmt: skip
        for view in views:
            found, other = op(view, dim=dim)
            assert torch.equal(found, q)
            assert torch.equal(other, scale)
            assert found.stride() == torch.empty_like(view).stride()
        turned, same_scale = op(x, dim=dim, transpose=True)
        assert torch.equal(turned, q.t())
        assert turned.is_contiguous()
        assert torch.equal(same_scale, scale)
        for group in (32, 64):
            assert torch.equal(op(x.t(), dim=-1 - dim, group=group)[0].t(), op(x, dim=dim, group=group)[0])
    row = torch.randn(45).to(dtype).expand(19, 45)
    assert torch.equal(op(row)[0], op(row.contiguous())[0])


def test_empty(backend):
    for shape, dim, expected in (((0, 5), -1, (0,)), ((5, 0), -1, (5,)), ((0, 5), 0, (5,)), ((0,), None, ())):
        q, scale = op(torch.empty(shape), dim=dim)
        assert q.shape == shape
        assert scale.shape == expected
        assert not scale.any()
    assert op(torch.empty(5, 0), group=32)[1].shape == (5, 0)
    assert op(torch.empty(0, 5), transpose=True)[0].shape == (5, 0)


def test_stochastic_rounding_has_the_mean_of_x_and_depends_on_seed_and_place(backend):
    x = torch.rand(200, 257) * 2 - 1
    x[:, 0] = 127 / 16  # one scale for all rows
    q, scale = op(x, stochastic=True, seed=5)
    assert torch.equal(q, op(x, stochastic=True, seed=torch.tensor(5))[0])
    assert not torch.equal(q, op(x, stochastic=True, seed=6)[0])
    assert torch.equal(q[:11], op(x[:11], stochastic=True, seed=5)[0])
    assert torch.equal(q, op(x.t(), dim=0, stochastic=True, seed=5)[0].t())
    ratio = x / scale.unsqueeze(1)
    assert ((q - ratio).abs() < 1).all()
    seeds = 36 if backend == "triton" else 400
    many = torch.stack([op(x[:4], stochastic=True, seed=s)[0].float() for s in range(seeds)])
    assert (many.mean(0) - ratio[:4]).abs().max() < 6 * 0.5 / seeds**0.5
    assert abs(float((q - ratio).mean())) < 6 * 0.41 / ratio.numel() ** 0.5
    with torch.random.fork_rng():
        torch.manual_seed(3)
        a = op(x, stochastic=True)[0]
        torch.manual_seed(3)
        assert torch.equal(a, op(x, stochastic=True)[0])


@pytest.mark.parametrize("backend", BACKENDS[:2], indirect=True)
def test_opcheck_and_compile(backend):
    torch._dynamo.reset()
    x = torch.randn(5, 70).t()
    seed = torch.tensor(3)
    for args in [(x, -1, 0, None, False, False), (x, 0, 32, seed, True, True), (x, None, 0, None, False, False)]:
        torch.library.opcheck(torch.ops.fastlm.quantize_int8.default, args)
    torch.library.opcheck(
        torch.ops.fastlm.quantize_int8.default, (x.clone().requires_grad_(), -1, 64, None, False, False)
    )
    compiled = torch.compile(lambda x: op(x * 2, group=32), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 6, 7):
        x = torch.randn(rows, 70)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), op(x * 2, group=32), strict=True))


def test_no_gradient(backend):
    q, scale = op(torch.randn(3, 4, requires_grad=True))
    assert not q.requires_grad
    assert not scale.requires_grad


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (None, {}, TypeError, "x is a NoneType"),
        (torch.ones(3, dtype=torch.int32), {}, TypeError, "x is int32"),
        (torch.ones(3, 4), dict(dim=2), ValueError, "dim is 2; .* from -2 to 1"),
        (torch.ones(()), {}, ValueError, "dim is -1; .* left at None"),
        (torch.ones(3, 4), dict(dim=1.0), TypeError, "dim is a float"),
        (torch.ones(3, 4), dict(group=16), ValueError, "group is 16"),
        (torch.ones(3, 4), dict(group=32.0), ValueError, "group is 32.0"),
        (torch.ones(3, 4), dict(group=32, dim=None), ValueError, "group is 32 with dim None"),
        (torch.ones(3), dict(transpose=True), ValueError, r"x has shape \[3\]; with transpose"),
        (torch.ones(3), dict(seed=1), ValueError, "seed was given with stochastic=False"),
        (torch.tensor([1.0, torch.nan, torch.inf]), dict(check=True), ValueError, "x holds 2 of 3 elements"),
    ],
)  # fmt: skip
def test_bad_input_is_named(x, options, error, message):
    with pytest.raises(error, match=message):
        op(x, **options)
