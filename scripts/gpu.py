"""``make gpu``: everything that needs a GPU, in under ten minutes, most important first, saved after each part.

Uses the interpreter at hand (``make gpu PYTHON=python3``), no network and no .venv: builds the CUDA wheel for this GPU into
build/gpu, then works through ``PARTS``: the GPU tests, the benchmarks of each op and of the training step, the sanitizer
and ncu over a short list, and, in the time that is left, the tuning of the Triton kernels. Where tests, a benchmark or the
sanitizer fail, the other parts still run, and the exit status is 1 in the end. Writes
bench/results/gpu-<device>.json after each part, from which the README's table is made. Ctrl-C, SIGTERM and a part's own
time limit keep what there is. The tuned table goes to build/gpu/table.json: taking it over changes the sources, and so
wants another run.

``--rehearse`` does what can be done without a GPU: the build, the collection of the tests, a smoke pass of the benchmarks,
and the short list under Triton's interpreter; it writes build/gpu/rehearsal.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/gpu"
SITE = WORK / "site"
SCHEMA = 1


@dataclass
class Run:
    """One ``make gpu``: its clock, its settings, and the result file as it grows."""

    budget: float
    path: Path
    rehearse: bool = False
    seconds: float = 0.4
    out: Path | None = None
    data: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # what did not go as it must: the exit status is 1 then
    begin: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begin)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.0f} s] {text}", flush=True)

    def save(self) -> None:
        """As a whole file, whatever kills the run; with what failed so far."""
        from fastlm.bench import results

        self.data["failed"] = self.failed
        results.write(self.path, json.dumps(self.data, indent=1) + "\n")
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.path, self.out / self.path.name)

    def fail(self, what: str) -> None:
        self.failed.append(what)
        self.say(f"{what}: FAILED")

    def command(self, words: list[str], limit: float, **env: str) -> tuple[int, str]:
        """Runs a command under a limit. Returns its status (124: stopped at the limit) and its output."""
        environment = os.environ | {"PYTHONPATH": str(SITE), "FASTLM_CHECKOUT": str(ROOT)} | env
        environment.pop("FASTLM_BACKEND", None)
        with subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                text, _ = process.communicate(timeout=max(1.0, limit))
            except subprocess.TimeoutExpired:
                process.kill()
                return 124, process.communicate()[0]
            except BaseException:  # Ctrl-C: nothing of ours stays on the GPU; Popen would not wait for it now
                process.kill()
                process.wait()
                raise
        return process.returncode, text


@dataclass(frozen=True)
class Part:
    """A part of the run. It is skipped where less than ``need`` seconds are left, and may take ``share`` of what is."""

    name: str
    do: Callable[[Run, float], None]
    share: float
    need: float = 30.0


def work(run: Run, parts: list[Part]) -> None:
    """Works through the parts, saving after each; one that raises is noted and the next one begins."""
    for part in parts:
        if run.left() < part.need:
            run.say(f"no time left for {part.name}")
            run.data.setdefault("skipped", []).append(part.name)
            run.save()
            continue
        run.say(part.name)
        try:
            part.do(run, run.left() * part.share)
        except KeyboardInterrupt:
            run.data["interrupted"] = part.name
            raise
        except Exception as error:  # noqa: BLE001 - noted in the result; what the other parts find is not lost for it
            run.say(f"{part.name} failed: {type(error).__name__}: {error}")
            run.data.setdefault("stopped", {})[part.name] = f"{type(error).__name__}: {error}"[:500]
            run.fail(part.name)
        finally:
            run.save()


# --------------------------------------------------------------------------------------------------------------- parts


def gpu_test_files(tests: Path) -> list[Path]:
    """The test files with tests marked gpu. Others are not even imported: they may need packages that are not here."""
    return sorted(p for p in tests.rglob("test_*.py") if re.search(r"^[^#\n]*pytest\.mark\.gpu\(", p.read_text(), re.M))


def test_part(run: Run, limit: float) -> None:
    from fastlm.bench import sources

    report = WORK / "tests.json"
    report.unlink(missing_ok=True)
    files = [str(p.relative_to(ROOT)) for p in gpu_test_files(ROOT / "tests")]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--gpu-report={report}", *files]
    if run.rehearse:
        status, text = run.command([*words, "--collect-only"], limit)
        run.say(f"collected the GPU tests: status {status}; {text.strip().splitlines()[-1] if text.strip() else ''}")
        if status:
            run.fail("the collection of the GPU tests")
        return
    status = 124
    text = ""
    try:
        status, text = run.command(words, limit)
    finally:  # also after Ctrl-C: what ran, ran
        outcomes = json.loads(report.read_text()) if report.exists() else {}
        for op, by_backend in outcomes.items():
            for name, counts in by_backend.items():
                entry = counts | {"hash": sources.source_hash(op, name, ROOT)}
                if status not in (0, 1):
                    entry["failed"] = entry.get("failed", 0) + 1  # stopped: not all ran
                run.data["gpu_tests"].setdefault(op, {})[name] = entry
        run.data["gpu_tests_output"] = text[-3000:]
    run.say(f"GPU tests ended with {status}")
    print(text[-5000:])
    if status:
        run.fail("the GPU tests")


def bench_part(suite: str) -> Callable[[Run, float], None]:
    def do(run: Run, limit: float) -> None:
        words = [sys.executable, "-m", "fastlm.bench", suite]
        if run.rehearse:
            status, text = run.command([*words, "--device", "cpu", "--smoke"], limit)
            run.say(f"a smoke pass of {suite}: status {status}")
            print(text[-1500:] if status else "")
            if status:
                run.fail(f"the smoke pass of {suite}")
            return
        folder = WORK / suite
        shutil.rmtree(folder, ignore_errors=True)
        words += ["--device", "cuda", "--seconds", str(run.seconds), "--memory", "--out", str(folder)]
        status, text = 124, ""
        try:
            # The suite ends by itself before the limit, which is there for one that hangs.
            status, text = run.command([*words, "--budget", f"{max(5.0, limit - 25):.0f}"], limit)
        finally:
            found = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
            if found.get("cases"):  # in place of an earlier run's, with --only or --skip-tests
                run.data["cases"] = [c for c in run.data["cases"] if c.get("op") != suite] + found["cases"]
            run.data.setdefault("runs", {}).update(found.get("runs", {}))
            run.data.setdefault("profiles", {}).update(found.get("profiles", {}))
            run.data.setdefault("not_run", []).extend(found.get("not_run", []))
            if status:
                run.data.setdefault("stopped", {})[suite] = f"status {status}: {text[-500:]}"
        print(text[-6000:])
        from fastlm.bench import harness

        broken = [f"{c['name']}, {t['name']}: {t['status']}" for c in found.get("cases", []) for t in c.get("contenders", [])
                  if harness.broken(t)]  # fmt: skip
        if status or broken:
            run.fail(f"benchmarks of {suite}" + (f" ({'; '.join(broken)})" if broken else ""))

    return do


def short(run: Run, *words: str) -> list[str]:
    return [sys.executable, "-m", "fastlm.bench.short", *words, *(["--interpret"] if run.rehearse else [])]


def sanitize_part(run: Run, limit: float) -> None:
    if run.rehearse:
        status, text = run.command(short(run), limit, TRITON_INTERPRET="1")
        run.say(f"the short list under the interpreter: status {status}")
        print(text[-2000:])
        if status:
            run.fail("the short list under the interpreter")
        return
    if not shutil.which("compute-sanitizer"):
        run.data["sanitizer"] = "compute-sanitizer is not installed"
        return
    for tool in ("memcheck", "racecheck", "initcheck"):
        words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", *short(run)]
        status, text = run.command(words, limit / 3)
        run.say(f"compute-sanitizer {tool}: {status}")
        run.data.setdefault("sanitizer", {})[tool] = {"status": status, "end": text[-400:]}
        entries = [entry for by_backend in run.data["gpu_tests"].values() for entry in by_backend.values()]
        if not status:
            for entry in entries:  # an earlier run's complaint, with --only
                entry["sanitizer"] = [t for t in entry.get("sanitizer", []) if t != tool]
        if status not in (0, 124):  # 124: cut off by the clock, which says nothing of the kernels
            run.fail(f"compute-sanitizer {tool}")
            # Its messages do not say which op's call they belong to: none counts as verified until all is clean.
            for entry in entries:
                entry["sanitizer"] = sorted({*entry.get("sanitizer", []), tool})
        run.save()


METRICS = (
    "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,launch__occupancy_limit_registers,"
    "smsp__warps_active.avg.pct_of_peak_sustained_active,sm__inst_executed_pipe_tensor.sum,"
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
)


def ncu_part(run: Run, limit: float) -> None:
    if run.rehearse:
        status, text = run.command(short(run, "--profile"), limit, TRITON_INTERPRET="1")
        run.say(f"one case of each kernel under the interpreter: status {status}")
        print(text[-2000:])
        if status:
            run.fail("one case of each kernel under the interpreter")
        return
    if not shutil.which("ncu"):
        run.data["ncu"] = "ncu is not installed"
        return
    words = ["ncu", "--clock-control", "none", "--csv", "--metrics", METRICS, "--kernel-name", "regex:kernel"]
    status, text = run.command([*words, *short(run, "--profile")], limit)
    run.say(f"ncu: {status}")
    lines = [line for line in text.splitlines() if line.startswith('"')]
    run.data["ncu"] = lines[:400] or f"status {status}: {text[-400:]}"  # often: no permission for the counters


def tune_part(run: Run, limit: float) -> None:
    table = WORK / "table.json"
    table.unlink(missing_ok=True)
    words = [sys.executable, "-m", "fastlm.bench", "--tune", "--table", str(table), "--budget", f"{limit - 10:.0f}"]
    status, text = run.command(words, limit)
    if run.rehearse:
        run.say(f"tuning without a GPU: status {status}; {text.strip()[-200:]}")
        if status != 2:
            run.fail("tuning without a GPU")
        return
    rules = json.loads(table.read_text()) if table.exists() else {}
    run.data["tuned"] = {k: [r for r in own if r["measured"]] for k, own in rules.items()}
    run.say(f"tuning: {status}; take it over with: cp {table.relative_to(ROOT)} kernels/table.json")
    print(text[-3000:])
    if run.out is not None and table.exists():
        shutil.copy(table, run.out / "table.json")


def parts(bench: Path) -> list[Part]:
    """All parts after the build, most important first. Every suite of bench/ that is an op comes before the step."""
    suites = sorted(p.stem.removeprefix("bench_") for p in bench.glob("bench_*.py"))
    from fastlm.bench import sources

    ops = [s for s in suites if s not in sources.COMPOSED]
    ops.sort(key=lambda s: s != "dropout_add_norm")
    return [
        Part("the GPU tests", test_part, 0.5),
        *(Part(f"benchmarks of {s}", bench_part(s), 0.45) for s in ops),
        Part("benchmarks of the training step", bench_part("step"), 0.5),
        Part("compute-sanitizer", sanitize_part, 0.6),
        Part("ncu", ncu_part, 0.6),
        Part("tuning", tune_part, 0.95, need=45.0),
    ]


# --------------------------------------------------------------------------------------------------------------- build


def missing_tools() -> list[str]:
    """What the build needs and this Python or machine does not have, each with what brings it."""
    import importlib.util

    gone = [f"the Python package {name}" for name in ("pybind11", "scikit_build_core", "pytest", "pytest_benchmark", "triton")
            if importlib.util.find_spec(name) is None]  # fmt: skip
    for tool, package in (("cmake", "cmake"), ("ninja", "ninja")):
        if shutil.which(tool) is None and importlib.util.find_spec(package) is None:
            gone.append(f"{tool} (pip install {package}, or the system's)")
    return gone


def build(run: Run, archs: str, cuda: bool) -> None:
    """Installs this checkout into build/gpu/site. A failure is final: nothing can be measured without it."""
    shutil.rmtree(SITE, ignore_errors=True)
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    native = {"FASTLM_CUDA": "ON" if cuda else "OFF", "FASTLM_CUDA_ARCHS": archs, "FASTLM_NATIVE": "ON"}
    status, text = run.command([*words, "--target", str(SITE), "."], 400, **native)
    if status:
        sys.exit(f"the build failed ({status}):\n{text[-4000:]}")
    # An editable install in this Python (`make venv`) comes before PYTHONPATH; the built package is the one to measure.
    forget = (
        "import sys\n"
        "ours = lambda f: 'editable' in type(f).__module__ and 'fastlm' in type(f).__module__\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if not ours(f)]\n"
    )
    (SITE / "sitecustomize.py").write_text(forget)
    exec(forget, {})


def arch_of(capability: tuple[int, int]) -> str:
    number = capability[0] * 10 + capability[1]
    return f"{number}a-real" if number == 90 else f"{number}-real"


def main() -> int:
    parser = argparse.ArgumentParser("make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=570, help="seconds for all of it (default 570)")
    parser.add_argument("--skip-tests", action="store_true", help="leaves the earlier test outcome in place")
    parser.add_argument("--only", default="", help="only parts whose name contains this, such as step or tuning")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each benchmark case (default 0.4)")
    parser.add_argument("--out", type=Path, default=None, help="also copy the result file here, after each part")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: build, collect, interpret")
    args = parser.parse_args()

    import torch

    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device and a PyTorch built for it; `make gpu ARGS=--rehearse` goes without")
    if gone := missing_tools():
        sys.exit(f"make gpu needs, for {sys.executable}: " + ", ".join(gone))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: with what there is
    run = Run(args.budget, WORK / "rehearsal.json", args.rehearse, args.seconds, args.out)
    nvcc = shutil.which("nvcc") is not None
    archs = "90a-real" if args.rehearse else arch_of(torch.cuda.get_device_capability())
    run.say(f"building for {archs if nvcc else 'no CUDA: nvcc is missing'}")
    build(run, archs, nvcc)

    sys.path.insert(0, str(SITE))
    os.environ["FASTLM_CHECKOUT"] = str(ROOT)
    from fastlm.bench import ceilings, peers, results

    if SITE not in Path(results.__file__).parents:
        sys.exit(
            f"{sys.executable} imports fastlm from {Path(results.__file__).parents[1]}, not from the {SITE} just built"
        )
    machine = ceilings.machine("cpu" if args.rehearse else "cuda")
    earlier: dict[str, Any] = {}
    if not args.rehearse:
        name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
        run.path = ROOT / "bench/results" / f"gpu-{name}.json"
        if (args.skip_tests or args.only) and run.path.exists():
            earlier = results.load(run.path)
            if earlier["machine"]["versions"] != machine["versions"]:
                sys.exit(f"{run.path.name} is of {earlier['machine']['versions']}, this Python has {machine['versions']}: "
                         "run all of make gpu, without --only and --skip-tests")  # fmt: skip
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run.data = {"runs": {}, "cases": [], "gpu_tests": {}, **earlier} | {
        "schema": SCHEMA, "date": now, "machine": machine, "peers": peers.table()}  # fmt: skip
    chosen = [p for p in parts(ROOT / "bench") if args.only in p.name and not (args.skip_tests and p.do is test_part)]
    try:
        work(run, chosen)
    except KeyboardInterrupt:
        run.say(f"interrupted during {run.data.get('interrupted')}; {run.path.relative_to(ROOT)} has what there was")
        return 130
    run.say(f"wrote {run.path.relative_to(ROOT)}")
    for op, backend, state in results.status(ROOT):
        print(f"{op:<20} {backend:<8} {state}")
    if run.failed:
        print("make gpu: failed: " + "; ".join(run.failed), file=sys.stderr)
    return int(bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
