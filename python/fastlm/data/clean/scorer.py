"""A filter of `fastlm data filter` as a block of the pipeline: it drops, masks or keeps apart what its policy names."""

from __future__ import annotations

import re
from pathlib import Path

from datatrove.data import Document

from fastlm.data.clean.rules import Rule
from fastlm.data.filter.model import Filter, load


def rule_of(prefix: str, category: str) -> str:
    """The name of a rule in the table and under .clean/dropped; signs that no file name should have by their numbers."""
    return f"{prefix}_" + re.sub(r"[^\w -]", lambda found: f"U{ord(found[0]):X}", category).replace(" ", "_")


class Harmful(Rule):
    """Drops a document (filter_CATEGORY), takes it out for people to judge (review_CATEGORY), or masks its passages."""

    name = "filter"

    def __init__(self, tally: Path, dropped: Path, folder: Path) -> None:
        super().__init__(tally, dropped)
        self.folder = folder
        self._filter: Filter | None = None  # read in the process of the task

    def judge(self, document: Document) -> tuple[str, str] | None:
        if self._filter is None:
            self._filter = load(self.folder)
        found = self._filter.verdicts(document.text)
        if not found:
            return None
        verdict = found[0]
        if verdict.action == "mask":  # so are all
            for one in found:
                self.counts[f"passages:{one.category}"] += len(one.spans)
            document.text = self._filter.masked(document.text)
            return None
        return rule_of("filter" if verdict.action == "drop" else "review", verdict.category), verdict.why()
