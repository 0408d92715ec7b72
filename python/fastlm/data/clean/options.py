"""What `fastlm data clean` does, as one frozen value: it is part of the plan that a restarted run must share."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from fastlm.data.bounds import COUNT, Range, bounded, check_fields
from fastlm.data.errors import InputError

KINDS = ("email", "ip", "iban", "card", "phone")
HASHES = 128  # of a signature, at most


@dataclass(frozen=True)
class CleanOptions:
    """The steps of cleaning. None of them changes with `workers` or the executor."""

    repair: bool = True
    """Mend mojibake, control characters and HTML entities (ftfy)."""
    html: bool = True
    """HTML documents become their main text (trafilatura)."""
    lang: tuple[str, ...] = ()
    """Languages to keep, as codes such as en de; all where none is named (py3langid)."""
    quality: Literal["gopher", "off"] = "gopher"
    """Gopher's rules on words, symbols, bullets and stop words (Rae et al. 2021, table A1)."""
    repetition: Literal["gopher", "off"] = "gopher"
    """Gopher's rules on repeated lines, paragraphs and n-grams."""
    c4: Literal["documents", "paper", "off"] = "documents"
    """C4's rules. documents: lorem ipsum goes, and lines of cookie notices. paper: all, lines without a full stop too."""
    min_words: int = bounded(50, 0)
    """Fewest words of a document under Gopher's rules."""
    exact: bool = True
    """Drop exact copies."""
    dedup: float = bounded(0.7, 0, 1)
    """Jaccard similarity of 5-word shingles from which documents are near-duplicates; 0: off."""
    copies: Literal["drop", "group"] = "drop"
    """drop: the first of a cluster of near-duplicates stays. group: all stay, with one `group`."""
    pii: Literal["mask", "drop", "off"] = "mask"
    """Personal data: masked as [EMAIL], or the document dropped."""
    pii_kinds: tuple[str, ...] = KINDS
    """Which: email ip iban card phone."""
    filter: str = ""
    """Folder of a toxicity filter (policy.toml)."""
    field: str = "text"
    """Which field of rows holds the text."""
    separator: str = ""
    """Text that parts documents within a file."""
    executor: Literal["local", "slurm", "ray"] = dataclasses.field(default="local", compare=False)
    """Which of datatrove's executors runs the tasks."""
    workers: int = dataclasses.field(default=0, compare=False, metadata={"range": Range(0, COUNT)})
    """Tasks at a time; 0: one per core. They change no byte of the result."""
    slurm_partition: str = dataclasses.field(default="", compare=False)
    """Partition that --executor slurm submits to."""
    slurm_time: str = dataclasses.field(default="12:00:00", compare=False)
    """Time limit of a task under --executor slurm."""

    def plan(self) -> dict[str, object]:
        """The options that decide the result."""
        return {n: getattr(self, n) for n, f in self.__dataclass_fields__.items() if f.compare}

    def check(self) -> None:
        """Raises InputError that names the flag."""
        check_fields(self)
        if 0 < self.dedup < 0.3:
            raise InputError(f"--dedup must be 0 (off) or lie between 0.3 and 1; it is {self.dedup}")
        if wrong := [kind for kind in self.pii_kinds if kind not in KINDS]:
            raise InputError(f"--pii-kinds takes {' '.join(KINDS)}; it is {' '.join(wrong)}")
        if wrong := [code for code in self.lang if not re.fullmatch("[a-z]{2,3}", code)]:
            raise InputError(f"--lang takes codes such as en de; it is {' '.join(wrong)}")
        if self.executor == "slurm" and not self.slurm_partition:
            raise InputError("--executor slurm needs --slurm-partition NAME")


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows) of the signature: as many rows as still find a pair of that similarity with 99.5%.

    A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands (Leskovec et al., Mining of Massive
    Datasets, section 3.4). False candidates cost time alone: each is checked.
    """
    best = 1
    for rows in range(1, 17):
        if 1 - (1 - threshold**rows) ** (HASHES // rows) >= 0.995:
            best = rows
    return HASHES // best, best
