"""`fastlm data tasks`; see `labels.py`, which reads what comes back."""

from __future__ import annotations

from fastlm.cli.labels import main_tasks as main

__all__ = ["main"]
