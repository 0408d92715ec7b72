"""The benchmark tools: fair timing, honest rows, comparison, source hashes, GPU status, generated tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from fastlm import backend
from fastlm.bench import harness, results, sources, tables
from fastlm.bench.__main__ import load_suite, main, suites

ROOT = sources.checkout()


def _case(*contenders, **kwargs):
    return harness.Case("op", "name", lambda seed: torch.randn(8), contenders, **kwargs)


def test_contenders_run_in_turn_and_are_checked_before_they_are_timed():
    order = []

    def contender(name, factor=2, kind="baseline"):
        def prepare(x):
            def call():
                order.append(name)
                return x * factor

            return call

        return harness.Contender(name, prepare, kind)

    def absent(x):
        raise harness.Missing("not installed here")

    def broken(x):
        raise RuntimeError("no kernel image")

    case = _case(
        contender("ours", kind="ours"), contender("right"), contender("wrong", 3),
        harness.Contender("absent", absent, "peer"), harness.Contender("broken", broken, "peer"),
        error=lambda result, x: harness.ratio_error(result, x * 2), tolerance=1e-6,
    )  # fmt: skip
    timings = {t.name: t for t in harness.measure(case, seconds=0.02)}
    assert {n: t.status for n, t in timings.items()} == {
        "ours": "ok", "right": "ok", "wrong": "wrong", "absent": "missing", "broken": "failed"}  # fmt: skip
    assert timings["absent"].reason == "not installed here"
    assert "no kernel image" in timings["broken"].reason
    assert len(timings["ours"].samples) == len(timings["right"].samples) >= 5
    assert not timings["wrong"].samples
    blocks = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert blocks[-10:] == ["ours", "right"] * 5


def test_a_wrong_result_of_our_own_is_an_error_not_a_row():
    case = _case(harness.Contender("ours", lambda x: lambda: x * 3, "ours"),
                 error=lambda result, x: harness.ratio_error(result, x * 2), tolerance=1e-6)  # fmt: skip
    with pytest.raises(AssertionError, match="fastlm's own result is wrong"):
        harness.measure(case, seconds=0)


def test_pytest_benchmark_gets_the_very_samples():
    timer = harness.ReplayTimer()
    timer.load([0.5, 0.25])
    assert [-(timer() - timer()) for _ in range(2)] == [0.5, 0.25]


def _result(path, ours, baseline, date="2026-01-01T00:00:00+00:00"):
    def contender(name, kind, median):
        return {"name": name, "kind": kind, "status": "ok", "median_s": median,
                "quartiles_s": [median * 0.99, median * 1.01], "samples_s": [median]}  # fmt: skip

    case = {"op": "attention", "name": "a", "bytes": 0, "flops": 0, "floor_s": 0, "goals": [], "ceilings": {},
            "contenders": [contender("fastlm", "ours", ours), contender("sdpa", "baseline", baseline)]}  # fmt: skip
    results.save(path, {"schema": 1, "date": date, "machine": {"device": "d"}, "cases": [case]})
    return str(path)


def test_compare_finds_regressions_beyond_the_noise_and_forgives_a_slower_machine(tmp_path, capsys):
    old = _result(tmp_path / "old.json", 1.0, 2.0)
    assert main(["--compare", old, _result(tmp_path / "same.json", 1.005, 2.0)]) == 0
    assert main(["--compare", old, _result(tmp_path / "slow-machine.json", 1.5, 3.0)]) == 0
    assert main(["--compare", old, _result(tmp_path / "slower.json", 1.5, 2.0)]) == 1
    assert "REGRESSION attention a" in capsys.readouterr().out
    assert main(["--compare", old, _result(tmp_path / "faster.json", 0.5, 2.0)]) == 0
    assert "faster     attention a" in capsys.readouterr().out
    assert main(["--compare", old, _result(tmp_path / "slower.json", 1.5, 2.0), "--threshold", "0.6"]) == 0


def test_bad_command_lines_are_told(tmp_path, capsys):
    assert main(["nonsense"]) == 2
    assert "suite is 'nonsense'; it must be one of" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    assert main(["--compare", str(tmp_path / "x.json"), str(tmp_path / "none.json")]) == 2
    assert "x.json is not a result file of schema 1" in capsys.readouterr().err


@pytest.fixture
def copy_of_checkout(tmp_path):
    for name in ("csrc", "kernels", "python", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("CMakeLists.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


OP = "dropout_add_norm"


@pytest.mark.parametrize("name,file,comment,change", [
    ("triton", f"kernels/{OP}.py", "\n# a comment\n", "\nX = 1\n"),
    ("triton", "kernels/philox.py", "\n# a comment\n", "\nX = 1\n"),
    ("cuda", f"csrc/cuda/{OP}.cu", "\n// a comment\n/* two\nlines */\n", "\nint x;\n"),
    ("cuda", "csrc/common/philox.h", "\n// a comment\n", "\nint x;\n"),
    ("cuda", f"python/fastlm/cuda/{OP}.py", "\n# a comment\n", "\nX = 1\n"),
    ("cuda", "CMakeLists.txt", "\n# a comment\n", "\nset(x 1)\n"),
])  # fmt: skip
def test_the_hash_follows_sources_and_not_comments(copy_of_checkout, name, file, comment, change):
    before = sources.source_hash(OP, name, copy_of_checkout)
    path = copy_of_checkout / file
    text = path.read_text()
    path.write_text(text + comment)
    assert sources.source_hash(OP, name, copy_of_checkout) == before
    path.write_text(text + change)
    assert sources.source_hash(OP, name, copy_of_checkout) != before


def test_status_is_verified_only_when_all_gpu_tests_passed_on_these_sources(copy_of_checkout):
    root = copy_of_checkout
    for path in results.gpu_files(root):
        path.unlink()
    states = lambda: {(o, b): s for o, b, s in results.status(root)}
    assert states()[OP, "triton"] == "never run on a GPU"
    digest = sources.source_hash(OP, "triton", root)
    base = {"schema": 1, "date": "2026-01-02T00:00:00+00:00", "machine": {"device": "NVIDIA X"}, "cases": []}

    def write(**counts):
        entry = {"hash": digest, "passed": 0, "failed": 0, "skipped": 0} | counts
        results.save(root / "bench/results/gpu-x.json", base | {"gpu_tests": {OP: {"triton": entry}}})

    write(passed=5)
    assert states()[OP, "triton"] == f"verified on NVIDIA X, 2026-01-02, source {digest}"
    for counts in ({"passed": 5, "failed": 1}, {"passed": 5, "skipped": 1}, {}):
        write(**counts)
        assert states()[OP, "triton"].startswith("not verified")
    write(passed=5, hash="0" * 16)
    assert states()[OP, "triton"].startswith("stale: verified on NVIDIA X")


def test_tables_in_readme_and_docs_are_those_of_the_committed_results():
    assert tables.stale(ROOT) == [], "run `fastlm bench --tables` and commit what it writes"


def test_a_changed_number_in_a_table_is_noticed(copy_of_checkout):
    text = "a\n<!-- gpu-table -->\nold\n<!-- /gpu-table -->\nb\n"
    assert tables.filled(text, {"gpu-table": "new"}) == "a\n<!-- gpu-table -->\nnew\n<!-- /gpu-table -->\nb\n"


def test_every_suite_defines_cases_with_names_of_their_own():
    for name, path in suites(ROOT).items():
        for device in ("cpu",):
            names = [c.name for c in load_suite(path).cases(device)]
            assert len(names) == len(set(names)) > 0, name


def test_runs_without_the_command_line_library_and_outside_a_checkout_says_so(tmp_path):
    code = (
        "import sys; sys.modules['tyro'] = None; sys.modules['rich'] = None\n"
        "from fastlm.bench.__main__ import main; sys.exit(main(['--status']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(op in done.stdout for op in backend.ops())
    env = os.environ | {"FASTLM_CHECKOUT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "fastlm.bench"], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert "Clone the repository" in done.stderr


def test_a_short_run_writes_json_of_the_schema_and_pictures(tmp_path, capsys):
    assert main([OP, "--seconds", "0.01", "--case", "2048x768 float32 p=0.1 forward", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "result.json").read_text())
    assert data["schema"] == 1
    assert data["cases"][0]["floor_s"] > 0
    assert {c["name"] for c in data["cases"][0]["contenders"]} >= {"fastlm", "eager", "copy_ of the same bytes"}
    assert (tmp_path / f"{OP}.png").stat().st_size > 1000
    assert "of ceiling" in capsys.readouterr().out
