"""Pruning the linear layers of a model: which weights stay, by one of three methods.

    magnitude    |w|                                        no data
    wanda        |w| * ||x|| within each output row         Sun et al. 2023, a calibration
    sparsegpt    optimal brain surgeon, other weights mend  Frantar and Alistarh 2023, a calibration

Zeros alone make no dense kernel faster and no tensor smaller: the report says so, and what does.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastlm import ops
from fastlm.compress import calibrate
from fastlm.compress.masks import MASK, masked
from fastlm.nn.masked import hold_, release_
from fastlm.ops._library import sharded
from fastlm.ops._prune_mask_arguments import check_sparsity
from fastlm.reference.prune_mask import parse

METHODS = ("magnitude", "wanda", "sparsegpt")
SCOPES = ("layer", "row", "global")
HEADS = ("head", "lm_head", "embed_out", "output_projection")
ADVICE = (
    "Zeros alone do not make a dense matrix product faster, nor a tensor smaller: what does is a format that leaves them "
    "out (a compressed file, 2:4 kernels on a GPU that has them), 8-bit weights, or whole heads, channels and layers removed."
)


@dataclass
class Row:
    """A linear layer: how far its mask and its weights are zero, or ``why`` it was left. ``note``: what a method says."""

    module: str
    shape: tuple[int, int]
    by_mask: float | None = None
    by_weight: float | None = None
    why: str = ""
    note: str = ""


@dataclass
class Pruned:
    """What ``prune`` did: every linear layer of the model, as a table when printed."""

    method: str
    pattern: str
    rows: list[Row] = field(default_factory=list)

    @property
    def pruned(self) -> list[Row]:
        return [row for row in self.rows if not row.why]

    @property
    def sparsity(self) -> float:
        """The part of the pruned layers' weights that is zero, by their masks."""
        count = sum(r.shape[0] * r.shape[1] for r in self.pruned)
        return sum((r.by_mask or 0.0) * r.shape[0] * r.shape[1] for r in self.pruned) / max(count, 1)

    def __str__(self) -> str:
        head = ("layer", "shape", "zero by mask", "zero by weight", "")
        lines = [head]
        for r in self.rows:
            shape = f"{r.shape[0]}x{r.shape[1]}"
            part = lambda x: "" if x is None else f"{x:.4%}"
            lines.append((r.module, shape, part(r.by_mask), part(r.by_weight), f"left: {r.why}" if r.why else r.note))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        text = ["  ".join([*(line[i].ljust(widths[i]) for i in range(4)), line[4]]).rstrip() for line in lines]
        kind = f"{self.method}, {self.pattern}: {self.sparsity:.4%} of {len(self.pruned)} layers' weights are zero"
        return "\n".join([*text, kind, ADVICE])


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """By glob, by a path that it lies below, or by its last name."""
    last = path.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(path, p) or path.startswith(p + ".") or last == p for p in patterns)


def _patterns(given: str | Sequence[str] | None) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def _choose(model: nn.Module, include: Any, exclude: Any) -> tuple[dict[str, nn.Linear], list[Row]]:
    """The layers to prune by path, and a row for each that is left. ValueError for a pattern that matches none."""
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    wanted, unwanted = _patterns(include), _patterns(exclude)
    for name, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(_matches(path, [pattern]) for path in linear):
                known = ", ".join(sorted({path.rpartition(".")[2] for path in linear})) or "none"
                raise ValueError(f"prune: {name} names {pattern!r}, which no linear layer matches; they are {known}")
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    chosen: dict[str, nn.Linear] = {}
    left: list[Row] = []
    for path, module in linear.items():
        own = module._parameters.get("weight")
        others = [o for o in owners.get(id(own), ()) if o != path]
        why = ""
        if wanted and not _matches(path, wanted):
            why = "not named by include"
        elif _matches(path, unwanted):
            why = "named by exclude"
        elif own is None:
            why = "its weight is computed from others (a parametrization)"
        elif others:
            why = f"it shares {others[0]}.weight"
        elif not wanted and path.rpartition(".")[2] in HEADS:
            why = "the output head (include names it)"
        elif not module.weight.is_floating_point():
            why = f"its weight is {str(module.weight.dtype).removeprefix('torch.')}"
        if why:
            left.append(Row(path, (module.weight.shape[0], module.weight.shape[1]), why=why))
        else:
            chosen[path] = module
    if not chosen:
        raise ValueError(
            "prune: no layer is left to prune: " + ("; ".join(f"{r.module}: {r.why}" for r in left) or "none")
        )
    return chosen, left


def _check(method: str, sparsity: float | None, pattern: str, scope: str, calibration: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"prune: method is {method!r}; it must be one of {', '.join(METHODS)}")
    if scope not in SCOPES:
        raise ValueError(f"prune: scope is {scope!r}; it must be one of {', '.join(SCOPES)}")
    kind = parse(pattern)[0]
    if kind == "unstructured" and sparsity is None:
        raise ValueError("prune: sparsity is None; with pattern 'unstructured' it must be between 0 and 1")
    if method != "magnitude" and calibration is None:
        raise ValueError(f"prune: method {method!r} needs calibration, batches of the model's inputs; it is None")
    if method != "magnitude" and kind not in ("unstructured", "n:m"):
        raise ValueError(f"prune: pattern is {pattern!r}; method {method!r} makes 'unstructured' and 'n:m'")
    if scope != "layer" and (kind != "unstructured" or method != "magnitude"):
        raise ValueError(f"prune: scope is {scope!r}; it is for method 'magnitude' with pattern 'unstructured'")
    check_sparsity(sparsity, kind, pattern)


def prune(
    model: nn.Module,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    method: str = "magnitude",
    scope: str = "layer",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    calibration: Iterable[Any] | None = None,
) -> Pruned:
    """Prunes the linear layers of ``model`` in place. They become ``fastlm.nn.MaskedLinear`` by their class alone.

    Each weight keeps its key and holds zeros; the mask is one more key, ``weight_mask``, of one bit a weight. A mask that
    is there already stays: what is zero stays zero, so pruning to a half twice is a half. "wanda" and "sparsegpt" keep a
    copy of the weights that they changed until they end, so that what fails half way leaves the model as it was.

    Weights may be DTensors (FSDP2, tensor parallelism) with "magnitude": every rank calls it. Ranks tell each other counts and
    bits, no weights; each has the mask of the whole, which is that of one process.

    Args:
        sparsity, pattern: as of ``fastlm.ops.prune_mask``.
        method: "magnitude"; "wanda" or "sparsegpt", which run the model on ``calibration`` block by block, each block on
            what the pruned ones before it give.
        scope: what a count is of: each "layer", each "row" of one, or "global", all layers together. Global magnitude was
            several times worse than by layer on the models measured, and warns.
        include, exclude: patterns of module paths: a glob ("blocks.*.mlp.*"), a path and all below it ("blocks.0"), or a
            last name ("qkv"). Without include all linear layers but the output head; embeddings and norms are none.
        calibration: batches of inputs; a tuple is the model's positional arguments. Read once.

    Returns:
        A table of every linear layer: how far it is zero, by mask and by weight, or why it was left.

    Raises:
        ValueError: an unknown method or scope, a pattern that matches no layer, a calibration that lacks or is not finite.
    """
    _check(method, sparsity, pattern, scope, calibration)
    chosen, left = _choose(model, include, exclude)
    notes: dict[str, str] = {}
    if method == "magnitude":
        if scope == "global":
            warnings.warn(
                "prune: one threshold over all layers was several times worse than one for each on the models measured; "
                "scope='layer' is the default",
                stacklevel=2,
            )
        weights = [m.weight.detach() for m in chosen.values()]
        where = {"layer": "tensor", "row": "row", "global": "global"}[scope]
        found = _magnitude(weights, sparsity=sparsity, pattern=pattern, scope=where, magnitude=True)
        for module, mask in zip(chosen.values(), found, strict=True):
            _put(module, mask)
    else:
        assert calibration is not None
        if cut := [path for path, module in chosen.items() if sharded(module.weight)]:
            raise ValueError(
                f"prune: {cut[0]}.weight is a DTensor; method {method!r} needs weights that are whole in the process, only "
                f"'magnitude' takes sharded ones"
            )
        notes = calibrate.run(model, chosen, list(calibration), method, sparsity, pattern, _put)
    report = Pruned(method, pattern, [*left])
    for path, module in chosen.items():
        if path in notes and notes[path].startswith("left"):
            shape = (module.weight.shape[0], module.weight.shape[1])
            report.rows.append(Row(path, shape, why=notes[path].removeprefix("left: ")))
            continue
        report.rows.append(measured(path, module, notes.get(path, "")))
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    report.rows.sort(key=lambda row: order[row.module])
    return report


def _magnitude(weights: list[Tensor], **options: Any) -> list[Tensor]:
    """Masks of the wholes. Of DTensors ranks tell each other counts and bits, and no weights."""
    if not sharded(*weights):
        return ops.prune_mask(weights, **options)
    from fastlm.ops import _dtensor

    if not all(map(sharded, weights)):
        raise ValueError("prune: some of the weights are DTensors and some are not; all must be, or none")
    return _dtensor.whole_masks(weights, **options)


def _zeros(weight: Tensor) -> int:
    if not sharded(weight):
        return weight.numel() - int(weight.count_nonzero())
    return int((weight == 0).sum().full_tensor())  # type: ignore[attr-defined]


def measured(path: str, module: nn.Linear, note: str = "") -> Row:
    """The row of a layer that has a mask, counted now."""
    count = module.weight.numel()
    kept = int(ops.mask_count(module._buffers[MASK]))  # type: ignore[arg-type]
    zeros = _zeros(module.weight.detach())
    shape = (module.weight.shape[0], module.weight.shape[1])
    return Row(path, shape, (count - kept) / max(count, 1), zeros / max(count, 1), note=note)


def _put(module: nn.Linear, mask: Tensor) -> None:
    old = module._buffers.get(MASK)
    hold_(module, mask if old is None else ops.mask_and(old, mask))


def unprune(model: nn.Module) -> list[str]:
    """Takes all masks away; returns the paths of the layers. The zeros stay, since what they were is gone, and may train."""
    found = masked(model)
    for module in found.values():
        release_(module)
    return list(found)
