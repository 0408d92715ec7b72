"""J/token of a step: where a counter measures its energy over its tokens, else one line and no figure."""

from __future__ import annotations

import pytest
from fastlm import energy
from fastlm.bench import joules
from fastlm.energy import counters, power


class Steady:
    """A counter that gains two joules a step."""

    name = "steady"

    def __init__(self) -> None:
        self.steps = 0

    def joules(self) -> float:
        return 2.0 * self.steps


def test_joules_a_token_are_those_of_the_steps_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counter = Steady()
    monkeypatch.setattr(
        energy, "find", lambda kind, index: energy.Meter(energy.MEASURED, "1 x processor by RAPL", (counter,))
    )

    def make() -> object:
        return lambda: setattr(counter, "steps", counter.steps + 1)

    rows = joules.of_steps([("fused", "float32", 4, 256, make), ("fused", "bfloat16", 8, 512, make)], "cpu", 0.01)  # type: ignore[list-item]
    assert [row["joules_per_token"] for row in rows] == [2 / 256, 2 / 512]
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "J/token (measured: 1 x processor by RAPL)"
    assert lines[1].split() == ["step", "dtype", "batch", "tokens/s", "J/token", "idle"]
    assert lines[2].split()[:3] == ["fused", "float32", "4"]


def test_without_a_counter_there_is_a_line_and_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setattr(counters, "ROOTS", (tmp_path / "none",))
    monkeypatch.setattr(power, "_table", lambda name: None)
    assert joules.of_steps([], "cpu") == []
    assert capsys.readouterr().out.startswith("\nJ/token: unavailable: this machine shows no counter")
