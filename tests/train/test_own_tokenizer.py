"""A tokenizer is never guessed: a model's own is read, kept by a resume and a fork, or asked for by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastlm.cli import main as cli
from fastlm.data import InputError
from fastlm.data import tokenizer as tokenizers
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.train import export, files, job
from test_train import _own_place, book, tiny  # noqa: F401


def learnt(text: str, size: int) -> dict[str, Any]:
    return tokenizers.BPETokenizer.train(iter([text.encode()]), size).spec()


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    """What transformers wrote of a GPT-2 before there was a tokenizer.json: vocab.json and merges.txt."""
    spec = learnt("to be or not to be, that is the question " * 50, 280)
    shape = GPTConfig(layers=1, heads=2, width=16, context=16, vocab=tokenizers.load(spec).vocab)
    export.export(export.Source(shape, GPT(shape).state_dict(), spec), "hf", tmp_path / "hf")
    model = json.loads(spec["content"])["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (" ".join(m) if isinstance(m, list) else m for m in model["merges"])
    (tmp_path / "hf" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "hf" / "spec.json").write_text(json.dumps(spec))
    return tmp_path / "hf"


def test_older_tokenizer_files_are_read_by_transformers(folder: Path) -> None:
    pytest.importorskip("transformers")
    own = tokenizers.load(json.loads((folder / "spec.json").read_text()))
    found = export.read_tokenizer(folder)
    assert found is not None
    text = b"to be, or not: that is a question"
    assert tokenizers.load(found).encode(text).tolist() == own.encode(text).tolist()
    path = job.tokenizer_of(folder)  # a tokenizer.json, which the flag may name
    assert tokenizers.make(path, 0, lambda: iter(())).encode(text).tolist() == own.encode(text).tolist()


def test_a_model_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer.*--tokenizer"):
        job.tokenizer_of(folder)
    (folder / "tokenizer.model").write_bytes(b"no sentencepiece")
    with pytest.raises(InputError, match=r"tokenizer\.model.*--tokenizer"):
        job.tokenizer_of(folder)


def test_the_default_tokenizer_is_no_answer_in_python_either(folder: Path, book: str) -> None:  # noqa: F811
    shape = {"layers": None, "heads": None, "width": None, "context": None, "style": "gpt2"}
    with pytest.raises(InputError, match="--tokenizer"):
        job.start(tiny(init=str(folder), **shape), (book,))
    for name in ("merges.txt", "vocab.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer.*--tokenizer"):
        job.start(tiny(init=str(folder), **shape), (book,))
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_a_fork_and_a_resume_keep_the_tokenizer_on_other_text(kind: str, book: str, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("tokenizers")
    config = tiny(name="first", tokenizer=kind, vocab=270, steps=2, sample=0)
    job.start(config, (book,)).run(lambda text: None)
    own = export.read_tokenizer(Path("runs/first"))
    assert own is not None
    other = tmp_path / "other.txt"
    other.write_text("quick brown foxes jump; lazy dogs sleep soundly\n" * 400)
    said: list[str] = []
    config.run.name = "second"
    made = job.fork(Path("runs/first"), config, (str(other),), other_data=True, say=said.append)
    assert made.data[0].tokenizer.spec() == own
    assert any("tokenizer: the run's own" in line for line in said)
    config.optim.steps = 3
    config.run.name = "first"
    gone_on = job.resume(Path("runs/first"), config, (str(other),), other_data=True, say=said.append)
    assert gone_on.data[0].tokenizer.spec() == own
    config.run.name, config.data.tokenizer = "third", "chars" if kind == "bpe" else "bpe"  # by name: another
    with pytest.raises(InputError):
        job.fork(Path("runs/first"), config, (str(other),), other_data=False, say=said.append)


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_eval_and_show_of_a_fork_to_other_text_take_the_runs_tokenizer(
    kind: str,
    book: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tokenizers")
    config = tiny(name="first", tokenizer=kind, vocab=270, steps=2, sample=0)
    job.start(config, (book,)).run(lambda text: None)
    other = Path("other.txt")
    # characters of the book alone, but fewer and in other numbers: a tokenizer learnt from them is another
    words = [word for word in Path(book).read_text().split() if "e" not in word]
    other.write_text("\n".join(" ".join(words[i : i + 8]) for i in range(0, len(words), 8)) + "\n")
    config.run.name, config.optim.steps = "second", 4
    said: list[str] = []
    made = job.fork(Path("runs/first"), config, (str(other),), other_data=True, say=said.append)
    result = made.run(lambda text: None)
    assert made.trainer.best["step"] == result.val["step"] == 4
    learnt_again = job.read_data((str(other),), config.data, made.shape.context)[0].tokenizer
    assert learnt_again.hash != made.data[0].tokenizer.hash
    capsys.readouterr()
    assert cli.main(["eval", "second", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == result.val["val_tokens"]
    assert found["loss"] == pytest.approx(result.val["val_loss"], rel=1e-5)
    assert cli.main(["data", "show", "0", "--run", "second"]) == 0
    _, targets, *_ = (t[0].numpy() for t in made.source.batch(np.array([0])))
    text = made.data[0].tokenizer.decode(targets).decode()
    assert text in capsys.readouterr().out


def test_ranks_that_write_one_tokenizer_at_once_leave_it_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    path = Path(job.tokenizer_of(folder))
    written = path.stat().st_mtime_ns, path.stat().st_ino
    assert job.tokenizer_of(folder) == str(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written  # what is there is not written again
    # two processes between opening and renaming: neither takes the other's draft away
    one, two = 11, 22
    real = os.replace

    def second_in_between(draft: str, place: str) -> None:
        monkeypatch.setattr(os, "replace", real)
        monkeypatch.setattr(os, "getpid", lambda: two)
        files.write_text(path, "other")
        real(draft, place)

    monkeypatch.setattr(os, "getpid", lambda: one)
    monkeypatch.setattr(os, "replace", second_in_between)
    files.write_text(path, "text")
    assert path.read_text() == "text"
    assert not list(path.parent.glob(".*.draft"))
