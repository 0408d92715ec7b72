"""Cases, contenders and the one timer.

A ``bench/bench_<op>.py`` defines ``cases(device)``. A case is one computation with the bytes and flops it must move and
its contenders: fastlm's own, PyTorch's, and peers where they are installed. All contenders of a case run in turn, round
after round, under one timer and one allocator setting, so that a machine that slows down slows all of them; outputs are
allocated inside the timed region on every side; a contender whose result is wrong is not timed. On a CPU a turn is a
short burst behind an untimed call, so that no contender is timed on the cache that another one left.

``pytest_cases`` hands the same samples to pytest-benchmark; ``fastlm bench`` needs only this file.
"""

from __future__ import annotations

import functools
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlm import backend
from fastlm.bench.ceilings import for_case
from fastlm.bench.clock import DTYPES as DTYPES  # bench files import all from here
from fastlm.bench.clock import Clock
from fastlm.bench.clock import Prepared as Prepared


class Missing(Exception):
    """A contender is not installed here, or does not serve this case. Its message becomes its row."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case. ``prepare(inputs)`` returns the function to time; it may raise ``Missing``."""

    name: str
    prepare: Callable[[Any], Prepared]
    kind: str = "baseline"  # "ours", "self" (a variant of ours), "baseline", "peer" or "ceiling"
    checked: bool = True  # compare its result with the case's reference before timing it
    # ``check(result, inputs)``, its largest error where the case's ``error`` cannot judge it (it draws a dropout mask of its
    # own, its result is a step). Held to the case's tolerance in place of ``error``.
    check: Callable[[Any, Any], float] | None = None


@dataclass(frozen=True)
class Goal:
    """fastlm should take at most 1/ratio of ``versus``'s time (ratio 17: seventeen times as fast)."""

    versus: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """One computation. ``bytes`` and ``flops``: what any implementation must move and compute, for the whole call.

    ``inputs(seed)`` makes fresh random inputs; ``error(result, inputs)`` returns the largest relative error of a
    contender's result against float64, and ``tolerance`` what it may be.

    A case is part of the smoke pass, of the timed runs, or of both: a small shape tells nothing of speed, a large one costs
    the smoke pass its minute.
    """

    op: str
    name: str
    inputs: Callable[[int], Any]
    contenders: tuple[Contender, ...]
    bytes: int = 0
    flops: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    parameters: dict[str, Any] = field(default_factory=dict)
    setting: str = "alone"  # "alone", "before a matmul", "step" or "trainer"
    error: Callable[[Any, Any], float] | None = None
    tolerance: float = 0.0
    goals: tuple[Goal, ...] = ()
    smoke: bool = True  # part of the smoke pass
    timed: bool = True  # part of a timed run
    longer: float = 1.0  # how many times as long as others it is timed: a call takes seconds, not milliseconds


@dataclass
class Timing:
    """A contender's samples in seconds, or why it has none."""

    name: str
    kind: str
    status: str = "ok"  # "ok", "missing", "failed", "wrong" or "not run"
    reason: str = ""
    samples: list[float] = field(default_factory=list)
    error: float | None = None  # what the check before the timing found; None: not checked
    backends: list[list[str]] = field(default_factory=list)  # (op, backend) of fastlm's that the checked call ran on

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartile."""
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4)
        return low, high

    def as_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"name": self.name, "kind": self.kind, "status": self.status}
        if self.reason:
            out["reason"] = self.reason
        if self.error is not None:
            out["error"] = self.error
        if self.backends:
            out["backends"] = self.backends
        if self.samples:
            low, high = self.spread
            out |= {"median_s": self.median, "quartiles_s": [low, high], "samples": len(self.samples)}
        return out


def raise_malloc_thresholds() -> str:
    """The one allocator setting of a run, the trainer's own: freed blocks are kept, not handed back page by page."""
    from fastlm.train.machine import spare_page_faults

    if spare_page_faults():
        return "glibc keeps freed blocks (as fastlm train sets it)"
    given = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    return "the system's default" if given is None else f"the environment's MALLOC_MMAP_THRESHOLD_={given}"


def prepare(case: Case, seed: int) -> tuple[list[Timing], list[Prepared | None]]:
    """Prepares every contender and checks its result; those that cannot or must not run get their reason.

    What earlier cases compiled is forgotten: the compiler would else take a new size for one that changes from call to
    call, and after eight of them run uncompiled.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    timings, functions = [], []
    for contender in case.contenders:
        timing = Timing(contender.name, contender.kind)
        function: Prepared | None = None
        inputs = case.inputs(seed)
        try:
            with backend.watched() as seen:
                function = contender.prepare(inputs)
                result = function()
            timing.backends = sorted([op, name] for op, name in seen)
        except Missing as why:
            timing.status, timing.reason, function = "missing", str(why), None
        except Exception as error:
            timing.status, function = "failed", None
            timing.reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if contender.kind == "ours":
                raise
        else:
            error_of: Callable[[], float] | None = None
            if contender.check is not None:
                error_of = functools.partial(contender.check, result, inputs)
            elif case.error is not None and contender.checked:
                error_of = functools.partial(case.error, result, inputs)
            if error_of is not None:
                wrong = timing.error = float(error_of())
                if not wrong <= case.tolerance:
                    timing.status, function = "wrong", None
                    timing.reason = f"largest error {wrong:.2e}, allowed {case.tolerance:.2e}"
                    if contender.kind == "ours":
                        raise AssertionError(f"{case.op} {case.name}: fastlm's own result is wrong: {timing.reason}")
        timings.append(timing)
        functions.append(function)
    return timings, functions


SHORT = 0.1  # seconds: in a longer call, filling the cache again is less than a hundredth
BURST = 3


def measure(
    case: Case, *, seconds: float = 3.0, min_rounds: int = 5, max_rounds: int = 200, seed: int = 0
) -> list[Timing]:
    """Times every contender of ``case`` in turn for about ``seconds``; ``seconds`` 0: one round, for the smoke pass.

    A turn is one sample; of a short call on a CPU it is an untimed call, which brings its own data into the cache, and
    then ``BURST`` samples. A case whose ``min_rounds`` would take more than three times ``seconds`` ends after two rounds.
    """
    timings, functions = prepare(case, seed)
    clock = Clock(case.device)
    alive = [(t, f) for t, f in zip(timings, functions, strict=True) if f is not None]
    turns = []
    for _, function in alive:
        if seconds:
            clock(function, 1)
        once = clock(function, 1)
        plain = clock.cuda or not seconds
        turns.append((1 if plain else max(1, min(1000, int(1e-3 / max(once, 1e-7)))), not plain and once < SHORT))
    gc.collect()
    gc.disable()
    begin, rounds = time.perf_counter(), 0
    try:
        while True:
            for (timing, function), (repeat, short) in zip(alive, turns, strict=True):
                if short:
                    function()
                timing.samples += [clock(function, repeat) for _ in range(BURST if short else 1)]
            rounds += 1
            spent = time.perf_counter() - begin
            enough = rounds >= (min_rounds if seconds else 1) or (rounds >= 2 and spent >= 3 * seconds)
            if rounds >= max_rounds or (spent >= seconds and enough):
                break
    finally:
        gc.enable()
    return timings


def not_run(case: Case, reason: str) -> list[Timing]:
    """The timings of a case that was never begun: its row and its goals are still there to be seen."""
    return [Timing(c.name, c.kind, "not run", reason) for c in case.contenders]


def broken(contender: dict[str, Any]) -> bool:
    """Whether a contender of a row failed or gave wrong values though nothing outside this checkout excuses it."""
    return contender["kind"] in ("ours", "self", "baseline") and contender["status"] in ("failed", "wrong")


def row(case: Case, timings: list[Timing], ceilings: dict[str, float]) -> dict[str, Any]:
    """The case's entry of the JSON file (schema: bench/results/README.md). A goal that nothing measured has reached None."""
    by_name = {t.name: t for t in timings}
    ours = next((t for t in timings if t.kind == "ours" and t.status == "ok"), None)
    floor = 0.0
    if case.bytes and ceilings.get("copy"):
        floor = max(floor, case.bytes / ceilings["copy"])
    if case.flops and ceilings.get("matmul"):
        floor = max(floor, case.flops / ceilings["matmul"])
    goals = []
    for goal in case.goals:
        other = by_name.get(goal.versus)
        measured = ours is not None and other is not None and other.status == "ok"
        reached = other.median / ours.median if measured and ours and other else None
        goals.append({"versus": goal.versus, "ratio": goal.ratio, "reached": reached})
    return {
        "op": case.op, "name": case.name, "setting": case.setting, "dtype": case.dtype, "device": case.device,
        "parameters": case.parameters, "bytes": case.bytes, "flops": case.flops, "floor_s": floor,
        "ceilings": ceilings, "contenders": [t.as_json() for t in timings], "goals": goals,
    }  # fmt: skip


def ratio_error(result: Any, expected: Any) -> float:
    """Largest error over the largest magnitude, over one tensor or matching sequences of tensors."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    expecteds = expected if isinstance(expected, (tuple, list)) else (expected,)
    worst = 0.0
    for got, want in zip(results, expecteds, strict=True):
        scale = want.abs().max().item() or 1.0
        error = (got.double() - want.double()).abs().max().item() / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst


# --- pytest-benchmark ---


class ReplayTimer:
    """A timer for pytest-benchmark that replays samples already taken, so that one clock times all contenders."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pending: Iterator[float] = iter(())
        self.running = False

    def load(self, samples: Iterable[float]) -> None:
        self.pending, self.running = iter(samples), False

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.pending, 0.0)
        self.running = not self.running
        return self.now


REPLAY = ReplayTimer()


def pytest_cases(cases: Callable[[str], Iterable[Case]]) -> Callable[..., None]:
    """The test function of a bench file: ``test_bench = pytest_cases(cases)``.

    A case is timed for --benchmark-max-time seconds (under --benchmark-disable: one round); each contender's ``extra_info`` is
    the case's row. A baseline that fails or gives wrong values fails its test, a contender that is not here skips it.
    """
    import pytest

    device = "cuda" if torch.cuda.is_available() else "cpu"
    taken: dict[str, tuple[list[Timing], dict[str, Any]]] = {}
    parameters = [
        pytest.param(case, contender.name, id=f"{case.name}-{contender.name}")
        for case in cases(device)
        for contender in case.contenders
    ]

    @pytest.mark.benchmark(timer=REPLAY)
    @pytest.mark.parametrize("case,name", parameters)
    def test_bench(case: Case, name: str, benchmark: Any, request: Any) -> None:
        if case.name not in taken:
            taken.clear()
            allocator = raise_malloc_thresholds()
            seconds = 0.0 if benchmark.disabled else float(request.config.getoption("benchmark_max_time"))
            timings = measure(case, seconds=seconds * case.longer)
            limits = for_case(case.bytes, case.flops, case.dtype, case.device) if seconds else {}
            taken[case.name] = timings, row(case, timings, limits) | {"allocator": allocator}
        timings, entry = taken[case.name]
        timing = next(t for t in timings if t.name == name)
        own = timing.as_json()
        benchmark.extra_info.update({k: v for k, v in entry.items() if k != "contenders"} | {"contender": own})
        if broken(own):
            pytest.fail(f"{timing.status}: {timing.reason}")
        if timing.status != "ok":
            pytest.skip(f"{timing.status}: {timing.reason}")
        benchmark.group = f"{case.op} {case.name}"
        REPLAY.load(timing.samples)
        benchmark.pedantic(lambda: None, rounds=len(timing.samples), iterations=1, warmup_rounds=0)

    return test_bench
