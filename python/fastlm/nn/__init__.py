"""Modules over the ops, for models written with fastlm from the start (``fastlm.swap`` is for models that exist)."""

from fastlm.nn.attention import Attention, KVCache
from fastlm.nn.dropout_add_norm import DropoutAddNorm
from fastlm.nn.int8 import Int8Linear, Int8TrainingLinear
from fastlm.nn.masked import MaskedLinear

__all__ = ["Attention", "DropoutAddNorm", "Int8Linear", "Int8TrainingLinear", "KVCache", "MaskedLinear"]
