"""``make gpu``: everything that needs a GPU, in under ten minutes, most important first, saved after each part.

Uses the interpreter at hand (``make gpu PYTHON=python3``), no network and no .venv: builds the CUDA wheel for this GPU into
build/gpu, then runs the GPU tests of each op, the benchmarks of each op and of the training step, compute-sanitizer and
ncu over a short list. Writes bench/results/gpu-<device>.json, from which the README's table is made.

``--rehearse`` does what can be done without a GPU: the build, the collection of the tests, and the short list under
Triton's interpreter; it writes nothing to bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build/gpu/site"
BEGIN = time.monotonic()


def left(budget: float) -> float:
    return budget - (time.monotonic() - BEGIN)


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:5.0f} s] {text}", flush=True)


def command(words: list[str], limit: float, env: dict[str, str]) -> tuple[int, str]:
    """Runs a command under a limit. Returns its status (124: stopped at the limit) and its output."""
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=max(1.0, limit), check=False
        )
    except subprocess.TimeoutExpired as stopped:
        text = stopped.stdout or b""
        return 124, text.decode(errors="replace") if isinstance(text, bytes) else text
    return done.returncode, done.stdout + done.stderr


def build(env: dict[str, str], archs: str, cuda: bool) -> None:
    """Installs this checkout into build/gpu/site. A failure is final: nothing can be measured without it."""
    shutil.rmtree(SITE, ignore_errors=True)
    own = env | {"FASTLM_CUDA": "ON" if cuda else "OFF", "FASTLM_CUDA_ARCHS": archs, "FASTLM_NATIVE": "ON"}
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    status, text = command([*words, "--target", str(SITE), "."], 400, own)
    if status:
        sys.exit(f"the build failed ({status}):\n{text[-4000:]}")


def main() -> int:
    parser = argparse.ArgumentParser("make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=570, help="seconds for all of it (default 570)")
    parser.add_argument(
        "--skip-tests", action="store_true", help="benchmarks only; leaves the earlier test outcome in place"
    )
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each benchmark case (default 0.4)")
    parser.add_argument("--out", type=Path, default=None, help="also copy the result file here, after each part")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: build, collect, interpret")
    args = parser.parse_args()
    env = os.environ | {"PYTHONPATH": str(SITE), "FASTLM_CHECKOUT": str(ROOT)}
    env.pop("FASTLM_BACKEND", None)

    import torch

    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device and a PyTorch built for it; `make gpu ARGS=--rehearse` goes without")
    nvcc = shutil.which("nvcc") is not None
    archs = "90a-real" if args.rehearse else arch_of(torch.cuda.get_device_capability())
    say(f"building for {archs if nvcc else 'no CUDA: nvcc is missing'}")
    build(env, archs, nvcc)
    if args.rehearse:
        return rehearse(env)

    sys.path.insert(0, str(SITE))
    os.environ.update(env)
    from fastlm.bench import ceilings, results, sources

    machine = ceilings.machine("cuda")
    path = ROOT / "bench/results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', machine['device'].lower()).strip('-')}.json"
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    data = {"schema": results.SCHEMA, "date": now, "machine": machine, "cases": [], "gpu_tests": {}}
    if args.skip_tests and path.exists():
        data["gpu_tests"] = results.load(path).get("gpu_tests", {})

    def save() -> None:
        results.save(path, data)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, args.out / path.name)

    if not args.skip_tests:
        report = ROOT / "build/gpu/tests.json"
        report.unlink(missing_ok=True)
        words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--gpu-report={report}", "tests"]
        status, text = command(words, left(args.budget) * 0.5, env)
        say(f"GPU tests ended with {status}")
        print(text[-5000:])
        outcomes = json.loads(report.read_text()) if report.exists() else {}
        for op, by_backend in outcomes.items():
            for name, counts in by_backend.items():
                entry = counts | {"hash": sources.source_hash(op, name, ROOT)}
                if status == 124:
                    entry["failed"] = entry.get("failed", 0) + 1  # stopped at the limit: not all ran
                data["gpu_tests"].setdefault(op, {})[name] = entry
        data["gpu_tests_output"] = text[-3000:]
        save()

    for suite in ("dropout_add_norm", "attention", "step"):
        if left(args.budget) < 30:
            say(f"no time left for the benchmarks of {suite}")
            continue
        say(f"benchmarks of {suite}")
        part = ROOT / "build/gpu" / f"{suite}.json"
        part.unlink(missing_ok=True)
        words = [sys.executable, "-m", "fastlm.bench", suite, "--device", "cuda", "--seconds", str(args.seconds)]
        status, text = command([*words, "--memory", "--out", str(part.parent / suite)], left(args.budget) * 0.5, env)
        print(text[-6000:])
        written = part.parent / suite / "result.json"
        if written.exists():
            found = results.load(written)
            data["cases"] += found["cases"]
            data.setdefault("profiles", {}).update(found.get("profiles", {}))
        if status:
            data.setdefault("stopped", {})[suite] = f"status {status}: {text[-500:]}"
        save()

    short = [sys.executable, "-m", "fastlm.bench.short"]
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck", "initcheck"):
            if left(args.budget) < 30:
                break
            words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", *short]
            status, text = command(words, min(90, left(args.budget)), env)
            say(f"compute-sanitizer {tool}: {status}")
            data.setdefault("sanitizer", {})[tool] = {"status": status, "end": text[-400:]}
            save()
    if shutil.which("ncu") and left(args.budget) > 30:
        metrics = "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
        metrics += "sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,"
        metrics += "smsp__warps_active.avg.pct_of_peak_sustained_active"
        words = ["ncu", "--clock-control", "none", "--csv", "--metrics", metrics, *short]
        status, text = command(words, left(args.budget) - 10, env)
        say(f"ncu: {status}")
        data["ncu"] = [line for line in text.splitlines() if line.startswith('"')][:400]
        save()
    say(f"wrote {path.relative_to(ROOT)}")
    for op, name, state in results.status(ROOT):
        print(f"{op:<20} {name:<8} {state}")
    return 0


def arch_of(capability: tuple[int, int]) -> str:
    number = capability[0] * 10 + capability[1]
    return f"{number}a-real" if number == 90 else f"{number}-real"


def rehearse(env: dict[str, str]) -> int:
    """Without a GPU: what ``make gpu`` would do up to the first launch."""
    failed = 0
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "tests"]
    status, text = command(words, 200, env)
    say(f"collected the GPU tests: status {status}; {text.strip().splitlines()[-1] if text.strip() else ''}")
    failed |= status not in (0,)
    status, text = command([sys.executable, "-m", "fastlm.bench.short", "--interpret"], 300,
                           env | {"TRITON_INTERPRET": "1"})  # fmt: skip
    say(f"the short list under the interpreter: status {status}")
    print(text[-2000:])
    failed |= status != 0
    status, text = command([sys.executable, "-m", "fastlm.bench", "--status"], 100, env)
    print(text)
    return int(failed or status != 0)


if __name__ == "__main__":
    sys.exit(main())
