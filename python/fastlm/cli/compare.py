"""`fastlm compare RUN RUN ...`; see `runs.py`, which lists by the same table."""

from __future__ import annotations

from fastlm.cli.runs import main_compare as main

__all__ = ["main"]
