"""The block that reads: the parts of a task as documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fastlm.data import corpus as corpora
from fastlm.data.cutting import Part, Piece


def pieces(unit: list[Any], field: str, separator: str) -> Iterator[Piece]:
    """The pieces of a unit of a task."""
    path, start, end, size, rows, ordered = unit
    if ordered:
        yield from corpora.documents(Path(path), field, separator)
    else:
        yield from corpora.pieces((Part(Path(path), start, end, size, rows),), field)


class Read(PipelineStep):
    """Reads the files of a plan. A document above 8 MiB comes in blocks of 64 KiB, each a document."""

    type = "fastlm"
    name = "read"

    def __init__(self, plan: Path, field: str, separator: str, tally: Path) -> None:
        super().__init__()
        self.plan, self.field, self.separator, self.tally = plan, field, separator, tally

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        units = json.loads(self.plan.read_text())["tasks"][rank]
        number = size = 0
        for unit in units:
            for place, piece in enumerate(pieces(unit, self.field, self.separator)):
                text = piece.text.decode("utf-8", "replace")
                number, size = number + 1, size + len(piece.text)
                source = f"{Path(unit[0]).name}:{unit[1]}+{place}"
                yield Document(text, f"{rank}-{number}", metadata={"source": source, "group": piece.group})
        self.tally.mkdir(parents=True, exist_ok=True)
        (self.tally / f"{rank:05d}-Read.json").write_text(json.dumps({"read": number, "read_bytes": size}))
