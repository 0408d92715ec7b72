"""masked_adamw_: PyTorch's fused AdamW and then the masks, in one pass."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import fastlm
import pytest
import torch
from accuracy import Result, violation
from fastlm import _native, ops
from torch import Tensor
from torch.optim.adamw import adamw

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")
OPTIONS = {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-8}


@pytest.fixture(params=["reference", pytest.param("cpu", marks=compiled)])
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, step: float = 6.0) -> list[Tensor]:
    """Weight, gradient, moments, steps."""
    w, g, m = (torch.randn(shape).to(dtype) for _ in range(3))
    return [w, g, m, torch.rand(shape).to(dtype), torch.tensor(step)]


def ours(state: list[Tensor], mask: Tensor, betas=(0.9, 0.99), **more) -> list[Tensor]:
    out = [t.clone() for t in state]
    ops.masked_adamw_(*([t] for t in out), [mask], betas=betas, **(OPTIONS | more))
    return out


def theirs(state: list[Tensor], mask: Tensor, betas=(0.9, 0.99), **more) -> list[Tensor]:
    """PyTorch's step, and zeros by hand."""
    w, g, m, v, step = out = [t.clone() for t in state]
    adamw([w], [g], [m], [v], [], [step], fused=True, amsgrad=False, maximize=False, beta1=betas[0], beta2=betas[1],
          **(OPTIONS | more))  # fmt: skip
    for t in (w, m, v):
        t[~ops.mask_to_bool(mask, w.shape[-1])] = 0.0
    return out


def bits(t: Tensor) -> Tensor:
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.4, 0.95)], ids=str)
def test_the_bits_are_those_of_pytorch_and_zeros(backend, dtype, betas):
    if "AVX" not in torch.backends.cpu.get_cpu_capability() and backend == "cpu":
        pytest.skip("PyTorch adds no product fused on this processor")
    for shape in ((64, 48), (37, 96), (5, 2, 16), (160,)):  # whole vectors of PyTorch's
        for more in ({}, {"grad_scale": torch.tensor(3.0)}, {"found_inf": torch.zeros(())}, {"weight_decay": 0.0}):
            state, keep = draw(shape, dtype), torch.rand(shape) < 0.5
            state[1][..., 0] = 0.0
            state[3][..., 0] = 0.0
            mask = ops.bool_to_mask(keep)
            for a, b in zip(ours(state, mask, betas, **more), theirs(state, mask, betas, **more), strict=True):
                assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes_are_as_exact_as_pytorch(backend, dtype):
    results: list[list[Result]] = [[], [], []]
    for shape in ((33, 61), (7, 3, 5), (1001,), (3, 1)) * 4:
        state, mask = draw(shape, dtype), ops.bool_to_mask(torch.rand(shape) < 0.7)
        with fastlm.backend.use("reference"):
            truth = ours([t.double() for t in state[:4]] + state[4:], mask)
        for i, (a, b, c) in enumerate(zip(ours(state, mask)[:1], theirs(state, mask)[:1], truth[:1], strict=True)):
            results[i].append(Result(a, b, c))
        for i in (2, 3):
            results[i - 1].append(Result(ours(state, mask)[i], theirs(state, mask)[i], truth[i]))
    assert [violation(r) for r in results] == [None] * 3


def test_the_formula_by_hand(backend):
    state, keep = draw((4, 8), step=2.0), torch.rand(4, 8) < 0.5
    w, g, m, v, _ = (t.double() for t in state)
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    w = w * (1 - 3e-4) - 3e-3 * (m / (1 - 0.9**3)) / ((v / (1 - 0.99**3)).sqrt() + 1e-8)
    out = ours(state, ops.bool_to_mask(keep))
    for a, b in zip((out[0], out[2], out[3]), (w, m, v), strict=True):
        assert torch.allclose(a.double(), torch.where(keep, b, 0.0), rtol=1e-5, atol=1e-6)
    assert float(out[4]) == 3.0
    assert torch.equal(out[1], state[1])


def test_nothing_of_a_pruned_weight_gets_through(backend):
    state, keep = draw((6, 40)), torch.rand(6, 40) < 0.5
    for t, bad in zip(state[:4], (-0.0, math.nan, math.inf, math.nan), strict=True):
        t[~keep] = bad
    out = ours(state, ops.bool_to_mask(keep))
    for i in (0, 2, 3):
        assert not bits(out[i])[~keep].any()
        assert bool(out[i][keep].isfinite().all())
    state[1][keep] = math.nan
    assert bool(ours(state, ops.bool_to_mask(keep))[0][keep].isnan().all())


def test_a_step_that_is_left_out_changes_nothing_but_what_the_mask_says(backend):
    state, keep = draw((6, 40)), torch.rand(6, 40) < 0.5
    out = ours(state, ops.bool_to_mask(keep), found_inf=torch.ones(()), grad_scale=torch.full((1,), 2.0))
    assert torch.equal(out[1], state[1])
    assert float(out[4]) == 6.0
    for i in (0, 2, 3):
        assert torch.equal(out[i], torch.where(keep, state[i], 0.0))


def test_strides_several_tensors_and_empty_ones(backend):
    states = [draw((8, 24)), draw((0, 8)), draw((5, 9))]
    states[0][1] = torch.randn(24, 8).T  # a gradient as some matmuls give it
    masks = [ops.bool_to_mask(torch.rand(s[0].shape) < 0.5) for s in states]
    masks[2] = masks[2].T.contiguous().T
    wanted = [ours(s, m) for s, m in zip(states, masks, strict=True)]
    ops.masked_adamw_(*map(list, zip(*states, strict=True)), masks, betas=(0.9, 0.99), **OPTIONS)
    for found, want in zip(states, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    ops.masked_adamw_([], [], [], [], [], [], lr=1.0)


def test_weights_that_the_kernel_does_not_take_are_the_references():
    state, keep = draw((24, 8)), torch.rand(8, 24) < 0.5
    turned = [t.T for t in state[:4]] + state[4:]
    for a, b in zip(ours(turned, ops.bool_to_mask(keep)), theirs(turned, ops.bool_to_mask(keep)), strict=True):
        assert torch.allclose(a, b)


MANY = """
import hashlib, sys, torch
from fastlm import _native, ops
torch.manual_seed(7)
drawn = [torch.randn(500, 403) for _ in range(3)] + [torch.rand(500, 403), torch.tensor(4.0)]
mask = ops.prune_mask(drawn[0], sparsity=0.5)
for threads in map(int, sys.argv[1].split(",")):
    torch.set_num_threads(threads)
    own = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state = [t.to(dtype).clone() for t in drawn[:4]] + [drawn[4].clone()]
        ops.masked_adamw_(*([t] for t in state), [mask], lr=1e-2, weight_decay=0.1)
        for t in state:
            own.update(t.float().numpy().tobytes())
    print(_native._C.cpu_isa(), own.hexdigest())
"""


@compiled
def test_the_same_bits_for_every_thread_count_and_instruction_set():
    found = []
    for isa in ("portable", "avx2", "avx512"):
        env = os.environ | {"FASTLM_CPU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", MANY, "1,2,8"], env=env, capture_output=True, text=True, check=True
        )
        found += [line.split() for line in done.stdout.splitlines()]
    assert len({digest for _, digest in found}) == 1, found
    assert found[0][0] == "portable"


def test_autograd_notices_the_change_and_parameters_stay_leaves(backend):
    weight = torch.nn.Parameter(torch.randn(4, 16))
    x = torch.randn(3, 16, requires_grad=True)
    (x @ weight.T).sum().backward()
    y, version = x @ weight.T, weight._version
    state = [torch.zeros(4, 16), torch.zeros(4, 16), torch.zeros(())]
    mask = ops.prune_mask(weight, sparsity=0.5, magnitude=True)
    ops.masked_adamw_([weight], [weight.grad], *([t] for t in state), [mask], lr=0.1)
    assert weight._version > version
    assert weight.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck():
    state, mask = draw((4, 24)), ops.bool_to_mask(torch.rand(4, 24) < 0.5)
    args = (*([t] for t in state), [mask], 0.1, 0.9, 0.99, 1e-8, 0.1, None, None)
    torch.library.opcheck(torch.ops.fastlm.masked_adamw_, args)


REFUSED = [
    (TypeError, {"grads": torch.ones(4, 8)}, "grads is a Tensor; it must be a list"),
    (ValueError, {"masks": []}, "masks has 0 tensors; it must have 1"),
    (TypeError, {"params": [torch.ones(4, 8, dtype=torch.int32)]}, r"params\[0\] is int32"),
    (TypeError, {"grads": [torch.ones(4, 8).half()]}, r"grads\[0\] is float16"),
    (ValueError, {"exp_avgs": [torch.ones(4, 9)]}, r"exp_avgs\[0\] has shape \[4, 9\]"),
    (TypeError, {"steps": [torch.ones((), dtype=torch.int64)]}, r"steps\[0\] is int64"),
    (ValueError, {"masks": [torch.ones(4, 2, dtype=torch.uint8)]}, r"masks\[0\] has shape \[4, 2\]"),
    (ValueError, {"lr": -1.0}, "lr is -1.0; it must be at least 0"),
    (ValueError, {"betas": (0.9, 1.0)}, "beta2 is 1.0; it must be at least 0 and below 1"),
    (TypeError, {"eps": "1"}, "eps is a str"),
    (ValueError, {"found_inf": torch.zeros(2)}, r"found_inf has shape \[2\]"),
]


@pytest.mark.parametrize(("error", "change", "text"), REFUSED, ids=[r[2] for r in REFUSED])
def test_arguments_are_refused_by_name(error, change, text):
    given = {
        "params": [torch.ones(4, 8)], "grads": [torch.ones(4, 8)], "exp_avgs": [torch.ones(4, 8)],
        "exp_avg_sqs": [torch.ones(4, 8)], "steps": [torch.zeros(())], "masks": [torch.ones(4, 1, dtype=torch.uint8)],
        "lr": 0.1,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        ops.masked_adamw_(**(given | change))
