"""Evidence of benchmarks: the hash of the sources, what counts as verified, tables and pictures of committed results."""

from __future__ import annotations

import re
import shutil

import pytest
from fastlm.bench import front, results, sources, tables

ROOT = sources.checkout()


@pytest.fixture
def copy_of_checkout(tmp_path):
    for name in ("csrc", "kernels", "python", "bench", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("CMakeLists.txt", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


OP = "dropout_add_norm"


@pytest.mark.parametrize("name,file", [
    ("triton", f"kernels/{OP}.py"), ("triton", "kernels/philox.py"), ("triton", "kernels/table.json"),
    ("cuda", f"csrc/cuda/{OP}_forward.cu"), ("cuda", "csrc/common/philox.h"), ("cuda", f"python/fastlm/cuda/{OP}.py"),
    ("cuda", "csrc/cuda/launch.cuh"), ("cuda", "CMakeLists.txt"), ("cuda", "csrc/bindings.cpp"),
    ("cpu", "csrc/cpu/simd.h"), ("cpu", f"csrc/cpu/entry_{OP}.cpp"), ("cpu", "csrc/cpu/dispatch.cpp"),
    ("cpu", f"python/fastlm/ops/{OP}.py"), ("cpu", "CMakeLists.txt"), ("cpu", "csrc/bindings.cpp"),
])  # fmt: skip
def test_the_hash_follows_the_text_of_the_sources(copy_of_checkout, name, file):
    before = sources.source_hash(OP, name, copy_of_checkout)
    path = copy_of_checkout / file
    text = path.read_text()
    path.write_text(text + "\n")
    assert sources.source_hash(OP, name, copy_of_checkout) != before
    path.write_text(text)
    assert sources.source_hash(OP, name, copy_of_checkout) == before


def test_the_hash_follows_the_build_type_and_how_a_gpu_machine_builds(copy_of_checkout):
    hashes = lambda: {b: sources.source_hash(OP, b, copy_of_checkout) for b in ("cpu", "cuda", "triton")}
    changed = lambda now, before: {b for b in now if now[b] != before[b]}
    first = hashes()
    path = copy_of_checkout / "pyproject.toml"
    path.write_text(path.read_text().replace('cmake.build-type = "Release"', 'cmake.build-type = "Debug"'))
    second = hashes()
    assert changed(second, first) == {"cpu", "cuda"}
    path = copy_of_checkout / "scripts/gpu.py"
    path.write_text(path.read_text().replace('"{number}a-real"', '"{number}-real"'))
    assert changed(hashes(), second) == {"cuda"}
    path.write_text(path.read_text() + "\nX = 1\n")  # nothing that builds
    assert changed(hashes(), second) == {"cuda"}


def test_the_hash_of_one_op_does_not_follow_another_and_that_of_the_step_follows_all(copy_of_checkout):
    hashes = lambda: {s: results.hashes(s, "cpu", copy_of_checkout) for s in (OP, "step", "loading")}
    before = hashes()
    path = copy_of_checkout / "csrc/cpu/attention_forward.cpp"
    path.write_text(path.read_text() + "\nint x;\n")
    after = hashes()
    assert after[OP] == before[OP]
    assert after["step"] != before["step"]
    path = copy_of_checkout / "python/fastlm/data/prepare.py"
    path.write_text(path.read_text() + "\nX = 1\n")
    assert hashes()["loading"] != after["loading"]


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
    write(passed=5, sanitizer=["racecheck"])
    assert states()[OP, "triton"].startswith("not verified: compute-sanitizer found errors (racecheck) on NVIDIA X")
    write(passed=5, sanitizer=[])
    assert states()[OP, "triton"].startswith("verified")
    write(passed=5, hash="0" * 16)
    assert states()[OP, "triton"].startswith("stale: verified on NVIDIA X")


def test_a_gpu_table_shows_only_ops_whose_tests_passed(copy_of_checkout, published):
    root = copy_of_checkout
    for path in results.gpu_files(root):
        path.unlink()
    entry = {"hash": "0" * 16, "passed": 3, "failed": 0, "skipped": 0}
    both = [[OP, "triton"], ["attention", "triton"]]
    cases = [_served(case, [[OP, "triton"]]) for case in published["cases"]]
    cases += [_served(_case_row(16, 1.0), both[1:]) | {"op": "attention", "name": "unproven"},
              _served(_case_row(16, 1.0), both) | {"op": "step", "name": "of both"},
              _served(_case_row(16, 1.0), [[OP, "cuda"]]) | {"name": "by a backend without tests"},
              _case_row(16, 1.0) | {"name": "by who knows what"}]  # fmt: skip
    data = published | {"machine": published["machine"] | {"kind": "cuda"}, "not_run": [], "cases": cases}

    def table(attention):
        tests = {OP: {"triton": entry}, "attention": {"triton": entry | attention}}
        results.save(root / "bench/results/gpu-x.json", data | {"gpu_tests": tests})
        return tables.sections(root)["gpu-table"]

    for outcome in ({"failed": 1}, {"skipped": 1}, {"passed": 0}):
        text = table(outcome)
        assert f"| {OP} 8 rows |" in text
        assert "unproven" not in text
        assert "by a backend without tests" not in text
        assert "by who knows what" not in text
        assert "of both" not in text
    assert "unproven" in table({})
    assert "of both" in table({})
    results.save(root / "bench/results/gpu-x.json", data | {"gpu_tests": {}})
    assert "Not yet run on a GPU" in tables.sections(root)["gpu-table"]


def test_tables_in_readme_and_docs_are_those_of_the_committed_results():
    assert tables.stale(ROOT) == [], "run `fastlm bench --tables` and commit what it writes"


@pytest.mark.parametrize("name", tables.TARGETS)
def test_a_changed_number_in_a_table_is_noticed(copy_of_checkout, name):
    shutil.copytree(ROOT / "docs", copy_of_checkout / "docs")
    tables.write(copy_of_checkout)
    assert tables.stale(copy_of_checkout) == []
    path = copy_of_checkout / name
    text = path.read_text()
    start = text.index("<!-- front -->" if name == "README.md" else "<!-- cpu-losses -->")
    path.write_text(text[:start] + re.sub(r"\d(?=\.\d*×)", "77", text[start:], count=1))
    assert tables.stale(copy_of_checkout) == [name]
    path.write_text(text)
    picture = next((copy_of_checkout / "docs").glob("bench-*/*.png"))
    picture.write_bytes(picture.read_bytes().replace(b"fastlm-data\0", b"fastlm-data\0older"))
    assert tables.stale(copy_of_checkout) == [str(picture.relative_to(copy_of_checkout))]
    picture.write_bytes(picture.read_bytes().replace(b"fastlm-data\0older", b"fastlm-data\0"))
    (copy_of_checkout / front.PICTURE).unlink()
    assert tables.stale(copy_of_checkout) == [front.PICTURE]


def test_the_front_page_is_of_one_machine_that_of_the_newest_of_the_fullest_runs():
    files = [results.load(path) for path in sorted((ROOT / "bench/results").glob("cpu-*.json"))]
    data = front.chosen(files)
    newer = data | {"date": "2099-01-01"}
    assert front.chosen([*files, newer]) is newer
    fewer = newer | {"runs": {name: data["runs"][name] for name in ("step", "attention", OP)}}
    assert front.chosen([*files, fewer]) is data
    without = newer | {"cases": [case for case in data["cases"] if case["op"] != "step"]}
    assert front.chosen([without]) is None
    assert front.text([without]) == "Not measured."
    text = front.text(files)
    for figure in front.FIGURES:
        case = next(c for c in data["cases"] if (c["op"], c["name"]) == (figure.op, figure.case))
        ours = results.ours_of(case)["median_s"]
        assert f"**{front.milliseconds(ours)}**" in text
        for contender in case["contenders"]:
            if contender["name"] in dict(figure.baselines):
                assert f"({contender['median_s'] / ours:.2g}×)" in text


def test_the_front_page_has_no_stale_figure_and_no_table_of_gpu_states():
    text = (ROOT / "README.md").read_text()
    assert "Stale" not in text
    assert "never run" not in text


def test_results_hold_medians_and_quartiles_and_no_samples():
    for path in (ROOT / "bench/results").glob("[cg]pu-*.json"):
        for case in results.load(path)["cases"]:
            for contender in case["contenders"]:
                assert "samples_s" not in contender, path
                assert contender["status"] != "ok" or len(contender["quartiles_s"]) == 2, path


def test_every_suite_and_every_generated_text_has_its_place_on_a_page():
    text = "".join((ROOT / name).read_text() for name in tables.TARGETS)
    suites = [p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")]
    names = {f"cpu-{suite}" for suite in suites} | set(tables.sections(ROOT))
    assert [name for name in sorted(names) if f"<!-- {name} -->" not in text] == []


def _served(case, backends):
    return case | {"contenders": [case["contenders"][0] | {"backends": backends}, *case["contenders"][1:]]}


def _case_row(rows, seconds, flops=0, **parameters):
    contenders = [{"name": n, "kind": k, "status": "ok", "median_s": s, "quartiles_s": [s, s]}
                  for n, k, s in (("fastlm", "ours", seconds), ("eager", "baseline", 2 * seconds))]  # fmt: skip
    return {"op": OP, "name": f"{rows} rows", "setting": "alone", "dtype": "float32", "device": "cpu", "bytes": rows * 8,
            "parameters": {"rows": rows, **parameters}, "flops": flops, "floor_s": seconds / 2, "goals": [],
            "ceilings": {"copy": 16 * rows / seconds, "matmul": 1e12}, "contenders": contenders}  # fmt: skip


@pytest.fixture
def published(tmp_path):
    run = {"date": "2026-01-02T00:00:00+00:00", "command": "fastlm bench x"}
    data = {"schema": 1, "date": "2026-01-02T00:00:00+00:00", "peers": {},
            "machine": {"device": "a processor", "kind": "cpu", "threads": 2, "instruction_set": "avx2",
                        "instruction_set_reason": "all it has",
                        "versions": {}},
            "runs": {OP: run | {"sources": results.hashes(OP, "cpu", ROOT)}}, "not_run": ["attention z"],
            "cases": [_case_row(8, 0.5, 10**9), _case_row(64, 4.0, 10**9)],
            "profiles": {"step": {"fused": {"shares": {"matmul": 0.8, "norm": 0.2},
                                            "ops": {"attention_forward": {"calls": 6, "seconds": 0.06}}}},
                         "train": {"save": {"call_s": 0.02}},
                         "loading": {"prepare 1 MB, bytes, 2 process(es)": {"MB/s": 50.0, "cores": 1.9}}},
            "time_to_quality": [{"model": "0.8M", "loop": "fastlm", "seed": 1, "target": 1.5, "ratio": 0.55, "goal": 0.6,
                                 "loss": 1.4, "seconds": 3.0, "source": "0"}]}  # fmt: skip
    data["cases"][0]["peak_memory_bytes"] = {"fastlm": 3 << 20, "eager": "missing: x"}
    data["cases"][0]["goals"] = [{"versus": "eager", "ratio": 3.0, "reached": 2.0}]
    data["cases"][1]["contenders"] += [
        {"name": "a peer", "kind": "peer", "status": "failed", "reason": "no kernel image"},
        {"name": "another", "kind": "peer", "status": "missing", "reason": "not installed"}]  # fmt: skip
    data["cases"][1]["goals"] = [{"versus": "a peer", "ratio": 5.0, "reached": None}]
    never = _case_row(64, 1.0) | {"name": "never begun", "goals": [{"versus": "eager", "ratio": 2.0, "reached": None}]}
    data["cases"].append(never | {"ceilings": {}, "floor_s": 0.0, "contenders": [
        {"name": n, "kind": k, "status": "not run", "reason": "--budget 1 was spent"}
        for n, k in (("fastlm", "ours"), ("eager", "baseline"))]})  # fmt: skip
    data["cases"][1]["contenders"].append(data["cases"][1]["contenders"][1] | {"name": "better", "median_s": 3.0})
    slow = {"name": "fastlm", "kind": "ours", "status": "not run", "reason": "bfloat16 is slow here"}
    data["cases"].append(
        never | {"name": "too slow", "ceilings": {}, "floor_s": 0.0, "goals": [], "contenders": [slow]}
    )
    data["cases"][0]["ceilings"] |= {"matmul": 2e12}
    substituted = {"name": "half", "dtype": "bfloat16", "goals": [], "ceilings": {"copy": 1.0, "matmul": 2e12}}
    data["cases"].append(_case_row(64, 4.0) | substituted)
    return data


def test_pictures_are_ratios_time_against_size_roofline_and_ceilings(published, tmp_path):
    from fastlm.bench import pictures

    assert pictures.stale(published, tmp_path) == pictures.names(published)
    drawn = [p.name for p in pictures.draw(published, tmp_path)]
    assert pictures.stale(published, tmp_path) == []
    assert drawn == [f"{OP}.png", f"{OP}-size.png", "roofline.png", "ceilings.png"]
    assert drawn == pictures.names(published)
    assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)
    published["cases"] = published["cases"][:1]
    assert pictures.stale(published, tmp_path) == pictures.names(published)  # of other data now
    assert f"{OP}-size.png" not in pictures.names(published)


def test_a_committed_result_fills_every_table(published, copy_of_checkout):
    root = copy_of_checkout
    shutil.copytree(ROOT / "docs", root / "docs")
    for path in (root / "bench/results").glob("cpu-*.json"):
        path.unlink()
    behind = {"name": "then matmul", "setting": "before a matmul", "ceilings": {}}
    published["cases"].append(_case_row(8, 0.25) | behind)
    results.save(root / "bench/results/cpu-x.json", published)
    assert set(tables.TARGETS) <= set(tables.stale(root))
    tables.write(root)
    assert tables.stale(root) == []
    text = (root / "docs/benchmarks.md").read_text()
    for piece in (
        "| 8 rows | 500.00 ms | 0.0 GB/s | 0.50 | eager 2.00× |", "By `fastlm bench x`.", "| matmul | 80% |",
        "| attention_forward | fused | 6 | 60.00 ms | 10.00 ms |", "| save | call_s 0.02 |",
        "| prepare 1 MB, bytes, 2 process(es) | MB/s 50, cores 1.9 |",
        "| dropout_add_norm 8 rows | fastlm 3 MiB, eager: missing: x |", f"| {OP} 8 rows | eager | 3× | 2.00× | 0.50 | 4.00× |",
        f"| {OP} 64 rows | better |  | 0.75× | 0.50 | 1.50× |",
        "eager: missing: x |", f"- {OP}, a peer: failed: no kernel image", f"- {OP}, another: not installed",
        "a peer: failed, better 0.75× |", "not measured: 5× a peer",
            "| copy, 6.1e-05 to 0.000244 MiB read and written | 2.56e-07 GB/s |",
        "| matmul, float32 | 1–2 TFLOP/s |", "| matmul, bfloat16 (float32's) | 2 TFLOP/s |",
        "on a processor, 2 threads, avx2 (all it has)",
        f"- {OP} too slow, fastlm: not run: bfloat16 is slow here", "| never begun | not run | | | | not measured: 2× eager |",
        "0.55 of its time; goal 0.6; **at other sources than the rest** |",
        "- cases that time ran out on: attention z", f"![{OP}-size](bench-cpu-x/{OP}-size.png)",
    ):  # fmt: skip
        assert piece in text, piece
    table = tables.sections(root)["cpu-behind"]
    assert f"| {OP} then matmul | 250.00 ms |" in table
    assert table.count(OP) == 1
    assert table in text
    assert (root / "README.md").read_text().count("Not measured.") == 1  # this run has none of the front page's figures
    path = root / "docs/benchmarks.md"
    path.write_text(text.replace("| 500.00 ms |", "| 400.00 ms |"))
    assert tables.stale(root) == ["docs/benchmarks.md"]
    path.write_text(text)
    assert (root / f"docs/bench-cpu-x/{OP}-size.png").exists()


def test_the_status_says_which_cpu_figures_are_stale(published, copy_of_checkout):
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
    run = published["runs"][OP]
    published["runs"] = {
        name: run | {"sources": results.hashes(name, "cpu", root)} for name in ("step", "train", "loading")
    }
    published["cases"] = [_case_row(8, 1.0) | {"op": name} for name in published["runs"]]
    results.save(root / "bench/results/cpu-x.json", published)
    stale = lambda: {suite for suite, state in results.cpu_status(root) if state.startswith("stale")}
    page = tables.sections(root)
    assert stale() == set()
    for file in ("fastlm/models/gpt.py", "fastlm/train/loop.py", "fastlm/data/pack.py"):
        path = root / "python" / file
        path.write_text(path.read_text() + "\nX = 1\n")
    assert stale() == {"step", "train", "loading"}
    assert tables.sections(root) == page  # which depends on the results alone: no change of a source ages it


def test_a_rerun_of_one_op_replaces_its_figures_and_keeps_the_others(published):
    other = _case_row(16, 1.0) | {"op": "attention", "name": "of old"}
    earlier = published | {"cases": [*published["cases"], other], "not_run": ["attention z", "step x", "train y"],
                           "profiles": {"step": {"a": 1}}}  # fmt: skip
    run = {"date": "2026-03-01T00:00:00+00:00", "command": "fastlm bench attention", "sources": {"cpu": "0"}}
    new = published | {"runs": {"attention": run}, "cases": [other | {"name": "new"}], "not_run": [f"{OP} q", "train y"],
                       "profiles": {"train": {"b": 2}}}  # fmt: skip
    both = results.merged(earlier, new)
    assert [(c["op"], c["name"]) for c in both["cases"]] == [
        ("attention", "new"), (OP, "8 rows"), (OP, "64 rows"), (OP, "never begun"), (OP, "too slow"), (OP, "half"),
    ]  # fmt: skip
    unbegun = next(c for c in published["cases"] if c["name"] == "never begun")  # whose earlier figures stay
    assert results.merged(earlier, new | {"cases": [*new["cases"], unbegun]})["cases"] == both["cases"]
    assert both["runs"] == {OP: published["runs"][OP], "attention": run}
    assert both["not_run"] == ["step x", "train y"]  # of dropout_add_norm the earlier figures stand
    assert both["profiles"] == {"step": {"a": 1}, "train": {"b": 2}}
    # A suite that ran anew without its profile has none; a time to quality stays until there is a new one.
    step = new | {"runs": {"step": run}, "cases": [], "profiles": {}, "time_to_quality": [{"loop": "plain"}]}
    again = results.merged(earlier, step)
    assert again["profiles"] == {}
    assert again["time_to_quality"] == published["time_to_quality"]
    anew = [{"loop": "plain"}, {"loop": "fastlm"}]
    assert results.merged(earlier, step | {"time_to_quality": anew})["time_to_quality"] == anew
    for key, value in (
        ("device", "another"),
        ("threads", 1),
        ("instruction_set", "avx512"),
        ("instruction_set_reason", "capped"),
        ("versions", {"torch": "1"}),
    ):
        moved = new | {"machine": new["machine"] | {key: value}}
        with pytest.raises(ValueError, match=rf"^--publish: that file is of {key} .*; give another name$"):
            results.merged(earlier, moved)
