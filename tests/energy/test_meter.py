"""Counters of energy, in a tree of files of our own making; and that nothing but a counter is called a measurement."""

from __future__ import annotations

import math
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from fastlm import energy
from fastlm.energy import counters, meter, power

KJ = 1_000_000_000  # microjoules in a kilojoule


class Tree:
    """A machine's powercap: packages with memory, cores within, and the platform beside."""

    def __init__(self, root: Path, packages: int = 1, turn: int = 65_532_610_987) -> None:
        self.root, self.turn = root / "intel-rapl", turn
        self.zones: dict[str, Path] = {}
        for i in range(packages):
            self.add(f"intel-rapl:{i}", f"package-{i}")
            self.add(f"intel-rapl:{i}/intel-rapl:{i}:0", "core")
            self.add(f"intel-rapl:{i}/intel-rapl:{i}:1", "dram")
        self.add(f"intel-rapl:{packages}", "psys")

    def add(self, path: str, name: str) -> None:
        folder = self.root / path
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{self.turn}\n")
        (folder / "constraint_0_max_power_uw").write_text("105000000\n")
        key = name if name != "dram" and name != "core" else f"{name}-{path[11]}"
        self.zones[key] = folder
        self.set(key, 0)

    def set(self, name: str, microjoules: int) -> None:
        (self.zones[name] / "energy_uj").write_text(f"{microjoules % self.turn}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    made = Tree(tmp_path, 2)
    monkeypatch.setattr(counters, "ROOTS", (made.root,))
    return made


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without counters, whose processor no table knows."""
    monkeypatch.setattr(counters, "ROOTS", (tmp_path / "none",))
    monkeypatch.setattr(power, "_table", lambda name: None)


def patient(zone: counters.Zone, now: list[float]) -> counters.Zone:
    zone._clock, zone._at = lambda: now[0], now[0]
    return zone


def test_each_joule_of_a_machine_is_counted_once(tree: Tree) -> None:
    found = counters.zones()
    assert sorted(z.name for z in found) == ["dram", "dram", "package-0", "package-1"]
    one = energy.find("cpu")
    assert one.label == "measured"
    assert one.what == "2 x processor by RAPL, 2 x memory by RAPL"
    other = energy.find("cpu", first=False)  # a second rank of this machine
    for name, joules in (("package-0", 5), ("package-1", 7), ("dram-0", 1), ("dram-1", 2), ("core-0", 4), ("psys", 20)):
        tree.set(name, joules * 1_000_000)
    for source in one._sources:
        source._at -= 10  # type: ignore[attr-defined]
    laps = one.lap(), other.lap()
    assert [lap.label for lap in laps] == ["measured", "measured"]
    assert [lap.joules for lap in laps] == [pytest.approx(15.0), 0.0]
    assert one.lap().joules == 0.0


def test_a_counter_that_wraps_is_followed_over_many_turns(tree: Tree) -> None:
    now = [0.0]
    zone = patient(counters.Zone(tree.zones["package-0"]), now)
    true = 0
    for _ in range(200):  # 300 W, read every 25 s: seven and a half kilojoules each, 23 turns in all
        now[0] += 25.0
        true += 7_500_000_000
        tree.set("package-0", true)
        assert zone.joules() == pytest.approx(true / 1e6, rel=1e-12)
    assert true // tree.turn == 22


@pytest.mark.parametrize("what", ["reset", "slept", "gone", "words"])
def test_a_reading_that_cannot_be_trusted_is_no_measurement(tree: Tree, what: str) -> None:
    now = [0.0]
    tree.set("package-0", 40 * KJ)
    zone = patient(counters.Zone(tree.zones["package-0"]), now)
    now[0] += 3600.0 if what == "slept" else 5.0
    tree.set("package-0", 1_000 if what == "reset" else 41 * KJ)
    if what in ("gone", "words"):
        (zone.folder / "energy_uj").write_text("none")
        if what == "gone":
            (zone.folder / "energy_uj").unlink()
    assert math.isnan(zone.joules())
    lap = meter.Meter(energy.MEASURED, "", (zone,)).lap()
    assert lap.label == "unavailable"


def test_a_thread_sees_each_turn_of_a_slow_program(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.Zone, "period", property(lambda zone: 0.04))
    read, enough = [0], threading.Event()

    def joules(zone: counters.Zone) -> float:
        read[0] += 1
        if read[0] > 40:
            enough.set()
        return float(read[0])

    monkeypatch.setattr(counters.Zone, "joules", joules)
    found = energy.find("cpu")
    found.begin()
    assert enough.wait(60)
    found.close()
    assert found._watch is None


def test_without_a_counter_nothing_is_called_measured(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = energy.find("cpu")
    assert (found.label, found.lap().label) == ("unavailable", "unavailable")
    assert "--watts" in found.what
    assert math.isnan(found.lap().joules)

    def none(index: int) -> None:
        raise counters.Unreadable("no GPU")

    monkeypatch.setattr(counters, "Gpu", none)  # a machine with one may have its counter
    assert energy.find("cuda").label == "unavailable"
    assert energy.find("mps").label == "unavailable"
    stated = energy.find("cpu", watts=100.0)
    lap = stated.lap()
    assert (stated.label, lap.label) == ("estimated", "estimated")
    assert "100" in stated.what


def test_an_estimate_is_the_stated_power_of_the_busy_cores(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(power, "packages", lambda: 2)
    ticks = iter((1.0, 3.0, 3.5))
    monkeypatch.setattr(meter.time, "process_time", lambda: next(ticks))
    found = energy.find("cpu", watts=120.0)
    assert found.lap().joules == pytest.approx(2 * 240 / 8)  # two core-seconds of eight cores that take 240 W
    assert found.lap().joules == pytest.approx(0.5 * 240 / 8)


def test_a_counter_for_root_alone_gives_what_the_processor_states(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(zone: counters.Zone) -> int:
        raise PermissionError

    monkeypatch.setattr(counters.Zone, "_read", refuse)
    found = energy.find("cpu")
    assert found.label == "estimated"
    assert "root alone" in found.what
    assert "210 W" in found.what


class Gpus:
    """What zeus gives: two GPUs with a counter in millijoules, and one without."""

    def __init__(self) -> None:
        self.count = [1e6, 5e6]
        self.gpus = [types.SimpleNamespace(handle=i) for i in range(3)]

    def supports_get_total_energy_consumption(self, index: int) -> bool:
        return index < 2

    def get_total_energy_consumption(self, index: int) -> float:
        return self.count[index]


def test_a_gpu_is_its_own_counter_and_processors_are_one_rank_s(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus()
    real = counters.Gpu.__init__
    monkeypatch.setattr(counters.Gpu, "__init__", lambda self, index: real(self, index, gpus))
    ranks = [energy.find("cuda", i, first=i == 0) for i in range(2)]
    assert [r.label for r in ranks] == ["measured", "measured"]
    gpus.count = [1e6 + 3000, 5e6 + 4000]
    tree.set("package-1", 2_000_000)
    for source in ranks[0]._sources[1:]:
        source._at -= 10  # type: ignore[attr-defined]
    assert [r.lap().joules for r in ranks] == [pytest.approx(5.0), pytest.approx(4.0)]
    assert energy.find("cuda", 2).label == "unavailable"
    assert "no counter" in energy.find("cuda", 2).what


def test_apple_s_parts_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    now = types.SimpleNamespace(cpu_total_mj=1000, gpu_mj=500, dram_mj=None, ane_mj=0, performance_cores_mj=[900])
    chip = counters.Apple(types.SimpleNamespace(get_total_energy_consumption=lambda: now))
    now.cpu_total_mj, now.gpu_mj = 4000, 1500
    assert chip.joules() == pytest.approx(4.0)


@pytest.mark.parametrize(("given", "said"), [
    ("-3", "three letters"), ("nan", "three letters"), ("Germany", "three letters"), ("", "three letters"), ("1e999", "grams"),
    ("DEU", "codecarbon"),
])  # fmt: skip
def test_carbon_that_cannot_be_is_one_sentence(bare: None, given: str, said: str) -> None:
    with pytest.raises(energy.EnergyError, match=said):
        energy.carbon_intensity(given)


def test_a_country_is_that_of_codecarbon_s_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, chips = tmp_path / "mix.json", tmp_path / "cpu.csv"
    table.write_text('{"DEU": {"carbon_intensity": 380.95}, "GBR": {"carbon_intensity": 237.6}}')
    chips.write_text("Name,TDP\nAMD EPYC 7763,280\nIntel Xeon E5-2690 v4,135\nIntel Xeon E5-2690,130\n")
    monkeypatch.setattr(power, "_table", lambda name: table if name == power.COUNTRIES else chips)
    assert energy.carbon_intensity("381") == 381.0
    assert energy.carbon_intensity("deu") == 380.95
    with pytest.raises(energy.EnergyError, match="no such country"):
        energy.carbon_intensity("XYZ")
    known: dict[str, Any] = {
        "AMD EPYC 7763 64-Core Processor": 280.0, "Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz": 135.0, "AMD EPYC": 0.0, "": 0.0,
    }  # fmt: skip
    for name, watts in known.items():
        assert power.thermal_power(name) == watts, name
