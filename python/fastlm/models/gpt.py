"""A readable GPT in plain PyTorch: GPT-2 style, and by configuration Llama style (RMSNorm, rotary, SwiGLU, grouped heads).

No fastlm op is named here: `fastlm.swap(model)` finds what it can replace by structure, and the parameters stay these.
Shapes: B batch, L positions, C width, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from fastlm.models.loss import document_scores, linear_cross_entropy, linear_token_losses, preference


@dataclass(frozen=True)
class GPTConfig:
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    vocab: int = 256
    kv_heads: int = 0  # 0: as many as heads
    hidden: int = 0  # width of the MLP; 0: 4 x width, or 8/3 x width rounded up to 32 with SwiGLU
    dropout: float = 0.0
    norm: str = "layer"  # "layer" | "rms"
    position: str = "learned"  # "learned" | "rotary"
    mlp: str = "gelu"  # "gelu" | "swiglu"
    bias: bool = True
    tied: bool = True
    eps: float = 1e-5
    rope_base: float = 10000.0
    head_size: int = 0  # width of a head; 0: width / heads
    shapes: tuple[tuple[int, int, int], ...] = ()  # of each layer heads, kv_heads and hidden, where they differ

    def __post_init__(self) -> None:
        if self.shapes:
            self._widest()
        kv = self.kv_heads or self.heads
        if not self.head_size and self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}; it is {self.width}")
        if self.heads % kv and not self.shapes:
            raise ValueError(f"heads must be a multiple of kv_heads {kv}; it is {self.heads}")
        if self.position == "rotary" and self.size % 2:
            what = "head_size" if self.head_size else f"width {self.width} / heads {self.heads}"
            raise ValueError(f"{what} must be even for rotary positions; it is {self.size}")
        if self.head_size * self.heads == self.width:  # one model has one configuration
            object.__setattr__(self, "head_size", 0)

    def _widest(self) -> None:
        """heads, kv_heads and hidden of a model whose layers differ are the largest; layers that are alike have no shapes."""
        shapes = tuple((int(h), int(kv), int(n)) for h, kv, n in self.shapes)
        if len(shapes) != self.layers:
            raise ValueError(f"shapes must be of {self.layers} layers; they are of {len(shapes)}")
        for i, (heads, kv, hidden) in enumerate(shapes):
            if min(heads, kv, hidden) < 1 or heads % kv:
                raise ValueError(
                    f"shapes must have three numbers above 0 of each layer, the first a multiple of the second; "
                    f"layer {i} has {heads}/{kv}/{hidden}"
                )
        heads, kv, hidden = map(max, zip(*shapes, strict=True))
        same = {"head_size": self.size, "heads": heads, "kv_heads": kv if self.kv_heads or kv != heads else 0}
        same |= {"hidden": hidden, "shapes": shapes if len(set(shapes)) > 1 else ()}
        for name, value in same.items():
            object.__setattr__(self, name, value)

    def layer(self, number: int) -> GPTConfig:
        """The configuration of one layer's shape."""
        if not self.shapes:
            return self
        heads, kv, hidden = self.shapes[number]
        return replace(self, heads=heads, kv_heads=kv, hidden=hidden, head_size=self.size, shapes=())

    @property
    def size(self) -> int:
        """Width of a head."""
        return self.head_size or self.width // self.heads

    @property
    def mlp_width(self) -> int:
        if self.hidden:
            return self.hidden
        return 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // (3 * 32)) * 32


STYLES: dict[str, dict[str, object]] = {
    "gpt2": {"norm": "layer", "position": "learned", "mlp": "gelu", "bias": True},
    "llama": {"norm": "rms", "position": "rotary", "mlp": "swiglu", "bias": False},
}
SIZES: dict[str, GPTConfig] = {
    "nano": GPTConfig(context=128),
    "small": GPTConfig(layers=6, heads=6, width=384, context=256),
    "124M": GPTConfig(layers=12, heads=12, width=768, context=1024),
    "350M": GPTConfig(layers=24, heads=16, width=1024, context=1024),
    "1B": GPTConfig(layers=16, heads=32, kv_heads=8, width=2048, hidden=8192, context=2048, rope_base=500000.0),
    "7B": GPTConfig(layers=32, heads=32, width=4096, hidden=11008, context=4096, tied=False),
}


def named(size: str, style: str = "gpt2", **changes: object) -> GPTConfig:
    """The configuration of a named size in a style, with the given fields changed: named("124M", "llama", vocab=50304)."""
    return replace(SIZES[size], **{**STYLES[style], **changes})  # type: ignore[arg-type]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Cache:
    """Keys and values of the positions already read, for generating one token at a time."""

    def __init__(self, layers: int, size: int) -> None:
        self.size, self.length = size, 0
        self.k: list[Tensor | None] = [None] * layers
        self.v: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        if self.k[layer] is None:
            self.k[layer] = k.new_empty(k.shape[0], k.shape[1], self.size, k.shape[3])
            self.v[layer] = v.new_empty(v.shape[0], v.shape[1], self.size, v.shape[3])
        keys, values = self.k[layer], self.v[layer]
        assert keys is not None
        assert values is not None
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), halves paired as in Llama: (x1, x2) turned by the angle of the position."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.size = layer, c.heads, c.kv_heads or c.heads, c.size
        self.dropout = c.dropout
        self.qkv = nn.Linear(c.width, (self.heads + 2 * self.kv_heads) * self.size, bias=c.bias)
        self.out = nn.Linear(self.heads * self.size, c.width, bias=c.bias)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        B, L, _ = x.shape
        qkv = self.qkv(x).view(B, L, self.heads + 2 * self.kv_heads, self.size).transpose(1, 2)
        q_BHLD, k_BGLD, v_BGLD = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if rope is not None:
            q_BHLD, k_BGLD = rotate(q_BHLD, *rope), rotate(k_BGLD, *rope)
        if cache is not None:
            k_BGLD, v_BGLD = cache.append(self.layer, k_BGLD, v_BGLD)
        y = F.scaled_dot_product_attention(
            q_BHLD,
            k_BGLD,
            v_BGLD,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None
            and L > 1,  # one new token sees the whole cache; a longer text starts with an empty one
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out(y.transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.gated = c.mlp == "swiglu"
        self.up = nn.Linear(c.width, c.mlp_width * (2 if self.gated else 1), bias=c.bias)
        self.down = nn.Linear(c.mlp_width, c.width, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        return self.down(F.gelu(h, approximate="tanh"))


def make_norm(c: GPTConfig) -> nn.Module:
    return RMSNorm(c.width, c.eps) if c.norm == "rms" else nn.LayerNorm(c.width, eps=c.eps, bias=c.bias)


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop1 = make_norm(c), Attention(c, layer), nn.Dropout(c.dropout)
        self.norm2, self.mlp, self.drop2 = make_norm(c), MLP(c), nn.Dropout(c.dropout)

    def forward(self, x: Tensor, *around: Any) -> Tensor:
        """`around`: rope, cache and mask, as Attention takes them."""
        x = x + self.drop1(self.attn(self.norm1(x), *around))
        x = x + self.drop2(self.mlp(self.norm2(x)))
        return x


def packed(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows that hold several documents, [B, L] numbers that change from one to the next: positions within each
    document [B, L], and the mask [B, 1, L, L] by which a position sees its own document up to itself."""
    at = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    start = torch.where(begins, at, 0).cummax(1).values
    mask = (start[:, :, None] == start[:, None, :]) & (at[:, None] >= at)
    return at - start, mask[:, None]


class GPT(nn.Module):
    """`model(tokens)` gives logits [B, L, V]; `model(tokens, targets)` the summed loss in nats, without holding them.

    `documents` [B, L], numbers that change where another document begins, keeps packed documents apart: attention does
    not cross their borders and positions start anew. With `reference` [B, L], the log-probability under another model of
    document j at [:, j], rows 2i and 2i + 1 hold pairs of answers, and the loss is that of `loss.preference`; with `wins` also
    how many pairs the model has the right way round, as a second number. `scores` asks for the log-probabilities [B, L]
    themselves, `each` for the loss of each target [B, L], 0 where it is -100.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.recompute = (
            "none"  # "full": each block's activations are computed again in the backward; "half": every other
        )
        self.contexts = noop_context_fn  # around a block that is recomputed, and its recomputation
        self.embed = nn.Embedding(c.vocab, c.width)
        self.place = nn.Embedding(c.context, c.width) if c.position == "learned" else None
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c.layer(layer), layer) for layer in range(c.layers))
        self.norm = make_norm(c)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        self.reset()
        if c.tied:
            self.head.weight = self.embed.weight

    def reset(self) -> None:
        """GPT-2's initialisation: normal 0.02, the two matrices that write to the residual stream / sqrt(2 layers)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                deep = name.endswith(("attn.out", "mlp.down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.layers) if deep else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin [L, D/2] (or [B, 1, L, D/2] of positions [B, L]) of the angles position x base^(-2i/D), float32."""
        if self.place is not None:
            return None
        size = self.config.size
        rate = self.config.rope_base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
        angle = positions[..., None].float() * rate
        if positions.dim() == 2:
            angle = angle[:, None]  # the same for all heads
        return angle.cos(), angle.sin()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        reference: Tensor | None = None,
        *,
        cache: Cache | None = None,
        smoothing: float = 0.0,
        z_loss: float = 0.0,
        beta: float = 0.1,
        normalized: bool = False,
        wins: bool = False,
        scores: bool = False,
        each: bool = False,
    ) -> Tensor:
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.context and self.place is not None:
            raise ValueError(f"{end} positions do not fit the context of {self.config.context}")
        positions, mask = torch.arange(start, end, device=tokens.device), None
        if documents is not None:
            if cache is not None:
                raise ValueError("documents and cache exclude each other: packed rows are for training and evaluation")
            positions, mask = packed(documents)
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place(positions)
        x = self.drop(x)
        rope = self.rope(positions)
        for i, block in enumerate(self.blocks):
            if self.training and (self.recompute == "full" or (self.recompute == "half" and i % 2 == 0)):
                x = checkpoint(block, x, rope, None, mask, use_reentrant=False, context_fn=self.contexts)
            else:
                x = block(x, rope, cache, mask)
        if cache is not None:
            cache.length = end
        x = self.norm(x)
        if targets is None:
            return self.head(x)
        if each:
            return self.token_losses(x, targets)
        if documents is not None and scores:
            return document_scores(self.token_losses(x, targets), targets, documents)[0]
        if documents is not None and reference is not None:
            return self.preference(x, targets, documents, reference, wins, beta, smoothing, normalized)
        return self.loss(x, targets, smoothing, z_loss)

    def loss(self, x: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
        """Summed loss of the last hidden states [B, L, C]."""
        return linear_cross_entropy(x, self.head.weight, targets, smoothing=smoothing, z_loss=z_loss)

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token [B, L] of the last hidden states [B, L, C]."""
        return linear_token_losses(x, self.head.weight, targets)

    def preference(
        self, x: Tensor, targets: Tensor, documents: Tensor, reference: Tensor, wins: bool, *how: float
    ) -> Tensor:
        """Summed loss of pairs of the last hidden states [B, L, C]; `how`: beta, smoothing, normalized."""
        found = document_scores(self.token_losses(x, targets), targets, documents)
        loss, won = preference(*found, reference, *how)  # type: ignore[arg-type]
        return torch.stack((loss, won.to(loss.dtype))) if wins else loss

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, sample) -> Tensor:
        """Append `count` tokens to [B, L]; `sample` turns logits [B, V] into tokens [B]."""
        reader = Reader(self)
        for _ in range(count):
            tokens = torch.cat((tokens, sample(reader.next(tokens))[:, None]), dim=1)
        return tokens


class Reader:
    """Reads a text that grows, each token once: `next(tokens)` gives the logits [B, V] that follow [B, L].

    The cache starts anew when it is full, with the last half of the context.
    """

    def __init__(self, model: GPT) -> None:
        self.model, self.seen = model, 0
        self.cache = Cache(model.config.layers, model.config.context)

    def next(self, tokens: Tensor) -> Tensor:
        context = self.model.config.context
        fresh = tokens[:, self.seen :] if self.seen else tokens[:, -context:]
        if self.cache.length + fresh.shape[1] > context:
            self.cache, fresh = Cache(self.model.config.layers, context), tokens[:, -max(context // 2, 1) :]
        self.seen = tokens.shape[1]
        return self.model(fresh, cache=self.cache)[:, -1]
