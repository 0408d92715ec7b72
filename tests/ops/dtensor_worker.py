"""One of the two ranks of test_dtensor.py: the ops on DTensors against the ops on the whole tensors."""

import copy
import os
import sys

import fastlm
import pytest
import torch
import torch.distributed as dist
from accuracy import Result, violation
from fastlm import ops
from test_swap_blocks import C, L, PreNorm
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
mesh, R = init_device_mesh("cpu", (2,)), Replicate()


pooled: dict[str, list[Result]] = {}  # gradients that ranks sum, in an order of their own: judged by the accuracy rule


def check(call, whole, placed, **options):
    """call(**tensors, **options) of DTensors against that of the whole.

    Values and gradients of what is sharded are its bits. Those of what is replicated are pooled by name: against the
    call in float64, two ranks may be off by what one is (tests/accuracy.py).
    """

    def results(tensors):
        leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
        out = call(**leaves, **options)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(5)
        gives = [torch.randn(t.shape).to(t.dtype) for t in out]
        if isinstance(out[0], DTensor):
            gives = [distribute_tensor(g, mesh, t.placements) for g, t in zip(gives, out)]
        grads = torch.autograd.grad(out, list(leaves.values()), gives)
        return out, dict(zip(leaves, grads))

    spread = {n: distribute_tensor(t, mesh, [placed[n]]) for n, t in whole.items()}
    out, grads = results(spread)
    expected, expected_grads = results(whole)
    _, true_grads = results({n: t.double() if t.is_floating_point() else t for n, t in whole.items()})
    first = next(iter(whole))
    for got, want in zip(out, expected):
        assert got.placements == spread[first].placements, got.placements
        assert got.full_tensor().equal(want), call
    for name, want in expected_grads.items():
        if isinstance(placed[name], Shard):
            assert grads[name].placements == spread[name].placements
            assert grads[name].full_tensor().equal(want), name
        else:
            kind = Partial if isinstance(placed[first], Shard) else Replicate
            assert isinstance(grads[name].placements[0], kind), (name, grads[name].placements)
            result = Result(grads[name].full_tensor(), want, true_grads[name])
            pooled.setdefault(f"{kind.__name__} gradient of {name}", []).append(result)


def merged(x):
    """Laid out as a model's projections are, and merged again."""
    h = x.transpose(1, 2)
    return ops.attention(h, h.detach(), h.detach(), causal=True).transpose(1, 2).flatten(-2)


torch.manual_seed(0)
for kind in (Shard(0), Shard(1), R):
    own = dict.fromkeys(("x", "residual", "rowscale", *"qkv"), kind) | dict.fromkeys(
        ("weight", "bias", "layerscale"), R
    )
    for batch in (3, 4, 1):  # uneven shares, and none at all
        x, residual = torch.randn(2, batch, 5, 24).unbind()
        weight, bias, scale = torch.randn(3, 24).unbind()
        two, drop = {"x": x, "weight": weight}, {"p": 0.4, "seed": 7}
        whole = dict(x=x, residual=residual, weight=weight, bias=bias, layerscale=scale)
        check(ops.dropout_add_norm, whole, own, **drop)
        check(ops.dropout_add_norm, two, own, **drop, norm="rms", offset=torch.randperm(batch * 5) * 3)
        check(ops.dropout_add_norm, {"x": x}, own, **drop, norm=None, offset=100)
        check(ops.norm, two, own)
    for shape, heads in (((3, 4, 6, 8), 2), ((4, 2, 5, 16), 2)):
        b, h, length, d = shape
        k, v = torch.randn(2, b, heads, length, d).unbind()
        whole = dict(q=torch.randn(shape), k=k, v=v)
        drop, ids = {"dropout_p": 0.3, "seed": 3}, torch.arange(b) * 5 + 2
        check(ops.attention, whole, own, **drop, causal=True, offset=(ids, 7, None, None))
        check(ops.attention, whole, own, **drop, alibi_slopes=torch.rand(h))
        check(ops.attention, whole, own, alibi_slopes=torch.rand(b, h), bias=torch.rand(b, 1, length, length) > 0.3)
        check(ops.attention, whole, own, seqlens_k=torch.arange(b) + 1, return_lse=True)
        for bias in (torch.randn(b, h, length, length), torch.randn(h, 1, length)):
            check(ops.attention, {**whole, "bias": bias}, own, **drop)
        check(merged, {"x": torch.randn(b, length, h, d)}, {"x": Shard(2) if kind == Shard(1) else kind})
        angle = torch.rand(40, d // 2)
        for positions in (None, torch.tensor(4), ids, torch.randint(40, (b, length))):
            check(ops.rotary, {"x": whole["q"]}, own, cos=angle.cos(), sin=angle.sin(), positions=positions)
    if kind != Shard(0):
        packed = dict(zip("qkv", torch.randn(3, 9, 4, 8).unbind()))
        lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
        check(ops.attention, packed, own, causal=True, cu_seqlens_q=lengths, dropout_p=0.3, seed=3)
        check(ops.rotary, {"x": packed["q"]}, own, cos=torch.ones(9, 4), sin=torch.zeros(9, 4))

broken = {name: why for name, results in pooled.items() if (why := violation(results))}
assert len(pooled) > 8, pooled.keys()
assert not broken, broken
dropped = [Result(r.ours * 0.5, r.torch, r.reference) for r in pooled["Partial gradient of weight"]]
assert violation(dropped), "the comparison must see the sum of one rank alone"

# a seed that nobody gave is one on all ranks, though their generators differ
torch.manual_seed(dist.get_rank())
x = distribute_tensor(torch.ones(6, 32), mesh, [R])
found = ops.dropout_add_norm(x, norm=None, p=0.5).to_local()
both = [torch.empty_like(found) for _ in range(2)]
dist.all_gather(both, found)
assert both[0].equal(both[1])
assert 0 < (found == 0).sum() < found.numel()

# int8 rows and their scales lie as the rows do
x = torch.arange(6 * 32.0).sin().view(6, 32)
for placement in (Shard(0), R):
    found = ops.dropout_add_norm(distribute_tensor(x, mesh, [placement]), p=0.4, seed=7, quantize="int8")
    expected = ops.dropout_add_norm(x, p=0.4, seed=7, quantize="int8")
    assert all(a.placements == (placement,) and a.full_tensor().equal(b) for a, b in zip(found, expected, strict=True))


def refused(message, call, *args, **options):
    with pytest.raises(ValueError, match=message) as found:
        call(*args, **options)
    assert "\n" not in str(found.value)


def spread(shape, placement):
    return distribute_tensor(torch.randn(shape), mesh, [placement])


rows, weight, four = spread((4, 8), Shard(0)), spread((8,), R), (4, 4, 6, 8)
partial = DTensor.from_local(torch.randn(4, 8), mesh, [Partial()], run_check=False)
refused(r"dropout_add_norm: x is placed \(Partial", ops.norm, partial, weight)
refused(r"dropout_add_norm: x is placed \(Shard\(dim=1\),\)", ops.norm, spread((4, 8), Shard(1)), weight)
refused(r"weight is placed \(Shard\(dim=0\),\); it must be a DTensor repl", ops.norm, rows, spread((8,), Shard(0)))
refused("weight is a plain tensor; it must be a DTensor replicated", ops.norm, rows, torch.ones(8))
refused("x is a plain tensor beside DTensors", ops.norm, torch.ones(4, 8), weight)
message = r"residual is placed \(Replicate\(\),\); it must be placed as x"
refused(message, ops.dropout_add_norm, rows, spread((4, 8), R))
for dim in (2, 3):
    bad = spread(four, Shard(dim))
    refused(rf"attention: q is placed \(Shard\(dim={dim}\),\)", ops.attention, bad, bad, bad)
    refused(rf"rotary: x is placed \(Shard\(dim={dim}\),\)", ops.rotary, bad, torch.ones(6, 4), torch.ones(6, 4))
q = spread(four, Shard(0))
refused(r"attention: k is placed \(Replicate\(\),\)", ops.attention, q, spread(four, R), q)
message = r"attention: bias is placed \(Shard\(dim=0\),\)"
refused(message, ops.attention, q, q, q, bias=spread((4, 4, 6, 6), Shard(0)))
one = spread((4, 1, 6, 8), Shard(1))
refused("k has 1 heads .* multiple of the 2 ranks", ops.attention, spread(four, Shard(1)), one, one)

# a swapped model of DTensors, its batch sharded
torch.manual_seed(0)
block = PreNorm()
fastlm.swap(block)
fastlm.rng.set(block, 3, 4, range(4))
x = torch.randn(4, L, C)
expected = block(x)
expected.square().sum().backward()
grads = {n: p.grad for n, p in block.named_parameters()}
true = copy.deepcopy(block).double()
true.zero_grad()
fastlm.rng.set(true, 3, 4, range(4))
truth = true(x.double())
truth.square().sum().backward()
true_grads = {n: p.grad for n, p in true.named_parameters()}
for name, p in list(block.named_parameters()):
    path, _, field = name.rpartition(".")
    setattr(block.get_submodule(path), field, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [R])))
fastlm.rng.set(block, 3, 4, range(4))
got = block(distribute_tensor(x, mesh, [Shard(0)]))
assert violation([Result(got.full_tensor(), expected, truth)]) is None
got.square().sum().full_tensor().backward()
for name, p in block.named_parameters():
    assert violation([Result(p.grad.full_tensor(), grads[name], true_grads[name])]) is None, name
print("done", flush=True)
# A rank whose peer is gone fails in what it still waits for: each leaves when both have said in the file that they are done.
store = dist.distributed_c10d._get_default_store()
store.set(f"left{sys.argv[2]}", "")
store.wait(["left0", "left1"])
# gloo's threads may abort an interpreter that is taken apart while they give back tensors (PyTorch #179291)
os._exit(0)
