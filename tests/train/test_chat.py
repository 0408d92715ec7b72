"""A model tuned on conversations is one at the command line and in what is exported of it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm.cli import conversation
from fastlm.cli.main import main
from fastlm.data import InputError, chat
from fastlm.data import tokenizer as tokenizers
from fastlm.models.gpt import GPT, named
from fastlm.train import chat_export, export, outputs, state

BYTES = {"kind": "bytes"}
TALK = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi é"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "so?"}]  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def specs() -> Iterator[Any]:
    """A specification of each kind of tokenizer."""
    yield BYTES
    yield {"kind": "chars", "characters": sorted({*"".join(m["content"] for m in TALK), *"SystemUserAssistant:\n "})}
    pytest.importorskip("tokenizers")
    yield tokenizers.BPETokenizer.train(iter([b"be kind hi so yes User: Assistant:"] * 3), 270).spec()


def folder(place: Path, spec: dict[str, Any], template: str, to: str) -> Path:
    torch.manual_seed(0)
    made = GPT(named("nano", "gpt2", layers=1, width=32, context=96, vocab=tokenizers.load(spec).vocab))
    source = export.Source(made.config, state.model_tensors(made), spec)
    export.export(source, to, place, more=chat_export.files(template, spec, to))
    return place


@pytest.mark.parametrize("number", range(3))
def test_transformers_writes_a_conversation_as_it_was_trained(number: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = list(specs())[number]
    place = folder(tmp_path / "out", spec, chat.PLAIN, "hf")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(place), tokenizers.load(spec)
    for talk in (TALK, TALK[1:2], TALK[1:]):
        found = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert found == outputs.opened(talk, ours, chat.PLAIN)
        whole = theirs.apply_chat_template(talk[:-1] or talk, tokenize=False)
        spans = chat.load(chat.PLAIN).spans(talk[:-1] or talk, 0, {})
        end = chat_export._end(spec)
        assert whole == end + "".join(span.text + end * span.stop for span in spans)
    with pytest.raises(Exception, match="judge"):
        theirs.apply_chat_template([{"role": "judge", "content": "x"}])
    assert chat.of_folder(place) == chat.PLAIN  # and read back it is the plain one


def test_a_template_of_one_s_own_goes_along(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = list(specs())[2]
    template = json.dumps({"kind": "jinja", "template": CHATML, "tokens": {"eos_token": "<|endoftext|>"}})
    place = folder(tmp_path / "out", spec, template, "hf")
    assert (place / "chat_template.jinja").read_text() == CHATML
    text = transformers.AutoTokenizer.from_pretrained(place).apply_chat_template(TALK[:2], tokenize=False)
    assert text == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi é<|im_end|>\n"
    assert chat.of_folder(place) == template
    assert chat.of_folder(folder(tmp_path / "own", spec, template, "safetensors")) == template
    assert chat.of_folder(folder(tmp_path / "none", spec, "", "hf")) == ""


def test_a_gguf_holds_the_template(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from fastlm.train import gguf as ours

    spec = list(specs())[2]
    made = GPT(named("nano", "llama", layers=1, width=32, context=96, vocab=tokenizers.load(spec).vocab))
    source = export.Source(made.config, state.model_tensors(made), spec)
    ours.write(source, tmp_path / "out", "float32", chat_export.jinja(chat.PLAIN, spec))
    field = gguf.GGUFReader(tmp_path / "out/model.gguf").get_field("tokenizer.chat_template")
    assert field.contents() == chat_export.jinja(chat.PLAIN, spec)


# ------------------------------------------------------------------------------------------------------- a conversation


class Scripted:
    """Answers that a model gives one after the other, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
        self.asked: list[str] = []
        left = [*answers]

        def answer(model: Any, tokenizer: Any, ids: Any, count: int, choose: Any, show: Any = None) -> outputs.Answer:
            self.asked.append(bytes(ids[1:]).replace(b"\0", b"|").decode())
            text = left.pop(0)
            show(text)
            return outputs.Answer(text, len(text), True, 0.0)

        monkeypatch.setattr(outputs, "answer", answer)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", BYTES, chat.PLAIN, "safetensors")


def said(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_each_line_is_answered_with_all_that_was_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Scripted(monkeypatch, "ho", "no")
    said(monkeypatch, "hi\n\n  why? \n")
    assert main(["generate", str(place), "--chat", "--device", "cpu", "--system", "be"]) == 0
    assert capsys.readouterr().out == "ho\nno\n"
    first = "System:\nbe\n\nUser:\nhi\n\nAssistant:\n"
    assert script.asked == [first, first + "ho|\n\nUser:\nwhy?\n\nAssistant:\n"]


def test_a_prompt_is_one_message_and_num_answers_to_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Scripted(monkeypatch, "ho", "no")
    assert main(["generate", str(place), "--chat", "--prompt", "hi", "--num", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "--- 1 of 2\nho\n--- 2 of 2\nno\n"
    assert script.asked == ["User:\nhi\n\nAssistant:\n"] * 2


def test_old_messages_leave_a_full_context_and_one_that_is_too_long_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Scripted(monkeypatch, "first answer", "second", "third")
    said(monkeypatch, f"{'a' * 20}\n{'x' * 90}\n{'b' * 20}\n{'c' * 20}\n")
    assert main(["generate", str(place), "--chat", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == "first answer\nsecond\nthird\n"
    assert "the message leaves no room for an answer: with its template it has" in err
    assert err.count("2 older messages no longer fit") >= 1
    assert all(len(asked) + 1 + conversation.LEAST <= 96 for asked in script.asked)
    assert script.asked[-1].endswith(f"User:\n{'c' * 20}\n\nAssistant:\n")
    assert main(["generate", str(place), "--chat", "--device", "cpu", "--prompt", "x" * 90]) == 2


def test_a_filter_withholds_an_answer_and_what_was_withheld_is_forgotten(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("darn\n")
    assert main(["data", "filter", "--words", str(tmp_path / "words.txt"), "--out", str(tmp_path / "f")]) == 0
    script = Scripted(monkeypatch, "darn", "darn it", "well", "darn", "good")
    said(monkeypatch, "hi\nso\n")
    capsys.readouterr()
    words = ["generate", str(place), "--chat", "--device", "cpu", "--filter", str(tmp_path / "f"), "--redraw", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("[withheld: ")
    assert out.endswith("\nwell\n")
    assert script.asked == ["User:\nhi\n\nAssistant:\n"] * 2 + ["User:\nso\n\nAssistant:\n"]


def test_a_model_of_no_conversations_is_said_to_be_one_and_flags_that_need_a_chat_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = folder(tmp_path / "plain", BYTES, "", "safetensors")
    said(monkeypatch, "hi\n")
    assert main(["generate", str(plain), "--chat", "--device", "cpu", "--tokens", "3"]) == 0
    assert "was not trained on conversations" in capsys.readouterr().err
    for words in (["--system", "be"], ["--chat", "--num", "2"]):
        assert main(["generate", str(plain), "--device", "cpu", *words]) == 2
        assert words[-2] in capsys.readouterr().err


def test_a_tuned_run_is_a_chat_and_stays_one_when_it_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    ask = lambda i: [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes."}]
    rows = [{"messages": ask(i)} for i in range(80)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "train",
        "rows.jsonl",
        "--sft",
        "--layers",
        "1",
        "--width",
        "64",
        "--heads",
        "2",
        "--context",
        "64",
        "--batch",
        "8",
    ]
    words += ["--steps", "60", "--lr", "0.01", "--eval-every", "0", "--name", "talk", "--device", "cpu", "--quiet"]
    assert main([*words, "--threads", "1", "--sample", "0", "--seed", "3"]) == 0
    assert main(["export", "talk", "--to", "safetensors", "--folder", "out"]) == 0
    capsys.readouterr()
    for place in ("talk", "out"):
        for prompt in ("say 3", "say 71"):
            asked = ["generate", place, "--chat", "--device", "cpu", "--temperature", "0", "--prompt", prompt]
            assert main(asked) == 0
            assert capsys.readouterr() == ("yes.\n", "")  # it ends by itself


def test_messages_that_no_template_knows_are_refused(place: Path) -> None:
    with pytest.raises(InputError, match="role"):
        outputs.opened([{"role": "judge", "content": "x"}], tokenizers.ByteTokenizer(), chat.PLAIN)
