"""The documentation's code runs as it is written."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import fastlm
import pytest
from fastlm.train import checkpoint
from fastlm.train.config import Config
from fastlm.train.files import read_metrics

DOCS = Path(__file__).parents[1] / "docs"


def test_the_readme_s_five_lines_swap_a_model() -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.S).group(1)  # type: ignore[union-attr]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "dropout_add_norm" in done.stdout


@pytest.mark.slow
@pytest.mark.grid
def test_the_trainer_s_example_trains_one_s_own_model_and_goes_on(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "trainer.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    run = lambda text: subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    first = run(code)
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("all steps done at step 200\n")
    rows = read_metrics(tmp_path / "runs" / "own")
    assert rows[-1]["loss"] < rows[0]["loss"] / 3
    second = run(code.replace("steps=200", "steps=210"))
    assert second.stdout.endswith("all steps done at step 210\n"), second.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "runs" / "own")] == list(range(1, 211))
    assert checkpoint.newest(tmp_path / "runs" / "own").name == "step-00000210"


def test_the_trainer_s_flags_exist() -> None:
    known = {f"--{name.replace('_', '-')}" for group in Config().to_dict().values() for name in group}
    known |= {"--resume", "--fork", "--other-data", "--help", "--max-restarts", "--folds", "--fractions"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", (DOCS / "trainer.md").read_text()))
    assert not named - known
    table = re.findall(r"`(--[^`]*)`", (DOCS / "trainer.md").read_text())
    flags = {flag for text in table for flag in re.findall(r"--[a-z-]+[a-z]", text)}
    for group in ("optim", "data"):
        missing = {f"--{name.replace('_', '-')}" for name in Config().to_dict()[group]} - flags
        assert missing <= {"--workers"}, missing


ATTENTION = (DOCS / "attention.md").read_text()


def test_attention_s_examples_run() -> None:
    codes = re.findall(r"```python\n(.*?)```", ATTENTION, re.S)
    assert len(codes) == 4
    code = "\n".join(f"exec({one!r}, {{}})" for one in codes)  # each alone, in one process
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_argument_of_attention_is_in_its_page() -> None:
    table = ATTENTION.split("## Arguments of")[1].split("`out` has")[0]
    named = set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    )
    assert named == set(inspect.signature(fastlm.ops.attention).parameters)
