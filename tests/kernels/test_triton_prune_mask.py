"""prune_mask by its Triton kernels under the interpreter: every bit the reference's."""

from __future__ import annotations

import math

import fastlm
import pytest
import torch
from fastlm import ops
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

OPTIONS = [
    {"sparsity": 0.0}, {"sparsity": 0.37}, {"sparsity": 1.0}, {"sparsity": 0.5, "scope": "row"}, {"pattern": "2:4"},
    {"pattern": "4:8"}, {"pattern": "3:5"}, {"pattern": "5:32", "dim": 0}, {"pattern": "row", "sparsity": 0.5},
    {"pattern": "column", "sparsity": 0.5}, {"pattern": "block:3x7", "sparsity": 0.4},
]  # fmt: skip


def draw(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "normal":
        return torch.randn(shape).to(dtype)
    if kind == "equal":
        return torch.full(shape, -1.5, dtype=dtype)
    if kind == "sorted":
        return torch.arange(math.prod(shape)).view(shape).to(dtype)
    return torch.tensor([-math.inf, -2.0, -0.0, 0.0, 1e-40, 1.0, math.inf])[torch.randint(7, shape)].to(dtype)


def both(score: Tensor | list[Tensor], **options) -> None:
    found = []
    for name in ("triton", "reference"):
        with fastlm.backend.use(name):
            masks = ops.prune_mask(score, **options)
        found.append([masks] if isinstance(masks, Tensor) else masks)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "few"])
def test_patterns(options, kind):
    x = draw((6, 21), kind)
    both(x, **options)
    both(x.bfloat16().T, magnitude=True, **options)


@pytest.mark.parametrize("kind", ["equal", "sorted"])
def test_scores_of_one_value_and_in_order(kind):
    both(draw((9, 43), kind), sparsity=0.37)
    both(draw((4, 40), kind), pattern="2:4")


@pytest.mark.parametrize("kind", ["normal", "few"])
def test_transposable(kind):
    both(draw((8, 24), kind), pattern="2:4t")
    both(draw((12, 20), kind).half(), pattern="2:4t", magnitude=True)


@pytest.mark.parametrize("kind", ["normal", "few"])
def test_several_tensors_long_rows_and_programs_of_several_tiles(kind, monkeypatch):
    from fastlm.kernels import prune_mask as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    both([draw((3, 5000), kind), draw((4, 7), kind).half(), draw((0, 3), kind), draw((2, 3, 9), kind).bfloat16()],
         sparsity=0.4, scope="global")  # fmt: skip
    both(draw((2, 9000), kind), sparsity=0.6)
    both(draw((2, 4500), kind), sparsity=0.6, scope="row")


def test_wanda_and_nan():
    x, scale = torch.randn(6, 40), torch.rand(40)
    for options in ({"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"pattern": "2:4"}, {"pattern": "2:4", "dim": 0},
                    {"pattern": "column", "sparsity": 0.5}):  # fmt: skip
        both(x, magnitude=True, scale=scale, **options)
    both([x, x.half()], magnitude=True, scale=[scale, scale], sparsity=0.5, scope="global")
    x[2, 3] = math.nan
    with fastlm.backend.use("triton"), pytest.raises(ValueError, match="score holds 1 NaN"):
        ops.prune_mask(x, sparsity=0.5)


def test_a_nan_is_the_lowest_where_nothing_is_checked(monkeypatch):
    from fastlm.kernels import prune_mask as kernels
    from fastlm.reference import prune_mask as reference

    monkeypatch.setattr(reference, "check_values", lambda tensors: None)
    x = draw((4, 24), "few")
    x[1, 2] = x[3, 20] = math.nan
    for sparsity, pattern, scope in (
        (0.1, "unstructured", "tensor"),
        (0.3, "unstructured", "row"),
        (None, "2:4", "tensor"),
    ):
        args = ([x], [], sparsity, pattern, -1, scope, False, False)
        assert torch.equal(kernels.forward(*args)[0], reference.forward(*args)[0])


@pytest.mark.parametrize("columns", [1, 8, 65, 4100])
def test_uses_of_masks(columns):
    keep, weights = torch.rand(3, columns) < 0.6, [torch.randn(3, columns), torch.randn(columns, 3).bfloat16().T]
    with fastlm.backend.use("triton"):
        mask = ops.bool_to_mask(keep)
        assert torch.equal(ops.bool_to_mask(keep.T.contiguous().T), mask)
        assert int(ops.mask_count(mask)) == int(keep.sum())
        assert torch.equal(ops.mask_to_bool(mask, columns), keep)
        applied = [ops.apply_mask_(w.clone(), mask) for w in weights]
        both_masks = ops.mask_and(mask, ops.bool_to_mask(~keep))
        assert int(ops.mask_count(both_masks)) == 0
    with fastlm.backend.use("reference"):
        assert torch.equal(ops.bool_to_mask(keep), mask)
    for found, weight in zip(applied, weights, strict=True):
        assert torch.equal(found, torch.where(keep, weight, torch.zeros((), dtype=weight.dtype)))
        assert not found[~keep].view(torch.int16).any()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty_tensors(shape):
    with fastlm.backend.use("triton"):
        mask = ops.prune_mask(torch.empty(shape), sparsity=0.5)
        assert mask.shape == (*shape[:-1], -(-shape[-1] // 8))
        assert int(ops.mask_count(mask)) == 0
        ops.apply_mask_(torch.empty(shape), mask)


def test_what_it_does_not_serve_is_said():
    with fastlm.backend.use("triton"):
        with pytest.raises(fastlm.backend.BackendError, match="not float64"):
            ops.prune_mask(torch.ones(2, 2).double(), sparsity=0.5)
        state = [torch.ones(2, 8).double() for _ in range(4)] + [torch.zeros(())]
        with pytest.raises(fastlm.backend.BackendError, match="not float64"):
            ops.masked_adamw_(*([t] for t in state), [torch.zeros(2, 1, dtype=torch.uint8)], lr=0.1)


@pytest.mark.parametrize("kind", ["normal", "few", "equal"])
def test_parts_of_a_tensor_are_counted_and_cut(kind):
    from fastlm.ops.prune_mask_parts import Part, _Selection

    x, scale = draw((9, 43), kind), torch.rand(43) + 0.5
    parts = [Part(x, (9, 43), (0, 0)), Part(x[:5].bfloat16(), (5, 43), (0, 0), (), scale), Part(x[:0], (0, 43), (0, 0))]
    found = {}
    for name in ("triton", "reference"):
        with fastlm.backend.use(name):
            found[name] = [
                mask
                for together in (False, True)
                for sparsity in (0.37, 1.0)
                for mask in _Selection(parts, True, False).run(sparsity, together)
            ]
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
