"""The int8 kernels of the CPU: exact over a sweep of shapes and at the extremes, on each instruction set and thread count."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import subprocess
import sys

import fastlm
import pytest
import torch
from fastlm import _native
from fastlm.reference import int8_matmul as reference
from paths import python_path
from torch import Tensor

pytestmark = pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")
op, quantize = fastlm.ops.int8_matmul, fastlm.ops.quantize_int8
EXTREMES = (-128, -127, 127)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with fastlm.backend.use("cpu"):
        yield


def integers(*shape: int, least: int = -128) -> Tensor:
    return torch.randint(least, 128, shape, dtype=torch.int8)


def exact(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).to(torch.int64)  # below 2**53 every sum is exact


def test_exact_for_every_product_of_two_bytes():
    every = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(op(every.view(-1, 1), every.view(1, -1)).long(), exact(every.view(-1, 1), every.view(1, -1)))


@pytest.mark.parametrize("rows", [1, 2, 4, 15, 16, 17])
def test_exact_at_the_extremes(rows):
    for left, right in itertools.product(EXTREMES, EXTREMES):
        for k in (1, 2, 31, 32, 33, 64, 257):
            a, b = torch.full((rows, k), left, dtype=torch.int8), torch.full((5, k), right, dtype=torch.int8)
            assert (op(a, b.t()) == k * left * right).all()
            if rows > 1:  # -128 in one row alone
                a[1] = 127
                assert torch.equal(op(a, b.t()).long(), exact(a, b.t()))


@pytest.mark.parametrize(("left", "right"), [(127, 127), (-127, 127), (-128, -128), (-128, 127), (None, None)])
def test_exact_for_long_sums(left, right):
    for k in (65_793, 100_000, 131_071):
        a = integers(3, k) if left is None else torch.full((3, k), left, dtype=torch.int8)
        b = integers(5, k) if right is None else torch.full((5, k), right, dtype=torch.int8)
        assert torch.equal(op(a, b.t()).long(), exact(a, b.t()))


def check_shapes(shapes: list[tuple[int, int, int]]) -> None:
    for m, n, k in shapes:
        a, b = integers(m, k, least=random.choice([-128, -127])), integers(n, k).t()
        if random.random() < 0.5:
            b = b.contiguous()
        if random.random() < 0.3:
            a = a.t().contiguous().t()
        if random.random() < 0.3:
            a = torch.cat((a.new_zeros(1), a.flatten()))[1:].view(m, k)
        assert torch.equal(op(a, b).long(), exact(a, b)), (m, n, k)


def draw_shapes(count: int) -> list[tuple[int, int, int]]:
    return [(random.randint(0, 130), random.randint(1, 129), random.randint(0, 257)) for _ in range(count)]


def test_exact_over_a_sweep_of_shapes():
    seed = random.randrange(2**32)
    print("seed", seed)
    random.seed(seed)
    check_shapes(draw_shapes(150))


@pytest.mark.slow
def test_exact_over_the_whole_sweep():
    """Every size along each axis, each with random others."""
    shapes = draw_shapes(0)
    for axis, sizes in enumerate((range(131), range(1, 130), range(258))):
        for size in sizes:
            for shape in draw_shapes(3):
                shapes.append(shape[:axis] + (size,) + shape[axis + 1 :])
    check_shapes(shapes)


def digest() -> str:
    """A hash of what must be the same bits on every instruction set."""
    total = hashlib.sha256()

    def take(*tensors: Tensor) -> None:
        for t in tensors:
            total.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())

    generator = torch.Generator().manual_seed(3)
    for m, n, k in ((1, 5, 33), (17, 70, 257), (2, 64, 100), (130, 33, 600), (4, 9, 4097)):
        x = torch.randn(m, k, generator=generator) * 10 ** torch.randn(m, 1, generator=generator)
        weight, bias = torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            seed = torch.tensor(m)
            (a, a_scale), (b, b_scale) = quantize(x.to(dtype)), quantize(weight)
            for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
                take(op(a, b.t(), a_scale, b_scale, bias=bias, out_dtype=out_dtype))
            take(a, a_scale, *quantize(x.to(dtype), dim=0, group=32), *quantize(x.to(dtype), dim=None))
            take(*quantize(x.to(dtype), stochastic=True, seed=seed), *quantize(x.t().to(dtype), dim=0, transpose=True))
            take(op(a - 1, b.t()))  # -128 occurs
    return total.hexdigest()


def test_same_bits_on_every_instruction_set_and_in_the_reference():
    """This process's instruction set, the reference, and every lower instruction set in a process of its own."""
    found = {_native._C.cpu_isa(): digest()}
    with fastlm.backend.use("reference"):
        found["reference"] = digest()
    code = "import test_int8_cpu as t, fastlm; from fastlm import _native\n"
    code += "with fastlm.backend.use('cpu'): print(_native._C.cpu_isa(), t.digest())"
    order = ("portable", "avx2", "avx512")
    for isa in order[: order.index(_native._C.cpu_isa())]:
        environment = os.environ | {"FASTLM_CPU_ISA": isa, "PYTHONPATH": python_path()}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used, value = done.stdout.split()
        assert used == isa
        found[used] = value
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("m", [95, 96, 97, 253, 300])
def test_exact_for_many_rows(m):
    """From 96 rows on AVX2 widens both operands: every tail of rows, columns and blocks along K, -128 on both sides."""
    for n, k in ((1, 1), (15, 17), (16, 512), (33, 513), (130, 1040), (5, 0)):
        a, b = integers(m, k), integers(n, k)
        a[-1], b[-1] = -128, -128
        for left, right in itertools.product((a, a.t().contiguous().t()), (b.t(), b.t().contiguous())):
            assert torch.equal(op(left, right).long(), exact(a, b.t())), (n, k)


@pytest.mark.parametrize("shape", [(1, 700, 4096), (130, 300, 513), (16, 257, 1024)])
def test_threads_change_no_bit(shape):
    m, n, k = shape
    x, (w, s), (g, gs) = torch.randn(m, k), quantize(torch.randn(n, k)), quantize(torch.randn(n, k), group=64)
    a, sa = quantize(x)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((*quantize(x), *quantize(x, dim=0), op(a, w.t(), sa, s), op(x, w.t(), b_scale=s),
                            op(x, g.t(), b_scale=gs.t())))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


@pytest.mark.parametrize("group", [None, 32])
def test_weight_only_rows_are_the_same_bits_alone_and_together(group):
    """The product of a row depends on no other row, nor on how the weight lies: few rows take another path than many."""
    (w, s), x = quantize(torch.randn(67, 1500), group=group), torch.randn(200, 1500)
    b, scale = w.t(), s.t() if group else s
    whole = op(x, b, b_scale=scale)
    for rows in (1, 2, 3, 16, 100):
        for same in (b, b.contiguous(), w.repeat_interleave(2, 1)[:, ::2].t()):
            torch.testing.assert_close(op(x[:rows], same, b_scale=scale), whole[:rows], rtol=0, atol=0)


def test_the_tests_catch_a_wrong_product():
    """What saturates at 16 bits, or skips the last bytes of a row, is not what the sweep expects."""
    a, b = torch.full((2, 64), 127, dtype=torch.int8), torch.full((64, 3), 127, dtype=torch.int8)
    pairs = (a.view(2, 32, 2, 1).int() * b.view(32, 2, 3).int()).sum(2).clamp(-32768, 32767).sum(1)
    assert torch.equal(pairs.long(), exact(a, b))  # one pair of +-127 fits
    a[:] = b[:] = -128
    pairs = (a.view(2, 32, 2, 1).int() * b.view(32, 2, 3).int()).sum(2).clamp(-32768, 32767).sum(1)
    assert not torch.equal(pairs.long(), exact(a, b))
    whole = reference.forward(a, b, None, None, None, "none", torch.int32)
    assert not torch.equal(reference.forward(a[:, :63], b[:63], None, None, None, "none", torch.int32), whole)
