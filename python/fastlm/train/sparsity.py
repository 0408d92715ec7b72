"""What --prune asks for."""

from __future__ import annotations

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
