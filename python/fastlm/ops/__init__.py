"""The ops: schema, fake kernel, autograd, dispatch and public function, one file per op."""

from fastlm.ops.attention import attention
from fastlm.ops.dropout_add_norm import dropout_add_norm, norm
from fastlm.ops.rotary import rotary

__all__ = ["attention", "dropout_add_norm", "norm", "rotary"]
