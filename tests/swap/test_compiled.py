"""torch.compile(model, backend="fastlm"): fused across blocks, the same results."""

from __future__ import annotations

import fastlm
import pytest
import torch
from fastlm.swap import compiled
from test_swap_blocks import B, C, L, PreNorm
from torch import nn


class Stack(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.drop, self.blocks, self.norm = nn.Dropout(p), nn.ModuleList(PreNorm(p) for _ in range(2)), nn.LayerNorm(C)

    def forward(self, x):
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@pytest.mark.parametrize(("p", "across"), [(0.2, 3), (0.0, 2)])
def test_chains_across_blocks_become_one_op(p, across):
    """5 norms, 5 ops: two chains lie within blocks, two across, and one starts with the embedding's dropout, if any."""
    torch.manual_seed(0)
    model = Stack(p)
    fastlm.swap(model)
    x = torch.randn(B, L, C)
    graphs = []

    def backend(gm, inputs):
        before = sum(compiled._is_op(n) for n in gm.graph.nodes)
        fused = compiled.fuse(gm)
        graphs.append((before, fused, sum(compiled._is_op(n) for n in gm.graph.nodes)))
        return gm

    torch._dynamo.reset()
    results = []
    for module in (model, torch.compile(model, backend=backend, fullgraph=True)):
        fastlm.rng.set(model, 1, 2, list(range(B)))
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    assert len(graphs) == 1
    assert graphs[0][2] == 5
    assert graphs[0][1] == across
    for a, b in zip(*results):
        assert torch.equal(a, b)


def _doubled(z):
    z.mul_(2)


def _put(z):
    z[0] = 1.0


@pytest.mark.parametrize(("change", "fused"), [(_doubled, 0), (_put, 0), (lambda z: None, 1)])
def test_a_norm_stays_behind_changes_in_place(change, fused):
    norm = nn.LayerNorm(C)
    fastlm.swap(norm)
    counts = []

    def chain(x, r):
        z = r + x
        change(z)
        return norm(z), z

    def backend(gm, inputs):
        counts.append(compiled.fuse(gm))
        return gm

    torch._dynamo.reset()
    x, r = torch.randn(B, L, C), torch.randn(B, L, C)
    for ours, theirs in zip(torch.compile(chain, backend=backend, fullgraph=True)(x, r), chain(x, r)):
        torch.testing.assert_close(ours, theirs)
    assert counts == [fused]


@pytest.mark.slow
def test_the_backend_is_found_by_name():
    torch._dynamo.reset()
    model = Stack(0.1)
    fastlm.swap(model)
    x = torch.randn(B, L, C)
    fastlm.rng.set(model, 1, 2, list(range(B)))
    eager = model(x)
    fastlm.rng.set(model, 1, 2, list(range(B)))
    torch.testing.assert_close(torch.compile(model, backend="fastlm", fullgraph=True)(x), eager)
