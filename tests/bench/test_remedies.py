"""docs/remedies.md: whole, made from the committed results, and honest about what has no figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastlm.bench import quality, remedies
from paths import ROOT

SCRIPT = "bench/quality_example.py"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with nothing in it but a script."""
    for folder in ("csrc", "bench/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / SCRIPT).write_text("x = 1\n")
    monkeypatch.setenv("FASTLM_CHECKOUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", [SCRIPT, "--data", "/somewhere/else/data.csv"])
    return tmp_path


def rows(text: str) -> list[list[str]]:
    head = text.split("# How the figures were made")[0]
    found = [[c.strip() for c in line.strip("|").split(" | ")] for line in head.splitlines() if line.startswith("| ")]
    return [row for row in found if row[0] not in ("remedy", "---")]


def empty(row: list[str]) -> bool:
    """Whether a row has neither figures nor a sentence."""
    return len(row) != len(remedies.HEADER) or not all(row) or (row[3] == "-" == row[4] and not row[2].endswith("."))


def test_the_page_is_made_from_the_results_and_no_row_is_empty() -> None:
    text = (ROOT / remedies.PAGE).read_text()
    assert text == remedies.page(ROOT), "run `make evidence` and commit what it writes"
    found = rows(text)
    assert len(found) >= len(remedies.ROWS) >= 30
    assert not [row for row in found if empty(row)]
    assert {row.challenge for row in remedies.ROWS} >= {
        "Compute",
        "Too little data",
        "Toxic output",
        "Time",
        "Overfitting",
    }


def test_an_empty_row_is_found() -> None:
    assert empty(["x", "`y`", "", "-", "-", "-", "-", "-"])
    assert empty(["x", "`y`", "seconds", "-", "-", "-", "-", "-"])


def test_a_script_s_rows_stand_on_the_page_and_its_sources_are_watched(checkout: Path) -> None:
    evidence = quality.Quality(checkout / SCRIPT, of=[], provisional="other programs ran")
    evidence.row(
        "crowds", "share right | of all", "0.81", quality.spread([0.9, 0.92]), 12.3, seeds=(1, 2), note="No gain."
    )
    evidence.table("Sets", ["set", "share"], [["duck", 0.5]], "A sentence.")
    evidence.examples("Replaced", [("a big\nhouse", "a large house")])
    path = evidence.save()
    data = json.loads(path.read_text())
    assert path.name == "quality-example.json"
    assert data["command"] == f"python {SCRIPT} --data data.csv"
    text = (checkout / remedies.PAGE).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| Crowds"))
    assert "share right \\| of all. No gain. | 0.81 | 0.910 ± 0.014 | 12 | 1, 2 |" in row
    assert remedies.PLANNED not in row
    for part in (
        "| duck | 0.5 |",
        "A sentence.",
        "- a big house\n  → a large house",
        "provisional: other programs ran",
    ):
        assert part in text
    assert remedies.main(["--status"]) == 0
    (checkout / SCRIPT).write_text("x = 2\n")
    assert remedies.main(["--status"]) == 1


def test_wrong_rows_are_refused(checkout: Path) -> None:
    evidence = quality.Quality(checkout / SCRIPT, of=[])
    with pytest.raises(ValueError, match="would hold no row"):
        evidence.save()
    with pytest.raises(ValueError, match="remedy must be one of"):
        evidence.row("nothing", "x", "1", "2", 1)
    with pytest.raises(ValueError, match="before of crowds is empty"):
        evidence.row("crowds", "x", " ", "2", 1)
    evidence.row("crowds", "x", "1", "2", 1)
    path = evidence.save()
    path.write_text(path.read_text().replace('"crowds"', '"clouds"'))
    with pytest.raises(ValueError, match=r"quality-example\.json has a row of 'clouds'"):
        remedies.page(checkout)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a quality result"):
        remedies.page(checkout)
