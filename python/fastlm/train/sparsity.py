"""What --prune asks for."""

from __future__ import annotations

from typing import Any

from fastlm.data.errors import InputError
from fastlm.reference.prune_mask import parse


def target(prune: str) -> tuple[float | None, str]:
    """(sparsity, pattern) of --prune: "0.7" or "2:4". InputError for what is neither."""
    try:
        sparsity = float(prune)
    except ValueError:
        try:
            kind = parse(prune)[0]
        except ValueError:
            kind = ""
        if kind not in ("n:m", "2:4t"):
            raise InputError(
                f"--prune must be the part of the weights that goes, such as 0.7, or a pattern such as 2:4; it is {prune!r}"
            ) from None
        return None, prune
    if not 0 < sparsity < 1:
        raise InputError(f"--prune must be above 0 and below 1; it is {prune}")
    return sparsity, "unstructured"


def check(o: Any, lora_rank: int) -> None:
    """`o` is an `OptimConfig`. Raise InputError for what --prune, its method and its steps cannot be together."""
    sparsity, _ = target(o.prune)
    if o.chooses and sparsity is not None:
        raise InputError(
            f"--prune-method sr-ste is for a pattern such as --prune 2:4, within whose groups it chooses; --prune is {o.prune}"
        )
    if (o.grows or o.chooses) and o.prune_begin > o.prune_end:
        raise InputError(f"--prune-begin must not be above --prune-end; they are {o.prune_begin:g} and {o.prune_end:g}")
    if lora_rank:
        raise InputError("--prune and --lora-rank exclude each other: LoRA leaves the weights frozen")


def heeded(o: Any) -> list[tuple[str, bool, str]]:
    """Of each field beside --prune whether it has an effect, and what that needs."""
    parts = bool(o.prune) and target(o.prune)[0] is not None
    method = "--prune with a pattern such as 2:4" if o.prune_method == "sr-ste" else "--prune with a part such as 0.7"
    growth = "--prune with a part such as 0.7, and --prune-method gradual"
    return [
        ("prune_method", parts or o.chooses, method),
        ("prune_begin", bool(o.prune), "--prune"),
        ("prune_end", o.grows or o.chooses, f"{growth} (or a pattern and sr-ste)"),
        ("prune_every", o.grows, growth),
        ("prune_decay", o.chooses, "--prune with a pattern such as 2:4, and --prune-method sr-ste"),
    ]
