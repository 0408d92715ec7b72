"""prune_mask on the CPU: from tensors to ``csrc/cpu/entry_prune_mask.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import _native
from fastlm._native import DTYPE, FLOATS
from fastlm.backend import YES, Support
from fastlm.reference import prune_mask as reference
from fastlm.reference.prune_mask import BINS, nan_message, parse, pruned_of


def serves_forward(
    scores: Sequence[Tensor], scales: Sequence[Tensor], sparsity: float | None, pattern: str, dim: int, scope: str,
    magnitude: bool, check: bool,
) -> Support:  # fmt: skip
    """float32, bfloat16 and float16, any strides."""
    why = _native.missing()
    if why:
        return Support(False, why)
    for s in scores:
        if s.dtype not in FLOATS:
            name = str(s.dtype).removeprefix("torch.")
            return Support(False, f"the cpu kernel takes float32, bfloat16 and float16 scores, not {name}")
    if (parse(pattern)[0] == "n:m" or scope == "row") and any(dim not in (-1, s.dim() - 1) for s in scores):
        return Support(True, "the mask is made along dim and turned round through a byte for each element")
    return YES


def _pack(score: Tensor, scale: Tensor | None, magnitude: bool, mask: Tensor, held: list[Tensor], flat: bool):
    """One tensor for the core. ``flat``: rows may be seen as one, where bytes of the mask allow it."""
    if scale is not None:
        scale = scale.contiguous()
        held.append(scale)
    if flat and scale is None and score.is_contiguous() and score.shape[-1] % 8 == 0:
        score = score.view(-1)
    sizes, packed, _, copies = _native.rows(score.shape, (score,))
    held.extend(copies)
    target = (mask.data_ptr(), DTYPE[torch.uint8], 0, 0, 0, 0)
    return _native._C.PruneScores(sizes, packed[0], _native.vector(scale), target, magnitude)


def forward(
    scores: Sequence[Tensor], scales: Sequence[Tensor], sparsity: float | None, pattern: str, dim: int, scope: str,
    magnitude: bool, check: bool,
) -> list[Tensor]:  # fmt: skip
    """As ``fastlm.reference.prune_mask.forward``."""
    kind, a, b = parse(pattern)
    part, threads = (0.0 if sparsity is None else sparsity), torch.get_num_threads()
    masks = [_empty_mask(s) for s in scores]
    held: list[Tensor] = []
    scale = lambda i: scales[i] if scales else None
    if scope == "global":
        packed = [_pack(s, scale(i), magnitude, masks[i], held, True) for i, s in enumerate(scores) if s.numel()]
        bad = _native._C.prune_select_cpu(packed, pruned_of(part, sum(s.numel() for s in scores)), threads)
        if bad:
            reference.check_values([reference.values(s, scale(i), magnitude) for i, s in enumerate(scores)])
        return masks
    for i, s in enumerate(scores):
        if not s.numel():
            continue
        along = dim % s.dim()
        if along != s.dim() - 1 and (kind == "n:m" or scope == "row"):
            masks[i] = _turned(s, scale(i), sparsity, pattern, along, scope, magnitude, i, len(scores))
            continue
        one = _pack(s, scale(i), magnitude, masks[i], held, kind == "unstructured" and scope == "tensor")
        if scope == "row":
            bad = _native._C.prune_rows_cpu(one, pruned_of(part, s.shape[-1]), threads)
        elif kind == "unstructured":
            bad = _native._C.prune_select_cpu([one], pruned_of(part, s.numel()), threads)
        elif kind == "n:m":
            bad = _native._C.prune_groups_cpu(one, a, b, threads)
        elif kind == "2:4t":
            bad = _native._C.prune_transposable_cpu(one, threads)
        else:
            high, wide = {"row": (1, s.shape[1]), "column": (s.shape[0], 1), "block": (a, b)}[kind]
            count = -(-s.shape[0] // high) * -(-s.shape[1] // wide)
            bad = _native._C.prune_blocks_cpu(one, high, wide, pruned_of(part, count), threads)
        if bad:
            raise ValueError(nan_message(i, len(scores), bad))
    return masks


def _turned(
    s: Tensor, scale: Tensor | None, sparsity: float | None, pattern: str, along: int, scope: str, magnitude: bool,
    index: int, count: int,
) -> Tensor:  # fmt: skip
    """A mask whose groups run along another dimension than the last."""
    if scale is not None:
        s, scale, magnitude = reference.values(s, scale, magnitude), None, False
    moved = s.movedim(along, -1)
    try:
        (mask,) = forward([moved], [], sparsity, pattern, -1, scope, magnitude, False)
    except ValueError:
        reference.check_values([s if i == index else s[:0] for i in range(count)])
        raise
    return pack(unpack(mask, moved.shape[-1]).movedim(-1, along))


def serves_spread(
    score: Tensor, scale: Tensor | None, magnitude: bool, low: int, shift: int, check: bool
) -> Support:  # fmt: skip
    """float32, bfloat16 and float16, any strides."""
    return _serves(FLOATS, score)


def spread(score: Tensor, scale: Tensor | None, magnitude: bool, low: int, shift: int, check: bool) -> Tensor:
    """As ``fastlm.reference.prune_mask.spread``; of scores that hold NaN only their count is right."""
    if not score.numel():
        return torch.zeros(1 + BINS, dtype=torch.int64)
    held: list[Tensor] = []
    one = _pack(score, scale, magnitude, _empty_mask(score), held, True)
    last = min(low + (BINS << shift), 2**31) - 1
    found = torch.tensor(_native._C.prune_histogram_cpu(one, low, last, shift, torch.get_num_threads()))
    return torch.cat([found[:1], found[2:]])


def serves_cut(score: Tensor, scale: Tensor | None, magnitude: bool, key: int, ties: int) -> Support:
    """float32, bfloat16 and float16, any strides."""
    return _serves(FLOATS, score)


def cut(score: Tensor, scale: Tensor | None, magnitude: bool, key: int, ties: int) -> Tensor:
    """As ``fastlm.reference.prune_mask.cut``."""
    mask, held = _empty_mask(score), list[Tensor]()
    if score.numel():
        one = _pack(score, scale, magnitude, mask, held, True)
        _native._C.prune_cut_cpu(one, key, ties, torch.get_num_threads())
    return mask


def _empty_mask(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8)


def _serves(dtypes: tuple[torch.dtype, ...], t: Tensor) -> Support:
    why = _native.missing()
    if why:
        return Support(False, why)
    if t.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return Support(False, f"the cpu kernel takes {names}, not {str(t.dtype).removeprefix('torch.')}")
    return YES


def serves_apply(weight: Tensor, mask: Tensor) -> Support:
    """float32, bfloat16 and float16, any strides that collapse to three leading axes."""
    found = _serves(FLOATS, weight)
    if found.ok and _native.copied((("weight", weight),), None):
        return Support(False, "weight has more than three leading axes that do not collapse")
    return found


def apply(weight: Tensor, mask: Tensor) -> None:
    """As ``fastlm.reference.prune_mask.apply``."""
    if not weight.numel():
        return
    mask = mask.contiguous()
    if weight.is_contiguous() and weight.shape[-1] % 8 == 0:
        weight = weight.view(-1)
    sizes, packed, _, _ = _native.rows(weight.shape, (weight,))
    target = (mask.data_ptr(), DTYPE[torch.uint8], 0, 0, 0, 0)
    _native._C.apply_mask_cpu(sizes, packed[0], target, torch.get_num_threads())


def serves_count(mask: Tensor) -> Support:
    """Everything."""
    return _serves((torch.uint8,), mask)


def count(mask: Tensor) -> Tensor:
    """As ``fastlm.reference.prune_mask.count``."""
    mask = mask.contiguous()
    packed = (mask.data_ptr(), DTYPE[torch.uint8], 0, 0, 0, 0)
    return torch.tensor(_native._C.mask_count_cpu(packed, mask.numel(), torch.get_num_threads()))


def serves_unpack(mask: Tensor, columns: int) -> Support:
    """Everything."""
    return _serves((torch.uint8,), mask)


def unpack(mask: Tensor, columns: int) -> Tensor:
    """As ``fastlm.reference.prune_mask.unpack``."""
    out = mask.new_empty((*mask.shape[:-1], columns), dtype=torch.bool)
    _bits(mask, out, columns, False)
    return out


def serves_pack(keep: Tensor) -> Support:
    """Everything."""
    return _serves((torch.bool,), keep)


def pack(keep: Tensor) -> Tensor:
    """As ``fastlm.reference.prune_mask.pack``."""
    out = keep.new_empty((*keep.shape[:-1], (keep.shape[-1] + 7) // 8), dtype=torch.uint8)
    _bits(keep, out, keep.shape[-1], True)
    return out


def _bits(source: Tensor, target: Tensor, columns: int, packing: bool) -> None:
    if not target.numel():
        return
    source = source.contiguous()
    kind = DTYPE[torch.uint8]
    rows = source.numel() // source.shape[-1]
    _native._C.mask_bits_cpu(
        (source.data_ptr(), kind, 0, 0, 0, 0), (target.data_ptr(), kind, 0, 0, 0, 0), rows, columns, packing,
        torch.get_num_threads(),
    )  # fmt: skip


def serves_adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], masks: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> Support:  # fmt: skip
    """Contiguous float32, bfloat16 and float16."""
    for i, p in enumerate(params):
        found = _serves(FLOATS, p)
        if not found.ok:
            return found
        if not (p.is_contiguous() and exp_avgs[i].is_contiguous() and exp_avg_sqs[i].is_contiguous()):
            return Support(False, "the cpu kernel takes contiguous weights and moments")
        if grad_scale is not None and not grads[i].is_contiguous():
            return Support(False, "the cpu kernel unscales contiguous gradients")
    return YES


def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], masks: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """As ``fastlm.reference.prune_mask.adamw``."""
    options = _native._C.AdamW(lr, beta1, beta2, eps, weight_decay)
    threads, scalar = torch.get_num_threads(), _native.scalar
    for p, g, m, v, step, mask in zip(params, grads, exp_avgs, exp_avg_sqs, steps, masks, strict=True):
        g, mask = g.contiguous(), mask.contiguous()
        rows, columns = (1, p.numel()) if p.shape[-1] % 8 == 0 else (p.numel() // p.shape[-1], p.shape[-1])
        _native._C.masked_adamw_cpu(
            rows, columns, scalar(p), scalar(g), scalar(m), scalar(v), scalar(step), scalar(mask), options,
            scalar(grad_scale), scalar(found_inf), threads,
        )  # fmt: skip
