"""fastlm: fused kernels that swap into any PyTorch model, and a trainer for language models around them."""

from importlib.metadata import version as _version

from fastlm import backend, nn, ops, rng
from fastlm.ops.flash import flash_attn_func, flash_attn_varlen_func
from fastlm.swap import explain, swap, unswap

__all__ = ["backend", "explain", "flash_attn_func", "flash_attn_varlen_func", "nn", "ops", "rng", "swap", "unswap"]
__version__ = _version("fastlm")
