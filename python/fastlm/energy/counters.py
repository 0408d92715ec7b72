"""Counters of energy: RAPL through Linux's powercap files, and GPUs and Apple's chips through zeus (extra `energy`).

Each counter has `name` and `joules()`: what it has counted since it was made, or NaN since a reading that cannot be trusted.
A processor's package is one device however many processes run on it: who asks must count it once.

RAPL's files are read here and not by zeus, which starts a process for each counter to see it wrap, and which counts the
whole platform (psys) as one more processor beside those that it holds.
"""

from __future__ import annotations

import importlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

ROOTS = (Path("/sys/class/powercap/intel-rapl"), Path("/zeus_sys/class/powercap/intel-rapl"))  # the latter: containers
PLAUSIBLE = 2000.0  # watts; no processor package draws more, so a counter that says so was reset, or wrapped twice


class Counter(Protocol):
    name: str

    def joules(self) -> float: ...


class Unreadable(Exception):
    """There is a counter, and it cannot be read; the message says why."""


class Zone:
    """One RAPL zone (a package, or its memory): a counter in microjoules that wraps at `max_energy_range_uj`.

    It must be read once in `period` seconds at least, or more than one turn might go unseen. What cannot be one turn at a
    power that a processor can draw makes the counter NaN from then on.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._clock = folder, clock
        try:
            self.name = (folder / "name").read_text().strip()
            self._range = int((folder / "max_energy_range_uj").read_text())
            self._last = self._read()
        except PermissionError:
            raise Unreadable(f"{folder}/energy_uj may be read by root alone") from None
        except (OSError, ValueError) as error:
            raise Unreadable(f"{folder} cannot be read: {error}") from None
        self._at, self._total = clock(), 0.0
        self._lock = threading.Lock()

    @property
    def period(self) -> float:
        """Seconds in which the counter cannot turn at any power that a package draws."""
        return self._range / 1e6 / PLAUSIBLE

    def _read(self) -> int:
        return int((self.folder / "energy_uj").read_text())

    def joules(self) -> float:
        with self._lock:
            try:
                new = self._read()
            except (OSError, ValueError):
                self._total = math.nan
                return self._total
            now = self._clock()
            step = new - self._last if new >= self._last else new - self._last + self._range
            most = (now - self._at + 0.1) * PLAUSIBLE * 1e6  # the kernel's own updates lag by some milliseconds
            if step < 0 or step > most or now - self._at > self.period:
                self._total = math.nan
            self._total += step / 1e6
            self._last, self._at = new, now
            return self._total


def zones() -> list[Zone]:
    """The zones that make a machine's processors, each joule in one of them: packages, and the memory that packages do not
    hold. Raises Unreadable where there are some and one cannot be read; a machine without any has none.
    """
    root = next((root for root in ROOTS if root.is_dir()), None)
    if root is None:
        return []
    found = []
    for folder in sorted(root.glob("intel-rapl:*")):
        zone = Zone(folder)
        if not zone.name.startswith("package"):  # psys holds the packages, and would count them twice
            continue
        found.append(zone)
        parts = (Zone(sub) for sub in sorted(folder.glob("intel-rapl:*:*")))
        found += [sub for sub in parts if sub.name == "dram"]  # core and uncore are within the package
    return found


def stated_power() -> float:
    """Watts that the machine's processors state of themselves in powercap (readable where the counters are not); 0 if none."""
    total = 0.0
    root = next((root for root in ROOTS if root.is_dir()), None)
    for folder in sorted(root.glob("intel-rapl:*")) if root is not None else ():
        try:
            if (folder / "name").read_text().startswith("package"):
                total += int((folder / "constraint_0_max_power_uw").read_text()) / 1e6
        except (OSError, ValueError):
            return 0.0
    return total


class Gpu:
    """A GPU's own counter by zeus (NVML, or AMD's SMI). `busy()` is the share of time in which it had work, NaN if unknown."""

    def __init__(self, index: int, devices: Any = None) -> None:
        """`devices` stands in for `zeus.device.get_gpus()`. Raises Unreadable where there is no counter."""
        self.index, self._handle, self._nvml = index, None, None
        try:
            self._devices = devices or importlib.import_module("zeus.device").get_gpus()
            if not self._devices.supports_get_total_energy_consumption(index):
                raise Unreadable(f"GPU {index} has no counter of energy")
            self._first = float(self._devices.get_total_energy_consumption(index))
        except ImportError:
            raise Unreadable("a GPU's counter needs the package zeus: pip install zeus") from None
        except (_zeus_error(), IndexError, ValueError) as error:  # ValueError: CUDA_VISIBLE_DEVICES by UUID
            raise Unreadable(f"GPU {index}: zeus finds no counter ({error})") from None
        self.name = f"GPU {index}"
        try:
            self._nvml = importlib.import_module("pynvml")
            self._handle = self._devices.gpus[index].handle
        except (ImportError, AttributeError, IndexError):
            self._nvml = None
        if self._shared():
            raise Unreadable(f"GPU {index} is cut into parts (MIG), and its counter counts all of them")

    def _shared(self) -> bool:
        if self._nvml is None:
            return False
        try:
            return bool(self._nvml.nvmlDeviceGetMigMode(self._handle)[0])
        except (self._nvml.NVMLError, TypeError):
            return False

    def joules(self) -> float:
        try:
            return (float(self._devices.get_total_energy_consumption(self.index)) - self._first) / 1e3
        except _zeus_error():
            return math.nan

    def busy(self) -> float:
        if self._nvml is None:
            return math.nan
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        except (self._nvml.NVMLError, TypeError):
            return math.nan


class Apple:
    """The parts of an Apple chip by zeus: processor, GPU, neural engine and memory together."""

    PARTS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "ane_mj", "dram_mj")
    name = "Apple's chip"

    def __init__(self, chip: Any = None) -> None:
        """`chip` stands in for `zeus.device.get_soc()`. Raises Unreadable where there is no counter."""
        try:
            self._chip = chip or importlib.import_module("zeus.device").get_soc()
            self._first = self._read()
        except ImportError:
            raise Unreadable("Apple's counters need: pip install zeus zeus-apple-silicon") from None
        except _zeus_error() as error:
            raise Unreadable(f"zeus finds no counter of Apple's: {error}") from None

    def _read(self) -> float:
        found = self._chip.get_total_energy_consumption()
        parts = [value for name in self.PARTS if (value := getattr(found, name, None)) is not None]
        return sum(parts) / 1e3 if parts else math.nan

    def joules(self) -> float:
        try:
            return self._read() - self._first
        except _zeus_error():
            return math.nan


def _zeus_error() -> type[Exception]:
    try:
        kind: type[Exception] = importlib.import_module("zeus.exception").ZeusBaseError
    except ImportError:
        return Unreadable
    return kind
