"""Rules: ``nn.MultiheadAttention`` by ``ops.attention``, and ``nn.TransformerEncoderLayer`` without its inference path.

Served is what returns no weights (``need_weights=False``): self- and cross-attention, batch first or second or none,
boolean and float masks, padding, dropout. Weights, ``bias_k``, ``add_zero_attn``, nested tensors and other subclasses of
Tensor are PyTorch's own, which is said once. A query that may attend to nothing gives zeros before the output projection.

In evaluation without gradients ``nn.TransformerEncoderLayer`` calls one fused function of PyTorch's that passes all its
modules by, swapped or not. Here its parts run as in training. With padding, ``nn.TransformerEncoder`` then does not put
zeros where that function would; what the mask hides was never defined.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.swap.attention import attend, unserved
from fastlm.swap.rules import Facts, Reason, Rewrite, Rule
from fastlm.swap.seen import stepped_back
from fastlm.swap.tensors import plain


class MultiheadForward(nn.MultiheadAttention):
    """``nn.MultiheadAttention.forward`` by the op; every attribute is read at each call."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        why = _refusal(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if why:
            stepped_back(self, f"is PyTorch's own: {why}")
            return super().forward(
                query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        q, k, v = _project(self, query, key, value)
        batched, first = query.dim() == 3, self.batch_first

        def heads(x: Tensor) -> Tensor:  # to [B, H, L, D]
            x = x.unflatten(-1, (self.num_heads, self.head_dim))
            if not batched:
                return x.transpose(0, 1).unsqueeze(0)
            return x.transpose(1, 2) if first else x.permute(1, 2, 0, 3)

        # As PyTorch has it: with the hint alone the mask is not looked at; with padding the hint is not.
        causal = is_causal and key_padding_mask is None
        bias = None if causal else _bias(self, attn_mask, key_padding_mask, batched)
        p = self.dropout if self.training else 0.0
        out = attend(
            self, 0, heads(q), heads(k), heads(v), causal="upper_left" if causal else False, bias=bias, p=p
        )  # fmt: skip
        if not batched:
            out = out.squeeze(0).transpose(0, 1)
        else:
            out = out.transpose(1, 2) if first else out.permute(2, 0, 1, 3)
        return F.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias), None


def _refusal(
    mha: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    need_weights: bool,
    mask: Tensor | None,
    is_causal: bool,
) -> str:
    """Why PyTorch's own forward must serve this call (or raise its error), or ""."""
    if need_weights:
        return "it was asked for attention weights (need_weights=True), which the op does not give"
    if mha.bias_k is not None or mha.bias_v is not None or mha.add_zero_attn:
        return "it adds keys of its own (add_bias_kv or add_zero_attn)"
    if not 0 <= mha.dropout < 1:
        return f"its dropout is {mha.dropout}"
    inputs = (query, key, value)
    if not all(isinstance(t, Tensor) for t in inputs):
        return "it is being traced by torch.fx"
    given = [t for t in (*inputs, padding, mask) if t is not None]
    if torch.overrides.has_torch_function(given) or any(t.is_nested for t in given):
        return "it got nested tensors, or tensors of another class"
    weights = (mha.in_proj_weight, mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight, mha.out_proj.weight)
    if not plain(*inputs, *weights, mha.in_proj_bias, mha.out_proj.bias):
        return "it got tensors that are not floating"
    dim = query.dim()
    if dim not in (2, 3) or key.dim() != dim or value.dim() != dim or key.shape[:-1] != value.shape[:-1]:
        return f"it got shapes {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
    axis = 0 if dim == 2 or not mha.batch_first else 1
    batch = 1 if dim == 2 else query.shape[1 - axis]
    if dim == 3 and key.shape[1 - axis] != batch:
        return f"it got shapes {list(query.shape)} and {list(key.shape)}"
    lengths = (query.shape[axis], key.shape[axis])
    if mask is not None and mask.shape not in (lengths, (batch * mha.num_heads, *lengths)):
        return f"attn_mask has shape {list(mask.shape)}"
    if padding is not None and padding.shape != ((batch, lengths[1]) if dim == 3 else (lengths[1],)):
        return f"key_padding_mask has shape {list(padding.shape)}"
    if any(t is not None and t.dtype != torch.bool and not t.is_floating_point() for t in (mask, padding)):
        return "a mask is neither boolean nor floating"
    if is_causal and mask is None:
        return "it got is_causal without attn_mask"
    return unserved(query, (mha.head_dim, mha.head_dim), padding if mask is None else mask)


def _project(mha: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bias = mha.in_proj_bias
    if mha._qkv_same_embed_dim and query is key and key is value:
        return F.linear(query, mha.in_proj_weight, bias).chunk(3, -1)  # type: ignore[return-value]
    if mha._qkv_same_embed_dim:
        weights = mha.in_proj_weight.chunk(3)
    else:
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))  # type: ignore[return-value]


def _bias(mha: nn.MultiheadAttention, mask: Tensor | None, padding: Tensor | None, batched: bool) -> Tensor | None:
    """Both masks as the op's bias; PyTorch's boolean ones say where not to attend."""
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, mha.num_heads))
    if padding is not None:
        padding = padding[:, None, None, :] if batched else padding
    if mask is None or padding is None:
        one = padding if mask is None else mask
        return ~one if one is not None and one.dtype == torch.bool else one
    if mask.dtype == padding.dtype == torch.bool:
        return ~(mask | padding)
    if mask.dtype == torch.bool:
        mask, padding = padding, mask
    return mask.masked_fill(padding, -torch.inf) if padding.dtype == torch.bool else mask + padding


class MultiheadRule(Rule):
    name = "multihead"
    mixin = MultiheadForward
    draws = 1

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        if not isinstance(module, nn.MultiheadAttention):
            return None
        if type(module).forward is not nn.MultiheadAttention.forward:
            return Reason("a MultiheadAttention with a forward of its own")
        if module.bias_k is not None or module.add_zero_attn:
            return Reason("it adds keys of its own (add_bias_kv or add_zero_attn): PyTorch's own runs")
        return self.describe(module, ())

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        assert isinstance(module, nn.MultiheadAttention)
        what = "attention (where need_weights=False; else PyTorch's own)"
        return Rewrite(self.name, facts, what, "attention", (1, module.num_heads, 16, module.head_dim), 3)


class EncoderLayer:
    """Reads as a layer whose activation the inference path does not know."""

    @property
    def activation_relu_or_gelu(self) -> int:
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class EncoderLayerRule(Rule):
    name = "encoder_layer"
    mixin = EncoderLayer

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        if not isinstance(module, nn.TransformerEncoderLayer):
            return None
        if type(module).forward is not nn.TransformerEncoderLayer.forward:
            return None  # it decides itself what it calls
        return self.describe(module, ())

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        assert isinstance(module, nn.TransformerEncoderLayer)
        what = "its parts in evaluation too, not PyTorch's fused inference path"
        heads, size = module.self_attn.num_heads, module.self_attn.head_dim
        return Rewrite(self.name, facts, what, "attention", (1, heads, 16, size), 3)
