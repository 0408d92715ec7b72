"""The Triton kernels of quantize_int8 and int8_matmul, interpreted, against the reference: bit for bit where bits are promised.

tests/ops runs its whole suites on them too, as slow tests. What the interpreter cannot show is compiled in test_offline.py.
"""

from __future__ import annotations

import re

import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch
from torch import Tensor

pytest.importorskip("triton")
from fastlm.bench import offline
from fastlm.kernels import int8_matmul as product
from fastlm.kernels import quantize_int8 as quantize
from fastlm.kernels import table
from fastlm.reference import int8_matmul as product_reference
from fastlm.reference import quantize_int8 as quantize_reference

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
SMALL = {"rows": 16, "columns": 16, "depth": 32, "num_warps": 4, "num_stages": 1}


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; NaN as NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def integers(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=I8)


def wild(*shape: int) -> Tensor:
    """Lines of very different sizes: zeros, tiny, huge, and one with an infinity or a NaN each."""
    x = torch.randn(shape) * 10 ** torch.randn(shape)
    lines = x.view(-1, shape[-1])
    lines[0] = 0
    lines[1] *= 1e-30
    lines[2] *= 1e30
    lines[3] *= 1e-38
    lines[4, 0], lines[5, -1] = torch.nan, -torch.inf
    return x


LAYOUTS = {
    "as it is": lambda x: x,
    "columns first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second": lambda x: torch.stack((x, x), -1)[..., 0],
    "unaligned": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
}


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [None, torch.tensor(-7)], ids=["nearest", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_bits_are_the_references(layout, seed):
    x = LAYOUTS[layout](wild(7, 150).to(BF16 if layout == "unaligned" else F32))
    for dim, group in ((-1, 0), (0, 0), (None, 0), (-1, 32), (1, 128), (0, 64)):
        for transpose in (False, True) if dim != 1 else (False,):
            found = quantize.forward(x, dim, group, seed, False, transpose)
            expected = quantize_reference.forward(x, dim, group, seed, False, transpose)
            assert torch.equal(found[0], expected[0])
            assert found[0].stride() == expected[0].stride()
            assert same(found[1], expected[1])


@pytest.mark.interpreter
def test_quantised_bits_of_other_shapes():
    one, seed = {"config": {"columns": 64, "num_warps": 4, "num_stages": 1}}, torch.tensor(3)
    for shape, dim, group in (
        ((), None, 0), ((7,), 0, 0), ((2, 3, 4, 40), 1, 32), ((2, 3, 4, 40), None, 0), ((6, 1), -1, 0), ((5, 0), -1, 32),
        ((0, 5), 0, 0), ((300,), -1, 0),
    ):  # fmt: skip
        x = torch.randn(shape).to(F16)
        for kind in (None, seed):
            expected = quantize_reference.forward(x, dim, group, kind, False, False)
            found = quantize.forward(x, dim, group, kind, False, False)
            assert all(map(same, found, expected))
            if shape == (300,):  # lines that are walked down twice
                with table.pinned(one):
                    assert all(map(same, quantize.forward(x, dim, group, kind, False, False), expected))
    apart = torch.randn(2, 4, 6, 8, 10)[::1, ::2, ::3, ::4]
    assert "copied first" in quantize.serves_forward(apart, -1, 0, None, False, False).why
    apart = apart.permute(3, 1, 2, 0, 4)
    for dim in (-1, 1):
        expected = quantize_reference.forward(apart, dim, 0, None, False, False)
        assert all(map(same, quantize.forward(apart, dim, 0, None, False, False), expected))


def placed(matrix: Tensor, kind: str) -> Tensor:
    """The same values at an offset of one byte: rows, columns, or both apart."""
    if kind == "column":
        return placed(matrix.t(), "row").t()
    rows, columns = matrix.shape
    step = 2 if kind == "both" else 1
    view = matrix.new_zeros(rows * (step * columns + 3) + 1)[1:].view(rows, -1)[:, : step * columns : step]
    return view.copy_(matrix)


@pytest.mark.interpreter
@pytest.mark.parametrize("config", [None, SMALL], ids=["table", "small tiles"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (18, 20, 40), (17, 40, 0)], ids=str)
def test_products_are_the_references(shape, config):
    m, n, k = shape
    a, b, bias = integers(m, k), integers(k, n), torch.randn(n)
    a[:, :1], b[:1] = -128, -128
    scales = torch.rand(m) / 64, torch.rand(n) / 64
    cases = [(None, None, None, torch.int32), (None, None, bias, F32), (*scales, bias.to(BF16), F32), (*scales, None, BF16),
             (scales[0][:1].expand(m), scales[1], bias, F16), (None, scales[1], bias, F32)]  # fmt: skip
    kinds = [("row", "column"), ("row", "row"), ("column", "row"), ("column", "column"), ("both", "both")]
    kinds = kinds if config and k else kinds[:1]
    with table.pinned({"config": config}) if config else table.pinned(table.rules("int8_matmul")[-1]):
        for left, right in kinds:
            x, w = (placed(a, left), placed(b, right)) if k else (a, b)
            for a_scale, b_scale, c, dtype in cases if left == "row" else cases[2:4]:
                expected = product_reference.forward(a, b, a_scale, b_scale, c, "none", dtype)
                found = product.forward(x, w, a_scale, b_scale, c, "none", dtype)
                assert found.is_contiguous()
                assert same(found, expected), (left, right, dtype)


@pytest.mark.interpreter
def test_no_fused_multiply_add_and_every_sum_is_exact():
    a, b, scale = integers(20, 96), integers(96, 40), torch.rand(40)
    acc = a.long() @ b.long()
    y = product.forward(a, b, None, scale, -(acc.float()[0] * scale), "none", F32)
    assert not y[0].any()
    row = torch.full((1, 131_071), -128, dtype=I8)
    with table.pinned({"config": {**SMALL, "depth": 4096}}):
        assert product.forward(row, row.t(), None, None, None, "none", torch.int32).item() == 2**14 * 131_071


functions = {
    "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", functions)
def test_activations_as_exact_as_torch_and_right_far_from_zero(activation):
    function = functions[activation]

    def draw(generator):
        y = torch.randn(4096, generator=generator) * 3
        zeros = torch.zeros(1, 32, dtype=I8), torch.zeros(32, 4096, dtype=I8)
        with table.pinned({"config": {**SMALL, "columns": 4096}}):
            ours = product.forward(*zeros, None, None, y, activation, F32)[0]
        return {"y": Result(ours, function(y), function(y.double()))}

    assert_as_exact_as_torch(draw)
    far = torch.tensor([80, 88.376, 88.72, 88.73, 104, 200, 1e4, 1e19, 1e30, 3e38, torch.inf, 0.0])
    y = torch.cat((far, -far, torch.tensor([torch.nan])))
    zeros = torch.zeros(1, 1, dtype=I8), torch.zeros(1, len(y), dtype=I8)
    found = product.forward(*zeros, None, None, y, activation, F32)[0]
    torch.testing.assert_close(found, function(y.double()).float(), rtol=1e-6, atol=1e-35, equal_nan=True)


def weight_only(rows: int, group: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Result]:
    k, n = 200, 300
    a = torch.randn(rows, k, generator=generator).to(dtype)
    weight, scale = quantize_reference.forward(torch.randn(n, k, generator=generator), -1, group, None, False, False)
    bias, dout = torch.randn(n, generator=generator), torch.randn(rows, n, generator=generator).to(dtype)
    by_column = scale.t() if group else scale
    with fastlm.backend.use("triton"):
        y = fastlm.ops.int8_matmul(a, weight.t(), b_scale=by_column, bias=bias)
        da, _ = product.backward(dout, weight.t(), by_column, dtype, None)
    spread = scale.repeat_interleave(group, 1)[:, :k] if group else scale.unsqueeze(1)
    found = []
    for wide in (F32, torch.float64):
        w = weight.to(wide) * spread.to(wide)
        found.append([a.to(wide) @ w.t() + bias.to(wide), dout.to(wide) @ w])
    theirs = [t.to(dtype) for t in found[0]]
    return {n: Result(*r) for n, *r in zip(("y", "da"), (y, da), theirs, found[1], strict=True)}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("rows", "group", "dtype"),
    [(64, 0, F32), (64, 32, BF16), (64, 128, F16)]
    + [
        pytest.param(r, g, d, marks=pytest.mark.slow)
        for r in (16, 37)
        for g in (0, 32, 64, 128)
        for d in (F32, BF16, F16)
    ],
    ids=str,
)
def test_weight_only_as_exact_as_torch(rows, group, dtype):
    assert_as_exact_as_torch(lambda generator: weight_only(rows, group, dtype, generator))


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("m", [0, 1, 2, 15, 16, 17, 64, 65, 130])
def test_products_of_many_sizes(m):
    for n in (1, 2, 31, 32, 33, 64, 129):
        for k in (0, 1, 31, 64, 65, 128, 257):
            a, b = integers(m, k), integers(n, k).t()
            scales = torch.rand(m), torch.rand(n)
            found = product.forward(a, b, *scales, torch.ones(n), "none", F32)
            assert same(found, product_reference.forward(a, b, *scales, torch.ones(n), "none", F32)), (n, k)


def test_the_compiled_product_has_no_fused_multiply_add():
    """Where one rounds a scaled sum and its bias at once, the bits are another machine's."""
    for arch in (80, 90):
        name = "int8_matmul 16x4096x4096 i8 none: int8_matmul_kernel"
        case = next(c for c in offline.cases() if c.arch == arch and c.name == name)
        _, ptx = offline.compile_case(case)
        assert re.search(r"\bmul(\.rn)?\.f32", ptx)
        assert not re.search(r"\bfma\S*\.f32", ptx)
        assert ".ftz" not in ptx


def test_the_compiled_quantisation_divides_and_keeps_denormals():
    case = next(c for c in offline.cases() if c.arch == 90 and c.name.startswith("quantize_int8 4096 f32:"))
    _, ptx = offline.compile_case(case)
    assert "div.rn.f32" in ptx
    assert ".ftz" not in ptx
    assert "div.full" not in ptx


def test_support_names_what_it_does_not_take():
    wide = torch.zeros(4, 4, dtype=torch.float64)
    assert "float64" in quantize.serves_forward(wide, -1, 0, None, False, False).why
    assert "float64, which a is" in product.serves_forward(wide, integers(4, 4), None, None, None, "none", F32).why
    assert "float64, which bias is" in product.serves_backward(wide.float(), integers(4, 4), None, F32, wide.dtype).why
    slow = product.serves_forward(integers(4, 4), integers(4, 4), None, None, None, "none", F32)
    assert slow.ok
    assert "elements of b lie apart" in slow.why
