"""What a filter's policy says, as cards and runs keep it: its hash, its rules, and how good the filter was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlm.data.filter.model import Filter


def told(found: Filter) -> dict[str, Any]:
    """Hash and categories of the policy, and the filter's figures on held-out texts where it has some."""
    rules = {c.name: {"threshold": c.threshold, "share": c.share, "action": c.action} for c in found.policy.categories}
    return {"hash": found.hash, "categories": rules, "figures": found.about.get("figures", {})}


def of_corpus(names: Sequence[str]) -> list[dict[str, Any]]:
    """The policies that cleaned a corpus: of each folder of `fastlm data clean --filter` among its names, what the policy
    says, and the documents and passages that it took."""
    out = []
    for folder in dict.fromkeys(found for name in names for found in (Path(name), Path(name).parent)):
        try:
            table = json.loads((folder / ".clean" / "table.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it was not cleaned here
            continue
        if isinstance(table, dict) and table.get("filter"):
            taken = {k: n["documents"] for k, n in table["dropped"].items() if k.startswith(("filter_", "review_"))}
            policy = table.get("policy") or {"hash": table["filter"], "categories": {}, "figures": {}}
            out.append({**policy, "read": table["documents"], "taken": taken, "masked": table.get("passages", {})})
    return out


def share(texts: Iterable[str], found: Filter) -> tuple[int, int]:
    """(texts in which the policy finds something, texts)."""
    verdicts = [found.judge(text, whole=True) is not None for text in texts]
    return sum(verdicts), len(verdicts)
