"""prune_mask in plain PyTorch: the definition that every backend is held to.

Scores are compared as float32 (float64 ones as such): NaN < -inf < ... < -0 = +0 < ... < inf, and of equal scores the one
with the lower flat index is the lower. With ``magnitude`` a score is |x|, with ``scales`` |x| * scale of its column.
The lowest go. How many, with round() half to even as Python's:

    unstructured      round(sparsity * numel) of the tensor, of each slice along ``dim`` (scope "row"), or of all tensors
                      of the list together (scope "global"), whose flat indices go on from tensor to tensor
    n:m               of each m adjacent ones along ``dim`` all but n; of a shorter last group all but n
    2:4t              of each 4 x 4 block two in each row and column, so that what stays has the largest sum
    row, column       round(sparsity * rows) rows, or columns, by the sum of their scores
    block:RxC         round(sparsity * blocks) blocks by their sum; blocks at the edges are short

Sums: element i of a row, column or block (in row-major order of the whole block) is added to lane i modulo 16, each lane
in order, and the lanes by the tree of ``csrc/cpu/simd.h``. A mask is uint8 [..., ceil(C/8)]: bit i of byte b is column
8b + i, 1 keeps, bits behind C are 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backend import YES, Support

LANES = 16
BINS = 2048  # of a histogram of keys
LOWEST = -(2**31)  # a bound of float32 keys, and the key of NaN in a histogram
LARGEST = 2.0**124  # of a 2:4t score: eight of them can be added


def parse(pattern: str) -> tuple[str, int, int]:
    """("unstructured" | "row" | "column" | "2:4t", 0, 0), ("n:m", n, m) or ("block", rows, columns); ValueError else."""
    if pattern in ("unstructured", "row", "column", "2:4t"):
        return pattern, 0, 0
    kind, cut, rest = ("block", "x", pattern[6:]) if pattern.startswith("block:") else ("n:m", ":", pattern)
    left, _, right = rest.partition(cut)
    if left.isascii() and left.isdigit() and right.isascii() and right.isdigit():
        a, b = int(left), int(right)
        if (kind == "block" and a >= 1 and b >= 1) or (kind == "n:m" and 1 <= a < b <= 32):
            return kind, a, b
    raise ValueError(
        f"prune_mask: pattern is {pattern!r}; it must be 'unstructured', 'n:m' with 1 <= n < m <= 32 such as '2:4', "
        f"'2:4t', 'row', 'column' or 'block:RxC'"
    )


def pruned_of(sparsity: float, count: int) -> int:
    """How many of ``count`` go."""
    return min(round(sparsity * count), count)


def values(score: Tensor, scale: Tensor | None, magnitude: bool) -> Tensor:
    """What is compared: score, |score| or |score| * scale, in float32 at least."""
    x = score.to(torch.promote_types(score.dtype, torch.float32))
    if magnitude:
        x = x.abs()
    return x if scale is None else x * scale.to(x.dtype)


def check_values(tensors: Sequence[Tensor]) -> None:
    """Raises ValueError where a score is NaN."""
    for i, x in enumerate(tensors):
        if bad := int(x.isnan().sum()):
            raise ValueError(nan_message(i, len(tensors), bad))


def nan_message(index: int, tensors: int, bad: int) -> str:
    name = "score" if tensors == 1 else f"score[{index}]"
    return f"prune_mask: {name} holds {bad} NaN; scores must be numbers (what made them has diverged)"


def keys(x: Tensor) -> Tensor:
    """int64 numbers in the order of float32 or float64 ``x``, NaN the lowest."""
    bits = x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32).to(torch.int64)
    sign = -(2**63) if x.dtype == torch.float64 else -(2**31)
    key = torch.where(bits < 0, sign - bits, bits)
    return key.masked_fill_(x.isnan(), -(2**63))


def lowest(key: Tensor, count: int) -> Tensor:
    """True for the ``count`` lowest along the last axis, of equal ones the first."""
    out = torch.zeros_like(key, dtype=torch.bool)
    order = key.argsort(dim=-1, stable=True)[..., :count]
    return out.scatter_(-1, order, True)


def lane_sums(x: Tensor) -> Tensor:
    """The sum along the last axis over sixteen lanes and a tree."""
    x = F.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    lanes = x.new_zeros(*x.shape[:-2], LANES)
    for i in range(x.shape[-2]):
        lanes = lanes + x[..., i, :]
    s = (lanes[..., :8] + lanes[..., 8:]).unbind(-1)
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))


@functools.cache
def transposable() -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """Every way to fill a 4 x 4 block, by what the upper two rows leave to the lower two.

    19 classes in a fixed order, each the pairs of rows that can be above and those that can be below; a row is the bits
    of its two columns. Of equal sums the first class, the first pair above and the first below count.
    """
    rows = [sum(1 << c for c in pair) for pair in itertools.combinations(range(4), 2)]
    counts = lambda pair: tuple((pair[0] >> c & 1) + (pair[1] >> c & 1) for c in range(4))
    by_count: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for pair in itertools.product(rows, rows):
        by_count.setdefault(counts(pair), []).append(pair)
    return [(above, by_count[tuple(2 - n for n in count)]) for count, above in by_count.items()]


def _transposable(x: Tensor) -> Tensor:
    """True where the 2:4t mask of x [R, C] keeps."""
    rows, columns = x.shape
    x = x.nan_to_num(-LARGEST, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
    block = x.view(rows // 4, 4, columns // 4, 4).transpose(1, 2)  # [.., .., row, column]
    total = {}
    for row, bits in itertools.product(range(4), {p for above, _ in transposable() for pair in above for p in pair}):
        first, second = (c for c in range(4) if bits >> c & 1)
        total[row, bits] = block[..., row, first] + block[..., row, second]
    best: Tensor | None = None
    bits_of_best = torch.zeros((), dtype=torch.int64)
    for above, below in transposable():
        top = torch.stack([total[0, a] + total[1, b] for a, b in above], -1)
        bottom = torch.stack([total[2, a] + total[3, b] for a, b in below], -1)
        (t, i), (b, j) = _first_max(top), _first_max(bottom)
        sums = t + b
        code = torch.tensor([a | b << 4 for a, b in above], device=x.device)[i]
        code = code | torch.tensor([a << 8 | b << 12 for a, b in below], device=x.device)[j]
        if best is None:
            best, bits_of_best = sums, code
        else:
            better = sums > best
            best, bits_of_best = torch.where(better, sums, best), torch.where(better, code, bits_of_best)
    keep = bits_of_best.unsqueeze(-1) >> torch.arange(16, device=x.device) & 1
    return keep.bool().unflatten(-1, (4, 4)).transpose(1, 2).reshape(rows, columns)


def _first_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value along the last axis, and the first place of it."""
    top = x.amax(-1, keepdim=True)
    return top.squeeze(-1), (x == top).to(torch.uint8).argmax(-1)


def _n_of_m(key: Tensor, n: int, m: int) -> Tensor:
    """True where it goes, groups along the last axis."""
    columns = key.shape[-1]
    short = columns % m
    whole = key[..., : columns - short].unflatten(-1, (-1, m))
    parts = [lowest(whole, m - n).flatten(-2)]
    if short:
        parts.append(lowest(key[..., columns - short :], max(short - n, 0)))
    return torch.cat(parts, -1)


def _blocks(x: Tensor, rows: int, columns: int, sparsity: float) -> Tensor:
    """True where the block goes."""
    high, wide = -(-x.shape[0] // rows), -(-x.shape[1] // columns)
    padded = F.pad(x, (0, wide * columns - x.shape[1], 0, high * rows - x.shape[0]))
    sums = lane_sums(padded.view(high, rows, wide, columns).transpose(1, 2).flatten(2))
    gone = lowest(keys(sums).flatten(), pruned_of(sparsity, high * wide)).view(high, wide)
    return gone.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: x.shape[0], : x.shape[1]]


def _one(x: Tensor, sparsity: float, pattern: str, dim: int, scope: str) -> Tensor:
    """True where x goes."""
    kind, a, b = parse(pattern)
    if kind == "2:4t":
        return ~_transposable(x)
    if kind == "row":
        return lowest(keys(lane_sums(x)), pruned_of(sparsity, x.shape[0])).unsqueeze(1).expand_as(x)
    if kind == "column":
        return lowest(keys(lane_sums(x.T)), pruned_of(sparsity, x.shape[1])).unsqueeze(0).expand_as(x)
    if kind == "block":
        return _blocks(x, a, b, sparsity)
    key = keys(x)
    if kind == "n:m":
        return _n_of_m(key.movedim(dim, -1), a, b).movedim(-1, dim)
    if scope == "row":
        return lowest(key.movedim(dim, -1), pruned_of(sparsity, x.shape[dim])).movedim(-1, dim)
    return lowest(key.flatten(), pruned_of(sparsity, x.numel())).view(x.shape)


# ------------------------------------------------------------------------------------------- what a backend must have


def serves_forward(
    scores: Sequence[Tensor], scales: Sequence[Tensor], sparsity: float | None, pattern: str, dim: int, scope: str,
    magnitude: bool, check: bool,
) -> Support:  # fmt: skip
    """Everything."""
    return YES


def forward(
    scores: Sequence[Tensor], scales: Sequence[Tensor], sparsity: float | None, pattern: str, dim: int, scope: str,
    magnitude: bool, check: bool,
) -> list[Tensor]:  # fmt: skip
    """The masks of ``scores``. Raises ValueError for a NaN on a CPU, elsewhere where ``check``."""
    found = [values(s, scales[i] if scales else None, magnitude) for i, s in enumerate(scores)]
    if check or scores[0].device.type == "cpu":
        check_values(found)
    part = 0.0 if sparsity is None else sparsity
    if scope == "global":
        widest = torch.float64 if any(x.dtype == torch.float64 for x in found) else torch.float32
        found = [x.to(widest) for x in found]  # keys of two types cannot be compared
        flat = torch.cat([keys(x).flatten() for x in found])
        gone = lowest(flat, pruned_of(part, flat.numel())).split([x.numel() for x in found])
        return [pack(~g.view(x.shape)) for g, x in zip(gone, found, strict=True)]
    return [pack(~_one(x, part, pattern, dim, scope)) if x.numel() else pack(x.bool()) for x in found]


def serves_spread(
    score: Tensor, scale: Tensor | None, magnitude: bool, low: int, shift: int, check: bool
) -> Support:  # fmt: skip
    """Everything."""
    return YES


def spread(score: Tensor, scale: Tensor | None, magnitude: bool, low: int, shift: int, check: bool) -> Tensor:
    """int64 [1 + BINS]: how many scores are NaN (on a GPU where ``check``), and how many keys lie in each of the ranges
    [low + i 2^shift, low + (i + 1) 2^shift). NaN count in the lowest."""
    out = torch.zeros(1 + BINS, dtype=torch.int64, device=score.device)
    x = score.reshape(score.shape[:-1].numel(), score.shape[-1])
    rows = max((1 << 18) // max(x.shape[1], 1), 1)
    for at in range(0, x.shape[0], rows):
        found = values(x[at : at + rows], scale, magnitude)
        if check or score.device.type == "cpu":
            out[0] += found.isnan().sum()
        bins = (keys(found).clamp_(min=LOWEST) - low) >> shift
        out[1:] += torch.bincount(bins[(bins >= 0) & (bins < BINS)], minlength=BINS)
    return out


def serves_cut(score: Tensor, scale: Tensor | None, magnitude: bool, key: int, ties: int) -> Support:
    """Everything."""
    return YES


def cut(score: Tensor, scale: Tensor | None, magnitude: bool, key: int, ties: int) -> Tensor:
    """The mask where the keys below ``key`` go, and of those equal to it the first ``ties`` by flat index."""
    found = keys(values(score, scale, magnitude)).clamp_(min=LOWEST)
    equal = (found == key).flatten()
    tied = equal & (equal.cumsum(0) <= ties)
    return pack((found >= key) & ~tied.view(found.shape))


def serves_apply(weight: Tensor, mask: Tensor) -> Support:
    """Everything."""
    return YES


def apply(weight: Tensor, mask: Tensor) -> None:
    """weight becomes +0 where the mask is 0."""
    weight.masked_fill_(~unpack(mask, weight.shape[-1]), 0.0)


def serves_count(mask: Tensor) -> Support:
    """Everything."""
    return YES


def count(mask: Tensor) -> Tensor:
    """The ones, int64 []."""
    return unpack(mask, 8 * mask.shape[-1]).sum()


def serves_unpack(mask: Tensor, columns: int) -> Support:
    """Everything."""
    return YES


def unpack(mask: Tensor, columns: int) -> Tensor:
    """bool [..., columns]."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten(-2)[..., :columns].bool()


def serves_pack(keep: Tensor) -> Support:
    """Everything."""
    return YES


def pack(keep: Tensor) -> Tensor:
    """uint8 [..., ceil(C/8)] of bool [..., C]."""
    bits = F.pad(keep.to(torch.uint8), (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def serves_adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], masks: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> Support:  # fmt: skip
    """Everything for which PyTorch has a fused AdamW."""
    return YES


def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], masks: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """PyTorch's fused AdamW, and then the masks."""
    from torch.optim.adamw import adamw as fused

    fused(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], list(steps), fused=True, amsgrad=False,
        beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False, grad_scale=grad_scale,
        found_inf=found_inf,
    )  # fmt: skip
    for *held, mask in zip(params, exp_avgs, exp_avg_sqs, masks, strict=True):
        for t in held:
            apply(t, mask)
