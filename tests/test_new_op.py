"""scripts/new_op.py: what it writes runs, fails until the maths is there, and passes with it."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

_SPEC = importlib.util.spec_from_file_location("new_op", ROOT / "scripts/new_op.py")
assert _SPEC is not None
assert _SPEC.loader is not None
new_op = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(new_op)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "bench").mkdir()
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/benchmarks.md", tmp_path / "docs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("python", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


def test_the_skeleton_is_python_and_names_are_refused_that_cannot_be_or_are_there(copy: Path) -> None:
    for path in new_op.write("doubled", copy):
        text = path.read_text()
        assert "doubled" in text
        assert path.suffix != ".py" or ast.parse(text)
        assert path.suffix != ".py" or "NAME" not in text
    for name in ("doubled", "rotary", "Doubled", "class", "1x", "a-b"):
        with pytest.raises(ValueError, match=f"NAME is '{name}'"):
            new_op.write(name, copy)


def run_tests(root: Path) -> str:
    """The tests of the new op in the copy, whose fastlm is imported in place of the editable one."""
    code = (
        "import sys, pytest\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', 'tests/ops/test_doubled.py']))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(root / "python")}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_its_tests_fail_until_the_maths_is_there(copy: Path) -> None:
    new_op.write("doubled", copy)
    found = run_tests(copy)
    assert "11 failed, 1 passed" in found, found
    assert "write the forward's maths in reference/doubled.py" in found
    maths = {
        "python/fastlm/reference/doubled.py": ("return (x.float() * scale).to(x.dtype)", "return forward(dout, scale)"),
        "tests/ops/doubled_cases.py": ("return x * scale",),
    }
    for name, bodies in maths.items():
        lines = (copy / name).read_text().splitlines()
        at = [i for i, line in enumerate(lines) if "NotImplementedError" in line]
        for i, body in zip(at, bodies, strict=True):
            lines[i] = "    " + body
        (copy / name).write_text("\n".join(lines) + "\n")
    found = run_tests(copy)
    assert "12 passed" in found, found
