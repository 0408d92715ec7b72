"""What a model says to prompts: where an answer ends, what comes before it, and a run's outputs in a review."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastlm.cli.main import main
from fastlm.data import InputError, chat
from fastlm.data import tokenizer as tokenizers
from fastlm.models.gpt import GPT, named
from fastlm.train import export, outputs, state

BYTES = tokenizers.ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(named("nano", "gpt2", layers=1, width=32, context=64)).eval()


@pytest.fixture(scope="module")
def folder(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "small"
    export.export(export.Source(model.config, state.model_tensors(model), {"kind": "bytes"}), "safetensors", place)
    return place


def says(text: bytes) -> Any:
    """A choice of tokens that spells this text and then goes on with an end."""
    left = [*text, BYTES.eot]
    return lambda logits: torch.tensor([left.pop(0)])


def test_an_answer_ends_where_the_model_ends_it_and_streams_what_it_says(model: GPT) -> None:
    shown: list[str] = []
    found = outputs.answer(model, BYTES, [*b"Q:"], 40, says("grün".encode()), shown.append)
    assert (found.text, found.tokens, found.ended, "".join(shown)) == ("grün", 5, True, "grün")
    cut = outputs.answer(model, BYTES, [*b"Q:"], 3, says("grün".encode()))
    assert (cut.text, cut.tokens, cut.ended) == ("gr\ufffd", 3, False)
    with torch.no_grad():
        own = model(torch.tensor([[*b"Q:gr"]]))[0].log_softmax(-1)
    expected = -sum(float(own[1 + i, t]) for i, t in enumerate(b"gr")) / 2
    assert outputs.answer(model, BYTES, [*b"Q:"], 2, says(b"gr")).surprise == pytest.approx(expected, rel=1e-4)
    nothing = outputs.answer(model, BYTES, [*b"Q:"], 9, says(b""))
    assert (nothing.text, nothing.tokens, nothing.ended) == ("", 0, True)


def test_prompts_are_opened_as_they_were_trained() -> None:
    assert outputs.opened("a", BYTES, chat.PLAIN) == [97]
    assert outputs.opened("", BYTES, chat.PLAIN) == [BYTES.eot]
    said = [{"role": "user", "content": "hi"}]
    assert outputs.opened(said, BYTES, chat.PLAIN) == [BYTES.eot, *b"User:\nhi\n\nAssistant:\n"]


def test_prompts_of_files(tmp_path: Path) -> None:
    ask, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"prompt": "p", "completion": "c"}, {"messages": [ask, reply, ask, reply]}, {"prompt": [ask], "chosen": []},
            {"prompt": "p"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outputs.read_prompts(tmp_path / "a.jsonl") == ["p", [ask, reply, ask], [ask]]
    (tmp_path / "a.txt").write_text("one\n\ntwo\none\n")
    assert outputs.read_prompts(tmp_path / "a.txt") == ["one", "two"]
    for text, why in (("{", "line 1 is no row"), ("{}", "line 1 has no prompt"), ("", "no prompt")):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(InputError, match=why):
            outputs.read_prompts(tmp_path / "a.jsonl")


class Held:
    """A prepared corpus as far as openings read it."""

    def __init__(self, *documents: bytes) -> None:
        self.tokenizer = BYTES
        self.val = [np.array([t for d in documents for t in (*d, BYTES.eot)], dtype=np.uint8)]


def test_openings_are_beginnings_of_held_out_documents_and_the_seed_s() -> None:
    texts = [f"document {i} of many words".encode() for i in range(30)]
    data: Any = [Held(*texts, b"short")]
    found = outputs.openings(data, 12, seed=4, length=14)
    assert len({*found}) == 12
    assert {*found} <= {t[:14].decode() for t in texts}
    assert outputs.openings(data, 12, seed=4, length=14) == found != outputs.openings(data, 12, seed=5, length=14)
    assert len(outputs.openings(data, 99, seed=4, length=14)) == 30
    with pytest.raises(InputError, match="--prompts"):
        outputs.openings(data, 12, seed=4, length=400)


def test_a_run_s_outputs_come_with_the_most_surprising_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    words = ["review", str(folder), "--prompts", str(tmp_path / "p.txt"), "--db", str(tmp_path / "r.db"), "--n", "5"]
    words += ["--tokens", "6", "--device", "cpu", "--export", str(tmp_path / "e.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert sorted(one["data"]["prompt"] for one in found) == ["one", "one", "three", "two", "two"]
    unsure = [row[0] for row in sqlite3.connect(tmp_path / "r.db").execute("SELECT unsure FROM items ORDER BY id")]
    assert unsure == sorted(unsure, reverse=True)
    assert unsure[0] > 0
    before = (tmp_path / "e.json").read_text()
    assert main([*words, "--seed", "9"]) == 0  # what was drawn stays
    assert (tmp_path / "e.json").read_text() == before
    (tmp_path / "p.txt").write_text("long " * 20)
    assert main([*words[:5], str(tmp_path / "other.db"), "--device", "cpu", "--export", str(tmp_path / "no")]) == 2
    assert "the model's context is 64" in capsys.readouterr().err
    assert main(["review", str(folder), "--db", str(tmp_path / "new.db"), "--export", str(tmp_path / "no")]) == 2
    assert "names no corpus: --prompts FILE" in capsys.readouterr().err
