"""A processor without instructions for a 16-bit dtype: doctor, the trainer and the benchmark's ceiling say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm import _processor
from fastlm.bench import ceilings, harness
from fastlm.bench.__main__ import load_suite, run, suites
from fastlm.bench.sources import checkout
from fastlm.cli import doctor
from fastlm.train.config import Config
from fastlm.train.loop import Trainer
from torch import nn

SLOW = "bfloat16 matrix products take 40 times as long as float32's on this processor"


@pytest.fixture(params=[40.0, 0.5], ids=["without", "with"])
def ratio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A processor on which bfloat16 takes so many times as long as float32."""
    monkeypatch.setattr(_processor, "_linear_seconds", lambda dtype: 1.0 if dtype == torch.float32 else request.param)
    _processor.slowdown.cache_clear()
    yield request.param
    _processor.slowdown.cache_clear()


def test_the_least_of_all_turns_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.bfloat16: iter([90.0, 6.0, *[50.0] * 8]), torch.float32: iter([2.0, *[40.0] * 9])}
    monkeypatch.setattr(_processor, "_linear_seconds", lambda dtype: next(times[dtype]))
    _processor.slowdown.cache_clear()
    assert _processor.slowdown(torch.bfloat16) == 3.0
    _processor.slowdown.cache_clear()


def test_measuring_leaves_threads_and_generator_as_they_were() -> None:
    _processor.slowdown.cache_clear()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    ratio = _processor.slowdown(torch.bfloat16)
    if torch.cpu._is_amx_tile_supported():
        assert ratio < 1.5
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_is_never_slower_than_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100, 1, -1))
    monkeypatch.setattr(_processor, "_linear_seconds", lambda dtype: float(next(times)))
    _processor.slowdown.cache_clear()
    assert not _processor.slow(torch.float32)


def test_doctor_tells(ratio: float, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([])
    told = f"{SLOW}: train in float32" if ratio > 1 else SLOW.replace("40", "0.5")
    assert f"  {told}\n" in capsys.readouterr().out.replace("bfloat16          ", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_warns(ratio: float, dtype: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Data:
        content = "none"

    config = Config()
    config.run.dtype, config.run.quiet, config.run.device = dtype, True, "cpu"
    Trainer(config, nn.Linear(2, 2), Data(), tmp_path)
    warned = f"--dtype bfloat16: {SLOW}; --dtype float32 trains faster here" in capsys.readouterr().err
    assert warned == (ratio > 1 and dtype == "bfloat16")


def test_the_ceiling_of_a_slow_dtype_is_that_of_float32(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ceilings, "_median", lambda product, device, rounds: asked.append(product().dtype) or 1.0)
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device: real(2, 2, device=device))
    ceilings.matmul_rate.cache_clear()
    ceilings.matmul_rate("bfloat16", "cpu")
    ceilings.matmul_rate.cache_clear()
    assert asked == [torch.float32 if ratio > 1 else torch.bfloat16]


def test_a_benchmark_that_would_take_minutes_for_its_matmuls_is_left_out(
    ratio: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "measure", lambda case, seconds: harness.not_run(case, "measured"))
    monkeypatch.setattr(ceilings, "for_case", lambda *case: {})
    data = run(["step"], "cpu", 1e-3, "context", False, None)
    reasons = {("bfloat16" in case["name"], case["contenders"][0]["reason"]) for case in data["cases"]}
    assert reasons == {(False, "measured"), (True, SLOW if ratio > 1 else "measured")}
    assert (SLOW in capsys.readouterr().out) == (ratio > 1)


def test_a_profile_leaves_out_the_slow_dtype_and_says_so(
    ratio: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = load_suite(suites(checkout())["step"])
    monkeypatch.setattr(suite, "CPU_MODEL", suite.SMALL_MODEL)
    found = suite.profile("cpu")
    assert {name.split()[1] for name in found} == ({"float32"} if ratio > 1 else {"float32", "bfloat16"})
    assert (f"no profile of a step, fused bfloat16: {SLOW}" in capsys.readouterr().out) == (ratio > 1)
