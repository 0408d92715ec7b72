"""Energy of a run: measured, estimated or unavailable, and never one for another; and when to run for less carbon or cost.

`find` gives a meter, `carbon_intensity` a country's grams of CO2e a kWh.
"""

from fastlm.energy.errors import EnergyError
from fastlm.energy.meter import ESTIMATED, MEASURED, NOTHING, UNAVAILABLE, Lap, Meter, find, host
from fastlm.energy.power import carbon_intensity

__all__ = [
    "ESTIMATED", "MEASURED", "NOTHING", "UNAVAILABLE", "EnergyError", "Lap", "Meter", "carbon_intensity", "find", "host",
]  # fmt: skip
