"""The command line as a user meets it: real processes, one sentence for bad input, clean ends on signals."""

from __future__ import annotations

import ast
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from fastlm import _native
from fastlm.cli import main as cli
from fastlm.train import checkpoint, config
from fastlm.train.files import read_metrics

SMALL = "--layers 1 --heads 2 --width 32 --context 16 --batch 4 --eval-tokens 512 --threads 1".split()  # noqa: SIM905

LIMIT = 240  # seconds after which a process counts as hung; nothing here is a test of speed


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    Path("book.txt").write_text("".join(f"line {i * i % 97} of a book about {i % 13} things\n" for i in range(3000)))


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastlm", *words], capture_output=True, text=True, timeout=LIMIT)


def begin(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastlm", "train", "book.txt", *SMALL, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, process: subprocess.Popen[str], seconds: float = LIMIT) -> None:
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
    assert f"{result['val']['val_bpb']:.4f} bits" in capfd.readouterr().out
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
        (["train", "short.txt", "--context", "4096", "--batch", "1"], "shorter than one context"),
        (["train", "book.txt", "--context", "10000000"], "GiB and the machine has"),
        (["train", "book.txt", "--dropout", "1.5"], "--dropout must be at least 0 and below 1"),
        (["train", "book.txt", "--steps", "0"], "--steps must be at least 1"),
        (["train", "book.txt", "--heads", "3"], "--heads 3; it is 128 (--size nano gives what"),
        (["train", "book.txt", "--lr", "0"], "--lr must be above 0"),
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
    Path("short.txt").write_text(Path("book.txt").read_text()[:4000])
    status = cli.main(words)
    err = capfd.readouterr().err
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("FASTLM_BACKEND", "cuda", "backend 'cuda' is forced and cannot serve"),
        ("FASTLM_CPU_ISA", "sse9", "is 'sse9'; it"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_said_before_there_is_a_run(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "FASTLM_CPU_ISA" and _native.missing():
        pytest.skip("no compiled core")
    monkeypatch.setenv(name, value)
    done = call("train", "book.txt", *SMALL, "--device", "cpu")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_unknown_flags_and_commands_exit_with_2() -> None:
    for words in (["train", "--colour", "red"], ["fly"], ["train", "--steps", "many"], []):
        result = call(*words)
        assert result.returncode == 2, words
        assert "Traceback" not in result.stderr
    assert call("--help").returncode == 0
    assert "doctor" in call("--help").stdout


def test_help_documents_every_flag() -> None:
    """Each field of the configuration is a flag, and what its docstring says is said beside it."""
    text = subprocess.run(
        [sys.executable, "-m", "fastlm", "train", "--help"],
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    ).stdout
    text = " ".join(text.replace("│", " ").split())
    documented = 0
    for group in ast.parse(Path(config.__file__).read_text()).body:
        if not isinstance(group, ast.ClassDef) or group.name == "Config":
            continue
        for field, doc in itertools.pairwise(group.body):
            if not isinstance(field, ast.AnnAssign):
                continue
            assert isinstance(field.target, ast.Name)
            flag = "--" + field.target.id.replace("_", "-")
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), flag
            assert isinstance(doc, ast.Expr), f"{flag} is not documented"
            assert isinstance(doc.value, ast.Constant)
            assert " ".join(str(doc.value.value).split()) in text, flag
            documented += 1
    assert documented == sum(len(group) for group in config.Config().to_dict().values())
    for word in ("CORPUS", "--resume", "--fork", "--other-data"):
        assert word in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(number: int) -> None:
    process = begin("--steps", "1000000", "--name", "a", "--eval-every", "0")
    metrics = Path("runs/a/metrics.jsonl")
    until(lambda: metrics.exists() and metrics.stat().st_size > 1000, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + number, (out, err)
    assert "go on with" in err
    assert "Traceback" not in err
    found = checkpoint.newest(Path("runs/a"))
    assert read_metrics(Path("runs/a"))[-1]["step"] == int(found.name.split("-")[1])


def on_a_terminal(words: list[str], hangup: signal.Handlers) -> tuple[subprocess.Popen[str], int]:
    """`fastlm train` on a terminal of its own, and what holds that terminal open."""
    keeper, terminal = os.openpty()

    def settle() -> None:
        signal.signal(signal.SIGHUP, hangup)
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "fastlm", "train", "book.txt", *SMALL, "--quiet", *words]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen(command, **streams, text=True, start_new_session=True, preexec_fn=settle)
    os.close(terminal)
    return process, keeper


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_a_closed_terminal_saves_the_run() -> None:
    process, keeper = on_a_terminal(["--steps", "1000000", "--name", "a", "--eval-every", "0"], signal.SIG_DFL)
    metrics = Path("runs/a/metrics.jsonl")
    until(lambda: metrics.exists() and metrics.stat().st_size > 1000, process)
    os.close(keeper)
    assert process.wait(LIMIT) == 128 + signal.SIGHUP
    found = checkpoint.newest(Path("runs/a"))
    assert read_metrics(Path("runs/a"))[-1]["step"] == int(found.name.split("-")[1])


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_a_run_under_nohup_outlives_its_terminal() -> None:
    process, keeper = on_a_terminal(["--steps", "300", "--name", "a", "--eval-every", "0"], signal.SIG_IGN)
    until(lambda: Path("runs/a/metrics.jsonl").exists(), process)
    os.close(keeper)
    process.wait(LIMIT)
    assert read_metrics(Path("runs/a"))[-1]["step"] == 300
    assert checkpoint.steps(Path("runs/a"))[-1][0] == 300


def second_interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C, and as soon as the process has said what a second one does, the second one."""
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    said = ""
    while "once more" not in said:
        said = process.stderr.readline()
        assert said, process.wait(LIMIT)  # the end of what it says
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 130


def computed(process: subprocess.Popen[str]) -> float:
    """Seconds of processor time that it has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processor times from /proc")
def test_a_second_interrupt_exits_at_once() -> None:
    # one step of 50,000 micro-batches outlasts the test on any machine, so only an end without its checkpoint is an end at once
    process = begin("--steps", "9", "--name", "a", "--eval-every", "0", "--batch", "200000", "--micro", "4")
    until(lambda: Path("runs/a/metrics.jsonl").exists(), process)
    begun = computed(process)
    # At work in its step: a first signal that comes before it ends the run with a checkpoint, as it should.
    until(lambda: computed(process) > begun + 2, process)
    second_interrupt(process)
    assert not checkpoint.steps(Path("runs/a"))


NATIVE = """
import ctypes
from fastlm.train import signals
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
with signals.heard(lambda stop: None):
    print("ready", flush=True)
    lock(mutex)
    lock(mutex)  # native, and neither it nor a signal ends this
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex is 64 zero bytes or less on Linux")
def test_a_second_interrupt_exits_from_within_a_native_call() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", NATIVE], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            second_interrupt(process)
        finally:
            process.kill()


ECHO = """
import os, signal, time
from fastlm.train import signals
signals.ECHO, asked = 3600.0, []
with signals.heard(asked.append):
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        time.sleep(0.02)  # or the kernel makes one of two
print(asked[0], len(asked) >= 3)
"""


def test_signals_on_the_heels_of_the_first_are_its_echo() -> None:
    # torchrun beside slurm, and the kernel where a launcher of several threads is killed, send one wish to stop twice
    result = subprocess.run([sys.executable, "-c", ECHO], capture_output=True, text=True, timeout=LIMIT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "signal SIGTERM True\n", "")


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
            [sys.executable, "-m", "fastlm", *words], env=env, capture_output=True, text=True, timeout=LIMIT
        )
        assert result.returncode == 0, result.stderr


def test_importing_the_trainer_needs_no_command_line_packages() -> None:
    code = (
        "import sys, fastlm.train, fastlm.data, fastlm.models.gpt\n"
        "assert not {'tyro', 'rich', 'matplotlib', 'tokenizers', 'pyarrow', 'safetensors'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
