"""`fastlm energy`: four plans under a curve and their picture; what cannot be is one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastlm.cli import main as cli


@pytest.fixture
def curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two days: 400 by day, 100 from 22 to 2 and from 4 to 6 o'clock."""
    monkeypatch.chdir(tmp_path)
    low = {22, 23, 0, 1, 4, 5}
    rows = [f"2026-01-0{1 + h // 24}T{h % 24:02d}:00,{100 if h % 24 in low else 400}" for h in range(48)]
    (tmp_path / "carbon.csv").write_text("\n".join(["time,g/kWh", *rows]) + "\n")
    return "carbon.csv"


def test_four_plans_are_printed_and_drawn(curve: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["energy", curve, "--hours", "6", "--deadline", "24h", "--start", "2026-01-01T12:00"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    lines = {line[:17].strip(): re.split(r"  +", line.strip()) for line in out.splitlines()[1:5]}
    assert list(lines) == ["now", "best single start", "with pauses", "best possible"]
    assert lines["now"][3:] == ["0", "400", "0.0%"]
    assert lines["best single start"][1:] == [
        "2026-01-01 20:00 UTC",
        "2026-01-02 02:00 UTC",
        "0",
        "200",
        "50.0%",
    ]  # the first of three
    assert lines["best possible"][1:] == ["2026-01-01 22:00 UTC", "2026-01-02 06:00 UTC", "1", "100", "75.0%"]
    assert lines["with pauses"][3] == "1"
    assert float(lines["with pauses"][5].rstrip("%")) == pytest.approx(74, abs=1.5)  # the restart costs a little
    text = Path("energy.svg").read_text()
    assert text.startswith("<?xml")
    for part in ("</svg>", "best single start", "with pauses", "g/kWh", "UTC"):
        assert part in text, part
    before = Path("energy.svg").read_bytes()
    assert cli.main([*words, "--picture", "again.svg"]) == 0
    assert Path("again.svg").read_bytes() == before
    dear = [*words, "--restart", "20000", "--picture", ""]  # no pause is worth that
    assert cli.main(dear) == 0
    assert re.search(r"with pauses .* 0 +200 +50.0%", capsys.readouterr().out)
    assert {p.name for p in Path().iterdir()} == {"carbon.csv", "energy.svg", "again.svg"}


@pytest.mark.parametrize(("words", "said"), [
    (["--hours", "30", "--deadline", "24h"], "--deadline 24h leaves 24 h, and --hours is 30"),
    (["--hours", "6", "--deadline", "3d"], "carbon.csv ends at 2026-01-03 00:00 UTC, before the deadline"),
    (["--hours", "6", "--deadline", "soon"], "--deadline must be"), (["--hours", "0", "--deadline", "1d"], "--hours must be"),
    (["--hours", "6", "--deadline", "9h", "--start", "noon"], "--start must be a time"),
    (["--hours", "6", "--deadline", "9h", "--start", "2020-01-01"], "--start 2020-01-01 is outside carbon.csv"),
    (["--hours", "6", "--deadline", "9h", "--picture", "none/a.svg"], "--picture none/a.svg cannot be written"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    curve: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["energy", curve, *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastlm energy: ")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert [p.name for p in Path().iterdir()] == ["carbon.csv"]
