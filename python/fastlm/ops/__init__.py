"""The ops: schema, fake kernel, autograd, dispatch and public function, one file per op."""

from fastlm.ops.attention import attention
from fastlm.ops.dropout_add_norm import dropout_add_norm, norm
from fastlm.ops.int8_matmul import int8_matmul
from fastlm.ops.masked_adamw import masked_adamw_
from fastlm.ops.prune_mask import apply_mask_, bool_to_mask, mask_and, mask_count, mask_to_bool, prune_mask
from fastlm.ops.prune_mask_parts import Part, prune_mask_parts
from fastlm.ops.quantize_int8 import quantize_int8
from fastlm.ops.rotary import rotary

__all__ = [
    "Part",
    "apply_mask_",
    "attention",
    "bool_to_mask",
    "dropout_add_norm",
    "int8_matmul",
    "mask_and",
    "mask_count",
    "mask_to_bool",
    "masked_adamw_",
    "norm",
    "prune_mask",
    "prune_mask_parts",
    "quantize_int8",
    "rotary",
]
