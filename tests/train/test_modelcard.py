"""The model card of a run and of what is exported of it: Hugging Face's format, what was measured, and what was not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from fastlm.cli.main import main
from fastlm.data.review import Item, Judgement, Store
from fastlm.train import Config, job, modelcard


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))


def settings(**changes: Any) -> Config:
    made = Config()
    defaults = {"layers": 1, "heads": 2, "width": 32, "context": 64, "steps": 2, "batch": 4, "eval_every": 0, "save_every": 0,
                "sample": 8, "eval_tokens": 512, "threads": 1, "device": "cpu", "quiet": True}  # fmt: skip
    for name, value in {**defaults, **changes}.items():
        group = next(g for g in vars(made).values() if name in {f.name for f in dataclasses.fields(g)})
        setattr(group, name, value)
    return made


def book(name: str = "book.txt") -> str:
    Path(name).write_text("".join(f"a line {i * i % 97} of a book about {i % 13} darn things\n" for i in range(1500)))
    return name


def words_filter() -> str:
    Path("words.txt").write_text("darn\n")
    assert main(["data", "filter", "--words", "words.txt", "--out", "filter"]) == 0
    return "filter"


def header(card: str) -> dict[str, Any]:
    hub = pytest.importorskip("huggingface_hub")
    return dict(hub.ModelCard(card).data.to_dict())


def test_a_finished_run_has_a_card_that_the_hub_reads_and_that_says_what_was_not_tested() -> None:
    made = job.start(settings(name="a"), (book(),))
    found = made.run(lambda text: None)
    card = Path("runs/a/README.md").read_text()
    assert header(card) == {"library_name": "fastlm", "pipeline_tag": "text-generation", "tags": ["fastlm"]}
    assert f"| val_bpb | {found.val['val_bpb']:.4f} |" in card
    assert "| --steps | 2 |" in card
    assert f"{made.costs.parameters:,} parameters" in card
    for said in ("cleaned by no filter", "Harmful text in what it says", "No data card was made", "whether training text can",
                 "energy is", "## Uses", "### Out-of-Scope Use", "all steps done"):  # fmt: skip
        assert said in card, said
    assert "Made smaller" not in card


def test_a_card_that_someone_edited_stays(capsys: pytest.CaptureFixture[str]) -> None:
    job.start(settings(name="a"), (book(),)).run(lambda text: None)
    path = Path("runs/a/README.md")
    assert modelcard.write(Path("runs/a"))
    before = path.read_text()
    path.write_text(before.replace("- **License:** [More Information Needed]", "- **License:** MIT"))
    edited = path.read_text()
    assert edited != before
    assert main(["train", "--resume", "runs/a", "--steps", "3"]) == 0
    assert path.read_text() == edited
    assert "written or edited by someone" in capsys.readouterr().err
    assert main(["export", "a", "--folder", "out"]) == 0  # what people added goes along
    assert "MIT" in Path("out/README.md").read_text()


def test_the_policy_that_cleaned_the_corpus_goes_into_the_run_and_the_card() -> None:
    pytest.importorskip("datatrove")
    Path("rows.jsonl").write_text("".join(
        json.dumps({"text": f"text {i} of many quiet words, " * 20 + ("darn " * 40 if i % 5 == 0 else "")}) + "\n"
        for i in range(60)
    ))  # fmt: skip
    own = words_filter()
    words = [
        "data",
        "clean",
        "rows.jsonl",
        "--out",
        "cleaned",
        "--filter",
        own,
        "--quality",
        "off",
        "--repetition",
        "off",
    ]
    assert main([*words, "--dedup", "0"]) == 0
    job.start(settings(name="a"), ("cleaned",)).run(lambda text: None)
    facts, table = (json.loads(Path(name).read_text()) for name in ("runs/a/facts.json", "cleaned/.clean/table.json"))
    (policy,) = facts["policies"]
    assert policy["hash"] == table["filter"]
    assert sum(policy["taken"].values()) == 12
    card = Path("runs/a/README.md").read_text()
    assert f"Policy `{policy['hash']}` read 60 documents" in card
    ((name, rule),) = policy["categories"].items()
    row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    assert row == f"| {name} | {rule['action']} | {rule['threshold']:.3g} | - | - | - | - | 12 |"
    assert "Harmful text in what it was trained on" not in card


def test_an_export_measures_the_harm_of_a_run_and_of_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    own = words_filter()
    job.start(settings(name="base"), (book(),)).run(lambda text: None)
    job.start(settings(name="tuned", init="base"), (book("more.txt"),)).run(lambda text: None)
    assert "**Finetuned from model:** base" in Path("runs/tuned/README.md").read_text()
    Path("p.txt").write_text("a\nb\nc\n")
    words = ["export", "tuned", "--filter", own, "--prompts", "p.txt", "--device", "cpu", "--folder"]
    assert main([*words, "out"]) == 0
    assert "README.md" in capsys.readouterr().out
    found = json.loads(Path("runs/tuned/toxicity.json").read_text())
    assert {name: n for name, (_, n) in found["shares"].items()} == {"base": 3, "tuned": 3}
    for path in ("out/README.md", "runs/tuned/README.md"):
        card = Path(path).read_text()
        assert "One output of up to 60 tokens to each of 3 prompts of p.txt" in card
        assert f"| tuned | {found['shares']['tuned'][0]} of 3 |" in card
        assert f"Policy `{found['hash']}`" in card
        assert "Harmful text in what it says" not in card
    assert header(Path("out/README.md").read_text())["library_name"] == "fastlm"
    assert main(["export", "out", "--filter", own, "--folder", "again"]) == 2
    assert "--filter measures the outputs of a run" in capsys.readouterr().err
    assert main(["export", "out", "--folder", "again"]) == 0  # of an exported folder its own card
    assert Path("again/README.md").read_text() == Path("out/README.md").read_text()
    assert main(["export", "tuned", "--prompts", "p.txt", "--folder", "third"]) == 2
    assert "give --filter" in capsys.readouterr().err


def test_what_people_said_stands_in_the_card() -> None:
    job.start(settings(name="a"), (book(),)).run(lambda text: None)
    store = Store.make(Path("runs/a/reviews.db"), "a", ("harmless", "harmful"), 0)
    store.add(Item({"prompt": "p", "text": f"{i}"}) for i in range(4))
    for one, said in zip(
        store.next("ann", "w", count=3), (Judgement("harmful", -1), Judgement("harmless", 1), Judgement())
    ):
        store.judge("ann", one["text"], one["id"], said)
    store.judge("bob", "x", 1, Judgement("harmful", -1, "better"))
    store.close()
    card = modelcard.text(Path("runs/a"))
    assert "4 judgements of outputs by 2 people" in card
    for row in (
        "| harmful | 2 |",
        "| harmless | 1 |",
        "| thumb up | 1 |",
        "| thumb down | 2 |",
        "| a better answer | 1 |",
    ):
        assert row in card
    assert "fastlm review RUN" not in card


def test_languages_come_from_the_data_card() -> None:
    job.start(settings(name="a"), (book(),)).run(lambda text: None)
    Path("runs/a/card.md").write_text(
        '---\npretty_name: "x"\nlanguage:\n- "en"\n- "no"\nsize_categories:\n- n<1K\n---\n\n# x\n'
    )
    card = modelcard.text(Path("runs/a"))
    assert header(card)["language"] == ["en", "no"]
    assert "in its data card, card.md" in card
