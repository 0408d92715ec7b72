"""Smaller models out of trained ones: layers in int8 (``quantize``, ``smooth``), weights that stay zero (``prune``), parts that
go whole (``shrink``)."""

from fastlm.compress.held import Held, held
from fastlm.compress.masks import Masks, attach, floats, hold, masked, masks, split
from fastlm.compress.outliers import outlier_columns
from fastlm.compress.prune import Pruned, prune, unprune
from fastlm.compress.quantize import Converted, convert, plan, restore
from fastlm.compress.semi_structured import check_24, pack_24, unpack_24
from fastlm.compress.shrink import KINDS, Shrunk, shrink
from fastlm.compress.smooth import Smoothed, smooth
from fastlm.compress.sparse_kernels import Sparse24, dense_24, sparse_24

__all__ = [
    "KINDS",
    "Converted",
    "Held",
    "Masks",
    "Pruned",
    "Shrunk",
    "Smoothed",
    "Sparse24",
    "attach",
    "check_24",
    "convert",
    "dense_24",
    "floats",
    "held",
    "hold",
    "masked",
    "masks",
    "outlier_columns",
    "pack_24",
    "plan",
    "prune",
    "restore",
    "shrink",
    "smooth",
    "sparse_24",
    "split",
    "unpack_24",
    "unprune",
]
