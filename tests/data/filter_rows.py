"""Labelled rows whose swear words mean nothing, and a filter that learnt them: what tests of the filter share."""

from __future__ import annotations

import random

BAD = ("grobble", "snarkfit", "plimbus", "vortnag")  # the swear words of these tests
GOOD = (
    "garden",
    "window",
    "letter",
    "summer",
    "bridge",
    "coffee",
    "music",
    "paper",
    "river",
    "teacher",
    "kitchen",
    "station",
)


def texts(seed: int, count: int) -> list[dict[str, str]]:
    draw, rows = random.Random(seed), []
    for number in range(count):
        words = draw.choices(GOOD, k=8)
        label = ("harmless", "insult", "threat")[number % 3]
        if label != "harmless":
            words[draw.randrange(8)] = draw.choice(BAD[:2] if label == "insult" else BAD[2:])
        rows.append({"text": " ".join(words), "label": label})
    return rows
