"""What a processor is stated to draw, and what a kilowatt-hour of a country emits.

Both tables are codecarbon's, read as files where that package is installed; nothing of it is imported.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import platform
import re
import sys
from pathlib import Path

from fastlm.energy.counters import stated_power
from fastlm.energy.errors import EnergyError

COUNTRIES, PROCESSORS = "private_infra/global_energy_mix.json", "hardware/cpu_power.csv"


def _table(name: str) -> Path | None:
    found = importlib.util.find_spec("codecarbon")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "data" / name
    return path if path.is_file() else None


def carbon_intensity(given: str) -> float:
    """Grams of CO2e a kWh: a number, or a country's code of three letters in codecarbon's table (a year's mean).

    Raises EnergyError for what is neither, and for a code where there is no table.
    """
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if value >= 0 and math.isfinite(value):
        return value
    if not re.fullmatch(r"[A-Za-z]{3}", given) or given.lower() in ("nan", "inf"):
        raise EnergyError(
            f"must be grams of CO2e a kWh, such as 381, or a country's code of three letters, such as DEU; it is {given!r}"
        )
    if (path := _table(COUNTRIES)) is None:
        raise EnergyError(f"{given} needs the table of codecarbon: pip install codecarbon, or give grams of CO2e a kWh")
    entry = json.loads(path.read_text(encoding="utf-8")).get(given.upper())
    if entry is None:
        raise EnergyError(f"{given}: codecarbon's table has no such country; give grams of CO2e a kWh, such as 381")
    return float(entry["carbon_intensity"])


def processor() -> str:
    """The processor's name as the system tells it; "" where it does not."""
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
        return found[1].strip() if found else ""
    return platform.processor()


def _plain(name: str) -> str:
    """A processor's name without what its makers and tables put around it."""
    name = re.sub(r"\((R|TM|C)\)|@.*|\b\d+-Core\b|\bCPU\b|\bProcessor\b|\bwith .*", " ", name, flags=re.I)
    return " ".join(name.split()).casefold()


def thermal_power(name: str) -> float:
    """Watts that codecarbon's table states for the processor of this very name; 0 where it has none."""
    path = _table(PROCESSORS)
    if path is None or not name:
        return 0.0
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            if len(row) > 1 and _plain(row[0]) == _plain(name):
                try:
                    return float(row[1])
                except ValueError:
                    return 0.0
    return 0.0


def packages() -> int:
    """Sockets of this machine; 1 where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 1
    return max(len(set(re.findall(r"^physical id\s*:\s*(\d+)$", text, re.M))), 1)


def stated(watts: float = 0.0) -> tuple[float, str]:
    """(watts of all processors of this machine when every core is busy, who states them); (0, "") where nobody does.

    `watts`: the user's word for one processor, which counts before the processor's own and codecarbon's.
    """
    number = packages()
    if watts:
        return watts * number, "--watts"
    if own := stated_power():
        return own, "the processor's own word"
    name = processor()
    if found := thermal_power(name):
        return found * number, f"codecarbon's table for {name}"
    return 0.0, ""
