"""``make gpu`` as far as no GPU is needed: order, saving after each part, interruption, what it collects and imports."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastlm import backend
from fastlm.bench import sources
from fastlm.bench.__main__ import suites

ROOT = sources.checkout()
_SPEC = importlib.util.spec_from_file_location("gpu_script", ROOT / "scripts/gpu.py")
gpu = importlib.util.module_from_spec(_SPEC)
sys.modules["gpu_script"] = gpu
_SPEC.loader.exec_module(gpu)


@pytest.fixture
def run(tmp_path):
    return gpu.Run(60, tmp_path / "gpu-x.json", data={"cases": [], "gpu_tests": {}})


def test_the_parts_are_the_tests_then_every_op_then_the_step_then_the_slow_tools_then_tuning():
    names = [part.name for part in gpu.parts(ROOT / "bench")]
    assert names[0] == "the GPU tests"
    step = names.index("benchmarks of the training step")
    assert {f"benchmarks of {op}" for op in backend.ops() if op in suites(ROOT)} <= set(names[1:step])
    assert names[step + 1 :] == ["compute-sanitizer", "ncu", "tuning"]


def test_each_part_is_saved_and_one_that_fails_stops_no_other(run):
    seen = []

    def good(run, limit):
        seen.append(json.loads(run.path.read_text())["first"] if run.path.exists() else None)
        run.data["first"] = 1

    def bad(run, limit):
        raise RuntimeError("no kernel image")

    gpu.work(run, [gpu.Part("a", good, 0.5), gpu.Part("b", bad, 0.5), gpu.Part("c", good, 0.5)])
    assert seen == [None, 1]
    assert json.loads(run.path.read_text())["stopped"] == {"b": "RuntimeError: no kernel image"}
    assert run.failed == json.loads(run.path.read_text())["failed"] == ["b"]


@pytest.mark.parametrize(
    "status,marked,failed", [(0, [], []), (3, ["memcheck", "racecheck", "initcheck"], 3), (124, [], [])]
)
def test_what_the_sanitizer_finds_fails_the_run_and_leaves_no_op_verified(run, monkeypatch, status, marked, failed):
    from fastlm.bench import results

    entry = {"hash": "0", "passed": 3, "failed": 0, "skipped": 0}
    run.data["gpu_tests"] = {"dropout_add_norm": {"triton": dict(entry), "cuda": dict(entry)}}
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(run, "command", lambda words, limit, **env: (status, "text"))
    gpu.sanitize_part(run, 10)
    for found in run.data["gpu_tests"]["dropout_add_norm"].values():
        assert sorted(found.get("sanitizer", [])) == sorted(marked)
        assert bool(results.unproven(found)) == bool(marked)
    assert len(run.failed) == (failed or 0)
    monkeypatch.setattr(run, "command", lambda words, limit, **env: (0, "clean"))
    gpu.sanitize_part(run, 10)
    assert not results.unproven(run.data["gpu_tests"]["dropout_add_norm"]["cuda"])


def test_a_wrong_backend_or_a_failed_suite_fails_the_run(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    contender = {"name": "fastlm cuda", "kind": "self", "status": "wrong"}

    def ran(words, limit, **env):
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"cases": [{"name": "a", "contenders": [contender]}]}))
        return 0, ""

    monkeypatch.setattr(run, "command", ran)
    gpu.bench_part("dropout_add_norm")(run, 10)
    assert run.failed == ["benchmarks of dropout_add_norm (a, fastlm cuda: wrong)"]


def test_a_part_without_time_is_skipped_and_said(run):
    run.budget = 20
    shares = []
    parts = [gpu.Part("long", lambda run, limit: shares.append(limit), 0.5, need=30), gpu.Part(
        "short", lambda run, limit: shares.append(limit), 0.5, need=5)]  # fmt: skip
    gpu.work(run, parts)
    assert json.loads(run.path.read_text())["skipped"] == ["long"]
    assert len(shares) == 1
    assert 9 < shares[0] <= 10


def test_an_interrupted_run_keeps_what_it_had(run):
    def first(run, limit):
        run.data["cases"].append("one")

    def interrupted(run, limit):
        run.data["cases"].append("two")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.work(run, [gpu.Part("a", first, 0.5), gpu.Part("b", interrupted, 0.5)])
    kept = json.loads(run.path.read_text())
    assert kept["cases"] == ["one", "two"]
    assert kept["interrupted"] == "b"


def test_a_command_is_stopped_at_its_limit_and_by_an_interrupt(run, tmp_path):
    status, text = run.command([sys.executable, "-c", "print('began', flush=True); import time; time.sleep(900)"], 5)
    assert (status, text.strip()) == (124, "began")  # and the test's own time limit has not come
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(900)"
    outer = (
        "import sys, signal; sys.path.insert(0, 'scripts'); import gpu; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"gpu.Run(900, Path('x')).command([sys.executable, '-c', {child!r}], 900)"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_half_a_suite_and_half_the_tests_are_kept_when_they_are_cut_off(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "WORK", tmp_path)

    def cut_off(words, limit, **env):
        if "pytest" in words:
            (tmp_path / "tests.json").write_text(
                json.dumps({"dropout_add_norm": {"triton": {"passed": 3, "failed": 0, "skipped": 0}}})
            )
        else:
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({"cases": [{"name": "a"}], "not_run": ["b"]}))
        return 124, "stopped"

    monkeypatch.setattr(run, "command", cut_off)
    gpu.test_part(run, 10)
    gpu.bench_part("dropout_add_norm")(run, 10)
    entry = run.data["gpu_tests"]["dropout_add_norm"]["triton"]
    assert (entry["passed"], entry["failed"]) == (3, 1)  # not all ran: not verified
    assert entry["hash"] == sources.source_hash("dropout_add_norm", "triton", ROOT)
    assert run.data["cases"] == [{"name": "a"}]
    assert run.data["not_run"] == ["b"]
    assert "status 124" in run.data["stopped"]["dropout_add_norm"]
    assert run.failed == ["the GPU tests", "benchmarks of dropout_add_norm"]


FORBIDDEN = ("tyro", "rich", "matplotlib", "safetensors", "tokenizers", "pyarrow", "zstandard", "tensorboard",
             "hypothesis", "psutil", "transformers", "xdist", "pytest_timeout")  # fmt: skip


@pytest.mark.slow
@pytest.mark.grid
def test_gpu_tests_and_benchmarks_import_only_what_a_gpu_machine_has(tmp_path):
    """torch, numpy, triton, pytest and pytest-benchmark: whatever else this project uses is refused on import."""
    files = [str(p) for p in gpu.gpu_test_files(ROOT / "tests")]
    assert files
    code = f"""
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ImportError(f"{{name}} is not on a GPU machine")
sys.meta_path.insert(0, Forbidden())
import pytest
from pathlib import Path
from fastlm.bench.__main__ import load_suite, main, suites
import fastlm.bench.short, fastlm.bench.tune, fastlm.bench.offline
for path in suites(Path({str(ROOT)!r})).values():
    assert list(load_suite(path).cases("cpu")), path
assert main(["dropout_add_norm", "--seconds", "0.01", "--case", "4096x384 float32", "--out", {str(tmp_path)!r}]) == 0
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "gpu", *{files!r}]))
"""
    # PYTEST_DISABLE_PLUGIN_AUTOLOAD: the plugins of this environment are not those of a GPU machine.
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "matplotlib is not installed" in done.stdout
    assert (tmp_path / "result.json").exists()


def test_what_is_missing_for_the_build_is_named(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gone = gpu.missing_tools()
    assert "the Python package pybind11" in gone
    assert any(line.startswith("ninja (pip install ninja") for line in gone)
