"""What a run leaves to look at: one self-contained page, samples, runs side by side, one picture, wandb when asked."""

from __future__ import annotations

import html
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastlm.cli import main as cli
from fastlm.data import InputError
from fastlm.energy import counters, power
from fastlm.train import job, measuring, report
from fastlm.train.callbacks import smoothed
from fastlm.train.files import read_metrics
from test_train import StopAt, _own_place, book, tiny  # noqa: F401


def test_the_report_is_one_file_with_all_of_it(book: str) -> None:  # noqa: F811
    made = job.start(tiny(name="a<b", eval_every=4, kernels="fused"), (book,))
    made.run(str)
    text = (made.folder / "report.html").read_text()
    for part in ("a&lt;b", "all steps done", "<svg", "Against counting", "5-gram", "Samples", "Throughput", "dropout"):
        assert part in text, part
    for part in ("Kernels", "Memory, estimated", "Data", "book.txt", "Configuration", "weight_decay"):
        assert part in text, part
    assert not re.search(r"https?:|//|@import|<script|<link|<img", text.replace("</", ""))
    rows = read_metrics(made.folder, "samples.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert all(row["text"] for row in rows)


def test_the_report_says_what_stopped_a_run(book: str) -> None:  # noqa: F811
    made = job.start(tiny(name="run", max_bad=2), (book,))
    made.model.embed.weight.data[:] = float("nan")
    with pytest.raises(InputError, match="2 steps in a row"):
        made.run(str)
    assert "2 steps in a row" in (made.folder / "report.html").read_text()
    other = job.start(tiny(name="other", save_every=3), (book,))
    other.trainer.callbacks.append(StopAt(5))
    other.run(str)
    assert "signal SIGTERM" in (other.folder / "report.html").read_text()


def test_runs_and_compare(book: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    for name, lr in (("one", 1e-3), ("two", 2e-3)):
        job.start(tiny(name=name, lr=lr), (book,)).run(str)
    begun = job.start(tiny(name="three"), (book,))
    begun.begin()
    begun.trainer.owner.release()  # as a kill does
    assert cli.main(["runs"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("one", "two", "three", "12/12", "not started", "all steps done"))
    best = report.summary(Path("runs/one")).best_loss
    assert f"{best:.4f}" in out
    assert cli.main(["compare", "one", "two"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"lr +0\.001 +0\.002", out)
    assert "dropout" not in out
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")
    for words, message in (
        (["one"], "two runs or more"),
        (["one", "x"], "no run x"),
        (["one", "two", "--picture", "a.txt"], ".png"),
    ):
        assert cli.main(["compare", *words]) == 2
        assert message in capsys.readouterr().err


def test_wandb_is_told_and_its_absence_is_one_sentence(book: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--wandb needs the package wandb"):
        job.start(tiny(name="none", wandb="p"), (book,))
    seen: list[Any] = []
    fake = types.SimpleNamespace(
        init=lambda **kw: seen.append(("init", kw["project"], kw["name"])) or object(),
        log=lambda values, step: seen.append(("log", step, values["loss"])),
        finish=lambda: seen.append(("finish",)),
        errors=types.SimpleNamespace(Error=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    made = job.start(tiny(name="told", wandb="p"), (book,))
    made.trainer.fit()
    rows = [("log", row["step"], row["loss"]) for row in read_metrics(made.folder)]
    assert seen == [("init", "p", "told"), *rows, ("finish",)]


def test_the_smoothed_curve_does_not_lag() -> None:
    """A falling loss: within the noise of what it is at every step, where a mean of the past would show 4.0 for 3.1."""
    steps = np.arange(400)
    true = 2.0 + 3.5 * np.exp(-steps / 35)
    noise = 0.05 * np.random.default_rng(1).standard_normal(400)
    found = np.array(smoothed((true + noise).tolist()))
    assert np.abs(found - true).max() < 0.1
    assert np.abs(np.diff(found, 2)).mean() < 0.4 * np.abs(np.diff(true + noise, 2)).mean()  # and it is smooth
    assert np.allclose(smoothed([5.0, 4.0, 3.0, 2.0]), [5.0, 4.0, 3.0, 2.0])  # a line is itself, to its ends
    assert smoothed([1.5]) == [1.5]
    assert smoothed([]) == []


# ----------------------------------------------------------------------------------------------------------------- energy


def report_of(run: Path) -> str:
    return html.unescape(report.page(run))


def test_a_machine_without_counters_shows_no_measurement(
    book: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(counters, "ROOTS", (tmp_path / "none",))
    monkeypatch.setattr(power, "_table", lambda name: None)
    made = job.start(tiny(device="cpu", name="bare", carbon="381"), (book,))
    assert "--carbon is of no effect here: energy is unavailable" in capsys.readouterr().err
    made.run(str)
    rows = read_metrics(made.folder)
    assert {row["energy"] for row in rows} == {"unavailable"}
    assert not any(key.startswith("joules") for row in rows for key in row)
    text = report_of(made.folder)
    assert "unavailable (this machine shows no counter" in text
    assert "kWh" not in text
    assert "measured" not in text.split("<h2>Energy")[1].split("<h2>Data")[0]
    made = job.start(tiny(device="cpu", name="stated", watts=100.0, carbon="381", pue=1.5), (book,))
    made.run(str)
    assert {row["energy"] for row in read_metrics(made.folder)} == {"estimated"}
    assert "estimated (this machine shows no counter: 100 W stated" in report_of(made.folder)


def test_counted_energy_adds_up_to_the_report(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A counter that gains a joule at each reading and wraps at 7: every one of them is in the lines and in the report."""
    zone = tmp_path / "intel-rapl" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("max_energy_range_uj", 7_000_000), ("energy_uj", 0)):
        (zone / name).write_text(f"{text}\n")
    monkeypatch.setattr(counters, "ROOTS", (zone.parent,))
    monkeypatch.setattr(counters, "PLAUSIBLE", 1e9)  # the test's clock is faster than a processor
    monkeypatch.setattr(counters.Zone, "period", property(lambda own: 1e9))
    read, reads = counters.Zone._read, [0]

    def count(own: counters.Zone) -> int:
        reads[0] += 1
        (own.folder / "energy_uj").write_text(f"{reads[0] * 1_000_000 % 7_000_000}\n")
        return read(own)

    monkeypatch.setattr(counters.Zone, "_read", count)
    made = job.start(tiny(device="cpu", name="run", eval_every=4, carbon="500", pue=2.0), (book,))
    made.trainer.fit()
    rows = read_metrics(made.folder)
    assert {row["energy"] for row in rows} == {"measured"}
    assert [row["joules"] for row in rows] == [1.0 if row["step"] % 4 else 2.0 for row in rows]
    assert [row["joules_aside"] for row in rows if not row["step"] % 4] == [1.0] * 3
    assert rows[0]["joules_per_token"] == 1 / (4 * 16)
    found = measuring.used(rows, 16)
    assert found is not None
    assert (found.label, found.joules, found.aside, found.tokens) == ("measured", 18.0, 3.0, 12 * 64)
    cells = dict(measuring.table(found, made.config.run, made.facts()["energy"]))
    assert cells["energy is"] == "measured (1 x processor by RAPL)"
    assert cells["with the data centre's share (PUE 2)"] == f"{36 / 3.6e6:.4g} kWh"
    assert cells["CO2e at 500 g/kWh"] == f"{36 / 3.6e6 / 2:.4g} kg"
    rows[3] = {k: v for k, v in rows[3].items() if not k.startswith("joules")} | {"energy": "unavailable"}
    found = measuring.used(rows, 16)
    assert found is not None
    assert (found.label, found.counted) == ("unavailable", 11)
    assert measuring.used([{"step": 1}], 16) is None
