"""Pruning masks in Triton: which scores go, exactly, and what is done with masks. The bits are the reference's.

The k lowest of N scores without sorting and without waiting for the device: a score's key is an integer in its order, of
32 bits, and three passes count how the keys spread over 2,048, 2,048 and 1,024 bins, each among those that share the bits
found before. A fourth counts, per program, the scores equal to the threshold; a fifth writes the mask, and of those the
first by flat index go. Bytes: five reads of the scores and N / 8 written; 64 KiB beside it and 8 bytes a program.

Patterns n:m compare each score with those of its group, which lie in the first cache; 2:4t goes through the classes of
``reference.prune_mask.transposable``; rows, columns and blocks are summed in sixteen lanes and a tree, and of these sums
the lowest go by the same selection.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from fastlm.backend import YES, Support
from fastlm.kernels._common import OfflineCase, arch_of, launch, recording
from fastlm.kernels._prune_mask_kernels import (
    adamw_kernel,
    apply_kernel,
    blocks_kernel,
    count_kernel,
    groups_kernel,
    narrow_kernel,
    pack_kernel,
    popcount_kernel,
    rows_kernel,
    sums_kernel,
    ties_kernel,
    transposable_kernel,
    unpack_kernel,
    write_kernel,
)
from fastlm.reference import prune_mask as reference
from fastlm.reference.prune_mask import parse, pruned_of
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # elements
PROGRAMS = 2048  # of a pass over all scores, at most
PASSES = ((21, 32, 2048), (10, 21, 2048), (0, 10, 1024))  # lowest bit, bit above, bins


# ----------------------------------------------------------------------------------------------------------- launchers


class _Matrix(NamedTuple):
    """A tensor as rows of columns and how it is cut: R rows of C columns a tile, ``pieces`` tiles across."""

    x: Tensor
    rows: int
    columns: int
    pieces: int
    R: int
    C: int

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.R) * self.pieces

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows, self.columns, self.pieces


def _matrix(x: Tensor, tile: int = TILE) -> _Matrix:
    """Collapses the leading axes, by a copy where they are no one axis."""
    x = x.reshape(-1, x.shape[-1])
    rows, columns = x.shape
    wide = min(max(triton.next_power_of_2(columns), 8), tile)
    return _Matrix(x, rows, columns, -(-columns // wide), max(tile // wide, 1), wide)


def _refusal(x: Tensor, dtypes: tuple[torch.dtype, ...], what: str) -> Support:
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return Support(False, f"the triton kernel takes {names} {what}, not {str(x.dtype).removeprefix('torch.')}")
    if x.device.type == "cuda" and arch_of(x.device) < 80:
        return Support(False, f"the triton kernels need compute capability 8.0; this has {arch_of(x.device) / 10}")
    return YES


def serves_forward(
    scores: Sequence[Tensor], scales: Sequence[Tensor], sparsity: float | None, pattern: str, dim: int, scope: str,
    magnitude: bool, check: bool,
) -> Support:  # fmt: skip
    """float32, bfloat16 and float16, any strides."""
    for s in scores:
        found = _refusal(s, FLOATS, "scores")
        if not found.ok:
            return found
    return YES


def forward(
    scores: Sequence[Tensor], scales: Sequence[Tensor], sparsity: float | None, pattern: str, dim: int, scope: str,
    magnitude: bool, check: bool,
) -> list[Tensor]:  # fmt: skip
    """As ``fastlm.reference.prune_mask.forward``."""
    kind, a, b = parse(pattern)
    part = 0.0 if sparsity is None else sparsity
    scale = lambda i: scales[i].contiguous() if scales else None
    if check or scores[0].device.type == "cpu":
        reference.check_values([reference.values(s, scale(i), magnitude) for i, s in enumerate(scores)])
    magnitude = magnitude or bool(scales)
    if scope == "global":
        gone = pruned_of(part, sum(s.numel() for s in scores))
        return _lowest(scores, [scale(i) for i in range(len(scores))], magnitude, gone)
    out = []
    for i, s in enumerate(scores):
        along = dim % s.dim()
        if not s.numel():
            out.append(_empty_mask(s))
        elif along != s.dim() - 1 and (kind == "n:m" or scope == "row"):
            if scales:
                s = reference.values(s, scale(i), magnitude)
            moved = s.movedim(along, -1)
            (mask,) = forward([moved], [], sparsity, pattern, -1, scope, magnitude, False)
            out.append(pack(unpack(mask, moved.shape[-1]).movedim(-1, along)))
        else:
            out.append(_one(s, scale(i), part, (kind, a, b), scope, magnitude))
    return out


def _empty_mask(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8)


def _one(
    s: Tensor, scale: Tensor | None, part: float, pattern: tuple[str, int, int], scope: str, magnitude: bool
) -> Tensor:
    kind, a, b = pattern
    if kind == "unstructured" and scope == "tensor":
        return _lowest([s], [scale], magnitude, pruned_of(part, s.numel()))[0]
    if kind in ("row", "column", "block"):
        if scale is not None:  # a product within a sum could be fused, and be other bits
            s, scale, magnitude = reference.values(s, scale, True), None, False
        high, wide = {"row": (1, s.shape[1]), "column": (s.shape[0], 1), "block": (a, b)}[kind]
        return _blocks(s, magnitude, part, high, wide)
    m, mask = _matrix(s), _empty_mask(s)
    strides = m.x.stride()
    with torch.cuda.device_of(s):
        if kind == "2:4t":
            return _transposable(m, scale, magnitude)
        if kind == "n:m":
            m = _matrix(s, TILE // 4)  # a whole tile spills
            launch(groups_kernel, (m.tiles,), m.x, scale, mask, *m.sizes, *strides, N=a, M=b, MAGNITUDE=magnitude,
                   R=m.R, C=m.C, num_warps=8, num_stages=1)  # fmt: skip
            return mask
        gone = pruned_of(part, m.columns)
        if gone in (0, m.columns):
            return _all_or_none(s, gone == 0)
        columns = min(m.C, 1024)  # 2,048 spill in bfloat16
        launch(rows_kernel, (m.rows,), m.x, scale, mask, gone, m.rows, m.columns, -(-m.columns // columns), *strides,
               MAGNITUDE=magnitude, C=columns, num_warps=8, num_stages=1)  # fmt: skip
    return mask


def _all_or_none(x: Tensor, keep: bool) -> Tensor:
    return pack(torch.full(x.shape, keep, dtype=torch.bool, device=x.device))


def _lowest(scores: Sequence[Tensor], scales: Sequence[Tensor | None], magnitude: bool, gone: int) -> list[Tensor]:
    """The masks of tensors of which the ``gone`` lowest scores go, all together."""
    count = sum(s.numel() for s in scores)
    if gone in (0, count):
        return [_all_or_none(s, gone == 0) for s in scores]
    device = scores[0].device
    state = torch.zeros(2, dtype=torch.int64, device=device)
    state[1:].fill_(gone)
    given = [(_matrix(s), scale, i) for i, (s, scale) in enumerate(zip(scores, scales, strict=True)) if s.numel()]
    cuts = [_programs(m) for m, _, _ in given]
    masks = [_empty_mask(s) for s in scores]
    with torch.cuda.device_of(scores[0]):
        for shift, top, bins in PASSES:
            found = torch.zeros(bins, dtype=torch.int64, device=device)
            for (m, scale, _), programs in zip(given, cuts, strict=True):
                _count(m, scale, programs, state, found, magnitude, shift, top)
            launch(narrow_kernel, (1,), found, state, SHIFT=shift, BINS=bins, num_warps=8, num_stages=1)
        _write(given, cuts, state, masks, magnitude)
    return masks


def _write(
    given: list[tuple[_Matrix, Tensor | None, int]], cuts: list[int], state: Tensor, masks: list[Tensor], magnitude: bool
) -> None:  # fmt: skip
    """The masks of matrices, by ``programs`` of each. state: int64 [threshold, how many of those equal to it go]."""
    counts = torch.zeros(sum(cuts), dtype=torch.int64, device=state.device)
    parts = counts.split(cuts)
    for (m, scale, _), own, programs in zip(given, parts, cuts, strict=True):
        launch(ties_kernel, (programs,), m.x, scale, state, own, *m.sizes, m.tiles, -(-m.tiles // programs),
               *m.x.stride(), MAGNITUDE=magnitude, R=m.R, C=m.C, num_warps=8, num_stages=1)  # fmt: skip
    parts = (counts.cumsum(0) - counts).split(cuts)
    for (m, scale, i), own, programs in zip(given, parts, cuts, strict=True):
        launch(write_kernel, (programs,), m.x, scale, state, own, masks[i], *m.sizes, m.tiles, -(-m.tiles // programs),
               *m.x.stride(), MAGNITUDE=magnitude, R=m.R, C=m.C, num_warps=8, num_stages=1)  # fmt: skip


def _programs(m: _Matrix) -> int:
    return -(-m.tiles // -(-m.tiles // PROGRAMS))


def serves_spread(
    score: Tensor, scale: Tensor | None, magnitude: bool, low: int, shift: int, check: bool
) -> Support:  # fmt: skip
    """float32, bfloat16 and float16, any strides."""
    return _refusal(score, FLOATS, "scores")


def spread(score: Tensor, scale: Tensor | None, magnitude: bool, low: int, shift: int, check: bool) -> Tensor:
    """As ``fastlm.reference.prune_mask.spread``, for the ranges of three passes: they begin at a multiple of their size."""
    out = torch.zeros(1 + reference.BINS, dtype=torch.int64, device=score.device)
    if not score.numel():
        return out
    scale = None if scale is None else scale.contiguous()
    if check or score.device.type == "cpu":
        out[0] = reference.values(score, scale, magnitude).isnan().sum()
    state = torch.full((2,), low - reference.LOWEST, dtype=torch.int64, device=score.device)
    ((top, bins),) = ((top, bins) for first, top, bins in PASSES if first == shift)
    m = _matrix(score)
    with torch.cuda.device_of(score):
        _count(m, scale, _programs(m), state, out[1 : 1 + bins], magnitude, shift, top)
    return out


def serves_cut(score: Tensor, scale: Tensor | None, magnitude: bool, key: int, ties: int) -> Support:
    """float32, bfloat16 and float16, any strides."""
    return _refusal(score, FLOATS, "scores")


def cut(score: Tensor, scale: Tensor | None, magnitude: bool, key: int, ties: int) -> Tensor:
    """As ``fastlm.reference.prune_mask.cut``."""
    mask = _empty_mask(score)
    if score.numel():
        state = torch.tensor([key - reference.LOWEST, ties], dtype=torch.int64, device=score.device)
        m = _matrix(score)
        with torch.cuda.device_of(score):
            scale = None if scale is None else scale.contiguous()
            _write([(m, scale, 0)], [_programs(m)], state, [mask], magnitude)
    return mask


def _count(
    m: _Matrix, scale: Tensor | None, programs: int, state: Tensor, found: Tensor, magnitude: bool, shift: int, top: int
) -> None:  # fmt: skip
    # the last pass has fewer bins, and spills with few warps
    launch(count_kernel, (programs,), m.x, scale, state, found, *m.sizes, m.tiles, -(-m.tiles // programs),
           *m.x.stride(), MAGNITUDE=magnitude, SHIFT=shift, HIGH=top, BINS=found.numel(), R=m.R, C=m.C,
           num_warps=8 if shift else 16, num_stages=1)  # fmt: skip


@functools.cache
def _classes(device: torch.device) -> Tensor:
    rows = []
    for above, below in reference.transposable():
        fill = [0] * (6 - len(above))
        rows.append([len(above), *(a | b << 4 for a, b in above), *fill, *(a | b << 4 for a, b in below), *fill])
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _transposable(m: _Matrix, scale: Tensor | None, magnitude: bool) -> Tensor:
    """Half bytes first, one for each row of each block, and then two to a byte."""
    across, blocks = m.columns // 4, m.rows // 4 * (m.columns // 4)
    halves = torch.empty(m.rows, across, dtype=torch.uint8, device=m.x.device)
    launch(transposable_kernel, (-(-blocks // 128),), m.x, scale, halves, _classes(m.x.device), blocks, across,
           m.columns, *m.x.stride(), MAGNITUDE=magnitude, B=128, num_warps=4,
           num_stages=1)  # fmt: skip
    if across % 2:
        halves = torch.nn.functional.pad(halves, (0, 1))
    return halves[:, ::2] | halves[:, 1::2] << 4


def _blocks(s: Tensor, magnitude: bool, part: float, high: int, wide: int) -> Tensor:
    m = _matrix(s)
    down, across = -(-m.rows // high), -(-m.columns // wide)
    sums = torch.empty(1, down * across, device=s.device)
    with torch.cuda.device_of(s):
        launch(sums_kernel, (-(-down * across // 64),), m.x, sums, m.rows, m.columns, high, wide, across, down * across,
               *m.x.stride(), MAGNITUDE=magnitude, B=64, num_warps=4, num_stages=1)  # fmt: skip
        (kept,) = _lowest([sums], [None], False, pruned_of(part, down * across))
        mask = _empty_mask(s)
        launch(blocks_kernel, (m.tiles,), kept, mask, *m.sizes, high, wide, across, R=m.R, C=m.C, num_warps=4,
               num_stages=1)  # fmt: skip
    return mask


def serves_apply(weight: Tensor, mask: Tensor) -> Support:
    """float32, bfloat16 and float16, whose leading axes are one axis."""
    found = _refusal(weight, FLOATS, "weights")
    if found.ok and weight.numel() and weight.reshape(-1, weight.shape[-1]).data_ptr() != weight.data_ptr():
        return Support(False, "weight has leading axes that are no one axis")
    return found


def apply(weight: Tensor, mask: Tensor) -> None:
    """As ``fastlm.reference.prune_mask.apply``."""
    if not weight.numel():
        return
    m = _matrix(weight)
    with torch.cuda.device_of(weight):
        launch(apply_kernel, (m.tiles,), m.x, mask.contiguous(), *m.sizes, *m.x.stride(), R=m.R, C=m.C, num_warps=4,
               num_stages=1)  # fmt: skip


def serves_count(mask: Tensor) -> Support:
    """Everything."""
    return _refusal(mask, (torch.uint8,), "masks")


def count(mask: Tensor) -> Tensor:
    """As ``fastlm.reference.prune_mask.count``."""
    if not mask.numel():
        return torch.zeros((), dtype=torch.int64, device=mask.device)
    counts = torch.empty(-(-mask.numel() // TILE), dtype=torch.int64, device=mask.device)
    with torch.cuda.device_of(mask):
        launch(popcount_kernel, (counts.numel(),), mask.contiguous(), counts, mask.numel(), B=TILE, num_warps=4,
               num_stages=1)  # fmt: skip
    return counts.sum()


def serves_unpack(mask: Tensor, columns: int) -> Support:
    """Everything."""
    return _refusal(mask, (torch.uint8,), "masks")


def unpack(mask: Tensor, columns: int) -> Tensor:
    """As ``fastlm.reference.prune_mask.unpack``."""
    out = torch.empty((*mask.shape[:-1], columns), dtype=torch.uint8, device=mask.device)
    if out.numel():
        m = _matrix(out)
        with torch.cuda.device_of(mask):
            launch(unpack_kernel, (m.tiles,), mask.contiguous(), m.x, *m.sizes, R=m.R, C=m.C, num_warps=4,
                   num_stages=1)  # fmt: skip
    return out.view(torch.bool)


def serves_pack(keep: Tensor) -> Support:
    """Everything."""
    return _refusal(keep, (torch.bool,), "tensors")


def pack(keep: Tensor) -> Tensor:
    """As ``fastlm.reference.prune_mask.pack``."""
    out = _empty_mask(keep)
    if keep.numel():
        m = _matrix(keep.view(torch.uint8))
        with torch.cuda.device_of(keep):
            launch(pack_kernel, (m.tiles,), m.x, out, *m.sizes, *m.x.stride(), R=m.R, C=m.C, num_warps=4,
                   num_stages=1)  # fmt: skip
    return out


def serves_adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], masks: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> Support:  # fmt: skip
    """Contiguous float32, bfloat16 and float16."""
    for i, p in enumerate(params):
        found = _refusal(p, FLOATS, "weights")
        if not found.ok:
            return found
        if not (p.is_contiguous() and exp_avgs[i].is_contiguous() and exp_avg_sqs[i].is_contiguous()):
            return Support(False, "the triton kernel takes contiguous weights and moments")
        if grad_scale is not None and not grads[i].is_contiguous():
            return Support(False, "the triton kernel unscales contiguous gradients")
    return YES


def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], masks: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """As ``fastlm.reference.prune_mask.adamw``, with the roundings of the CPU's kernel. Nothing waits for the device.

    Bytes: weight, moments and mask read, gradient too, weight and moments written; with grad_scale the gradient.
    """
    now = torch.stack(list(steps)).double() + 1
    scalars = torch.zeros(len(params), 4, device=now.device)  # a row is 16 bytes, as pointers are specialised for
    scalars[:, 0] = -(lr / (1 - beta1**now))
    scalars[:, 1] = (1 - beta2**now).sqrt()
    base = abs(float(torch.tensor(1 - beta1))) >= 0.5  # as torch.lerp, which goes from the nearer end
    numbers = (1 - lr * weight_decay, float(torch.tensor(1 - beta1)) - base, beta2, 1 - beta2, eps)
    with torch.cuda.device_of(params[0]):
        for i, (p, g, m, v, mask) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, masks, strict=True)):
            if p.numel():
                columns = p.numel() if p.shape[-1] % 8 == 0 else p.shape[-1]
                launch(adamw_kernel, (-(-p.numel() // 1024),), p, g.contiguous(), m, v, mask.contiguous(), scalars[i],
                       grad_scale, found_inf, *numbers, p.numel(), columns, BASE=base, E=1024, num_warps=4, num_stages=1,
                       enable_fp_fusion=False)  # fmt: skip
    for step in steps:
        step.add_(1 if found_inf is None else 1 - found_inf)


# ------------------------------------------------------------------------------------------------------- offline cases


def _adamw_of(x: Tensor, mask: Tensor) -> None:
    adamw([x], [x], [x], [x], [torch.empty((), device=x.device)], [mask], 1e-3, 0.9, 0.99, 1e-8, 0.1, None, None)


def offline_cases() -> list[OfflineCase]:
    """A matrix of a large model by each pattern, and each use of a mask."""
    cases: list[OfflineCase] = []
    score = torch.empty(4096, 4096, device="meta")
    half = score.to(torch.bfloat16)
    mask = torch.empty(4096, 512, dtype=torch.uint8, device="meta")
    options: dict[str, dict[str, Any]] = {
        "50%": {"part": 0.5}, "50% a row": {"part": 0.5, "scope": "row"}, "2:4": {"pattern": "2:4"}, "4:8": {"pattern": "4:8"},
        "2:4t": {"pattern": "2:4t"}, "column": {"part": 0.5, "pattern": "column"},
    }  # fmt: skip
    for arch in (80, 90):
        for name, o in options.items():
            for kind, x in (("f32", score), ("bf16", half)):
                moved = x.numel() * x.element_size() + mask.numel()
                with recording(arch, f"prune_mask {name} {kind}", bytes_moved=moved, flops=0) as recorded:
                    forward([x], [], o.get("part"), o.get("pattern", "unstructured"), -1, o.get("scope", "tensor"), True,
                            False)  # fmt: skip
                cases += recorded
        calls = {
            "masked_adamw_ f32": (lambda: _adamw_of(score, mask), 7 * score.numel() * 4 + mask.numel()),
            "masked_adamw_ bf16": (lambda: _adamw_of(half, mask), 7 * half.numel() * 2 + mask.numel()),
            "apply_mask_": (lambda: apply(half, mask), 2 * half.numel() * 2),
            "mask_count": (lambda: count(mask), mask.numel()),
            "mask_to_bool": (lambda: unpack(mask, 4096), 9 * mask.numel()),
            "bool_to_mask": (lambda: pack(torch.empty(4096, 4096, dtype=torch.bool, device="meta")), 9 * mask.numel()),
        }
        for name, (call, moved) in calls.items():
            with recording(arch, name, bytes_moved=moved, flops=0) as recorded:
                call()
            cases += recorded
    return cases
