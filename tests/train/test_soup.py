"""Soups: means of weights to the bit, refused where runs share no ancestor, and runs that every command takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm.cli.main import main
from fastlm.data import InputError
from fastlm.train import checkpoint, export, job, lineage, soup
from test_train import _own_place, book, tiny  # noqa: F401

RUNS = Path("runs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


def fork(origin: str, name: str, book: str, **changes: Any) -> Path:  # noqa: F811
    same = {"steps": 50, "lr": 1e-2, "schedule": "constant"}
    made = job.fork(RUNS / origin, tiny(name=name, **{**same, **changes}), (book,), other_data=False, say=str)
    made.trainer.fit()
    return made.folder


def start(name: str, book: str, **changes: Any) -> Path:  # noqa: F811
    made = job.start(tiny(name=name, **{"steps": 30, "lr": 1e-2, "schedule": "constant", **changes}), (book,))
    made.trainer.fit()
    return made.folder


@pytest.fixture
def runs(book: str, trained: Path) -> str:  # noqa: F811
    """A base and three forks of it, one of them ruined; and a run that shares nothing with them. Made once."""
    if not (trained / "runs").exists():
        start("base", book)
        fork("base", "a", book)
        fork("base", "b", book, seed=5, steps=55)
        fork("base", "worse", book, lr=2.0)
        start("apart", book, seed=2)
        shutil.copytree("runs", trained / "runs")
    else:
        shutil.copytree(trained / "runs", "runs")
    return book


def loss(name: str, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    assert main(["eval", name, "--json", "--device", "cpu"]) == 0
    return float(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"])


def test_a_uniform_soup_is_the_mean_to_the_bit_and_every_command_takes_it(
    runs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["soup", "a", "b", "base", "--out", "soup", "--method", "uniform", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "soup of 3" in said
    assert "common ancestor" in said
    assert "run folder: runs/soup" in said
    tensors = [export.read_model(RUNS / name).tensors for name in ("a", "b", "base")]
    made = export.read_model(RUNS / "soup")
    for name, t in made.tensors.items():
        mean = (tensors[0][name].double() + tensors[1][name] + tensors[2][name]) / 3
        assert torch.equal(t, mean.float()), name
    record = json.loads((RUNS / "soup" / "config.json").read_text())["soup"]
    assert [one["taken"] for one in record["members"]] == [True] * 3
    assert [one["loss"] for one in record["members"]] == pytest.approx([loss(n, capsys) for n in ("a", "b", "base")])
    result = json.loads((RUNS / "soup" / "result.json").read_text())
    assert loss("soup", capsys) == pytest.approx(result["val"]["val_loss"], rel=1e-6)

    assert main(["generate", "soup", "--tokens", "5", "--device", "cpu"]) == 0
    for to in ("safetensors", "hf"):
        assert main(["export", "soup", "--to", to]) == 0
    capsys.readouterr()
    assert main(["compare", "soup", "base", "--picture", "both.svg"]) == 0
    assert f"{result['val']['val_loss']:.4f}" in capsys.readouterr().out
    assert "soup of 3 runs" in (RUNS / "soup" / "report.html").read_text()
    words = [
        "--init",
        "soup",
        "--name",
        "next",
        "--steps",
        "2",
        "--batch",
        "4",
        "--sample",
        "0",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert main(["train", runs, *words]) == 0
    assert lineage.shared([RUNS / "next", RUNS / "a"]).path == str((RUNS / "base").resolve())  # type: ignore[union-attr]


def test_a_greedy_soup_leaves_out_what_makes_it_worse(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soup", "worse", "a", "b", "--out", "elsewhere/s", "--device", "cpu"]) == 0
    assert "left out: with it the mean is worse" in capsys.readouterr().out
    each = {name: loss(name, capsys) for name in ("worse", "a", "b")}
    assert each["worse"] > max(each["a"], each["b"]) + 0.1
    body = json.loads(Path("elsewhere/s/config.json").read_text())
    taken = {Path(one["run"]).name: one["taken"] for one in body["soup"]["members"]}
    assert taken["worse"] is False
    assert loss("elsewhere/s", capsys) <= min(each.values()) + 1e-6
    assert body["soup"]["method"] == "greedy"
    Path("new.txt").write_text(Path(runs).read_text()[:4000])  # another text may choose otherwise; it is what measures
    assert main(["soup", "a", "b", "--out", "t", "--text", "new.txt", "--device", "cpu"]) == 0
    found = json.loads((RUNS / "t" / "result.json").read_text())["val"]["val_loss"]
    capsys.readouterr()
    assert main(["eval", "t", "new.txt", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(found, rel=1e-6)


def test_runs_that_share_nothing_are_refused_unless_forced(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["soup", "a", "apart", "--out", "s", "--method", "uniform", "--device", "cpu"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "runs/a and runs/apart have no common ancestor" in err
    assert len(err.strip().splitlines()) == 1
    assert not (RUNS / "s").exists()
    assert main([*words, "--force"]) == 0
    assert "have no common ancestor" in capsys.readouterr().err
    assert json.loads((RUNS / "s" / "config.json").read_text())["soup"]["forced"] is True


def test_what_no_soup_can_be_is_one_sentence(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    start("letters", runs, tokenizer="chars", steps=2)
    start("wide", runs, width=48, steps=2)
    assert main(["compress", "a", runs, "--int8", "--device", "cpu", "--samples", "2"]) == 0
    for words, says in (
        (["a", "--out", "s"], "fastlm soup needs two runs or more; it was given 1"),
        (["a", "b"], "--out must name the new run"),
        (["a", "a", "--out", "s"], "takes each run once"),
        (["a", "b", "--out", "base"], "runs/base exists and is not overwritten"),
        (["a", "none", "--out", "s"], "there is no run none"),
        (["a", "letters", "--out", "s", "--force"], "runs/a and runs/letters have different tokenizers"),
        (["a", "wide", "--out", "s", "--force"], "runs/a and runs/wide are of different shapes (width 32 and 48"),
        (["a", "a-int8", "--out", "s", "--force"], "runs/a-int8 is an int8 model"),
    ):
        capsys.readouterr()
        assert main(["soup", *words, "--device", "cpu"]) == 2, words
        err = capsys.readouterr().err.strip().splitlines()
        assert says in err[-1], (words, err)
        assert not (RUNS / "s").exists()


def test_a_greedy_soup_of_models_without_data_asks_for_a_text(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        export.export(export.read_model(RUNS / name), "safetensors", Path(f"out/{name}"))
    words = ["soup", "out/a", "out/b", "--out", "s", "--device", "cpu", "--force"]
    assert main(words) == 2
    assert "give --text, or --method uniform" in capsys.readouterr().err
    assert main([*words, "--method", "uniform"]) == 0
    assert main(["generate", "s", "--tokens", "3", "--device", "cpu"]) == 0
    mean = (
        export.read_model(RUNS / "a").tensors["embed.weight"].double()
        + export.read_model(RUNS / "b").tensors["embed.weight"]
    ) / 2
    assert torch.equal(export.read_model(RUNS / "s").tensors["embed.weight"], mean.float())


def test_masks_that_are_alike_stay_and_others_are_refused(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    start("pruned", runs, prune="0.5", prune_begin=0.0, prune_end=0.2, prune_method="magnitude")
    for name, seed in (("p", 2), ("q", 3)):
        made = job.start(_from("pruned", name, seed, prune="0.5", prune_method="magnitude", prune_begin=0.0), (runs,))
        made.trainer.fit()
    masks = [export.read_model(RUNS / name).masks for name in "pq"]
    alike = all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    assert main(["soup", "p", "q", "--out", "s", "--method", "uniform", "--device", "cpu"]) == (0 if alike else 2)
    if alike:
        made_of = export.read_model(RUNS / "s")
        assert made_of.masks.keys() == masks[0].keys()
    else:
        assert "runs/p and runs/q are pruned by different masks" in capsys.readouterr().err
    assert main(["soup", "pruned", "a", "--out", "t", "--force", "--device", "cpu"]) == 2
    assert "are pruned by different masks" in capsys.readouterr().err


def test_a_soup_that_is_damaged_or_resumed_is_refused(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soup", "a", "b", "--out", "s", "--device", "cpu"]) == 0
    for word in ("--resume", "--fork"):
        assert main(["train", word, "s"]) == 2
        assert "runs/s is a soup of runs and holds no training to go on with" in capsys.readouterr().err
    assert main(["compress", "a", runs, "--int8", "--device", "cpu", "--samples", "2"]) == 0
    assert main(["train", "--resume", "a-int8"]) == 2
    assert "runs/a-int8 is a compressed model" in capsys.readouterr().err
    file = RUNS / "s" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(InputError, match="does not match its hash"):
        job.load(RUNS / "s", "cpu")


# ---------------------------------------------------------------------------------------------------------------- lineage


def _from(init: str, name: str, seed: int, **changes: Any) -> Any:
    given = tiny(name=name, seed=seed, init=str(RUNS / init), steps=4, **changes)
    for field in ("layers", "heads", "width", "context"):
        setattr(given.model, field, None)
    return given


def common(*names: str) -> tuple[str, int | None] | None:
    found = lineage.shared([RUNS / name for name in names])
    return None if found is None else (Path(found.path).name, found.step)


def test_forks_share_the_step_they_forked_at(runs: str) -> None:
    assert common("a", "b") == ("base", 30)
    assert common("a", "base") == ("base", 30)
    assert common("a", "b", "base") == ("base", 30)
    assert common("a", "apart") is None
    assert common("a", "b", "apart") is None
    fork("a", "c", runs, steps=52)
    assert common("b", "c") == ("base", 30)
    assert common("a", "c") == ("a", 50)
    fork("c", "d", runs, steps=54)
    assert common("d", "a") == ("a", 50)
    assert common("d", "b") == ("base", 30)


def test_an_ancestor_that_is_moved_gone_or_made_anew_is_still_told(runs: str) -> None:
    shutil.move(RUNS / "base", "moved")
    assert common("a", "b") == ("base", 30)
    assert lineage.shared([RUNS / "a", Path("moved")]).step == 30  # type: ignore[union-attr]
    start("base", runs, seed=7)  # of the same name, and another run
    fork("base", "new", runs)
    assert common("a", "new") is None
    assert common("a", "b") == ("base", 30)
    shutil.rmtree("moved")
    assert common("a", "b") == ("base", 30)
    shutil.move(RUNS / "a", RUNS / "renamed")
    assert common("renamed", "b") == ("base", 30)


def test_runs_by_init_of_one_folder_share_it(runs: str) -> None:
    export.export(export.read_model(RUNS / "a"), "safetensors", Path("runs/plain"))
    for init, names in (("a", ("i", "j")), ("plain", ("k", "l"))):
        for seed, name in enumerate(names):
            job.start(_from(init, name, seed), (runs,)).trainer.fit()
    assert common("i", "j") == ("a", 50)
    assert common("i", "b") == ("base", 30)
    assert common("k", "l") == ("plain", None)
    assert common("k", "i") is None  # an exported folder does not tell whose it was


def test_checkpoints_of_one_run_share_it(book: str) -> None:  # noqa: F811
    start("long", book, save_every=10, keep=5)
    folders = [path for _, path in checkpoint.steps(RUNS / "long")]
    assert len(folders) == 3
    found = lineage.shared(folders)
    assert found is not None
    assert found.step == 10
    made = soup.run(folders, RUNS / "late", method="uniform", text=(book,), device="cpu")
    assert made.measured["val_loss"] > 0
    mean = sum(export.read_model(f).tensors["embed.weight"].double() for f in folders) / 3
    assert torch.equal(export.read_model(RUNS / "late").tensors["embed.weight"], mean.float())


def test_a_run_keeps_its_id_when_it_goes_on_and_older_runs_go_by_their_paths(runs: str) -> None:
    body = json.loads((RUNS / "a" / "config.json").read_text())
    again = job.resume(RUNS / "a", tiny(name="a", steps=52, lr=1e-2), (runs,), other_data=False, say=str)
    again.trainer.fit()
    after = json.loads((RUNS / "a" / "config.json").read_text())
    assert (after["id"], after["ancestors"]) == (body["id"], body["ancestors"])
    assert len({json.loads((RUNS / n / "config.json").read_text())["id"] for n in ("a", "b", "base", "apart")}) == 4
    for name in ("a", "b", "base"):  # as before there were ids
        old = json.loads((RUNS / name / "config.json").read_text())
        del old["id"], old["ancestors"]
        if old["fork"]:  # where the run was copied from
            old["fork"] = str((RUNS / "base" / "checkpoints" / Path(old["fork"]).name).resolve())
        (RUNS / name / "config.json").write_text(json.dumps(old))
    assert common("a", "b") == ("base", 30)
    fork("base", "late", runs)
    assert common("late", "a") == ("base", 30)
    shutil.rmtree(RUNS / "base")
    assert common("late", "a") == ("base", 30)
