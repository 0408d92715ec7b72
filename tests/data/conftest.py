"""What tests of the filter share: its rows on disk, and the folder of a filter that learnt them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastlm.cli.main import main
from filter_rows import texts


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(1, 600)))
    return path


@pytest.fixture(scope="session")
def folder(rows: Path) -> Path:
    pytest.importorskip("sklearn")
    out = rows.parent / "filter"
    assert main(["data", "filter", str(rows), "--out", str(out)]) == 0
    return out
