"""One of the ranks of test_prune_parts.py: masks of shards against those of the whole tensors."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from fastlm import compress, ops
from fastlm.nn import MaskedLinear
from fastlm.ops import Part, prune_mask, prune_mask_parts
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

RANK, WORLD, KIND = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=RANK, world_size=WORLD)


def scores(shape, seed=0):
    """Normal, two-valued, all-equal, sorted, with both zeros and infinities."""
    g = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    few = torch.tensor([-torch.inf, -2.0, -0.0, 0.0, 1e-40, 1.0, torch.inf])
    return {
        "normal": torch.randn(shape, generator=g),
        "two": torch.randint(2, shape, generator=g).float() - 0.5,
        "equal": torch.full(shape, -1.5),
        "sorted": torch.arange(count).view(shape).float(),
        "few": few[torch.randint(7, shape, generator=g)],
    }


def placed(x, mesh, placements):
    return distribute_tensor(x, mesh, placements)


def parts_are_the_whole() -> None:
    """Uneven shards by rows, columns and both, an empty one; per tensor and over a list; by boxes and DTensors."""
    line = init_device_mesh("cpu", (WORLD,))
    meshes = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if WORLD == 4:
        square = init_device_mesh("cpu", (2, 2))
        meshes += [(square, [Shard(0), Shard(1)]), (square, [Shard(1), Shard(0)]), (square, [Replicate(), Shard(0)]),
                   (square, [Shard(0), Shard(0)])]  # fmt: skip
    for mesh, placements in meshes:
        for name, x in scores((7, 43)).items():
            other, tiny = scores((3, 5), 1)[name].bfloat16(), scores((1, 16), 2)[name].half()
            for magnitude in (False, True):
                for sparsity in (0.0, 0.37, 1.0) if name == "normal" else (0.37,):
                    for scope in ("tensor", "global"):
                        options = {"sparsity": sparsity, "scope": scope, "magnitude": magnitude}
                        whole = [x, other, tiny]
                        want = prune_mask(whole, **options)
                        boxes = [box(placed(t, mesh, placements)) for t in whole]
                        for got, mask, part in zip(prune_mask_parts(boxes, **options), want, boxes, strict=True):
                            assert torch.equal(got, cut(mask, part)), (name, placements, options)


def box(x: DTensor, scale=None) -> Part:
    from fastlm.ops._dtensor import _boxes, _parts

    (part,) = _parts(_boxes([x]), [] if scale is None else [scale])
    return part


def cut(mask, part):
    keep = ops.mask_to_bool(mask, part.shape[-1])
    for axis, (first, count) in enumerate(zip(part.offset, part.score.shape, strict=True)):
        keep = keep.narrow(axis, first, count)
    return ops.bool_to_mask(keep.contiguous())


def options_and_refusals() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    x, scale = torch.randn(8, 32 * WORLD, generator=torch.Generator().manual_seed(3)), torch.rand(32 * WORLD) + 0.5
    dist.broadcast(scale, 0)
    for placement in (Shard(0), Shard(1)):
        got = prune_mask(placed(x, mesh, [placement]), sparsity=0.4, magnitude=True, scale=scale)
        assert got.placements == (placement,)
        assert torch.equal(got.full_tensor(), prune_mask(x, sparsity=0.4, magnitude=True, scale=scale))
        got = prune_mask(placed(x, mesh, [placement]), pattern="2:4", magnitude=True)
        assert torch.equal(got.full_tensor(), prune_mask(x, pattern="2:4", magnitude=True))
    rows = placed(x, mesh, [Shard(0)])
    assert torch.equal(
        prune_mask(rows, sparsity=0.5, scope="row").full_tensor(), prune_mask(x, sparsity=0.5, scope="row")
    )
    odd = torch.randn(6, 6 * WORLD)
    for call, text in (
        (lambda: prune_mask(placed(odd, mesh, [Shard(1)]), sparsity=0.5), "multiple of 8 columns"),
        (lambda: prune_mask(placed(odd, mesh, [Shard(1)]), pattern="2:4"), "multiple of 8 columns"),
        (lambda: prune_mask(rows, pattern="row", sparsity=0.5), "whose sums are of whole tensors"),
        (lambda: prune_mask(placed(x, mesh, [Shard(1)]), sparsity=0.5, scope="row"), "must not be cut"),
        (lambda: prune_mask(placed(torch.full((8, 8), torch.nan), mesh, [Shard(0)]), sparsity=0.5), "64 NaN"),
        (
            lambda: prune_mask_parts([Part(x, (8 * WORLD + 1, 32 * WORLD), (0, 0), (None,))], sparsity=0.5),
            "boxes of parts",
        ),
        (lambda: prune_mask_parts([Part(x, (4, 32 * WORLD), (0, 0), (None,))], sparsity=0.5), "must lie in the whole"),
        (lambda: prune_mask_parts([Part(x.double(), (8, 32), (0, 0), (None,))], sparsity=0.5), "float64"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            call()


def model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(24, 13), nn.Tanh(), nn.Linear(13, 24))


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def a_model_is_pruned_and_held() -> None:
    """FSDP2, uneven rows: prune before or after sharding, every optimizer holds, the masks and weights are one process's."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, make in OPTIMIZERS.items():
        for first in (True, False):
            for pattern in (None, "2:4"):
                args = {"pattern": pattern} if pattern else {"sparsity": 0.37}
                one = model()
                many = copy.deepcopy(one)
                report = compress.prune(one, **args)
                if first:
                    compress.prune(many, **args)
                for layer in (many[0], many[2]):
                    fully_shard(layer, mesh=mesh)
                fully_shard(many, mesh=mesh)
                if not first:
                    found = compress.prune(many, **args)
                    assert [(r.by_mask, r.by_weight) for r in found.rows] == [
                        (r.by_mask, r.by_weight) for r in report.rows
                    ]
                a, b = make(one.parameters()), make(many.parameters())
                compress.hold(a, one)
                compress.hold(b, many)
                x = torch.randn(16, 24, generator=torch.Generator().manual_seed(7))
                for _ in range(5):
                    for m, o in ((one, a), (many, b)):
                        o.zero_grad()
                        (m(x) - x.roll(1, 1)).square().mean().backward()
                        o.step()
                for i in (0, 2):
                    assert torch.equal(one[i].weight_mask, many[i].weight_mask)
                    gone = ~ops.mask_to_bool(one[i].weight_mask, one[i].in_features)
                    whole = many[i].weight.full_tensor().detach()
                    assert not whole[gone].view(torch.int32).any()
                    torch.testing.assert_close(whole, one[i].weight.detach(), rtol=1e-4, atol=1e-6)
                    for key, value in b.state[many[i].weight].items():
                        if key != "step" and isinstance(value, DTensor):
                            assert not value.full_tensor()[gone].any(), (name, key)
    with pytest.raises(ValueError, match="is a DTensor"):
        compress.prune(many, 0.5, method="wanda", calibration=[torch.randn(4, 24)])


def tensor_parallel() -> None:
    """Columns cut at no multiple of 8, and the mask a replicated DTensor."""
    mesh = init_device_mesh("cpu", (WORLD,))
    one = nn.Linear(12 * WORLD, 6)
    with torch.no_grad():
        for p in one.parameters():
            dist.broadcast(p, 0)
    many = copy.deepcopy(one)
    many.weight = nn.Parameter(distribute_tensor(many.weight.detach(), mesh, [Shard(1)]))
    for m in (one, many):
        compress.prune(m, 0.5)
    assert torch.equal(one.weight_mask, many.weight_mask)
    assert torch.equal(many.weight.full_tensor(), one.weight)
    many._buffers["weight_mask"] = distribute_tensor(many.weight_mask, mesh, [Replicate()])
    with torch.no_grad():
        many.weight.to_local().fill_(1)
    assert isinstance(many, MaskedLinear)
    many.apply_mask_()
    assert torch.equal(many.weight.full_tensor() != 0, ops.mask_to_bool(one.weight_mask, 12 * WORLD))


if KIND == "parts":
    parts_are_the_whole()
    options_and_refusals()
else:
    a_model_is_pruned_and_held()
    tensor_parallel()
dist.destroy_process_group()
print("done")
