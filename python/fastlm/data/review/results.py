"""What comes of a review: an export in Label Studio's format, and pairs of answers to train on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlm.data.errors import InputError
from fastlm.data.groups import group_of
from fastlm.data.review.items import Item
from fastlm.data.review.store import Judgement, Store


def exported(store: Store) -> list[dict[str, Any]]:
    """All items in Label Studio's JSON format, with an annotation a person. The label is a choice, the thumb a rating of 5 or
    1, the better answer a text. A skip is an annotation that was cancelled."""
    out = []
    for number, (data, said) in enumerate(store.judged(), 1):
        annotations = [
            {"completed_by": {"email": who}, "result": [*_results(one)], "was_cancelled": one == Judgement()}
            for who, one in said
        ]
        out.append({"id": number, "data": data, "annotations": annotations})
    return out


def _results(one: Judgement) -> Iterator[dict[str, Any]]:
    for name, kind, value in (
        ("label", "choices", None if one.label is None else {"choices": [one.label]}),
        ("thumb", "rating", {"rating": 5 if one.thumb > 0 else 1} if one.thumb else None),
        ("better", "textarea", None if one.better is None else {"text": [one.better]}),
    ):
        if value is not None:
            yield {"from_name": name, "to_name": "text", "type": kind, "value": value}


def read_export(path: Path) -> list[dict[str, Any]]:
    """The export of a database by its path."""
    store = Store.open(path)
    try:
        return exported(store)
    finally:
        store.close()


# ----------------------------------------------------------------------------------------------------------------- pairs


def pairs(store: Store) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows for `fastlm train --dpo`, and how many were left out, by the reason.

    A better answer is preferred to the one in whose place it stands. Of two answers to one prompt, the one that more people
    gave a thumb up than down is preferred to one where it is the other way round. Raises InputError where there is no pair.
    """
    found: dict[tuple[str, str, str], str] = {}
    up: dict[str, list[str]] = {}
    down: dict[str, list[str]] = {}
    left = Counter[str]()
    for data, said in store.judged():
        one = Item(data)
        prompt, thumbs = json.dumps(one.prompt or ""), sum(judgement.thumb for _, judgement in said)
        for _, judgement in said:
            if judgement.better is not None:
                found[prompt, judgement.better, one.text] = "better answer"
        if thumbs and one.prompt is not None:
            (up if thumbs > 0 else down).setdefault(prompt, []).append(one.text)
    for prompt, good in up.items():
        for chosen in good:
            for rejected in down.get(prompt, ()):
                found.setdefault((prompt, chosen, rejected), "thumbs")
    rows = []
    for (prompt, chosen, rejected), how in found.items():
        if chosen == rejected:
            left["the two answers are the same"] += 1
        elif not (chosen and rejected):
            left["an answer is empty"] += 1
        elif (prompt, rejected, chosen) in found:
            left["another judgement says the opposite"] += 1
        else:
            rows.append(_row(json.loads(prompt), chosen, rejected, how))
    if not rows:
        why = "; ".join(f"{count:,} left out: {reason}" for reason, count in left.items())
        raise InputError(
            f"{store.path} holds no pair{f' ({why})' if why else ''}: one comes of a better answer, or of two answers to one "
            f"prompt, one of them with a thumb up and one with a thumb down"
        )
    return rows, left


def _row(prompt: Any, chosen: str, rejected: str, how: str) -> dict[str, Any]:
    said = lambda text: [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
    whole = json.dumps(prompt or rejected).encode()
    group = f"prompt {group_of(whole)}"  # pairs of one prompt are split together; the hash is that of no document
    return {"prompt": prompt, "chosen": said(chosen), "rejected": said(rejected), "group": group, "from": how}
