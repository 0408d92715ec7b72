"""Series of runs: `--folds` and `--fractions`, their figures against each run's own, and a series that goes on after a stop."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import flag_pairs
import pytest
import torch
from fastlm.cli import train as command
from fastlm.cli.main import main
from fastlm.data import corpus_batches
from fastlm.train import Config, callbacks, checkpoint, export, job, power_law, report, series, series_report
from fastlm.train.files import read_metrics
from fastlm.train.loop import Trainer
from test_train import _own_place, book  # noqa: F401

SMALL = "--layers 1 --heads 2 --width 32 --context 16 --steps 24 --batch 8 --lr 1e-2 --warmup 2 --eval-every 8".split()  # noqa: SIM905
SMALL += "--eval-tokens 512 --save-every 5 --sample 0 --device cpu --threads 1 --quiet".split()  # noqa: SIM905
CLOCKS = flag_pairs.CLOCKS


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "draw", lambda *args, **options: None)
    monkeypatch.setattr(report, "svg", lambda *args, **options: "<svg></svg>")
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def train(*words: str) -> int:
    return main(["train", *words, *SMALL])


def rows(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(run)]


def told(capsys: pytest.CaptureFixture[str], run: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", str(run), "--json", "--device", "cpu"]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_folds_are_runs_that_every_command_takes_and_one_report(
    book: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(book, "--folds", "3", "--name", "cv", "--dropout", "0.1") == 0
    said = capsys.readouterr().out
    place = Path("runs/cv")
    result = json.loads((place / "result.json").read_text())
    values = [part["val"] for part in result["parts"]]
    assert result["mean"] == pytest.approx(statistics.mean(values))
    assert result["sd"] == pytest.approx(statistics.stdev(values))
    assert f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} bits per byte over 3 folds" in said
    for number, part in enumerate(result["parts"], 1):
        folder = place / f"fold-{number}"
        found = told(capsys, folder)
        assert part["val"] == pytest.approx(found["bits_per_byte"], rel=1e-6)
        best = json.loads((folder / "result.json").read_text())["best"]["step"]
        assert part["step"] == best == checkpoint.steps(folder, "best")[-1][0]
        assert part["gap"] == pytest.approx(part["val"] - part["train"])
        assert part["train"] == pytest.approx(on_training(folder), rel=0.02)
        config, _ = job.read_config(folder)
        assert config.data.fold == f"{number}/3"
        assert main(["generate", str(folder), "--tokens", "3", "--device", "cpu"]) == 0
    page = (place / "report.html").read_text()
    assert "mean ± sd" in page
    assert "fold-2/report.html" in page
    names = [str(place / f"fold-{n}") for n in (1, 2, 3)]
    assert main(["compare", *names, "--picture", "cv.svg"]) == 0
    assert main(["export", names[0], "--to", "safetensors"]) == 0
    assert (
        main(
            [
                "train",
                book,
                "--init",
                names[0],
                "--name",
                "next",
                "--steps",
                "1",
                "--batch",
                "4",
                "--sample",
                "0",
                "--quiet",
            ]
        )
        == 0
    )
    assert main(["eval", *names, "--ensemble", "--device", "cpu"]) == 0
    assert "other data than those of" in capsys.readouterr().err  # the others trained on what the first holds out
    assert main(["eval", "cv"]) == 2
    assert "cv is a series of runs: name one of them, such as runs/cv/fold-1" in capsys.readouterr().err


def on_training(folder: Path) -> float:
    """Bits per byte of all that a run trained on, token by token."""
    config, corpus = job.read_config(folder)
    model, tokenizer = job.load(folder, "cpu")
    (data,) = job.read_data(corpus, config.data, 16, kept=tokenizer)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in corpus_batches(data.turned(), 16, 512):
            total += float(model(*batch))
            count += int((batch[1] >= 0).sum())
    return total / count / 0.6931471805599453


@pytest.mark.slow
def test_a_series_that_is_stopped_goes_on_and_ends_as_one_that_was_not(
    book: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert train(book, "--folds", "2", "--name", "whole") == 0
    real = Trainer.train_step

    def stops(self: Trainer) -> None:
        real(self)
        if self.folder.name == "fold-2" and self.step == stop[0]:
            stop.pop(0)
            self._ask("signal SIGTERM")

    stop = [3, 13, -1]
    monkeypatch.setattr(Trainer, "train_step", stops)
    assert train(book, "--folds", "2", "--name", "half") == 143
    assert "go on with the whole by fastlm train --resume runs/half" in capsys.readouterr().out
    assert not (Path("runs/half/fold-2") / "measured.json").exists()
    assert main(["train", "--resume", "half"]) == 143
    before = (Path("runs/half/fold-1") / "metrics.jsonl").stat().st_mtime_ns
    assert main(["train", "--resume", "runs/half"]) == 0
    assert (Path("runs/half/fold-1") / "metrics.jsonl").stat().st_mtime_ns == before  # what has ended stays
    for name in ("fold-1", "fold-2"):
        assert rows(Path("runs/whole") / name) == rows(Path("runs/half") / name)
        one, two = (export.read_model(Path("runs") / run / name).tensors for run in ("whole", "half"))
        assert all(torch.equal(t, two[key]) for key, t in one.items())
    results = [json.loads(Path(f"runs/{name}/result.json").read_text()) for name in ("whole", "half")]
    assert results[0] == results[1]
    assert main(["train", "--resume", "half"]) == 0  # nothing is left to do


def test_a_part_killed_before_it_began_is_run(book: str) -> None:  # noqa: F811
    config, corpus, _ = command.parse([book, *SMALL, "--name", "cv"])
    made = series.begin("fold", ("1/2", "2/2"), config, corpus)
    (made.folder / "fold-1").mkdir()
    (made.folder / "fold-1" / ".lock").touch()  # all that a kill in the first instant leaves
    assert main(["train", "--resume", "cv"]) == 0
    assert len(json.loads(Path("runs/cv/result.json").read_text())["parts"]) == 2


def test_a_learning_curve_fits_what_its_runs_reached(book: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert train(book, "--fractions", "0.5", "0.125", "0.25", "--name", "curve") == 0
    said = capsys.readouterr().out
    result = json.loads(Path("runs/curve/result.json").read_text())
    parts = result["parts"]
    assert [part["part"] for part in parts] == ["0.125", "0.25", "0.5"]
    sizes, values = [part["size"] for part in parts], [part["val"] for part in parts]
    assert sizes == sorted(sizes)
    for part in parts:
        folder = Path("runs/curve") / part["name"]
        assert part["val"] == pytest.approx(told(capsys, folder)["bits_per_byte"], rel=1e-6)
        data = json.loads((folder / "config.json").read_text())["data"]
        assert part["size"] == sum(one["train"]["bytes"] for one in data)
    held = {told(capsys, Path("runs/curve") / part["name"])["bytes"] for part in parts}
    assert len(held) == 1  # all are measured on one text
    law = power_law.fit(sizes, values)
    back = power_law.fit(sizes[:-1], values[:-1])(sizes[-1])
    assert result["held_back"]["predicted"] == pytest.approx(back)
    assert result["held_back"]["error"] == pytest.approx(back / values[-1] - 1)
    assert result["predicted"] == {p: pytest.approx(law(float(p) * sizes[-1] / 0.5)) for p in ("1", "2", "4")}
    assert f"measured {values[-1]:.4f} ({back / values[-1] - 1:+.2%})" in said
    assert "fraction-0.5 reads 3,072 of its " in said  # 24 steps of 8 contexts of 16


@pytest.mark.parametrize("words, says", [
    (["--folds", "1"], "--folds must be at least 2"),
    (["--folds", "30"], "--folds 30: 30 folds need as many documents, blocks or groups; the corpus has "),
    (["--folds", "3", "--fractions", "0.1", "0.2", "0.3"], "--folds and --fractions exclude each other"),
    (["--folds", "3", "--fold", "1/3"], "--folds and --fold exclude each other"),
    (["--fractions", "0.1", "0.2"], "--fractions takes three parts of the training text or more, each once"),
    (["--fractions", "0.1", "0.2", "0.2"], "--fractions takes three parts of the training text or more, each once"),
    (["--fractions", "0.1", "0.2", "1.5"], "--fractions must be above 0 and at most 1; it is 1.5"),
    (["--fractions", "0.1", "0.2", "0.3", "--fraction", "0.5"], "--fractions and --fraction exclude each other"),
    (["--fractions", "0.5", "0.5001", "0.5002"], "of the training text are the same"),
    (["--folds", "3", "--when", "c.csv", "--deadline", "1h"], "--folds and --when exclude each other"),
    (["--folds", "3", "--lr", "-1"], "--lr must be above 0"),
    (["--fold", "3"], "--fold must be I/K such as 2/5"),
])  # fmt: skip
def test_what_no_series_can_be_is_one_sentence(
    book: str,  # noqa: F811
    words: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", book, *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_a_series_is_never_overwritten_and_goes_on_as_it_began(
    book: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(series, "run", lambda made, train: 0)
    assert train(book, "--folds", "2", "--name", "cv") == 0
    assert train(book, "--folds", "2", "--name", "cv") == 2
    assert "the series runs/cv exists and is not overwritten" in capsys.readouterr().err
    assert main(["train", "--resume", "cv", "--steps", "5"]) == 2
    assert "runs/cv is a series of runs and goes on as it began: leave --steps 5 out" in capsys.readouterr().err
    job.start(command.parse([book, *SMALL, "--name", "one", "--steps", "1"])[0], (book,)).trainer.fit()
    for mode in ("--resume", "--fork"):
        assert main(["train", mode, "one", "--folds", "2"]) == 2
        assert f"--folds and {mode} exclude each other" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert train(book, "--folds", "2", "--name", "other") == 2
    assert "--folds beside torchrun or slurm" in capsys.readouterr().err
    Path("runs/cv/series.json").write_text("{")
    assert main(["train", "--resume", "cv"]) == 2
    assert "series.json cannot be read" in capsys.readouterr().err


def test_every_flag_reaches_the_runs_of_a_series() -> None:
    """Words made of a configuration are read as that configuration: with every value of every flag that the walk knows."""
    known = {name: some for name, some in flag_pairs.values().items() if name not in {*flag_pairs.MODES, "init"}}
    for number in range(max(map(len, known.values()))):
        config = Config()
        for name, some in known.items():
            setattr(flag_pairs.owner(config, name), name, some[min(number, len(some) - 1)])
        read, corpus, _ = command.parse(series.words(config, ("a.txt", "b c")))
        assert config.differences(read) == []
        assert corpus == ("a.txt", "b c")


def test_figures_of_parts() -> None:
    parts = [
        series_report.Part(f"fold-{i}", f"{i}/3", 10 * i, val, val - 0.1, "bits per byte", 100, 100, 1000)
        for i, val in enumerate((2.0, 2.2, 2.1), 1)
    ]
    text = "\n".join(series_report.lines("fold", parts))
    assert "2.1000 ± 0.1000" in text
    assert "0.1000 ± 0.0000" in text
    curve = [
        series_report.Part(
            f"fraction-{p}", p, 5, 1 + float(p) ** -0.25, 1.0, "bits per byte", int(1e6 * float(p)), 100, 1000
        )
        for p in ("0.125", "0.25", "0.5")
    ]
    found = series_report.learning_curve(curve)
    assert found["predicted"]["1"] == pytest.approx(2.0, rel=1e-3)
    assert found["predicted"]["2"] == pytest.approx(1 + 2**-0.25, rel=1e-3)
    assert "reads" not in "\n".join(series_report.lines("fraction", curve))
