"""rotary: the same rotation on every backend, forward and backward, by the rule of accuracy.py."""

from __future__ import annotations

import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch, violation
from fastlm.reference import rotary as reference
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(
    not fastlm.backend._support("rotary", "cpu", "forward", torch.device("cpu"),
                                (torch.ones(1, 1, 1, 2), torch.ones(1, 1), torch.ones(1, 1), None, False, False)).ok,
    reason="no compiled core")), pytest.param("triton", marks=pytest.mark.interpreter)]  # fmt: skip
op = fastlm.ops.rotary


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


def tables(positions: int, half: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), rate)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def compose(x, cos, sin, positions, interleaved, inverse=False):
    """What models write: rotate_half over tables spread to the head size, in float32 at least."""
    place = torch.arange(x.shape[2]) if positions is None else positions
    if place.dim() < 2 and positions is not None:
        place = place.reshape(-1, 1) + torch.arange(x.shape[2])
    spread = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat((t, t), -1))
    wide = torch.promote_types(x.dtype, F32)
    c, s = (spread(t[place].to(wide)) for t in (cos, sin))
    if place.dim() == 2:
        c, s = c.unsqueeze(1), s.unsqueeze(1)
    turned = 2 * cos.shape[1]
    y = x[..., :turned].to(wide)
    if interleaved:
        half = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    else:
        first, second = y.chunk(2, -1)
        half = torch.cat((-second, first), -1)
    y = y * c + half * (-s if inverse else s)
    return torch.cat((y.to(x.dtype), x[..., turned:]), -1)


def places(kind, batch, length, generator):
    if kind == "none":
        return None
    shape = {"scalar": (), "batch": (batch,), "each": (batch, length)}[kind]
    return torch.randint(0, 50, shape, generator=generator)


def draw(shape, half, dtype, kind, interleaved, generator, make=lambda x: x, function=None):
    x = torch.randn(shape, generator=generator)
    cos, sin = tables(50 + shape[2], half)
    positions = places(kind, shape[0], shape[2], generator)
    dy = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for run, wide in ((function or op, dtype), (None, dtype), (None, torch.float64)):
        leaf = make(x.to(dtype).to(wide)).clone(memory_format=torch.preserve_format).requires_grad_()
        if run is None:
            y = compose(leaf, cos.to(torch.promote_types(wide, F32)), sin.to(torch.promote_types(wide, F32)), positions,
                        interleaved)  # fmt: skip
        else:
            y = run(leaf, cos, sin, positions=positions, interleaved=interleaved)
        y.backward(dy.to(wide))
        results.append((y.detach(), leaf.grad))
    return {"y": Result(*(r[0] for r in results)), "dx": Result(*(r[1] for r in results))}


@pytest.mark.grid(fast=28)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("shape", "half", "kind"),
    [((2, 3, 17, 64), 32, "none"), ((2, 3, 17, 40), 9, "each"), ((3, 1, 5, 130), 65, "batch"),
     ((1, 64, 1, 8), 4, "scalar"), ((2, 2, 9, 96), 24, "batch")],
)  # fmt: skip
def test_as_exact_as_torch(backend, shape, half, kind, dtype, interleaved):
    assert_as_exact_as_torch(lambda g: draw(shape, half, dtype, kind, interleaved, g))


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_change_no_bit_and_are_kept(backend, interleaved):
    x = torch.randn(2, 7, 4, 40)
    cos, sin = tables(7, 16)
    expected = op(x.transpose(1, 2).contiguous(), cos, sin, interleaved=interleaved)
    views = [
        x.transpose(1, 2),
        torch.stack((x, x), -1)[..., 0].transpose(1, 2),
        x.movedim(-1, 0).contiguous().movedim(0, -1).transpose(1, 2),
    ]
    for view in views:
        y = op(view, cos, sin, interleaved=interleaved)
        assert torch.equal(y, expected)
        assert y.stride() == torch.empty_like(view).stride()
        back = torch.autograd.grad(op(leaf := view.detach().requires_grad_(), cos, sin).sum(), leaf)[0]
        assert torch.equal(back, op(torch.ones_like(expected), cos, sin, inverse=True))
    row = torch.randn(40).expand(2, 4, 7, 40)
    assert torch.equal(op(row, cos, sin), op(row.contiguous(), cos, sin))


def test_packed_sequences_and_inverse(backend):
    x = torch.randn(11, 3, 32)
    cos, sin = tables(20, 16)
    places = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4])
    y = op(x, cos, sin, positions=places)
    assert y.shape == x.shape
    assert torch.equal(y[4:6], op(x[4:6], cos, sin))
    assert torch.equal(
        op(x, cos, sin, positions=torch.tensor(3))[0], op(x[:1], cos, sin, positions=torch.tensor([3]))[0]
    )
    torch.testing.assert_close(op(y, cos, sin, positions=places, inverse=True), x)


def test_a_cache_continues_where_the_text_ended(backend):
    x = torch.randn(2, 3, 9, 16)
    cos, sin = tables(30, 8)
    whole = op(x, cos, sin)
    assert torch.equal(op(x[:, :, 4:], cos, sin, positions=torch.tensor(4)), whole[:, :, 4:])
    ends = torch.tensor([5, 7], dtype=torch.int32)
    rows = torch.stack([x[i, :, e] for i, e in enumerate(ends)]).unsqueeze(2)
    expected = torch.stack([whole[i, :, e] for i, e in enumerate(ends)]).unsqueeze(2)
    assert torch.equal(op(rows, cos, sin, positions=ends), expected)


def test_kernels_keep_positions_inside_the_table():
    """On a GPU nothing is checked; the kernels clamp, as the reference does."""
    x, (cos, sin) = torch.randn(1, 2, 3, 8), tables(5, 4)
    far = torch.tensor([[-7, 2, 2**40]])
    expected = reference.forward(x, cos, sin, torch.tensor([[0, 2, 4]]), False, False)
    assert torch.equal(reference.forward(x, cos, sin, far, False, False), expected)
    if not fastlm._native.missing():
        from fastlm.cpu import rotary as cpu

        torch.testing.assert_close(cpu.forward(x, cos, sin, far, False, False), expected)


@pytest.mark.interpreter
def test_triton_keeps_positions_inside_the_table():
    kernels = pytest.importorskip("fastlm.kernels.rotary")
    x, (cos, sin) = torch.randn(1, 2, 3, 8), tables(5, 4)
    far = torch.tensor([[-7, 2, 2**40]])
    expected = reference.forward(x, cos, sin, torch.tensor([[0, 2, 4]]), False, False)
    torch.testing.assert_close(kernels.forward(x, cos, sin, far, False, False), expected)


def test_threads_change_no_bit():
    x, (cos, sin) = torch.randn(2, 4, 64, 128), tables(64, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(op(x, cos, sin))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_empty_and_float64():
    cos, sin = tables(6, 4)
    assert op(torch.empty(0, 2, 3, 8), cos, sin).shape == (0, 2, 3, 8)
    assert op(torch.empty(2, 2, 0, 8), cos, sin).shape == (2, 2, 0, 8)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    assert op(x, cos, sin).dtype == torch.float64
    wide = [t.double() for t in (cos, sin)]
    place = torch.tensor([2])
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op(x, *wide, positions=place), leaf)
    assert torch.autograd.gradcheck(lambda x: op(x, *wide, positions=place, interleaved=True), leaf)
    y = op(leaf, *wide)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(torch.autograd.grad(y.square().sum(), leaf, create_graph=True)[0].sum(), leaf)


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck_and_compile(interleaved):
    torch._dynamo.reset()
    x = torch.randn(2, 5, 3, 16).transpose(1, 2).requires_grad_()
    cos, sin = tables(40, 6)
    for positions in (None, torch.tensor(3), torch.tensor([1, 2]), torch.arange(10).view(2, 5)):
        torch.library.opcheck(torch.ops.fastlm.rotary.default, (x, cos, sin, positions, interleaved, False))
    compiled = torch.compile(
        lambda x, p: op(x * 2, cos, sin, positions=p, interleaved=interleaved), fullgraph=True, backend="aot_eager"
    )
    for length in (5, 6, 7):
        for place in (1, 2):
            x = torch.randn(2, 3, length, 16)
            p = torch.tensor(place)
            assert torch.equal(compiled(x, p), op(x * 2, cos, sin, positions=p, interleaved=interleaved))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.ones(3, 8)), ValueError, r"x has shape \[3, 8\]; it must be \[B, H, L, D\]"),
        (dict(x=torch.ones(1, 2, 3, 8, dtype=torch.int64)), TypeError, "x is int64"),
        (dict(cos=torch.ones(4, 5), sin=torch.ones(4, 5)), ValueError, r"cos has shape \[4, 5\].*head size, 8"),
        (dict(cos=torch.ones(2, 4), sin=torch.ones(2, 4)), ValueError, r"cos has 2 rows .* x has 3 positions"),
        (dict(sin=torch.ones(4, 3)), ValueError, r"sin has shape \[4, 3\]; it must be \[4, 4\]"),
        (dict(cos=torch.ones(4, 4, dtype=BF16)), TypeError, "cos is bfloat16"),
        (dict(cos=torch.ones(4, 4).requires_grad_()), ValueError, "cos requires a gradient"),
        (dict(positions=torch.ones(1)), TypeError, "positions is float32"),
        (dict(positions=torch.zeros(2, dtype=torch.int64)), ValueError, r"positions has shape \[2\]; it must be \[\], \[1\]"),
        (dict(positions=torch.tensor(2)), ValueError, "positions reach from 2 to 4; each must be between 0 and 3"),
        (dict(positions=torch.tensor([[0, -1, 2]])), ValueError, "positions reach from -1 to 2"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    given = dict(x=torch.ones(1, 2, 3, 8), cos=torch.ones(4, 4), sin=torch.ones(4, 4)) | change
    with pytest.raises(error, match=message):
        op(given.pop("x"), given.pop("cos"), given.pop("sin"), **given)


def test_the_suite_fails_for_wrong_kernels():
    def wrong(change):
        def function(x, cos, sin, positions=None, interleaved=False):
            return change(x, cos, sin, positions, interleaved)

        generator = torch.Generator().manual_seed(0)
        results = draw((2, 3, 17, 64), 24, F32, "batch", False, generator, function=function)
        return [violation([r]) is not None for r in results.values()]

    good = lambda x, c, s, p, i: op(x, c, s, positions=p, interleaved=i)
    assert wrong(good) == [False, False]
    assert all(wrong(lambda x, c, s, p, i: op(x, c, s, positions=p, interleaved=not i)))
    assert all(wrong(lambda x, c, s, p, i: op(x, c, s, positions=p + 1, interleaved=i)))
    assert all(wrong(lambda x, c, s, p, i: op(x, c, s, positions=p, interleaved=i, inverse=True)))
    assert all(wrong(lambda x, c, s, p, i: op(x, c, s, interleaved=i)))

    class NotTurnedBack(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, c, s, p):
            ctx.save_for_backward(c, s, p)
            return op(x, c, s, positions=p)

        @staticmethod
        def backward(ctx, dy):
            c, s, p = ctx.saved_tensors
            return op(dy, c, s, positions=p), None, None, None

    assert wrong(lambda x, c, s, p, i: NotTurnedBack.apply(x, c, s, p)) == [False, True]
