"""What takes a filter: `data clean`, `data card`, `data tasks` and `generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fastlm.cli.main import main
from fastlm.data.filter import load, model, policy
from filter_rows import BAD, texts

ALL = ("--workers", "1", "--quality", "off", "--repetition", "off", "--dedup", "0")  # no other rule takes a text


def _folder_with(folder: Path, out: Path, rules: str) -> Path:
    shutil.copytree(folder, out)
    (out / policy.NAME).write_text(f"format = 1\n{rules}")
    return out


def _kept(out: Path) -> list[str]:
    return [json.loads(line)["text"] for path in out.glob("*.jsonl") for line in path.open()]


def test_clean_drops_masks_and_keeps_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datatrove")
    made = _folder_with(folder, tmp_path / "f", '[category.threat]\nthreshold = 0.5\n\n[category.insult]\nthreshold = 0.5\n'
                        'action = "mask"\n')  # fmt: skip
    rows = [
        {"text": f"the garden {i} and a {word}"} for i, word in enumerate(["window", "vortnag", "grobble", "letter"])
    ]
    corpus = tmp_path / "in.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", "clean", str(corpus), *ALL]
    assert main([*command, "--out", str(tmp_path / "out"), "--filter", str(made)]) == 0
    said = capsys.readouterr().out
    assert "filter_threat" in said
    assert "passages masked: insult 1" in said
    assert f"filter: policy {load(made).hash}" in said
    kept = _kept(tmp_path / "out")
    assert kept == [rows[0]["text"], model.MASK, rows[3]["text"]]
    assert main(["data", "clean", "--out", str(tmp_path / "out"), "--show-dropped", "filter_threat"]) == 0
    shown = capsys.readouterr().out
    assert "vortnag" in shown
    assert "threat 0." in shown or "threat 1." in shown
    (made / policy.NAME).write_text('format = 1\n[category.threat]\nthreshold = 0.5\naction = "review"\n')
    assert main([*command, "--out", str(tmp_path / "out"), "--filter", str(made)]) == 2, (
        "another policy, another result"
    )
    assert main([*command, "--out", str(tmp_path / "two"), "--filter", str(made)]) == 0
    assert "review_threat" in capsys.readouterr().out
    apart = list((tmp_path / "two" / ".clean" / "dropped" / "review_threat").glob("*.jsonl"))
    assert main(["data", "tasks", *map(str, apart), "--out", str(tmp_path / "tasks.json")]) == 0
    assert [task["data"]["text"] for task in json.loads((tmp_path / "tasks.json").read_text())] == [rows[1]["text"]]


def test_masked_passages_of_all_categories_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datatrove")
    rule = '[category.{}]\nthreshold = 0.5\naction = "mask"\n'
    made = _folder_with(folder, tmp_path / "f", rule.format("threat") + rule.format("insult"))
    corpus = tmp_path / "in.jsonl"
    text = f"the garden {BAD[0]} window\nthe garden {BAD[3]} window\nthe {BAD[1]} garden\nthe letter"
    corpus.write_text(json.dumps({"text": text}) + "\n")
    command = ["data", "clean", str(corpus), *ALL]
    assert main([*command, "--out", str(tmp_path / "out"), "--filter", str(made)]) == 0
    assert "passages masked: insult 2, threat 1" in capsys.readouterr().out
    kept = _kept(tmp_path / "out")
    assert kept == ["\n".join([model.MASK] * 3 + ["the letter"])]


def test_the_card_counts_what_the_policy_takes(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    corpus = tmp_path / "in.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in texts(4, 30)))
    assert main(["data", "card", str(corpus), "--out", str(tmp_path), "--filter", str(folder)]) == 0
    text = (tmp_path / "card.md").read_text()
    assert f"20 of 30 documents (66.7%) are what the filter's policy {load(folder).hash} takes: " in text
    assert "insult 10" in text
    assert "threat 10" in text


def test_tasks_begin_with_the_least_sure(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "in.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in [*texts(5, 60), {"text": "a grxobble garden"}]))
    out = tmp_path / "tasks.json"
    assert main(["data", "tasks", str(corpus), "--n", "20", "--filter", str(folder), "--out", str(out)]) == 0
    found = [task["data"]["text"] for task in json.loads(out.read_text())]
    unsure = [abs(load(folder).worst(text)) for text in found]
    assert len(found) == 20
    assert unsure == sorted(unsure)
    every = sorted(abs(load(folder).worst(json.loads(line)["text"])) for line in corpus.open())
    assert unsure == every[:20]


def test_what_the_filter_finds_is_drawn_again_or_withheld() -> None:
    from fastlm.cli.generate import _passed

    verdict = model.Verdict("drop", "insult", 0.9, 1.0, ((0, 1),))
    shown = iter(["one grobble", "two grobble", "three", "four"])
    judge = lambda text: verdict if "grobble" in text else None
    assert _passed(lambda show: show(next(shown)), judge, 3) == ("three", True)
    assert _passed(lambda show: show("grobble"), judge, 2) == ("[withheld: insult; drawn 3 times]", False)


def test_rules_of_categories_without_letters_are_apart() -> None:
    from fastlm.data.clean.scorer import rule_of

    assert rule_of("filter", "hate speech") == "filter_hate_speech"
    assert len({rule_of("filter", name) for name in ("😡", "😠", "../😡", "a/b", "a:b")}) == 5
    assert "/" not in rule_of("filter", "../😡")
