"""One problem of attention cut into pieces by ``offset``: data, tensor and context parallel give what one process gives.

Pieces by batch or by heads are the same work, so on the CPU kernels they are the same bits, at any number of pieces.
Pieces by queries or keys cut sums, as ring attention does; they are held to the rule of accuracy.py, through autograd.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch
from attention_cases import BACKENDS, BF16, F32, Case, arguments, compose, inputs, leaves, run, truth, with_gradients
from torch import Tensor

op = fastlm.ops.attention
WHOLE = Case(batch=3, heads=8, kv_heads=4, queries=300, keys=300, causal=True, p=0.2)
FEATURES = [
    WHOLE,
    replace(WHOLE, bias="bhqk", alibi=True, window=(170, -1)),
    replace(WHOLE, mask="bhqk", causal=False, softcap=4.0, queries=90, keys=700),
    replace(WHOLE, queries=1, keys=2100, valid=(2100, 900, 0), p=0.0),  # generation
    replace(WHOLE, queries=3, keys=1100, bias="bhqk", kv_heads=2),
]


def piece(case: Case, tensors: dict[str, Tensor], batches: slice, heads: slice) -> dict[str, Tensor]:
    """The results of some batches and query heads, from a call that sees nothing else."""
    group = case.heads // case.kv_heads
    keys = slice(heads.start // group, heads.stop // group)
    cut = {}
    for name, t in tensors.items():
        if name == "slopes":
            cut[name] = t[heads]
        elif name == "valid":
            cut[name] = t[batches]
        elif name == "seed":
            cut[name] = t
        else:
            cut[name] = t[batches, keys if name in "kv" else heads]
    ids = torch.arange(case.batch)[batches]
    return run(case, cut, offset=(ids, heads.start, None, None))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled core with attention")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_pieces_by_batch_and_heads_are_the_bits_of_the_whole(case, dtype):
    case = replace(case, dtype=dtype)
    tensors = inputs(case, torch.Generator().manual_seed(7))
    group = case.heads // case.kv_heads
    with fastlm.backend.use("cpu"):
        whole = run(case, tensors)
        for batches, heads in itertools.product(
            [slice(0, 1), slice(1, 3)], [slice(0, group), slice(group, case.heads)]
        ):
            keys = slice(heads.start // group, heads.stop // group)
            for name, value in piece(case, tensors, batches, heads).items():
                expected = whole[name][batches, keys if name in ("dk", "dv") else heads]
                assert torch.equal(value, expected), (name, batches, heads)


def merged(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What ring attention makes of the results against each piece of the keys."""
    lse = torch.logsumexp(torch.stack(lses), 0)
    return sum(torch.exp(part - lse)[..., None] * out for out, part in zip(outs, lses, strict=True)), lse


def ring(case: Case, tensors: dict[str, Tensor], rows: list[int], columns: list[int]) -> dict[str, Tensor]:
    """The whole from calls on pieces of the queries and of the keys, whose ends are given; gradients by autograd."""
    t = leaves(tensors)
    options = arguments(case, {**tensors, **t})
    outs, lses = [], []
    for q0, q1 in itertools.pairwise([0, *rows]):
        parts = []
        for k0, k1 in itertools.pairwise([0, *columns]):
            bias = options["bias"]
            if bias is not None:
                bias = bias[:, :, q0:q1] if bias.shape[2] > 1 else bias
                bias = bias[..., k0:k1] if bias.shape[3] > 1 else bias
            valid = None if case.valid is None else (options["seqlens_k"] - k0).clamp(0, k1 - k0)
            parts.append(
                op(
                    t["q"][:, :, q0:q1], t["k"][:, :, k0:k1], t["v"][:, :, k0:k1],
                    **{**options, "bias": bias, "seqlens_k": valid, "offset": (None, 0, q0, k0), "return_lse": True},
                )
            )  # fmt: skip
        out, lse = merged(*map(list, zip(*parts, strict=True)))
        outs.append(out)
        lses.append(lse)
    return with_gradients(torch.cat(outs, 2).to(case.dtype), torch.cat(lses, 2), t, tensors)


RINGS = [
    Case(batch=1, queries=200, keys=200, kv_heads=2, causal="upper_left", p=0.2),
    Case(batch=1, queries=200, keys=200, window=(60, 30), bias="hk"),
    Case(batch=1, queries=200, keys=200, causal="upper_left", alibi=True, softcap=6.0, bias="qk", p=0.1),
    Case(batch=1, queries=200, keys=200, mask="hqk", kv_heads=3),
    Case(batch=1, queries=200, keys=200, causal=True, dtype=BF16),
    Case(queries=200, keys=200, causal=False, valid=(170, 90), p=0.2),
]


@pytest.mark.grid(fast=12)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", RINGS, ids=str)
@pytest.mark.parametrize("ends", [([200], [64, 130, 200]), ([70, 200], [200]), ([50, 100, 150, 200],) * 2], ids=str)
def test_pieces_by_queries_and_keys_give_the_whole(backend, case, ends):
    def draw(generator: torch.Generator) -> dict[str, Result]:
        tensors = inputs(case, generator)
        with fastlm.backend.use(backend):
            ours = ring(case, tensors, *ends)
        measure, real = compose(case, tensors, F32), truth(case, tensors)
        return {name: Result(ours[name], measure[name], real[name]) for name in real}

    assert_as_exact_as_torch(draw, seed=1)
