"""Smaller models out of trained ones: linear layers in int8 (``quantize``) and SmoothQuant before it (``smooth``)."""

from fastlm.compress.held import Held, held
from fastlm.compress.quantize import Converted, convert, plan, restore
from fastlm.compress.smooth import Smoothed, smooth

__all__ = ["Converted", "Held", "Smoothed", "convert", "held", "plan", "restore", "smooth"]
