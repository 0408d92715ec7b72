"""What a run leaves to look at: one self-contained page, samples, runs side by side, one picture, wandb when asked."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastlm.cli import main as cli
from fastlm.data import InputError
from fastlm.train import job, report
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
