"""Every command beside what a machine may be: a narrow terminal, a closed pipe, a full disk, file names in any bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastlm.cli.main import COMMANDS
from fastlm.data.review import Item, Judgement, Store

SMALL = "--layers 1 --heads 2 --width 32 --context 16 --batch 4 --eval-tokens 512 --sample 8 --steps 2".split()  # noqa: SIM905
SMALL += ["--threads", "1", "--device", "cpu"]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command line in a process of its own, and says how it ended; in a folder with two runs and a text."""
    place = tmp_path_factory.mktemp("place")
    text = "".join(f"line {i * i % 97} of a book about {i % 13} things\n" for i in range(3000))
    (place / "book.txt").write_text(text)
    (place / "curve.csv").write_text("".join(f"{1.8e9 + 3600 * i:.0f},{200 + i % 5}\n" for i in range(48)))
    (place / "labels.json").write_text(json.dumps([
        {"id": i, "data": {"text": f"text {i}"}, "annotations": [
            {"completed_by": who, "result": [{"type": "choices", "value": {"choices": ["a" if i % 2 else "b"]}}]}
            for who in (1, 2)
        ]} for i in range(4)
    ]))  # fmt: skip
    reviews = Store.make(place / "reviews.db", "tasks.json", ("a", "b"), 0)
    reviews.add([Item({"text": "text 1"})])
    reviews.judge("ann", "1", 1, Judgement("a", better="text 2"))
    reviews.close()
    env = {**os.environ, "FASTLM_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    env.pop("COLUMNS", None)
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place, env=env
    ) as server:

        def ask(*argv: str, **streams: str) -> dict[str, Any]:
            assert server.stdin
            assert server.stdout
            print(json.dumps({"argv": argv, **streams}), file=server.stdin, flush=True)
            return {"place": place, **json.loads(server.stdout.readline())}

        made = ask("train", "book.txt", *SMALL, "--name", "a", "--quiet")
        assert made["code"] == 0, made["err"]
        shutil.copytree(place / "runs/a", place / "runs/b")
        yield ask
        server.stdin.close()


COMMAND_LINES = {
    "train": ["train", "book.txt", *SMALL],
    "generate": ["generate", "a", "--tokens", "30"],
    "eval": ["eval", "a"],
    "eval json": ["eval", "a", "--json"],
    "export": ["export", "a"],
    "inspect": ["inspect", "a", "--prompt", "a book", "--saliency", "text"],
    "compress": ["compress", "a", "--int8", "--name", "small"],
    "runs": ["runs"],
    "compare": ["compare", "a", "b"],
    "soup": ["soup", "a", "b", "--out", "mixed"],
    "review": ["review", "reviews.db", "--export", "export.json"],
    "energy": ["energy", "curve.csv", "--hours", "1", "--deadline", "9h", "--start", "2027-01-15T10:00Z"],
    "plan": ["plan", *SMALL],
    "plan json": ["plan", *SMALL, "--json"],
    "doctor": ["doctor"],
    "data prepare": ["data", "prepare", "book.txt"],
    "data show": ["data", "show", "1", "book.txt"],
    "data clean": ["data", "clean", "book.txt", "--out", "cleaned", "--quality", "off", "--repetition", "off"],
    "data card": ["data", "card", "book.txt", "--out", "carded"],
    "data tasks": ["data", "tasks", "book.txt", "--out", "tasks.json"],
    "data labels": ["data", "labels", "labels.json", "--out", "labelled.jsonl"],
    "data filter": ["data", "filter", "--words", "book.txt", "--out", "filter"],
    "data pairs": ["data", "pairs", "reviews.db", "--out", "pairs.jsonl"],
    "data augment": ["data", "augment", "book.txt", "--out", "more.jsonl", "--shuffle", "1"],
    "bench": ["bench", "--status"],
    "version": ["--version"],
    "help": ["--help"],
    "train help": ["train", "--help"],
    "data help": ["data", "--help"],
}
"""A line of each command that ends well and prints."""
# what these print is what they are for, or says where it is
PRODUCT = set(COMMAND_LINES) - {"train", "compress", "soup"}


def test_every_command_has_a_line() -> None:
    from fastlm.cli.data import OTHERS

    given = {" ".join(words[:2]) if words[0] == "data" else words[0] for words in COMMAND_LINES.values()}
    assert given >= (set(COMMANDS) - {"data"}) | {f"data {name}" for name in (*OTHERS, "prepare", "show")}


FAST = {("train", "closed"), ("train", "full"), ("generate", "full"), ("generate", "closed"), ("runs", "narrow"),
        ("runs", "full"), ("data show", "full"), ("train help", "closed")}  # fmt: skip
CASES = [(which, out) for which in COMMAND_LINES for out in ("pipe", "narrow", "closed", "full")]


@pytest.mark.parametrize("which, out", [c if c in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in CASES])
def test_a_command_survives_what_it_prints_to(run: Run, which: str, out: str) -> None:
    words = list(COMMAND_LINES[which])
    if which == "train":
        words += ["--name", f"new-{out}"]
    place = run("--version")["place"]
    for made in ("cleaned", "carded", "runs/small", "runs/mixed", "runs/a/export-safetensors"):
        shutil.rmtree(place / made, ignore_errors=True)
    for made in ("more.jsonl", "tasks.json", "labelled.jsonl"):
        (place / made).unlink(missing_ok=True)
    found = run(*words, out=out)
    err = found["err"]
    for word in ("Traceback", "Exception ignored", "Error:"):
        assert word not in err, err
    if out in ("pipe", "narrow"):
        assert found["code"] == 0, err
        assert found["text"].strip()
    elif which in PRODUCT:
        assert found["code"] == 1, err
        assert ("No space left" in err) == (out == "full"), err
    else:
        assert found["code"] == 0, err
        assert "stdout cannot be written any more" in err
    if which == "train":
        for name in ("result.json", "report.html", "sample.txt"):
            assert (place / "runs" / f"new-{out}" / name).is_file(), name


@pytest.mark.parametrize(
    "words", [["train", "missing.txt"], ["generate", "nowhere"], ["train", "--steps", "many"], ["fly"]]
)
@pytest.mark.parametrize("err", ["narrow", "closed", "full"])
def test_a_refusal_that_cannot_be_said_is_one_all_the_same(run: Run, words: list[str], err: str) -> None:
    assert run(*words, err=err)["code"] == 2


BYTES = os.fsdecode(b"caf\xe9 \xff")
NAMED = {
    "train": ["train", "{}.txt", *SMALL, "--out", "{}", "--name", "{}", "--val", "more={}.txt", "--tokenizer", "{}.json"],
    "train again": ["train", "--resume", "{0}/{0}", "--steps", "3", "--val", "other={}.txt", "--other-data"],
    "train from it": ["train", "{}.txt", *SMALL[8:], "--init", "{0}/{0}", "--out", "{}", "--name", "{} 2", "--batch", "2"],
    "generate": ["generate", "{0}/{0}", "--tokens", "3"],
    "eval": ["eval", "{0}/{0}", "{}.txt"],
    "eval json": ["eval", "{0}/{0}", "{}.txt", "--json"],
    "export": ["export", "{}", "--out", "{}", "--folder", "{}.exported"],
    "inspect": ["inspect", "{0}/{0}", "--prompt", "a book", "--page", "{}.html"],
    "runs": ["runs", "--out", "{}"],
    "compare": ["compare", "a", "{0}/{0}", "--picture", "{}.png"],
    "compare in svg": ["compare", "a", "{0}/{0}", "--picture", "{}.svg"],
    "data prepare": ["data", "prepare", "{}.txt"],
    "data show": ["data", "show", "1", "--run", "{0}/{0}"],
    "data clean": ["data", "clean", "{}.txt", "--out", "{}.cleaned", "--quality", "off", "--repetition", "off"],
    "data tasks": ["data", "tasks", "{}.txt", "--out", "{}.tasks"],
    "data labels": ["data", "labels", "{}.labels", "--out", "{}.jsonl"],
    "data filter": ["data", "filter", "--words", "{}.txt", "--out", "{}.filter"],
    "data pairs": ["data", "pairs", "{}.db", "--out", "{}.pairs"],
    "review": ["review", "{}.db", "--export", "{}.exported.json"],
    "data augment": ["data", "augment", "{}.txt", "--out", "{}.more.jsonl", "--shuffle", "1"],
    "missing": ["eval", "{0}/{0}", "{}.none"],
}  # fmt: skip


@pytest.fixture(scope="module")
def named(run: Run) -> Run:
    """The same where a text, a tokenizer and a run have names that are no text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    place = run("--version")["place"]
    byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*byte, "<|endoftext|>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (place / f"{BYTES}.json").write_text(made.to_str())
    shutil.copy(place / "book.txt", place / f"{BYTES}.txt")
    shutil.copy(place / "labels.json", place / f"{BYTES}.labels")
    shutil.copy(place / "reviews.db", place / f"{BYTES}.db")
    return run


def test_a_run_of_files_whose_names_are_any_bytes(named: Run) -> None:
    for which in ("train", "train again", "generate", "eval", "runs", "missing"):
        sound(named, which)


@pytest.mark.slow
@pytest.mark.parametrize("which", NAMED)
def test_every_command_takes_file_names_in_any_bytes(named: Run, which: str) -> None:
    if not (named("--version")["place"] / BYTES / BYTES).exists() and which != "train":
        sound(named, "train")
    if which == "train":
        shutil.rmtree(named("--version")["place"] / BYTES, ignore_errors=True)
    sound(named, which)


def sound(named: Run, which: str) -> None:
    found = named(*(word.format(BYTES) for word in NAMED[which]))
    assert "Traceback" not in found["err"]
    assert found["code"] == (2 if which == "missing" else 0), found["err"]
    if which == "missing":
        assert "caf? ?.none" in found["err"]
        assert len(found["err"].strip().splitlines()) == 1
    if which.startswith("train") and "from" not in which:
        page = (found["place"] / BYTES / BYTES / "report.html").read_text()
        assert "caf" in page
