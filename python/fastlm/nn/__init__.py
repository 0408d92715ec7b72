"""Modules over the ops, for models written with fastlm from the start (``fastlm.swap`` is for models that exist)."""

from fastlm.nn.attention import Attention, KVCache
from fastlm.nn.dropout_add_norm import DropoutAddNorm

__all__ = ["Attention", "DropoutAddNorm", "KVCache"]
