"""Wanda and SparseGPT: what a layer's inputs say about its weights.

Inputs are seen by pre-hooks while the model's own forward runs, so no model is written again here. Layers are taken block by
block (an item of the outermost ModuleList), in the order in which the forward calls them; a block is seen with those before
it pruned, and the forward ends where the block has been. One forward of all batches before them says who is called how
often, and that all is finite before anything changes.

Wanda (Sun et al. 2023, eq. 1): of each output row the lowest |w_ij| * ||x_j|| go.
SparseGPT (Frantar and Alistarh 2023, algorithm 1): with H = X X^T + damping and U the upper Cholesky factor of H^-1, columns
go from left to right; in column j those with the lowest w_ij^2 / U_jj^2 of a block of 128 columns go, and what that takes
from the output is taken up by the columns right of it: W -= (w_j - q_j) / U_jj * U_j.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.compress.masks import MASK
from fastlm.nn.masked import hold_, release_
from fastlm.reference.prune_mask import parse, pruned_of

COLUMNS = 128  # of a block of SparseGPT
DAMPING = 0.01  # of the mean of H's diagonal
MOST_DAMPING = 100.0

Put = Callable[[nn.Linear, Tensor], None]


class _Seen(Exception):
    """No error: the forward has gone as far as it is needed."""


class Inputs:
    """What is kept of a layer's inputs X [tokens, in]: X^T X, or the sums of squares of its columns; float64 on a CPU."""

    def __init__(self, module: nn.Linear, whole: bool) -> None:
        size = module.weight.shape[1]
        self.dtype = torch.float64 if module.weight.device.type == "cpu" else torch.float32
        shape = (size, size) if whole else (size,)
        self.sums = torch.zeros(shape, dtype=self.dtype, device=module.weight.device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).to(self.dtype)
        self.tokens += x.shape[0]
        self.sums += x.T @ x if self.sums.dim() == 2 else x.square().sum(0)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _block_of(model: nn.Module, path: str) -> str:
    parts = path.split(".") if path else []
    module = model
    for i, name in enumerate(parts):
        if isinstance(module, nn.ModuleList):
            return ".".join(parts[: i + 1])
        module = getattr(module, name)
    return path


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a Linear was called on, by position or by its name."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def _order(model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[Any]) -> dict[str, list[int]]:
    """How often each batch calls each layer, in the order of their first calls. ValueError where an input is not finite."""
    number = 0
    called: dict[str, list[int]] = {}
    finite: dict[str, Tensor] = {}

    def seen(path: str, x: Tensor) -> None:
        called.setdefault(path, [0] * len(batches))[number] += 1
        finite[path] = x.detach().isfinite().all() & finite.get(path, True)

    hook = lambda path: lambda _, args, kwargs: seen(path, _input(args, kwargs))
    handles = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in layers.items()]
    try:
        for i, batch in enumerate(batches):
            number = i
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for path, good in finite.items():
        if not good:
            raise ValueError(f"prune: the inputs of {path} are not finite on the calibration")
    return called


def _see(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    calls: Mapping[str, list[int]],
    batches: Sequence[Any],
    whole: bool,
) -> dict[str, Inputs]:
    """The inputs of ``layers``. The forward of a batch ends where it has called each of them as often as ``calls`` says."""
    found = {path: Inputs(m, whole) for path, m in layers.items()}
    left: dict[str, int] = {}

    def seen(path: str, x: Tensor) -> None:
        found[path].add(x)
        left[path] -= 1
        if all(count <= 0 for count in left.values()):
            raise _Seen

    hook = lambda path: lambda _, args, kwargs: seen(path, _input(args, kwargs))
    handles = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in layers.items()]
    try:
        for number, batch in enumerate(batches):
            left.update({path: calls[path][number] for path in layers})
            with contextlib.suppress(_Seen):
                _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def run(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Sequence[Any],
    method: str,
    sparsity: float | None,
    pattern: str,
    put: Put,
) -> dict[str, str]:
    """Prunes ``layers`` by "wanda" or "sparsegpt"; ``put`` gives a layer its mask. Returns a note for each.

    Whatever it raises, the model is what it was: a copy of the weights that changed is kept until the end.
    """
    if not batches:
        raise ValueError("prune: calibration is empty; it must be one batch at least")
    for path, module in layers.items():
        if not module.weight.isfinite().all():
            raise ValueError(f"prune: {path}.weight is not finite")
    training = {m: m.training for m in model.modules()}
    model.eval()
    notes: dict[str, str] = {}
    before: dict[str, tuple[Tensor, Tensor | None]] = {}  # what changed layers were
    try:
        order = _order(model, layers, batches)
        blocks: dict[str, dict[str, nn.Linear]] = {}
        for path in order:
            blocks.setdefault(_block_of(model, path), {})[path] = layers[path]
        for block in blocks.values():
            for path, inputs in _see(model, block, order, batches, method == "sparsegpt").items():
                if not inputs.sums.isfinite().all():
                    raise ValueError(f"prune: the inputs of {path} are not finite on the calibration")
                module = block[path]
                before[path] = module.weight.clone(), module._buffers.get(MASK)
                if method == "wanda":
                    put(module, wanda(module.weight, inputs.sums.sqrt().float(), sparsity, pattern))
                    notes[path] = f"{inputs.tokens:,} tokens"
                    continue
                old = module._buffers.get(MASK)
                weight, mask, damping = sparsegpt(module.weight, inputs.sums, sparsity, pattern, old)
                module.weight.copy_(weight)
                put(module, mask)
                notes[path] = f"{inputs.tokens:,} tokens, damping {damping:g}"
    except BaseException:  # an interrupt too: a model that is pruned in part is none that anybody wants
        for path, (weight, old) in before.items():
            release_(layers[path])
            if old is not None:
                hold_(layers[path], old)
            layers[path].weight.copy_(weight)
        raise
    finally:
        for one, was in training.items():
            one.training = was
    return notes | {path: "left: the calibration never called it" for path in layers if path not in order}


def wanda(weight: Tensor, norms: Tensor, sparsity: float | None, pattern: str) -> Tensor:
    """The mask of weight [out, in] by |w| * norms [in], of each output row or each group of it."""
    scope = "row" if pattern == "unstructured" else "tensor"
    return ops.prune_mask(weight, sparsity=sparsity, pattern=pattern, scope=scope, magnitude=True, scale=norms)


def factor(h: Tensor) -> tuple[Tensor, float]:
    """The upper Cholesky factor of (h + damping)^-1, and the damping as a part of the diagonal's mean.

    Where the factorisation fails the damping is raised tenfold. Raises ValueError where it fails at any.
    """
    mean, damping = h.diagonal().mean(), DAMPING
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    while damping <= MOST_DAMPING:
        lower, bad = torch.linalg.cholesky_ex(h + damping * mean * eye)
        if not bad:
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not bad and upper.isfinite().all():
            return upper, damping
        damping *= 10
    raise ValueError(
        f"prune: SparseGPT's matrix of inputs has no Cholesky factor, not with a damping of {MOST_DAMPING:g}"
    )


def sparsegpt(
    weight: Tensor, h: Tensor, sparsity: float | None, pattern: str, old: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Weight [out, in] mended, its mask, and the damping used. ``h`` = X^T X [in, in]; ``old`` is a mask that stays."""
    rows, columns = weight.shape
    w, h = weight.to(h.dtype).clone(), h.clone()
    keep = torch.ones_like(weight, dtype=torch.bool) if old is None else ops.mask_to_bool(old, columns)
    dead = h.diagonal() == 0  # inputs that are always 0: their weights do nothing
    h.diagonal()[dead] = h.diagonal()[~dead].mean() if (~dead).any() else 1.0
    w[:, dead] = 0
    w[~keep] = 0
    upper, damping = factor(h)
    kind, _, m = parse(pattern)
    step = COLUMNS if kind == "unstructured" else COLUMNS // m * m
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        part, errors, u = w[:, begin:end], torch.zeros_like(w[:, begin:end]), upper[begin:end, begin:end]
        gone = torch.zeros_like(part, dtype=torch.bool)
        if kind == "unstructured":
            assert sparsity is not None
            count = pruned_of(sparsity, rows * end) - pruned_of(sparsity, rows * begin)
            gone = ~_keep(_scores(part, u.diagonal(), keep[:, begin:end]), count / gone.numel(), pattern)
        for j in range(end - begin):
            if kind != "unstructured" and j % m == 0:
                group = slice(j, min(j + m, end - begin))
                scores = _scores(part[:, group], u.diagonal()[group], keep[:, begin:end][:, group])
                gone[:, group] = ~_keep(scores, None, pattern)
            left = part[:, j].masked_fill(gone[:, j] | ~keep[:, begin + j], 0.0)
            errors[:, j] = (part[:, j] - left) / u[j, j]
            part[:, j:] -= errors[:, j : j + 1] * u[j, j:]
            part[:, j] = left
        keep[:, begin:end] &= ~gone
        w[:, end:] -= errors @ upper[begin:end, end:]
    mask = ops.bool_to_mask(keep)
    mended = w.to(weight.dtype)
    ops.apply_mask_(mended, mask)
    return mended, mask, damping


def _scores(w: Tensor, diagonal: Tensor, keep: Tensor) -> Tensor:
    """w^2 / U_jj^2; below all of them where the weight is gone already."""
    return (w / diagonal).square().float().masked_fill(~keep, -1.0)


def _keep(scores: Tensor, sparsity: float | None, pattern: str) -> Tensor:
    return ops.mask_to_bool(ops.prune_mask(scores, sparsity=sparsity, pattern=pattern), scores.shape[1])
