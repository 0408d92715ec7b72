"""prune_mask and its kin: against a brute force in plain Python, and every backend bit for bit against the reference."""

from __future__ import annotations

import copy
import itertools
import math

import fastlm
import numpy as np
import pytest
import torch
from fastlm import ops
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _has_cpu() -> bool:
    support = fastlm.backend._support("prune_mask", "cpu", "count", torch.device("cpu"), (torch.zeros(1, 1).byte(),))
    return support.ok


BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not _has_cpu(), reason="no compiled kernel"))]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


# ------------------------------------------------------------------------------------------ the brute force


def lowest(values: list[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])


def lane_sum(values: list[float]) -> float:
    lanes = [np.float32(0)] * 16
    for i, v in enumerate(values):
        lanes[i % 16] = np.float32(lanes[i % 16] + np.float32(v))
    while len(lanes) > 1:  # halves to halves
        half = len(lanes) // 2
        lanes = [np.float32(a + b) for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    return float(lanes[0])


def brute(x: Tensor, sparsity=None, pattern="unstructured", dim=-1, scope="tensor") -> Tensor:
    """bool, True = keep."""
    keep = torch.ones(x.shape, dtype=torch.bool)
    if pattern in ("row", "column"):
        rows = x.float().tolist() if pattern == "row" else x.float().T.tolist()
        for i in lowest([lane_sum(r) for r in rows], round(sparsity * len(rows))):
            (keep if pattern == "row" else keep.T)[i] = False
    elif pattern.startswith("block:"):
        high, wide = map(int, pattern[6:].split("x"))
        places = list(itertools.product(range(0, x.shape[0], high), range(0, x.shape[1], wide)))
        sums = []
        for r, c in places:
            padded = torch.zeros(high, wide)
            part = x[r : r + high, c : c + wide].float()
            padded[: part.shape[0], : part.shape[1]] = part
            sums.append(lane_sum(padded.flatten().tolist()))
        for i in lowest(sums, round(sparsity * len(places))):
            r, c = places[i]
            keep[r : r + high, c : c + wide] = False
    elif pattern == "unstructured" and scope == "tensor":
        flat = x.flatten().tolist()
        for i in lowest(flat, round(sparsity * len(flat))):
            keep.view(-1)[i] = False
    else:
        moved, kept = x.movedim(dim, -1), keep.movedim(dim, -1)
        for place in itertools.product(*map(range, moved.shape[:-1])):
            values = moved[place].tolist()
            if pattern == "unstructured":
                gone = lowest(values, round(sparsity * len(values)))
            else:
                n, m = map(int, pattern.split(":"))
                gone = {
                    at + i
                    for at in range(0, len(values), m)
                    for i in lowest(values[at : at + m], max(len(values[at : at + m]) - n, 0))
                }
            for i in gone:
                kept[(*place, i)] = False
    return keep


def draw(shape, dtype=F32, kind="normal") -> Tensor:
    if kind == "normal":
        return torch.randn(shape).to(dtype)
    if kind == "few":  # many ties, both zeros, infinities
        choice = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 1e-40 if dtype == F32 else 0.0, 1.0, math.inf])
        return choice[torch.randint(0, 7, shape)].to(dtype)
    return {
        "equal": torch.full(shape, 0.5),
        "two": torch.randint(0, 2, shape).float(),
        "sorted": torch.arange(math.prod(shape)).view(shape).float(),
        "falling": -torch.arange(math.prod(shape)).view(shape).float(),
        "wide": torch.randn(shape) * torch.exp(20 * torch.randn(shape)),
    }[kind].to(dtype)


PATTERNS = [
    {"sparsity": 0.5}, {"sparsity": 0.0}, {"sparsity": 1.0}, {"sparsity": 0.37}, {"sparsity": 0.999},
    {"sparsity": 0.5, "scope": "row"}, {"sparsity": 0.3, "scope": "row", "dim": 0}, {"sparsity": 1, "scope": "row"},
    {"pattern": "2:4"}, {"pattern": "1:4"}, {"pattern": "4:8"}, {"pattern": "3:7"}, {"pattern": "31:32"},
    {"pattern": "1:2"}, {"pattern": "2:4", "dim": 0}, {"pattern": "5:16"},
    {"pattern": "row", "sparsity": 0.5}, {"pattern": "column", "sparsity": 0.3},
    {"pattern": "block:3x7", "sparsity": 0.4}, {"pattern": "block:4x4", "sparsity": 0.6},
    {"pattern": "block:1x1", "sparsity": 0.5}, {"pattern": "block:100x100", "sparsity": 0.5},
]  # fmt: skip


def identity(options) -> str:
    return " ".join(f"{v}" for v in options.values())


@pytest.mark.parametrize("options", PATTERNS, ids=identity)
def test_every_pattern_is_that_of_the_brute_force(backend, options):
    for shape in ((17, 37), (8, 64), (1, 1), (3, 8), (33, 5)):
        for kind in ("normal", "few"):
            x = draw(shape, kind=kind)
            if kind == "few" and options.get("pattern", "").startswith(("row", "column", "block")):
                x = x.nan_to_num(3.0, 3.0, -3.0)  # inf - inf is no number
            mask = ops.prune_mask(x, **options)
            assert mask.dtype == torch.uint8
            assert mask.shape == (shape[0], -(-shape[1] // 8))
            assert torch.equal(ops.mask_to_bool(mask, shape[1]), brute(x, **options)), (shape, kind)
            assert torch.equal(ops.bool_to_mask(ops.mask_to_bool(mask, shape[1])), mask)  # padding bits are 0


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("options", PATTERNS[3::3], ids=identity)
def test_types_of_sixteen_bits(backend, dtype, options):
    x = draw((19, 45), dtype)
    assert torch.equal(ops.mask_to_bool(ops.prune_mask(x, **options), 45), brute(x, **options))


@pytest.mark.parametrize("kind", ["equal", "two", "sorted", "falling", "wide", "few"])
def test_exact_counts_whatever_the_scores(backend, kind):
    x = draw((211, 523), kind=kind)
    order = x.double().flatten().add(0.0).argsort(stable=True)
    for sparsity in (0.0, 1e-5, 0.1, 0.5, 0.9, 1 - 1e-5, 1.0):
        count = round(sparsity * x.numel())
        mask = ops.prune_mask(x, sparsity=sparsity)
        assert int(ops.mask_count(mask)) == x.numel() - count
        keep = torch.ones(x.numel(), dtype=torch.bool)
        keep[order[:count]] = False
        assert torch.equal(ops.mask_to_bool(mask, 523), keep.view(x.shape))


@pytest.mark.parametrize("options", [{"sparsity": 0.4}, {"sparsity": 0.4, "scope": "row"}, {"pattern": "2:4"},
                                     {"pattern": "4:8", "dim": 0}, {"pattern": "2:4t"}], ids=identity)  # fmt: skip
def test_strides_and_dimensions(backend, options):
    base = torch.randn(24, 40, 3)
    views = [base[..., 1], base[:, ::2, 0].T, base[::3, ::5, 0], base.flip(0)[:, 4:, 2], base[:, :, 0].T]
    for x in views:
        x = x[: x.shape[0] // 4 * 4, : x.shape[1] // 4 * 4]
        assert torch.equal(ops.prune_mask(x, **options), ops.prune_mask(x.contiguous(), **options))
    if options.get("pattern") != "2:4t":
        for x in (base, base.permute(2, 0, 1), base[None, :, None], base.flatten()):
            mask = ops.prune_mask(x, **(options | {"dim": -1}))
            assert mask.shape == (*x.shape[:-1], -(-x.shape[-1] // 8))
            assert torch.equal(ops.mask_to_bool(mask, x.shape[-1]), brute(x, **(options | {"dim": -1})))


def test_one_threshold_over_a_list(backend):
    scores = [draw((7, 13)), draw((5,), BF16), draw((0, 4)), draw((3, 4, 9)).permute(2, 0, 1), draw((4, 31), F16)]
    flat = torch.cat([s.float().flatten() for s in scores])
    for sparsity in (0.0, 0.25, 0.5, 1.0):
        masks = ops.prune_mask(scores, sparsity=sparsity, scope="global")
        keep = brute(flat, sparsity=sparsity).split([s.numel() for s in scores])
        for s, mask, k in zip(scores, masks, keep, strict=True):
            assert torch.equal(ops.mask_to_bool(mask, s.shape[-1]), k.view(s.shape))
    equal = [torch.ones(3, 5), torch.ones(2, 6)]
    kept = [int(ops.mask_count(m)) for m in ops.prune_mask(equal, sparsity=0.5, scope="global")]
    assert kept == [1, 12]  # 14 of 27 go, from the first on
    one = ops.prune_mask(scores, sparsity=0.5)
    assert all(torch.equal(m, ops.prune_mask(s, sparsity=0.5)) for s, m in zip(scores, one, strict=True))


def test_one_threshold_over_float64_and_others():
    scores = [draw((7, 13)).double(), draw((5, 6), BF16), 3 * draw((4, 31))]
    masks = ops.prune_mask(scores, sparsity=0.5, scope="global", magnitude=True)
    keep = brute(torch.cat([s.double().flatten() for s in scores]).abs(), sparsity=0.5).split(
        [s.numel() for s in scores]
    )
    for s, mask, k in zip(scores, masks, keep, strict=True):
        assert torch.equal(ops.mask_to_bool(mask, s.shape[-1]), k.view(s.shape))


def test_magnitude_and_scale_are_those_of_written_scores(backend):
    x, scale = torch.randn(12, 50), torch.rand(50) * 10
    for options in (*PATTERNS[3::4], {"pattern": "1:4"}):
        assert torch.equal(ops.prune_mask(x, magnitude=True, **options), ops.prune_mask(x.abs(), **options))
        found = ops.prune_mask(x.bfloat16(), magnitude=True, scale=scale, **options)
        assert torch.equal(found, ops.prune_mask(x.bfloat16().float().abs() * scale, **options))


FILLS = [
    torch.tensor([[r >> (4 * i) >> j & 1 for j in range(4)] for i in range(4)], dtype=torch.bool)
    for r in range(1 << 16)
    if all((r >> (4 * i) & 15).bit_count() == 2 for i in range(4))
    and all(sum(r >> (4 * i) >> j & 1 for i in range(4)) == 2 for j in range(4))
]


@pytest.mark.parametrize("kind", ["normal", "few", "equal", "wide"])
def test_transposable_keeps_the_largest_sum(backend, kind):
    assert len(FILLS) == 90
    fills = torch.stack(FILLS).double()
    x = draw((20, 36), kind=kind).nan_to_num(7.0, 7.0, -7.0)
    keep = ops.mask_to_bool(ops.prune_mask(x, pattern="2:4t"), 36)
    for r, c in itertools.product(range(0, 20, 4), range(0, 36, 4)):
        block, kept = x[r : r + 4, c : c + 4].double(), keep[r : r + 4, c : c + 4]
        assert (kept.sum(0) == 2).all()
        assert (kept.sum(1) == 2).all()
        best = (fills * block).sum((1, 2)).max()
        assert (kept * block).sum() >= best - 1e-6 * block.abs().sum()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"pattern": "2:4"}], ids=identity
)
def test_empty_tensors(backend, shape, options):
    mask = ops.prune_mask(torch.empty(shape), **options)
    assert mask.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert int(ops.mask_count(mask)) == 0
    ops.apply_mask_(torch.empty(shape), mask)


@pytest.mark.parametrize(
    "options", [PATTERNS[i] for i in (0, 1, 2, 5, 8, 13, 16, 18)] + [{"pattern": "2:4t"}], ids=identity
)
def test_a_nan_is_an_error(backend, options):
    x = torch.randn(16, 24)
    x[11, 23] = math.nan
    with pytest.raises(ValueError, match=r"score holds 1 NaN"):
        ops.prune_mask(x, **options)
    if not options.get("pattern"):
        with pytest.raises(ValueError, match=r"score\[1\] holds 1 NaN"):
            ops.prune_mask([torch.ones(2, 2), x], **options)
    y = x.nan_to_num(0.0)
    y[3, 4], scale = math.inf, torch.ones(24)
    scale[4] = 0.0
    if "pattern" not in options:
        with pytest.raises(ValueError, match="1 NaN"):
            ops.prune_mask(y, magnitude=True, scale=scale, **options)


def test_a_nan_is_the_lowest_where_nothing_is_checked():
    """On a GPU; the definition is asked as the reference would be there."""
    from fastlm.reference import prune_mask as reference

    x = torch.tensor([1.0, -math.inf, math.nan, 2.0, math.nan])
    assert reference.lowest(reference.keys(x), 2).tolist() == [False, False, True, False, True]
    assert reference.lowest(reference.keys(x), 3).tolist() == [False, True, True, False, True]


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64], ids=str)
def test_apply_gives_plus_zero_and_leaves_the_rest(dtype):
    for shape, view in (((9, 37), lambda t: t), ((37, 18), lambda t: t.T[::2]), ((5, 3, 16), lambda t: t[:, 1:])):
        weight = view(torch.randn(shape).to(dtype))
        weight[0].fill_(math.nan)
        weight[..., 1] = -0.0
        keep = torch.rand(weight.shape) < 0.5
        wanted = torch.where(keep, weight, torch.zeros((), dtype=dtype))
        names = ["reference"] + ["cpu"] * (_has_cpu() and dtype != torch.float64)
        for name in names:
            with fastlm.backend.use(name):
                given = weight.clone(memory_format=torch.preserve_format)
                assert ops.apply_mask_(given, ops.bool_to_mask(keep)) is given
            number = {8: torch.int64, 4: torch.int32, 2: torch.int16}[given.element_size()]
            assert torch.equal(given.contiguous().view(number), wanted.contiguous().view(number))


def test_masks_in_bits(backend):
    for columns in (1, 7, 8, 9, 31, 64, 65):
        first, second = (torch.rand(5, columns) < 0.6 for _ in range(2))
        a, b = ops.bool_to_mask(first), ops.bool_to_mask(second.T.contiguous().T)
        for i in range(columns):
            assert torch.equal(a[:, i // 8] >> (i % 8) & 1, first[:, i].byte())
        assert torch.equal(ops.mask_to_bool(ops.mask_and(a, b), columns), first & second)
        assert int(ops.mask_count(a)) == int(first.sum())
        assert ops.mask_count(a).dtype == torch.int64
        assert torch.equal(ops.mask_to_bool(a.T.contiguous().T, columns), first)
        assert int(ops.mask_count(a[::2, ::2])) == int(ops.mask_count(a[::2, ::2].contiguous()))


def test_autograd_does_not_see_a_mask_and_notices_the_change():
    weight = torch.nn.Parameter(torch.randn(4, 16))
    x = torch.randn(3, 16, requires_grad=True)
    mask = ops.prune_mask(weight, sparsity=0.5, magnitude=True)
    assert not mask.requires_grad
    y = x @ weight.T
    version = weight._version
    assert ops.apply_mask_(weight, mask) is weight
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    (x @ weight.T).sum().backward()
    assert weight.grad is not None
    assert weight.is_leaf
    copy.deepcopy(weight)
    with torch.inference_mode():
        ops.apply_mask_(torch.ones(4, 16), mask)


# ------------------------------------------------------------------------------------------ the PyTorch contract


def test_opcheck():
    x, mask = torch.randn(4, 20), ops.bool_to_mask(torch.rand(4, 20) < 0.5)
    options = (0.5, "unstructured", -1, "tensor", False, False)
    torch.library.opcheck(torch.ops.fastlm.prune_mask, ([x, x.bfloat16()], [], *options))
    torch.library.opcheck(torch.ops.fastlm.apply_mask_, (x, mask))
    torch.library.opcheck(torch.ops.fastlm.mask_count, (mask,))
    torch.library.opcheck(torch.ops.fastlm.mask_to_bool, (mask, 20))
    torch.library.opcheck(torch.ops.fastlm.bool_to_mask, (torch.rand(4, 20) < 0.5,))


def test_compiles_to_one_graph_with_sizes_that_change():
    def step(weight):
        mask = ops.prune_mask(weight, sparsity=0.5, magnitude=True)
        both = ops.mask_and(mask, ops.prune_mask(weight, pattern="2:4", magnitude=True))
        ops.apply_mask_(weight, both)
        return both, ops.mask_count(both), ops.bool_to_mask(ops.mask_to_bool(both, weight.shape[-1]))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((8, 16), (5, 24), (7, 36)):
        weight = torch.randn(shape)
        other = weight.clone()
        for found, wanted in zip(compiled(other), step(weight), strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(weight, other)


REFUSED = [
    (TypeError, {"score": 3}, "score is a int"),
    (TypeError, {"score": []}, "an empty list"),
    (ValueError, {"score": torch.tensor(1.0)}, "score has no dimension"),
    (TypeError, {"score": torch.ones(3, dtype=torch.int32)}, "score is int32"),
    (TypeError, {"sparsity": None}, "sparsity is a NoneType"),
    (TypeError, {"sparsity": True}, "sparsity is a bool"),
    (ValueError, {"sparsity": 1.5}, "sparsity is 1.5"),
    (ValueError, {"sparsity": math.nan}, "sparsity is nan"),
    (ValueError, {"pattern": "2:4"}, "sparsity is 0.5; with pattern '2:4'"),
    (ValueError, {"pattern": "4:4", "sparsity": None}, "pattern is '4:4'"),
    (ValueError, {"pattern": "2:33", "sparsity": None}, "pattern is '2:33'"),
    (ValueError, {"pattern": "block:0x4"}, "pattern is 'block:0x4'"),
    (ValueError, {"pattern": "rows"}, "pattern is 'rows'"),
    (TypeError, {"pattern": 4}, "pattern is a int"),
    (ValueError, {"scope": "layer"}, "scope is 'layer'"),
    (ValueError, {"scope": "global", "pattern": "row"}, "scope is 'global'; with pattern 'row'"),
    (ValueError, {"dim": 2}, "dim is 2"),
    (ValueError, {"score": torch.ones(2, 3, 4), "pattern": "row"}, "pattern 'row' is for matrices"),
    (ValueError, {"score": torch.ones(6, 8), "pattern": "2:4t", "sparsity": None}, "needs multiples of 4"),
    (ValueError, {"scale": torch.ones(8)}, "needs magnitude=True"),
    (ValueError, {"scale": torch.ones(7), "magnitude": True}, r"scale has shape \[7\]"),
    (TypeError, {"scale": torch.ones(8).double(), "magnitude": True}, "scale is float64"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "change", "text"), REFUSED, ids=[r[2] for r in REFUSED])
def test_arguments_are_refused_by_name(error, change, text):
    with pytest.raises(error, match=text):
        ops.prune_mask(**({"score": torch.ones(8, 8), "sparsity": 0.5} | change))


def test_masks_are_refused_by_name():
    weight, mask = torch.ones(3, 20), torch.zeros(3, 3, dtype=torch.uint8)
    for call, text in (
        (lambda: ops.apply_mask_(weight, mask[:, :2]), r"mask has shape \[3, 2\]; for \[3, 20\] it must be \[3, 3\]"),
        (lambda: ops.apply_mask_(weight, mask.bool()), "mask is bool"),
        (lambda: ops.apply_mask_(weight.int(), mask), "weight is int32"),
        (lambda: ops.mask_to_bool(mask, 25), "columns is 25; for a mask of 3 bytes a row it must be 17 to 24"),
        (lambda: ops.mask_to_bool(mask, 2.0), "columns is a float"),
        (lambda: ops.mask_and(mask, mask[:2]), r"second has shape \[2, 3\]"),
        (lambda: ops.mask_count(weight), "mask is float32"),
        (lambda: ops.bool_to_mask(mask), "keep is uint8"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            call()


def test_which_says_who_serves():
    choice = fastlm.backend.which("prune_mask", torch.ones(4, 8), sparsity=0.5)
    assert choice.backend == ("cpu" if _has_cpu() else "reference")
