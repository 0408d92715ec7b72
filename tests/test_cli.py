"""The command line as a user meets it: real processes, one sentence for bad input, clean ends on signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastlm.cli import main as cli
from fastlm.train import checkpoint
from fastlm.train.callbacks import read_metrics

SMALL = "--layers 1 --heads 2 --width 32 --context 16 --batch 4 --eval-tokens 512 --threads 1".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    Path("book.txt").write_text("".join(f"line {i * i % 97} of a book about {i % 13} things\n" for i in range(3000)))


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastlm", *words], capture_output=True, text=True, timeout=120)


def begin(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastlm", "train", "book.txt", *SMALL, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_train_generate_eval_resume(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["train", "book.txt", *SMALL, "--steps", "30", "--name", "a", "--lr", "1e-2", "--dropout", "0.1"]) == 0
    )
    out = capfd.readouterr().out
    for word in ("corpus:", "parameters", "bits per byte", "bigram", "zlib -9", "a sample:", "runs/a"):
        assert word in out
    assert cli.main(["generate", "--prompt", "line 1", "--tokens", "12", "--seed", "3"]) == 0
    first = capfd.readouterr().out
    assert first.startswith("line 1")
    assert cli.main(["generate", "a", "--prompt", "line 1", "--tokens", "12", "--seed", "3"]) == 0
    assert capfd.readouterr().out == first
    assert cli.main(["eval"]) == 0
    result = json.loads(Path("runs/a/result.json").read_text())
    assert f"{result['val']['val_bpb']:.3f}"[:4] in capfd.readouterr().out
    assert cli.main(["eval", "a", "book.txt"]) == 0
    assert cli.main(["train", "--resume", "runs/a", "--steps", "40"]) == 0
    out = capfd.readouterr().out
    assert "changed: steps: 30 -> 40" in out
    assert "going on from step 30 of 40" in out
    assert [r["step"] for r in read_metrics(Path("runs/a"))] == list(range(1, 41))


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "missing.txt"], "missing.txt does not exist"),
        (["train", "empty.txt"], "empty"),
        (["train", "book.txt", "--context", "10000000"], "shorter than one context"),
        (["train", "book.txt", "--dropout", "1.5"], "--dropout must lie in [0, 1)"),
        (["train", "book.txt", "--steps", "0"], "--steps must be at least 1"),
        (["train", "book.txt", "--heads", "3"], "multiple of heads"),
        (["train", "book.txt", "--lr", "0"], "--lr must be positive"),
        (["train", "book.txt", "--device", "tpu"], "--device must be"),
        (["train", "book.txt", "--tokenizer", "words"], "not bytes, chars, bpe"),
        (["train", "--resume", "nowhere"], "no run nowhere"),
        (["generate", "nowhere"], "no run nowhere"),
        (["eval"], "holds no run"),
        (["generate", "--top-p", "0"], "top-p"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").touch()
    status = cli.main(words)
    err = capfd.readouterr().err
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_unknown_flags_and_commands_exit_with_2() -> None:
    for words in (["train", "--colour", "red"], ["fly"], ["train", "--steps", "many"], []):
        result = call(*words)
        assert result.returncode == 2, words
        assert "Traceback" not in result.stderr
    assert call("--help").returncode == 0
    assert "doctor" in call("--help").stdout


def test_help_documents_every_flag() -> None:
    text = call("train", "--help").stdout
    for flag in ("--kernels", "--resume", "--dropout", "--steps", "--optimizer", "CORPUS"):
        assert flag in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(number: int) -> None:
    process = begin("--steps", "1000000", "--name", "a", "--eval-every", "0")
    metrics = Path("runs/a/metrics.jsonl")
    until(lambda: metrics.exists() and metrics.stat().st_size > 1000, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, (out, err)
    assert "go on with" in err
    assert "Traceback" not in err
    found = checkpoint.newest(Path("runs/a"))
    assert read_metrics(Path("runs/a"))[-1]["step"] == int(found.name.split("-")[1])


def test_a_second_interrupt_exits_at_once() -> None:
    process = begin("--steps", "1000000", "--name", "a", "--eval-every", "0", "--batch", "20000")  # a step of seconds
    until(lambda: Path("runs/a/metrics.jsonl").exists(), process)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "once more" not in process.stderr.readline():
        assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - start < 5


def test_a_read_only_place_is_one_sentence() -> None:
    Path("runs").write_text("a file where the folder should be")
    result = call("train", "book.txt", *SMALL)
    assert result.returncode == 2
    assert "cannot make the run's folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_train_generate_eval_and_export_need_no_network(tmp_path: Path) -> None:
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(
        "import socket\n"
        "def no(*a, **k): raise RuntimeError('network')\n"
        "socket.socket.connect = no; socket.getaddrinfo = no; socket.create_connection = no\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for words in (
        ["train", "book.txt", *SMALL, "--steps", "3"],
        ["generate", "--tokens", "3"],
        ["eval"],
        ["export", "--to", "hf"],
    ):
        result = subprocess.run(
            [sys.executable, "-m", "fastlm", *words], env=env, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr


def test_importing_the_trainer_needs_no_command_line_packages() -> None:
    code = (
        "import sys, fastlm.train, fastlm.data, fastlm.models.gpt\n"
        "assert not {'tyro', 'rich', 'matplotlib', 'tokenizers', 'pyarrow', 'safetensors'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
