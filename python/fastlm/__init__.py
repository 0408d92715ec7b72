"""fastlm: fused kernels that swap into any PyTorch model, and a trainer for language models around them."""

from importlib.metadata import version as _version

from fastlm import backend, nn, ops, rng
from fastlm.swap import explain, swap, unswap

__all__ = ["backend", "explain", "nn", "ops", "rng", "swap", "unswap"]
__version__ = _version("fastlm")
