"""How much energy a process's devices take, and whether that is measured, estimated or unavailable.

    meter = find("cpu")          # what serves on this machine, and why not more: meter.label, meter.what
    meter.lap()                  # joules, busy and idle time since the last lap

A GPU's run counts its GPU, and the processors too where they have counters. A run on a processor counts the packages;
without counters the processor's stated power times the part of its cores that this process keeps busy, an estimate.
"""

from __future__ import annotations

import math
import os
import platform
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fastlm.energy import counters, power
from fastlm.energy.counters import Counter, Unreadable

MEASURED, ESTIMATED, UNAVAILABLE = "measured", "estimated", "unavailable"


@dataclass(frozen=True)
class Lap:
    """A stretch of time: `joules` (NaN where unknown), whether any of them is estimated, seconds, and of the device's
    time how much was `busy` and how much there was (`capacity`, in core-seconds or GPU-seconds; busy is NaN if unknown)."""

    joules: float
    estimated: bool
    seconds: float
    busy: float
    capacity: float

    @property
    def label(self) -> str:
        return UNAVAILABLE if math.isnan(self.joules) else ESTIMATED if self.estimated else MEASURED

    def __add__(self, other: Lap) -> Lap:
        return Lap(
            self.joules + other.joules, self.estimated or other.estimated, self.seconds + other.seconds,
            self.busy + other.busy, self.capacity + other.capacity,
        )  # fmt: skip


NOTHING = Lap(0.0, False, 0.0, 0.0, 0.0)


class Meter:
    """Counters of one process, read in laps. `watts` a core-second are its estimate where there are no counters."""

    def __init__(self, label: str, what: str, sources: tuple[Counter, ...] = (), watts: float = 0.0,
                 gpu: counters.Gpu | None = None, cores: float = 1.0) -> None:  # fmt: skip
        self.label, self.what, self._sources, self._watts, self._gpu, self._cores = (
            label,
            what,
            sources,
            watts,
            gpu,
            cores,
        )
        self._stop = threading.Event()
        self._watch: threading.Thread | None = None
        self._at, self._busy, self._last = time.perf_counter(), time.process_time(), [s.joules() for s in sources]

    def begin(self) -> None:
        """Start to look at counters that wrap often enough to see each turn, in a thread that `close` ends."""
        periods = [s.period for s in self._sources if isinstance(s, counters.Zone)]
        if periods and self._watch is None:
            every = min(periods) / 4
            self._stop.clear()
            self._watch = threading.Thread(target=self._look, args=(every,), daemon=True, name="fastlm-energy")
            self._watch.start()

    def _look(self, every: float) -> None:
        while not self._stop.wait(every):
            for source in self._sources:
                source.joules()

    def close(self) -> None:
        self._stop.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None

    def lap(self) -> Lap:
        """What was taken since the last lap, or since the meter was made."""
        now, used = time.perf_counter(), time.process_time()
        seconds, busy = now - self._at, used - self._busy
        self._at, self._busy = now, used
        if self.label == UNAVAILABLE:
            joules = math.nan
        elif self.label == ESTIMATED:
            joules = self._watts * busy
        else:
            found = [s.joules() for s in self._sources]
            joules = math.fsum(a - b for a, b in zip(found, self._last))
            self._last = found
        if self._gpu is not None:
            return Lap(joules, False, seconds, self._gpu.busy() * seconds, seconds)
        return Lap(joules, self.label == ESTIMATED, seconds, busy, self._cores * seconds)


def host() -> str:
    """What tells this machine, whose counters are counted once, from others; containers of one machine have one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find(kind: str = "cpu", index: int = 0, *, first: bool = True, processes: int = 1, watts: float = 0.0) -> Meter:
    """The meter of a process that computes on `kind` ("cpu", "cuda", "mps") and there on device `index`.

    Args:
        first: Whether this process counts what its machine's processes share, the processors; one of them must.
        processes: Processes of this run on this machine, which share its cores.
        watts: What one processor is stated to draw, where the user knows.
    """
    if kind == "cuda":
        return _of_gpu(index, first)
    if kind == "mps" or platform.system() == "Darwin":
        try:
            chip = counters.Apple()
            return Meter(MEASURED, chip.name, (chip,) if first else (), cores=cores() / processes)
        except Unreadable as why:
            return _estimate(str(why), processes, watts) if kind == "cpu" else Meter(UNAVAILABLE, str(why))
    try:
        zones = counters.zones()
    except Unreadable as why:
        return _estimate(str(why), processes, watts)
    if not zones:
        return _estimate("this machine shows no counter", processes, watts)
    return Meter(MEASURED, _named(zones), tuple(zones) if first else (), cores=cores() / processes)


def _named(zones: list[counters.Zone]) -> str:
    kinds = [("processor", "package"), ("memory", "dram")]
    counted = {name: sum(z.name.startswith(start) for z in zones) for name, start in kinds}
    return ", ".join(f"{number} x {name} by RAPL" for name, number in counted.items() if number)


def _of_gpu(index: int, first: bool) -> Meter:
    try:
        gpu = counters.Gpu(index)
    except Unreadable as why:
        return Meter(UNAVAILABLE, str(why))
    try:
        shared = counters.zones()
        also = f", {_named(shared)}" if shared else "; the processors have no counter and are not counted"
    except Unreadable as why:
        shared, also = [], f"; the processors are not counted: {why}"
    return Meter(MEASURED, f"{gpu.name}{also}", (gpu, *(shared if first else ())), gpu=gpu)


def _estimate(why: str, processes: int, watts: float) -> Meter:
    whole, by = power.stated(watts)
    if not whole:
        what = f"{why}, and the power of its processor ({power.processor() or 'unknown'}) is not known: give --watts"
        return Meter(UNAVAILABLE, what, cores=cores() / processes)
    what = f"{why}: {whole:g} W stated for all cores ({by}), times the part of them that was busy"
    return Meter(ESTIMATED, what, watts=whole / (os.cpu_count() or 1), cores=cores() / processes)
