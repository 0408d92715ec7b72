"""All that the page shows of one text, computed: numbers and encoded pictures, ready for JSON."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.data.errors import InputError
from fastlm.data.tokenizer import Tokenizer
from fastlm.inspect import anatomy, pieces, views

LONGEST = 1024  # tokens of a page
HELD = 8 << 20  # bytes of attention that a page holds, as they stand in it
GUESSES = 5
AFFORDABLE = (
    2e12  # flops of the saliency of each token, up to which nobody has to ask for it: about a minute on two cores
)


@dataclass(frozen=True)
class Wanted:
    """What to show first and what to compute.

    layer, head: the attention that the page opens with; None: one in the middle. saliency: each (of every token), text (of
    the whole text alone) or auto (each where that is affordable).
    """

    layer: int | None = None
    head: int | None = None
    saliency: str = "auto"
    steps: int = views.STEPS


def look(
    model: nn.Module, tokenizer: Tokenizer, tokens: Tensor, wanted: Wanted, note: Callable[[str], None]
) -> dict[str, Any]:
    """What `page.page` shows of tokens [1, L]. InputError for a layer or head that is not there."""
    parts = anatomy.find(model, tokens)
    layers = len(parts.blocks)
    if wanted.layer is not None and not 0 <= wanted.layer < layers:
        raise InputError(f"--layer must be 0 to {layers - 1}; it is {wanted.layer}")
    seen = views.attention(model, parts, tokens)
    with torch.no_grad():
        logits = anatomy.logits_of(model, tokens)[0]
    loss, rank = views.surprise(logits, tokens[0])
    read = pieces.reader(tokenizer)
    lens = _lens(model, parts, tokens)
    named = {int(t) for t in tokens[0]} | {int(t) for t in np.unique(lens["ids"])}
    return {
        "tokens": tokens[0].tolist(),
        "pieces": {t: _shown(read(t)) for t in sorted(named)},
        "loss": [None, *(_digits(v) for v in loss.tolist())],
        "rank": [None, *rank.tolist()],
        "vocab": logits.shape[1],
        "lens": {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in lens.items()},
        "attention": _attention(seen, wanted, note),
        "saliency": _saliency(model, parts, tokens, logits, wanted, note),
    }


def _shown(piece: pieces.Piece) -> list[Any]:
    return [piece.text, int(piece.special), int(piece.ends_line)]


def _digits(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _lens(model: nn.Module, parts: anatomy.Anatomy, tokens: Tensor) -> dict[str, Any]:
    """At each depth and position the likeliest tokens with their probabilities, and those of the token that came."""
    found: dict[str, list[Any]] = {"ids": [], "p": [], "own": [], "rank": []}
    for logits in views.lens(model, parts, tokens):
        likely = logits.float().softmax(1)
        top = likely.topk(min(GUESSES, likely.shape[1]), dim=1)
        found["ids"].append(top.indices.cpu().numpy())
        found["p"].append([[_digits(p, 3) for p in row] for row in top.values.tolist()])
        loss, rank = views.surprise(logits, tokens[0])
        found["own"].append([_digits(p, 3) for p in (-loss).exp().tolist()])
        found["rank"].append(rank.tolist())
    return {**found, "ids": np.stack(found["ids"])}


def packed(values: np.ndarray) -> str:
    """Bytes as text: zlib, which a browser unpacks, and base64."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 9)).decode()


def below(rows: Tensor) -> np.ndarray:
    """The lower triangle of weights [L, L] row by row, 255 times their roots as uint8: steps that are fine where weights are
    small, and nowhere coarser than 0.4%."""
    grid = (rows.clamp(0, 1).sqrt() * 255).round().to(torch.uint8).cpu().numpy()
    return grid[np.tril_indices(len(grid))]


def _attention(seen: list[Tensor | None], wanted: Wanted, note: Callable[[str], None]) -> dict[str, Any]:
    there = [n for n, weights in enumerate(seen) if weights is not None]
    if wanted.layer is not None and wanted.layer not in there:
        raise InputError(
            f"--layer {wanted.layer} has no attention that could be seen" + (f"; {there} have" if there else "")
        )
    layer = wanted.layer if wanted.layer is not None else there[len(there) // 2] if there else 0
    weights = seen[layer]
    heads = 0 if weights is None else len(weights)
    if wanted.head is not None and not 0 <= wanted.head < heads:
        raise InputError(f"--head must be 0 to {heads - 1} in layer {layer}; it is {wanted.head}")
    held: dict[int, list[str]] = {}
    size = 0
    for n in sorted(there, key=lambda n: abs(n - layer)):
        rows = seen[n]
        assert rows is not None
        encoded = [packed(below(one)) for one in rows]
        size += sum(map(len, encoded))
        if size > HELD and held:
            break
        held[n] = encoded
    left = ""
    if len(held) < len(there):
        low, high = min(held), max(held)
        left = (f"The page holds the attention of layers {low} to {high}, which is {HELD >> 20} MB; --layer opens it "
                f"elsewhere.")  # fmt: skip
        note(left)
    unseen = [n for n in range(len(seen)) if n not in there]
    if unseen:
        left = f"{left} No attention was seen in layers {', '.join(map(str, unseen))}.".strip()
    return {
        "layers": len(seen),
        "held": dict(sorted(held.items())),
        "layer": layer,
        "head": wanted.head or 0,
        "left": left,
    }


def _saliency(model: nn.Module, parts: anatomy.Anatomy, tokens: Tensor, logits: Tensor, wanted: Wanted,
              note: Callable[[str], None]) -> dict[str, Any]:  # fmt: skip
    goals = views.goals_of(tokens)
    length = tokens.shape[1]
    size = sum(p.numel() for p in model.parameters())
    flops = 2.0 * size * wanted.steps * length * (1 + 2 * length)
    each = wanted.saliency == "each" or (wanted.saliency == "auto" and flops <= AFFORDABLE)
    left = ""
    groups = [goals]
    if each:
        groups += [[goal] for goal in [*goals, (length - 1, int(logits[-1].argmax()))]]
    else:
        left = "It is of the whole text: of each token it would take long; --saliency each computes it."
        note("saliency of the whole text alone; --saliency each computes it for each token too")
    try:
        found, gain = views.saliency(model, parts, tokens, groups, wanted.steps)
    except RuntimeError as error:
        if "does not require grad" not in str(error) and "derivative" not in str(error):
            raise
        return {"left": "The model has no gradients, so there is no saliency."}
    if not bool(found.isfinite().all()):
        return {"left": "The gradients are not finite, so there is no saliency."}
    scale = found.abs().amax(1).clamp_min(1e-30)
    rows = (found / scale[:, None] * 127).round().to(torch.int8).cpu().numpy()
    off = ((found.sum(1) - gain).abs()[0] / gain.abs()[0].clamp_min(1e-9)).item()
    return {"rows": packed(rows), "count": len(groups), "scale": [_digits(v) for v in scale.tolist()], "steps": wanted.steps,
            "off": _digits(off, 2), "left": left}  # fmt: skip
