"""bench/quality_prune.py: what it writes follows from the losses, and nothing is written while some are missing."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fastlm.bench import quality
from paths import ROOT


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_prune", ROOT / "bench/quality_prune.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_rows_and_bars_follow_from_the_losses(script: ModuleType) -> None:
    more = {
        "sr-ste": 0.09,
        "magnitude": 0.2,
        "wanda": 0.18,
        "sparsegpt": 0.08,
        "gradual": 0.1,
        "dense": 0.0,
        "smaller": 0.3,
    }
    names = ["dense", *(name for part in script.PARTS for name in script.figures(part))]
    assert len(names) == len(set(names)) == 1 + 1 + 5 * 3 * 2 + 2
    found = {
        n: {
            "loss": 1 + more[n.split()[0]] * (0.5 if n.endswith("healed") else 1),
            "seconds": 1.0,
            "parameters": 8 - ("layers" in n),
        }
        for n in names
    }
    bars = {name: (limit, value) for name, limit, value in script.bars(found)}
    assert bars["SparseGPT against magnitude, 70%"] == (0.5, pytest.approx(0.4))
    assert bars["SparseGPT against magnitude, 2:4"] == (0.35, pytest.approx(0.4))
    assert bars["gradual with healing against SparseGPT, 70%"] == (1.0, pytest.approx(0.05 / 0.08))
    assert bars["SR-STE against masked at once, 2:4"] == (1.0, pytest.approx(0.9))
    evidence = quality.Quality(ROOT / "bench/quality_prune.py", of=script.OF)
    script.write(evidence, found, argparse.Namespace(seed=1, heal=600, tokens=65536), 2930)
    rows, (changes, held) = evidence.data["rows"], evidence.data["tables"]
    assert [row["command"] for row in rows] == [
        "fastlm compress RUN --prune 0.5", "fastlm compress RUN --prune 0.7", "fastlm compress RUN --prune 2:4",
        *(f"fastlm compress RUN --prune {t} --heal 600" for t in ("heads:0.25", "channels:0.3", "layers:1")),
        "fastlm train --prune 2:4 --prune-method sr-ste", "fastlm compress RUN --prune 0.7 --heal 600",
    ]  # fmt: skip
    assert rows[0]["before"] == f"{math.e:.3f}"
    assert rows[0]["after"] == f"{math.exp(1.08):.3f} (+8.3%)"
    assert rows[5]["note"] == f"Without healing {math.exp(1.3):.3f} (+35.0%). 0.875 of the parameters."
    assert (rows[6]["before"], rows[6]["after"]) == (f"{math.exp(1.1):.3f} (+10.5%)", f"{math.exp(1.09):.3f} (+9.4%)")
    assert "The best with healing: sparsegpt" in rows[7]["note"]
    assert changes["rows"][4] == ["sr-ste", "-", "-", "-", "-", "+9.42%", "+4.60%"]
    assert changes["rows"][0] == ["magnitude", *["+22.14%", "+10.52%"] * 3]
    assert [row[-1] for row in held["rows"]] == ["yes", "yes", "no", "yes", "yes"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_setting_runs_in_parts(script: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    words = ["--steps", "4", "--heal", "2", "--tokens", "512", "--keep", str(tmp_path), "--dry", "--only"]
    monkeypatch.setattr(script, "TARGETS", {"70%": "0.7", "2:4": "2:4"})
    monkeypatch.setattr(script, "SMALLER", ("layers:1",))
    monkeypatch.setattr(script, "write", lambda *_: None)
    monkeypatch.setattr(script, "BARS", {"70%": 0.5})
    for parts, word in ((["model"], "no result yet: 21 of 21"), (["one-shot"], "no result yet: 15 of 21"),
                        (["healed", "gradual", "smaller"], "SR-STE against masked at once, 2:4")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["quality_prune.py", *words, *parts])
        script.main()
        assert word in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["quality_prune.py", *words, "model", "--seed", "2"])
    with pytest.raises(SystemExit, match="or name another --keep"):
        script.main()
