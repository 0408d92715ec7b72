"""The seam of the toxicity filter: a folder with a policy.toml and a scorer, as one more block of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlm.data.errors import InputError


def load(folder: Path) -> Any:
    """The block of a filter's folder: a `rules.Rule` that drops, masks or marks what its policy names.

    Raises InputError: the filter that `fastlm data filter` will train is not part of this version.
    """
    if not (folder / "policy.toml").is_file():
        raise InputError(f"--filter {folder} is no filter's folder: it has no policy.toml")
    raise InputError(f"--filter {folder}: this version of fastlm has no scorer for it yet; clean without --filter")
