"""fastlm.rng: masks depend on (run seed, step, module, call, sample) and on nothing else."""

from __future__ import annotations

import copy
import pickle

import fastlm
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

C, L, B = 16, 5, 6


class Net(nn.Module):
    """Two dropouts of its own and one that is called twice."""

    def __init__(self, twice: bool = True, checkpointed: bool = False, context=None):
        super().__init__()
        self.first, self.last = nn.Dropout(0.4), fastlm.nn.DropoutAddNorm(C, p=0.3)
        self.shared = nn.Sequential(nn.Linear(C, C), nn.Dropout(0.5))
        self.twice, self.checkpointed, self.context = twice, checkpointed, context

    def branch(self, x):
        if not self.checkpointed:
            return self.shared(x)
        extra = {"context_fn": self.context} if self.context else {}
        return checkpoint(self.shared, x, use_reentrant=False, **extra)

    def forward(self, x):
        x = self.branch(self.first(x))
        if self.twice:
            x = self.branch(x)
        return self.last(x, x)[0]


def swapped(**kwargs) -> Net:
    torch.manual_seed(1)
    net = Net(**kwargs)
    fastlm.swap(net)
    return net


def masks(net: nn.Module, ids, seed=7, step=3, x=None) -> torch.Tensor:
    fastlm.rng.set(net, seed, step, ids)
    return net(torch.ones(len(ids), L, C) if x is None else x)


def test_a_batch_in_pieces_draws_the_masks_of_the_whole():
    net = swapped()
    whole = masks(net, range(B))
    for pieces in ([[0, 1, 2], [3, 4, 5]], [[5], [0, 3], [4, 2, 1]]):
        for piece in pieces:
            torch.testing.assert_close(masks(net, piece), whole[piece], rtol=0, atol=1e-6)


def test_every_part_of_the_key_changes_the_mask():
    drop = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    fastlm.swap(drop)
    ones = torch.ones(B, L, 64)

    def mask(seed=7, step=3, ids=range(B), path=0):
        fastlm.rng.set(drop, seed, step, list(ids))
        return drop[path](ones) != 0

    base = mask()
    assert torch.equal(base, mask())
    for other in (mask(seed=8), mask(step=4), mask(ids=range(1, B + 1)), mask(path=1)):
        assert 0.4 < (base == other).float().mean() < 0.6
    drop[0](ones)
    fastlm.rng.set(drop, 7, 3, list(range(B)))
    first, second = drop[0](ones) != 0, drop[0](ones) != 0
    assert torch.equal(first, base)
    assert 0.4 < (first == second).float().mean() < 0.6  # the second call within a forward draws anew
    assert 0.4 < (base[0] == base[1]).float().mean() < 0.6  # samples differ
    assert 0.4 < (base[0, 0] == base[0, 1]).float().mean() < 0.6  # rows differ


def test_flattened_and_positions_first_layouts_draw_the_same_rows():
    drop = nn.Dropout(0.5)
    model = nn.Sequential(drop)
    fastlm.swap(model)
    ids, x = [4, 1, 7], torch.ones(3, L, C)
    whole = masks(model, ids, x=x)
    assert torch.equal(masks(model, ids, x=x.view(-1, C)).view(3, L, C), whole)
    fastlm.rng.set(model, 7, 3, ids, batch_dim=1)
    assert torch.equal(model(torch.ones(L, 3, C)).transpose(0, 1), whole)


def test_without_set_the_default_generator_governs():
    net = swapped()
    x = torch.ones(2, L, C)
    torch.manual_seed(5)
    a = net(x)
    torch.manual_seed(5)
    assert torch.equal(a, net(x))
    assert not torch.equal(a, net(x))
    masks(net, [0, 1])
    fastlm.rng.unset(net)
    torch.manual_seed(5)
    assert torch.equal(a, net(x))


def test_state_dict_parameters_and_buffers_are_untouched():
    net = swapped()
    before = list(net.state_dict()), [n for n, _ in net.named_buffers()]
    masks(net, range(B))
    assert (list(net.state_dict()), [n for n, _ in net.named_buffers()]) == before


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_carry_their_own_seeds(clone):
    net = swapped()
    whole = masks(net, range(B))
    fastlm.rng.set(net, 7, 3, list(range(B)))
    other = clone(net)
    fastlm.rng.set(net, 1, 1, [9])
    x = torch.ones(B, L, C)
    assert torch.equal(other(x), whole)
    assert torch.equal(masks(other, range(B)), whole)
    assert net.first._fastlm_places[0].state.tensor.data_ptr() != other.first._fastlm_places[0].state.tensor.data_ptr()


def test_the_tensor_is_filled_in_place_and_only_one():
    net = swapped()
    masks(net, range(B))
    places = [p for m in net.modules() for p in getattr(m, "_fastlm_places", None) or ()]
    address = places[0].state.tensor.data_ptr()
    masks(net, range(3, 3 + B), step=9)
    masks(net, range(2), step=10)
    assert {p.seed.untyped_storage().data_ptr() for p in places} == {address}
    assert len(places) == 3


def test_set_before_the_backward_of_an_earlier_forward_changes_nothing():
    net = swapped()
    x = torch.randn(2, L, C)
    grads = []
    for interfere in (False, True):
        net.zero_grad()
        out = masks(net, [0, 1], x=x)
        if interfere:
            masks(net, [5, 6])
        out.sum().backward()
        grads.append([p.grad.clone() for p in net.shared.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("reentrant", [False, True])
def test_plain_checkpointing_draws_the_same_masks(reentrant):
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        layer = nn.Sequential(nn.Linear(C, C), nn.Dropout(0.5), nn.Linear(C, C))
        fastlm.swap(layer)
        x = torch.randn(B, L, C, requires_grad=True)
        for step in range(2):
            fastlm.rng.set(layer, 7, step, list(range(B)))
            y = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
            y.square().sum().backward()
        results.append([x.grad, layer[0].weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_checkpointing_a_module_called_twice_raises_or_is_right():
    x = torch.randn(B, L, C)
    expected = swapped()
    masks(expected, range(B), x=x).square().sum().backward()
    plain = swapped(checkpointed=True)
    out = masks(plain, range(B), x=x).square().sum()
    with pytest.raises(RuntimeError, match=r"called 2 times since rng.set.*checkpoint_context"):
        out.backward()
    told = swapped(checkpointed=True)
    told.context = fastlm.rng.checkpoint_context(told)
    out = masks(told, range(B), x=x).square().sum()
    masks(told, [3])  # as a pipeline would, before the backward
    out.backward()
    for a, b in zip(expected.parameters(), told.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_compiles_whole_once_and_draws_the_eager_masks():
    net = swapped()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for step in range(4):
        eager = masks(net, range(step, step + B), step=step)
        assert torch.equal(masks(compiled, range(step, step + B), step=step), eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiles_checkpointed_regions():
    x = torch.randn(B, L, C)
    expected = swapped()
    masks(expected, range(B), x=x).square().sum().backward()
    net = swapped(checkpointed=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    masks(compiled, range(B), x=x).square().sum().backward()
    for a, b in zip(expected.parameters(), net.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_path_ignores_wrappers():
    net = swapped()
    whole = masks(net, range(B))
    inner = nn.Module()
    inner._orig_mod = net
    assert torch.equal(masks(net, range(B)), whole)
    fastlm.rng.set(inner, 7, 3, list(range(B)))
    assert torch.equal(net(torch.ones(B, L, C)), whole)


def test_a_model_without_dropout_has_nothing_to_set():
    assert fastlm.rng.set(nn.Linear(2, 2), 0, 0, [0]) == 0


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1.5, 0, [0]), TypeError, "run_seed is a float"),
        ((0, None, [0]), TypeError, "step is a NoneType"),
        ((0, 0, torch.zeros(2)), TypeError, "sample_ids is torch.float32"),
        ((0, 0, []), (TypeError, ValueError), "sample_ids"),
        ((0, 0, [[0]]), ValueError, r"shape \[1, 1\]"),
    ],
)
def test_bad_input_is_named(args, error, message):
    with pytest.raises(error, match=message):
        fastlm.rng.set(swapped(), *args)


def test_a_batch_that_set_was_not_told_of_raises():
    net = swapped()
    fastlm.rng.set(net, 0, 0, [0, 1])
    with pytest.raises(ValueError, match=r"shape \[3, 5, 16\].*2 samples"):
        net(torch.ones(3, L, C))


@pytest.mark.parametrize("shape", [(2, 8, 16), (16, 16), (1, 8, 16)], ids=str)
def test_parts_of_the_positions_draw_their_parts_of_the_mask(shape):
    model = nn.Sequential(nn.Dropout(0.5))
    fastlm.swap(model)
    x = torch.ones(shape).reshape(-1, 8, 16)

    def run(x, **part):
        fastlm.rng.set(model, 1, 2, [5, 9], **part)
        return model(x.reshape(-1, 16) if len(shape) == 2 else x).reshape(len(x), -1, 16)

    whole = run(x)
    assert torch.equal(torch.cat([run(x[:, 4 * i : 4 * i + 4], part=(i, 2)) for i in range(2)], 1), whole)
    with pytest.raises(ValueError, match=r"part is \(2, 2\)"):
        fastlm.rng.set(model, 1, 2, [5], part=(2, 2))
