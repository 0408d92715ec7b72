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
from fastlm.bench import harness, memory, results, sources, tables
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


@pytest.mark.parametrize("kind,status,code", [
    ("baseline", "failed", 1), ("baseline", "wrong", 1), ("baseline", "missing", 0), ("peer", "failed", 0)])  # fmt: skip
def test_a_smoke_pass_fails_with_a_baseline_that_fails_or_is_wrong(kind, status, code, monkeypatch, capsys):
    from fastlm.bench import __main__ as command

    contender = {"name": "eager", "kind": kind, "status": status, "reason": "a reason"}
    data = {"cases": [{"op": OP, "name": "case", "contenders": [contender]}]}
    monkeypatch.setattr(command, "run", lambda *arguments: data)
    assert main(["--smoke"]) == code
    assert (f"{OP} case, eager: {status}, a reason" in capsys.readouterr().err) == bool(code)


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
    ("cuda", f"csrc/cuda/{OP}_forward.cu", "\n// a comment\n/* two\nlines */\n", "\nint x;\n"),
    ("cuda", "csrc/common/philox.h", "\n// a comment\n", "\nint x;\n"),
    ("cuda", f"python/fastlm/cuda/{OP}.py", "\n# a comment\n", "\nX = 1\n"),
    ("cuda", "csrc/cuda/launch.cuh", "\n// a comment\n", "\nint x;\n"),
    ("cuda", "CMakeLists.txt", "\n# a comment\n", "\nset(x 1)\n"),
    ("cpu", "csrc/cpu/simd.h", "\n/* a comment */\n", "\nint x;\n"),
    ("cpu", f"csrc/cpu/entry_{OP}.cpp", "\n// a comment\n", "\nint x;\n"),
    ("cpu", "csrc/cpu/dispatch.cpp", "\n// a comment\n", "\nint x;\n"),
    ("cpu", f"python/fastlm/ops/{OP}.py", "\n# a comment\n", "\nX = 1\n"),
    ("cpu", "CMakeLists.txt", "\n# a comment\n", "\nset(x 1)\n"),
    ("triton", "kernels/table.json", "", "\n"),
])  # fmt: skip
def test_the_hash_follows_sources_and_not_comments(copy_of_checkout, name, file, comment, change):
    before = sources.source_hash(OP, name, copy_of_checkout)
    path = copy_of_checkout / file
    text = path.read_text()
    path.write_text(text + comment)
    assert sources.source_hash(OP, name, copy_of_checkout) == before
    path.write_text(text + change)
    assert sources.source_hash(OP, name, copy_of_checkout) != before


def test_the_hash_of_one_op_does_not_follow_another_and_that_of_the_step_follows_all(copy_of_checkout):
    hashes = lambda: {s: results.hashes(s, "cpu", copy_of_checkout) for s in (OP, "step", "loading")}
    before = hashes()
    path = copy_of_checkout / "csrc/cpu/attention_forward.cpp"
    path.write_text(path.read_text() + "\nint x;\n")
    after = hashes()
    assert after[OP] == before[OP]
    assert after["step"] != before["step"]
    path = next(p for p in (copy_of_checkout / "python/fastlm/data").glob("*.py") if p.name != "__init__.py")
    path.write_text(path.read_text() + "\nX = 1\n")
    assert hashes()["loading"] != after["loading"]


def test_the_hash_does_not_depend_on_the_version_of_python(monkeypatch):
    """Each version adds fields to nodes of the syntax tree (3.12: type_params), which old code leaves empty."""
    text = "def f(a, *, b=None):\n    'doc'\n    return f'{a!r:>{b}}' or None\n"
    before = sources.stripped_python(text)
    monkeypatch.setattr(sources.ast.FunctionDef, "_fields", (*sources.ast.FunctionDef._fields, "novelty"))
    monkeypatch.setattr(sources.ast.FunctionDef, "novelty", [], raising=False)
    assert sources.stripped_python(text) == before
    assert sources.stripped_python(text.replace("b=None", "b=0")) != before
    assert sources.stripped_python(text.replace("or None", "")) != before


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


def test_a_gpu_table_shows_only_ops_whose_tests_passed(copy_of_checkout, published):
    root = copy_of_checkout
    for path in results.gpu_files(root):
        path.unlink()
    entry = {"hash": "0" * 16, "passed": 3, "failed": 0, "skipped": 0}
    data = published | {"machine": published["machine"] | {"kind": "cuda"}, "not_run": [],
                        "cases": [*published["cases"], _case_row(16, 1.0) | {"op": "attention", "name": "unproven"},
                                  _case_row(16, 1.0) | {"op": "step", "name": "of both"}]}  # fmt: skip

    def table(attention):
        tests = {OP: {"triton": entry}, "attention": {"triton": entry | attention}}
        results.save(root / "bench/results/gpu-x.json", data | {"gpu_tests": tests})
        return tables.sections(root)["gpu-table"]

    for outcome in ({"failed": 1}, {"skipped": 1}, {"passed": 0}):
        text = table(outcome)
        assert f"| {OP} 8 rows |" in text
        assert f"**Stale: the sources of {OP} have changed since.**" in text
        assert "unproven" not in text
        assert "of both" not in text
    assert "unproven" in table({})
    assert "of both" in table({})
    results.save(root / "bench/results/gpu-x.json", data | {"gpu_tests": {}})
    assert "Not yet run on a GPU" in tables.sections(root)["gpu-table"]


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


def test_a_contender_with_a_mask_of_its_own_is_checked_without_dropout():
    def contender(name, wrong_by):
        return harness.Contender(name, lambda x: lambda: x * 3, "peer", check=lambda x: wrong_by)

    case = _case(harness.Contender("ours", lambda x: lambda: x * 2, "ours"), contender("right", 1e-8),
                 contender("wrong", 0.5), contender("nan", float("nan")),
                 error=lambda result, x: harness.ratio_error(result, x * 2), tolerance=1e-6)  # fmt: skip
    timings = {t.name: t for t in harness.measure(case, seconds=0)}
    assert {n: t.status for n, t in timings.items()} == {"ours": "ok", "right": "ok", "wrong": "wrong", "nan": "wrong"}
    assert timings["right"].as_json()["error"] == 1e-8


@pytest.mark.parametrize("suite", ["dropout_add_norm", "step"])
def test_a_wrong_peer_is_found_by_the_suites_own_checks(suite, monkeypatch):
    module = load_suite(suites(ROOT)[suite])
    if suite == "step":
        case, right = next(c for c in module.cases("cpu") if c.smoke), torch.optim.AdamW
        for contender in case.contenders:
            made: list[int] = []

            def upwards_at_first(*args, made=made, **kwargs):
                made.append(1)
                return right(*args, **kwargs, maximize=len(made) == 1)  # the contender's; the second is the check's own

            with monkeypatch.context() as patch:
                patch.setattr(torch.optim, "AdamW", upwards_at_first)
                assert not contender.check(case.inputs(0)) <= case.tolerance
        return
    eager = module._eager
    monkeypatch.setattr(module, "_eager", lambda i, p: (eager(i, p)[0] * 1.001, eager(i, p)[1]))
    case = next(c for c in module.cases("cpu") if c.name == "2048x768 float32 p=0.1 forward+backward")
    assert {t.name: t.status for t in harness.measure(case, seconds=0)}["eager"] == "wrong"


def test_a_missing_peer_says_how_to_get_it_and_a_broken_one_what_it_said(tmp_path, monkeypatch):
    from fastlm.bench import peers

    with pytest.raises(harness.Missing, match=r"^nonesuch-9 is not installed \(pip install nonesuch-9\)$"):
        peers.load("nonesuch-9", "nonesuch_9")
    (tmp_path / "broken_peer.py").write_text("import nonesuch_9")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "installed", lambda name: "1.2")
    with pytest.raises(harness.Missing, match=r"^broken-peer 1.2 cannot be imported: No module named 'nonesuch_9'$"):
        peers.load("broken-peer", "broken_peer")
    assert set(peers.table()) >= {"liger-kernel", "bitsandbytes", "torchao", "flash-attn", "xformers"}


def test_time_is_limited_for_a_case_and_for_all(tmp_path, monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))  # each call takes a second
    case = _case(harness.Contender("slow", lambda x: lambda: x, "ours"))
    assert len(harness.measure(case, seconds=0.1)[0].samples) == 2
    monkeypatch.undo()
    assert main([OP, "--budget", "0.0001", "--out", str(tmp_path)]) == 0
    assert f"no time left (--budget 0.0001) for: {OP}" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["not_run"]


@pytest.mark.parametrize("words,message", [
    (["--seconds", "0"], "--seconds must be greater than 0; it is 0"),
    (["--budget", "-1"], "--budget must be greater than 0; it is -1"),
    (["--threads", "-2"], "--threads must be at least 0 (0: torch's own number); it is -2"),
    (["--publish", "x", "--case", "float32"], "--publish takes whole suites; --case 'float32' leaves some"),
    (["--publish", "A B"], "--publish names a file: small letters, digits and '-'; it is 'A B'"),
])  # fmt: skip
def test_a_bad_value_is_named(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def _case_row(rows, seconds, flops=0, **parameters):
    contenders = [{"name": n, "kind": k, "status": "ok", "median_s": s, "quartiles_s": [s, s], "samples_s": [s, s / 3]}
                  for n, k, s in (("fastlm", "ours", seconds), ("eager", "baseline", 2 * seconds))]  # fmt: skip
    return {"op": OP, "name": f"{rows} rows", "setting": "alone", "dtype": "float32", "device": "cpu", "bytes": rows * 8,
            "parameters": {"rows": rows, **parameters}, "flops": flops, "floor_s": seconds / 2, "goals": [],
            "ceilings": {"copy": 16 * rows / seconds, "matmul": 1e12}, "contenders": contenders}  # fmt: skip


@pytest.fixture
def published(tmp_path):
    run = {"date": "2026-01-02T00:00:00+00:00", "command": "fastlm bench x"}
    data = {"schema": 1, "date": "2026-01-02T00:00:00+00:00", "peers": {},
            "machine": {"device": "a processor", "kind": "cpu", "threads": 2, "instruction_set": "avx2", "versions": {}},
            "runs": {OP: run | {"sources": results.hashes(OP, "cpu", ROOT)}}, "not_run": ["attention z"],
            "cases": [_case_row(8, 0.5, 10**9), _case_row(64, 4.0, 10**9)],
            "profiles": {"step": {"fused": {"shares": {"matmul": 0.8, "norm": 0.2},
                                            "ops": {"attention_forward": {"calls": 6, "seconds": 0.06}}}},
                         "train": {"save": {"call_s": 0.02}}},
            "time_to_quality": [{"model": "0.8M", "loop": "fastlm", "seed": 1, "target": 1.5, "ratio": 0.55, "goal": 0.6,
                                 "loss": 1.4, "seconds": 3.0}]}  # fmt: skip
    data["cases"][0]["peak_memory_bytes"] = {"fastlm": 3 << 20, "eager": "missing: x"}
    data["cases"][0]["goals"] = [{"versus": "eager", "ratio": 3.0, "reached": 2.0}]
    data["cases"][1]["contenders"].append(data["cases"][1]["contenders"][1] | {"name": "better", "median_s": 3.0})
    return data


def test_pictures_are_ratios_time_against_size_roofline_and_ceilings(published, tmp_path):
    from fastlm.bench import pictures

    drawn = [p.name for p in pictures.draw(published, tmp_path)]
    assert drawn == [f"{OP}.png", f"{OP}-size.png", "roofline.png", "ceilings.png"]
    assert drawn == pictures.names(published)
    assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)
    published["cases"] = published["cases"][:1]
    assert f"{OP}-size.png" not in pictures.names(published)


def test_a_committed_result_fills_every_table(published, copy_of_checkout):
    root = copy_of_checkout
    shutil.copytree(ROOT / "docs", root / "docs")
    for path in (root / "bench/results").glob("cpu-*.json"):
        path.unlink()
    results.save(root / "bench/results/cpu-x.json", published)
    assert "docs/benchmarks.md" in tables.stale(root)
    tables.write(root)
    assert tables.stale(root) == []
    text = (root / "docs/benchmarks.md").read_text()
    for piece in (
        "| 8 rows | 500.00 ms | 0.0 GB/s | 0.50 | eager 2.00× |", "By `fastlm bench x`.", "| matmul | 80% |",
        "| attention_forward | fused | 6 | 60.00 ms | 10.00 ms |", "| save | call_s 0.02 |",
        "| dropout_add_norm 8 rows | fastlm 3 MiB |", f"| {OP} 8 rows | eager | 3× | 2.00× | 0.50 | 4.00× |",
        f"| {OP} 64 rows | better |  | 0.75× | 0.50 | 1.50× |",
        "0.55 of its time; goal 0.6", "- cases that time ran out on: attention z", f"![{OP}-size](bench-cpu/{OP}-size.png)",
    ):  # fmt: skip
        assert piece in text, piece
    assert (root / f"docs/bench-cpu/{OP}-size.png").exists()
    assert (
        json.loads((root / "bench/results/cpu-x.json").read_text())["cases"][0]["contenders"][0]["samples_s"][1]
        == 0.16667
    )


def test_cpu_figures_go_stale_visibly(published, copy_of_checkout):
    root = copy_of_checkout
    for path in (root / "bench/results").glob("cpu-*.json"):
        path.unlink()
    assert dict(results.cpu_status(root))[OP] == "no committed figures"
    published["runs"][OP]["sources"] = results.hashes(OP, "cpu", root)
    results.save(root / "bench/results/cpu-x.json", published)
    assert dict(results.cpu_status(root))[OP].startswith("measured on a processor, 2026-01-02")
    path = root / f"csrc/cpu/{OP}_forward.cpp"
    path.write_text(path.read_text() + "\nint x;\n")
    assert dict(results.cpu_status(root))[OP].startswith("stale: the sources have changed since; measured on ")
    assert dict(results.cpu_status(root))["attention"] == "no committed figures"
    text = tables.sections(root)[f"cpu-{OP}"]
    assert f"**Stale: the sources of {OP} have changed since.**" in text  # and on the page


def test_a_rerun_of_one_op_replaces_its_figures_and_keeps_the_others(published):
    other = _case_row(16, 1.0) | {"op": "attention", "name": "of old"}
    earlier = published | {"cases": [*published["cases"], other], "not_run": ["attention z", "step x", "train y"],
                           "profiles": {"step": {"a": 1}}}  # fmt: skip
    run = {"date": "2026-03-01T00:00:00+00:00", "command": "fastlm bench attention", "sources": {"cpu": "0"}}
    new = published | {"runs": {"attention": run}, "cases": [other | {"name": "new"}], "not_run": [f"{OP} q", "train y"],
                       "profiles": {"train": {"b": 2}}}  # fmt: skip
    both = results.merged(earlier, new)
    assert [(c["op"], c["name"]) for c in both["cases"]] == [("attention", "new"), (OP, "8 rows"), (OP, "64 rows")]
    assert both["runs"] == {OP: published["runs"][OP], "attention": run}
    assert both["not_run"] == ["step x", "train y"]  # of dropout_add_norm the earlier figures stand
    assert both["profiles"] == {"step": {"a": 1}, "train": {"b": 2}}
    for key, value in (
        ("device", "another"),
        ("threads", 1),
        ("instruction_set", "avx512"),
        ("versions", {"torch": "1"}),
    ):
        moved = new | {"machine": new["machine"] | {key: value}}
        with pytest.raises(ValueError, match=rf"^--publish: that file is of {key} .*; give another name$"):
            results.merged(earlier, moved)


def test_peak_memory_is_that_of_a_child_and_grows_with_what_is_held():
    path = suites(ROOT)[OP]
    case = next(c for c in load_suite(path).cases("cpu") if c.name == "2048x768 float32 p=0.1 forward")
    peaks = memory.of_case(path, case, "cpu", ["fastlm", "eager"])
    tensor = 2048 * 768 * 4
    assert 2 * tensor <= peaks["fastlm"] <= peaks["eager"] + tensor  # y and z; eager: dropout's output and its mask too
    assert peaks.keys() == {"fastlm", "eager"}
    assert not memory.wanted(case)
    assert [c.setting for c in load_suite(suites(ROOT)["step"]).cases("cpu") if memory.wanted(c)][:1] == ["step"]


def test_saves_and_time_to_quality_of_a_tiny_model(tmp_path, monkeypatch):
    train = load_suite(suites(ROOT)["train"])
    cost = train.save_cost(train.TINY, 2, 2, 2, "cpu")
    assert 0 < cost["call_s"] < 60

    class Text:
        vocab = 256

        def __init__(self, config):
            self.config = config

        def source(self, seed):
            return train.Windows(self.config)

        def loss(self, model):
            return 5.0 - 0.001 * sum(p.numel() for p in model.parameters()) ** 0.5

    monkeypatch.setattr(train, "Text", Text)
    monkeypatch.setattr(train, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(train, "SEEDS", (1, 2))
    best = {"style": "llama", "optimizer": "muon", "lr": 1e-3, "dtype": "float32"}
    monkeypatch.setattr(train, "QUALITY", {"tiny": (train.TINY, 2, 8, 0.9, best)})
    path = tmp_path / "quality.jsonl"
    assert train.long(path, -1.0) == []  # no time: nothing is begun
    rows = train.long(path, 300.0)
    assert [(r["loop"], r["seed"]) for r in rows] == [
        ("plain", 1),
        ("plain", 1),
        ("fastlm", 1),
        ("plain", 2),
        ("fastlm", 2),
    ]
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    again = train.long(path, 300.0)  # goes on where it was
    assert again[:3] == rows[:3]
    assert len(again) == 5
    assert train.long(path, -1.0) == again
    assert all(r["ratio"] is None or r["ratio"] > 0 for r in rows if r["loop"] == "fastlm")


def test_every_op_has_short_calls_for_the_sanitizer_and_the_profiler():
    for op in backend.ops():
        module = load_suite(suites(ROOT)[op])
        assert set(module.SHORT) == {f"{i}{k}" for i in ("", "interpreted ") for k in ("odd", "profile")}
        for call in module.short("cpu", torch.float32, "interpreted odd"):
            loss = call()
            assert loss.isfinite(), op
            if loss.requires_grad:  # generation has none
                loss.backward()
