"""The benchmark tools: fair timing, honest rows, comparison, source hashes, GPU status, generated tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from fastlm import backend
from fastlm.bench import harness, memory, results, sources
from fastlm.bench.__main__ import load_suite, main, suites

ROOT = sources.checkout()
OP = "dropout_add_norm"


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
    timings = {t.name: t for t in harness.measure(case, seconds=0.5)}
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


def test_a_bench_file_runs_under_pytest_with_its_row_beside_the_samples(tmp_path):
    words = ["bench/bench_loading.py", "-q", "-k", "batch and 4x64", "--benchmark-max-time=0.01", "-p", "no:xdist",
             "-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'b.json'}"]  # fmt: skip
    # pytest-benchmark measures nothing in a worker of xdist, and takes this process for one by its environment
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = {
        b["extra_info"]["contender"]["name"]: b for b in json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    }
    assert found.keys() >= {"fastlm", "np.memmap, random crops"}
    info, stats = found["fastlm"]["extra_info"], found["fastlm"]["stats"]
    assert info["floor_s"] > 0
    assert info["bytes"] == 4 * 64 * 17
    assert "allocator" in info
    assert info["contender"]["median_s"] == pytest.approx(stats["median"])


def test_make_test_runs_no_benchmark(request):
    assert request.config.getini("testpaths") == ["tests"]
    assert not list((ROOT / "tests").rglob("bench_*.py"))


def test_under_pytest_a_wrong_baseline_fails_and_a_wrong_peer_is_skipped(tmp_path):
    outcomes = {("baseline", 3): "FAILED", ("self", 3): "FAILED", ("peer", 3): "SKIPPED", ("baseline", 2): "PASSED"}
    (tmp_path / "bench_x.py").write_text(f"""
from fastlm.bench import harness
import torch
def cases(device):
    for kind, factor in {list(outcomes)!r}:
        yield harness.Case("op", f"{{kind}}{{factor}}", lambda seed: torch.ones(8), (
            harness.Contender("fastlm", lambda x: lambda: x * 2, "ours"),
            harness.Contender("other", lambda x, factor=factor: lambda: x * factor, kind),
        ), error=lambda result, x: harness.ratio_error(result, x * 2), tolerance=1e-6)
test_bench = harness.pytest_cases(cases)
""")
    words = ["-v", "-ra", "--benchmark-disable", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    words += ["--rootdir", str(tmp_path), str(tmp_path / "bench_x.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True)
    for (kind, factor), outcome in outcomes.items():
        assert f"[{kind}{factor}-fastlm] PASSED" in done.stdout, done.stdout + done.stderr
        assert f"[{kind}{factor}-other] {outcome}" in done.stdout, done.stdout + done.stderr


def _result(path, ours, baseline, date="2026-01-01T00:00:00+00:00"):
    def contender(name, kind, median):
        return {"name": name, "kind": kind, "status": "ok", "median_s": median,
                "quartiles_s": [median * 0.99, median * 1.01]}  # fmt: skip

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


def test_compare_lists_what_only_one_file_has_and_fails_without_a_common_case(tmp_path, capsys):
    old, new = (results.load(_result(tmp_path / f"{n}.json", 1.0, 2.0)) for n in "ab")
    other = old["cases"][0] | {"name": "b"}

    def compared(*cases):
        (tmp_path / "new.json").write_text(json.dumps(new | {"cases": list(cases)}))
        return main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "new.json")])

    assert compared(new["cases"][0], other) == 0
    assert "added      attention b: only the second file has it" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps(old | {"cases": [*old["cases"], other]}))
    assert compared(new["cases"][0]) == 0
    assert "removed    attention b: only the first file has it" in capsys.readouterr().out
    gone = [c | {"status": "failed"} if c["kind"] == "ours" else c for c in other["contenders"]]
    assert compared(new["cases"][0], other | {"contenders": gone}) == 1
    assert "REGRESSION attention b: fastlm ran in the first file, not in the second" in capsys.readouterr().out
    assert compared(other | {"name": "c"}) == 2
    assert "--compare: the two files have no case in common" in capsys.readouterr().err
    for cut, said in (
        ({"schema": 1}, "it has no 'machine'"),
        ({"schema": 1, "machine": {}, "cases": [{}]}, "case 0 has no 'op'"),
    ):
        (tmp_path / "cut.json").write_text(json.dumps(cut))
        assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "cut.json")]) == 2
        assert said in capsys.readouterr().err


def test_a_goal_that_nothing_measured_stays_and_is_counted(tmp_path, monkeypatch, capsys):
    from fastlm.bench import __main__ as command

    case = _case(harness.Contender("fastlm", lambda x: lambda: x, "ours"), goals=(harness.Goal("eager", 2.0),))
    timings = harness.measure(case, seconds=0)
    assert harness.row(case, timings, {})["goals"] == [{"versus": "eager", "ratio": 2.0, "reached": None}]
    entry = harness.row(case, harness.not_run(case, "no time"), {})
    assert entry["goals"][0]["reached"] is None
    assert entry["contenders"] == [{"name": "fastlm", "kind": "ours", "status": "not run", "reason": "no time"}]
    results.print_case(entry)
    assert "goal: 2x eager: not measured" in capsys.readouterr().out
    data = {"schema": 1, "machine": {}, "cases": [entry], "runs": {}}
    monkeypatch.setattr(command, "run", lambda *arguments: data)
    monkeypatch.setattr(command, "draw", lambda *arguments: None)
    assert main(["--out", str(tmp_path)]) == 0
    assert "0 of 1 goals reached, 1 not measured" in capsys.readouterr().out


@pytest.mark.parametrize("kind,status,code", [
    ("self", "wrong", 1),
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", list(suites(ROOT)))
def test_every_suite_defines_cases_with_names_of_their_own_and_goals_beside_contenders(suite, device):
    with torch.device("meta"):  # models are made to count their parameters; inputs when a case runs: no GPU is needed
        cases = list(load_suite(suites(ROOT)[suite]).cases(device))
    names = [c.name for c in cases]
    assert len(names) == len(set(names)) > 0
    assert any(c.smoke for c in cases)
    for case in cases:
        contenders = [c.name for c in case.contenders]
        assert len(contenders) == len(set(contenders))
        assert {g.versus for g in case.goals} <= set(contenders), case.name
        assert case.smoke or case.timed
        for contender in case.contenders:  # nothing but a ceiling is timed unchecked
            assert contender.kind == "ceiling" or contender.check or (case.error and contender.checked), contender.name


@pytest.mark.parametrize("suite,words", [
    ("attention", ["mask=random", "mask=padded", "window=", "p=0.1", "bfloat16", "then matmul", "decode", "causal", "full"]),
    ("dropout_add_norm", ["p=0 ", "p=0.1", "bfloat16", "then matmul", "forward+backward"]), ("rotary", ["bfloat16", "float32"]),
])  # fmt: skip
def test_each_kind_of_call_is_in_the_smoke_pass(suite, words):
    names = [c.name for c in load_suite(suites(ROOT)[suite]).cases("cpu") if c.smoke]
    assert [w for w in words if not any(w in name for name in names)] == []


@pytest.mark.parametrize("suite", ["attention", "dropout_add_norm", "rotary"])
def test_every_timed_case_of_an_op_is_beside_torch_compile(suite):
    for device in ("cpu", "cuda"):
        for case in load_suite(suites(ROOT)[suite]).cases(device):
            assert not case.timed or "torch.compile" in [c.name for c in case.contenders], case.name


def test_on_a_gpu_every_backend_of_dropout_add_norm_is_timed_beside_the_dispatched_one():
    for case in load_suite(suites(ROOT)[OP]).cases("cuda"):
        if case.setting == "alone":
            kinds = {c.name: c.kind for c in case.contenders}
            assert {n: kinds.get(n) for n in ("fastlm", "fastlm triton", "fastlm cuda")} == {
                "fastlm": "ours", "fastlm triton": "self", "fastlm cuda": "self"}  # fmt: skip


def test_a_row_says_which_backend_served(tmp_path):
    case = next(c for c in load_suite(suites(ROOT)[OP]).cases("cpu") if c.smoke)
    rows = {c["name"]: c for c in harness.row(case, harness.measure(case, seconds=0), {})["contenders"]}
    assert rows["fastlm"]["backends"] == [[OP, "cpu"]]
    assert "backends" not in rows["eager"]
    with backend.use("reference"):
        rows = harness.measure(case, seconds=0)
    assert rows[0].backends == [[OP, "reference"]]


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


@pytest.mark.slow
@pytest.mark.grid
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
        return harness.Contender(name, lambda x: lambda: x * 3, "peer", check=lambda result, x: wrong_by)

    case = _case(harness.Contender("ours", lambda x: lambda: x * 2, "ours"), contender("right", 1e-8),
                 contender("wrong", 0.5), contender("nan", float("nan")),
                 error=lambda result, x: harness.ratio_error(result, x * 2), tolerance=1e-6)  # fmt: skip
    timings = {t.name: t for t in harness.measure(case, seconds=0)}
    assert {n: t.status for n, t in timings.items()} == {"ours": "ok", "right": "ok", "wrong": "wrong", "nan": "wrong"}
    assert timings["right"].as_json()["error"] == 1e-8


@pytest.mark.parametrize("what", ["scale", "share", "other mask backward", "right"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_with_a_mask_of_its_own_is_held_to_that_mask(what, dtype):
    module = load_suite(suites(ROOT)[OP])
    i = module._inputs(64, 512, dtype, "cpu", True, "")(0)

    class Dropout(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, p):
            ctx.mask = (torch.rand(x.shape) >= (0.3 if what == "share" else p)).to(x.dtype)
            ctx.p = p
            return x * ctx.mask * (1.0 if what == "scale" else 1 / (1 - p))

        @staticmethod
        def backward(ctx, g):
            mask = ctx.mask.roll(1, 0) if what == "other mask backward" else ctx.mask
            return g * mask * (1.0 if what == "scale" else 1 / (1 - ctx.p)), None

    function = lambda i, p: module._composed(i, Dropout.apply(i.x, p))
    for part in (module.FORWARD, module.BOTH):
        error = module._error(0.1, part, own_mask=True)(module._calls(function, i, 0.1, part)(), i)
        right = what == "right" or (what == "other mask backward" and part == module.FORWARD)
        assert (error <= module.TOLERANCE[dtype]) == right, (part, error)


def test_what_the_compiler_makes_is_what_is_checked(monkeypatch):
    module = load_suite(suites(ROOT)[OP])
    monkeypatch.setattr(torch, "compile", lambda f: lambda i, p: tuple(t * 1.01 for t in f(i, p)))
    case = next(c for c in module.cases("cpu") if "torch.compile" in [one.name for one in c.contenders])
    assert {t.name: t.status for t in harness.measure(case, seconds=0)}["torch.compile"] == "wrong"
    step = load_suite(suites(ROOT)["step"])
    right = step._step
    seen = []
    monkeypatch.setattr(step, "_step", lambda *a, **k: seen.append(a[4]) or right(*a[:4], False, **k))
    case = step._case(step.SMALL_MODEL, 2, "float32", "cpu", ())
    contender = next(c for c in case.contenders if c.name == "torch compiled")
    assert contender.check(torch.ones(()), case.inputs(0)) <= case.tolerance
    assert seen[-2:] == [True, False]
    assert contender.check(torch.full((), torch.nan), case.inputs(0)) == float("inf")


def test_the_trainer_s_loops_are_checked_and_a_wrong_one_is_found(monkeypatch):
    train = load_suite(suites(ROOT)["train"])
    case = next(c for c in train.cases("cpu") if c.smoke)
    for contender in case.contenders:
        assert contender.check(None, case.inputs(0)) <= case.tolerance
    monkeypatch.setattr(train.torch.nn.utils, "clip_grad_norm_", lambda *a: None)  # the trainer clips by itself
    assert case.contenders[0].check(None, case.inputs(0)) > case.tolerance


def test_prepared_tokens_are_checked_on_both_sides():
    loading = load_suite(suites(ROOT)["loading"])
    case = next(c for c in loading.cases("cpu") if c.smoke and c.name.startswith("prepare"))
    for contender in case.contenders:
        arrays = contender.prepare(0)()
        assert case.error(arrays, 0) == 0
        assert case.error([arrays[0][1:], *arrays[1:]], 0) > case.tolerance
        assert case.error([*arrays, arrays[-1]], 0) > case.tolerance


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
                assert not contender.check(torch.ones(()), case.inputs(0)) <= case.tolerance
        return
    eager = module._eager
    monkeypatch.setattr(module, "_eager", lambda i, p: (eager(i, p)[0] * 1.001, eager(i, p)[1]))
    case = next(c for c in module.cases("cpu") if c.name == "37x320 float32 p=0 forward+backward")
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
    assert main([OP, "step", "--budget", "0.0001", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"no time left (--budget 0.0001) for: {OP}" in text
    assert "; step profile\n" in text
    assert json.loads((tmp_path / "result.json").read_text())["not_run"]


@pytest.mark.parametrize("words,message", [
    (["--seconds", "0"], "--seconds must be above 0 and finite; it is 0.0"),
    (["--budget", "-1"], "--budget must be above 0 and finite; it is -1.0"),
    (["--threads", "-2"], "--threads must be at least 0 and at most 65536; it is -2"),
    (["--threshold", "-1"], "--threshold must be at least 0 and finite; it is -1.0"),
    (["--device", "gpu"], "--device must be cpu, cuda or cuda:<number>; it is 'gpu'"),
    (["--case", "none such"], "--case must be part of a case's name, such as '"),
    (["--publish", "x", "--case", "float32"], "--publish takes whole suites; --case 'float32' leaves some"),
    (["--publish", "A B"], "--publish names a file: small letters, digits and '-'; it is 'A B'"),
])  # fmt: skip
def test_a_bad_value_is_named(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no CUDA device here" in capsys.readouterr().err


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
    assert train.long(path, -1.0, source="changed") == []  # nor does it take what other sources gave
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
