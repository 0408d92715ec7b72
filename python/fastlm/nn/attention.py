"""The module over ``ops.attention``: projections, rotary positions, norms of queries and keys, packing, and a cache.

Shapes: B batch, L positions, T packed tokens, W width, H query heads, G key/value heads, D head size, R <= D channels turned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastlm import ops, rng
from fastlm._torch import assert_async
from fastlm.ops._library import autocast_dtype, check_p

Rope = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of what was read, in memory of fixed size: k, v [B, G, size, D], and seqlens int32 [B] of them valid.

    ``Attention.new_cache`` makes one per layer. ``forward`` writes behind the valid part and moves ``seqlens`` on the
    device, so one captured CUDA graph or one compiled graph decodes any number of tokens. ``reset()`` empties it.
    """

    def __init__(self, k: Tensor, v: Tensor, seqlens: Tensor) -> None:
        self.k, self.v, self.seqlens = k, v, seqlens

    @property
    def size(self) -> int:
        return self.k.shape[2]

    def reset(self) -> None:
        """Forgets everything, in place."""
        self.seqlens.zero_()

    def append(self, k: Tensor, v: Tensor) -> Tensor:
        """Writes k, v [B, G, L, D], of the cache's dtype, behind the valid part; returns int32 [B], where each row now ends.

        ``seqlens`` is not moved. What does not fit raises ValueError on a CPU, and RuntimeError when compiled; on a GPU,
        where looking would wait for the device, it goes to the last place and never outside: the last position then
        holds what came last, and the caller must count.
        """
        length = k.shape[2]
        if self.seqlens.device.type == "cpu" and torch.compiler.is_compiling():
            fits = (self.seqlens <= self.size - length).all()
            assert_async(fits, "KVCache: what is read does not fit; make it larger or reset() it")
        elif self.seqlens.device.type == "cpu":
            longest = int(self.seqlens.max()) if self.seqlens.numel() else 0
            if longest + length > self.size:
                raise ValueError(
                    f"KVCache: {longest} of {self.size} positions are taken and {length} more do not fit; make it "
                    f"larger (new_cache(batch, size)) or reset() it"
                )
        place = self.seqlens.long().unsqueeze(1) + torch.arange(length, device=k.device)
        index = place.clamp(max=self.size - 1)[:, None, :, None].expand(k.shape)
        self.k.scatter_(2, index, k)
        self.v.scatter_(2, index, v)
        return (self.seqlens + length).clamp(max=self.size)


class Attention(nn.Module):
    """Self-attention with one kernel for everything between its two projections.

    Args:
        width: W, of the input and output.
        heads: H, of the queries.
        kv_heads: G, of the keys and values, a divisor of heads; None: as many.
        head_size: D; None: width / heads.
        bias: whether the projections have one.
        dropout: of the attention probabilities, in training, 0 <= dropout < 1.
        causal: whether a position sees only itself and what stands before it.
        window: (left, right), how far a position sees, inclusive, -1 unlimited; None: everything.
        softcap: if positive, scores become softcap * tanh(score / softcap).
        scale: of the scores; None: 1 / sqrt(D).
        alibi: linear biases of the distance (Press et al. 2022), with the slopes of that paper.
        rotary: base of the rotary positions (10000.0 in Su et al. 2021); None: no rotary positions.
        rotary_size: R, how many channels of a head are turned, even; None: all.
        interleaved: whether rotary pairs are neighbours (GPT-J) or halves of the head (Llama).
        qk_norm: RMSNorm of each query and key head before they are turned.
        eps: of those norms.
        device, dtype: of the parameters.

    Parameters: qkv.weight [(H + 2 G) D, W], out.weight [W, H D], their biases, and with qk_norm q_norm and k_norm [D].
    ``fastlm.rng.set(model, ...)`` fixes its dropout masks; without it they come from torch's default generator.

    Raises ValueError or TypeError for sizes that do not fit, naming the argument.
    """

    _fastlm_draws = 1
    _fastlm_places = None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_size: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        alibi: bool = False,
        rotary: float | None = None,
        rotary_size: int | None = None,
        interleaved: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"Attention: kv_heads is {kv_heads}; it must divide heads, {heads}")
        if head_size is None:
            if width % heads:
                raise ValueError(
                    f"Attention: width is {width}; it must be a multiple of heads, {heads}, or give head_size"
                )
            head_size = width // heads
        rotary_size = head_size if rotary_size is None else rotary_size
        if rotary is not None and not (0 < rotary_size <= head_size and rotary_size % 2 == 0):
            raise ValueError(
                f"Attention: rotary_size is {rotary_size}; it must be even, positive and at most the head size, {head_size}"
            )
        check_p(dropout, "Attention", "dropout")
        self.width, self.heads, self.kv_heads, self.head_size = width, heads, kv_heads, head_size
        self.dropout, self.causal, self.window, self.softcap, self.scale = dropout, causal, window, softcap, scale
        self.alibi, self.rotary, self.rotary_size, self.interleaved, self.eps = (
            alibi,
            rotary,
            rotary_size,
            interleaved,
            eps,
        )
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_size, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(heads * head_size, width, bias=bias, device=device, dtype=dtype)
        self.q_norm = nn.Parameter(torch.ones(head_size, device=device, dtype=dtype)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(head_size, device=device, dtype=dtype)) if qk_norm else None

    def new_cache(self, batch: int, size: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``size`` positions, on the parameters' device.

        ``dtype`` None: what forward attends in here, the autocast dtype under autocast, else the parameters'.
        """
        weight = self.qkv.weight
        shape = (batch, self.kv_heads, size, self.head_size)
        k = torch.zeros(shape, device=weight.device, dtype=dtype or _computed(weight))
        return KVCache(k, torch.zeros_like(k), torch.zeros(batch, dtype=torch.int32, device=weight.device))

    def rope(self, positions: Tensor) -> Rope:
        """cos and sin, float32 [positions, R / 2], of ``positions``, a vector of numbers: one table serves all layers."""
        if self.rotary is None:
            raise ValueError("Attention: rope was asked of a module without rotary positions (rotary=None)")
        size = self.rotary_size
        channel = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
        angle = torch.outer(positions.float(), self.rotary ** (-channel / size))
        return angle.cos(), angle.sin()

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        positions: Tensor | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """Attends within x.

        Args:
            x: [B, L, W], or with cu_seqlens [T, W].
            mask: added to the scores, or bool, True where a query may attend; broadcastable to [B, H, L, keys].
            cache: what was read before; L more positions are written into it. Needs causal=True and no gradients.
            lengths: with a cache, int [B]: how many of the L positions are text; the next call overwrites the rest.
            cu_seqlens: int32 [sequences + 1], where the sequences packed into x begin and end.
            max_seqlen: none of them is longer; None: T.
            positions: int64 [B, L] or [B], of rows or of the first one (packed: [T]), for rotary; None: counted from
                what is in the cache, or from each sequence's beginning.
            rope: tables that ``rope()`` made, with a row for every position; None: made here.

        Returns:
            x's shape, in the projection's dtype.

        Raises:
            TypeError: a cache of another dtype than attention runs in.
            ValueError: arguments that do not go together or do not fit, named.
            RuntimeError: a cache while gradients are recorded.
        """
        packed = cu_seqlens is not None
        if x.dim() != (2 if packed else 3) or x.shape[-1] != self.width:
            wanted = f"[T, {self.width}] with cu_seqlens" if packed else f"[B, L, {self.width}]"
            raise ValueError(f"Attention: x has shape {list(x.shape)}; it must be {wanted}")
        if packed and mask is not None:
            raise ValueError(
                "Attention: mask was given with cu_seqlens; packed sequences take causal, window and alibi"
            )
        if lengths is not None and cache is None:
            raise ValueError("Attention: lengths was given without cache, whose valid part it counts")
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (sum(heads), self.head_size)).split(heads, dim=-2)
        if self.q_norm is not None:
            q = ops.norm(q, self.q_norm, norm="rms", eps=self.eps)
            k = ops.norm(k, self.k_norm, norm="rms", eps=self.eps)
        if not packed:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            self._check(cache, q, k, packed)
        if self.rotary is not None:
            q, k = self._turn(q, k, cache, cu_seqlens, positions, rope)
        seqlens_k = None
        if cache is not None:
            seqlens_k = cache.append(k.to(cache.k.dtype), v.to(cache.v.dtype))
            k, v = cache.k, cache.v
        p = self.dropout if self.training else 0.0
        seed = offset = None
        if p > 0:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            seed, ids = rng.batch(self, 0, sequences, x.device)
            offset = None if ids is None else (ids, getattr(self, rng.FIRST_HEAD, 0), None, None)
        y = ops.attention(
            q, k, v, causal=self.causal, window=self.window, bias=mask, softcap=self.softcap, scale=self.scale,
            alibi_slopes=alibi_slopes(self.heads, x.device) if self.alibi else None, dropout_p=p, seed=seed,
            offset=offset, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            seqlens_k=seqlens_k,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        if cache is not None:
            cache.seqlens.add_(x.shape[1] if lengths is None else lengths).clamp_(max=cache.size)
        return self.out((y if packed else y.transpose(1, 2)).flatten(-2))

    def _turn(
        self,
        q: Tensor,
        k: Tensor,
        cache: KVCache | None,
        cu: Tensor | None,
        positions: Tensor | None,
        rope: Rope | None,
    ) -> tuple[Tensor, Tensor]:
        length = q.shape[0] if cu is not None else q.shape[2]
        if positions is None and cache is not None:
            positions = cache.seqlens.long()
        elif positions is None and cu is not None:
            token = torch.arange(length, device=q.device)
            positions = token - cu.long()[torch.searchsorted(cu[1:].long(), token, right=True)]
        if rope is None:
            # A table of just the rows that are needed, so there is no largest position.
            rows = torch.arange(length, device=q.device) if positions is None else positions
            if positions is not None and cu is None and positions.dim() < 2:
                rows = positions.reshape(-1, 1) + torch.arange(length, device=q.device)
            rope = self.rope(rows.flatten())
            if positions is not None:
                positions = torch.arange(rows.numel(), device=q.device).view(rows.shape)
                if cu is None and positions.shape[0] != q.shape[0]:
                    positions = positions.expand(q.shape[0], -1)
        turn = dict(positions=positions, interleaved=self.interleaved)
        return ops.rotary(q, *rope, **turn), ops.rotary(k, *rope, **turn)  # type: ignore[arg-type]

    def _check(self, cache: KVCache, q: Tensor, k: Tensor, packed: bool) -> None:
        if packed:
            raise ValueError("Attention: cache was given with cu_seqlens; a cache takes [B, L, W]")
        if not self.causal:
            raise ValueError("Attention: cache was given to a module with causal=False; what was read could not change")
        if torch.is_grad_enabled() and k.requires_grad:
            raise RuntimeError("Attention: a cache keeps no gradients; call it within torch.no_grad()")
        if cache.k.shape[:2] != k.shape[:2] or cache.k.shape[3] != k.shape[3]:
            wanted = [*k.shape[:2], "size", k.shape[3]]
            raise ValueError(f"Attention: cache.k has shape {list(cache.k.shape)}; it must be {wanted}")
        dtype = _computed(q)
        if not cache.k.dtype == cache.v.dtype == dtype:  # else the whole cache would be converted for each token
            raise TypeError(
                f"Attention: cache.k is {cache.k.dtype} and cache.v {cache.v.dtype}; they must be {dtype}, in which "
                f"attention runs here (new_cache under the same autocast, or with dtype, makes such a cache)"
            )

    def extra_repr(self) -> str:
        parts = [f"{self.width}, heads={self.heads}"]
        plain = dict(kv_heads=self.heads, dropout=0.0, causal=False, window=None, softcap=0.0, alibi=False, rotary=None)
        parts += [f"{name}={getattr(self, name)}" for name, value in plain.items() if getattr(self, name) != value]
        return ", ".join(parts)


def _computed(x: Tensor) -> torch.dtype:
    """The dtype in which ``ops.attention`` takes ``x``."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """The slopes of Press et al. 2022, float32 [heads]: 2^(-8 i / n), n the power of two at or below heads; then, as if
    there were 2 n, every other one."""
    n = 2 ** int(math.log2(heads))
    whole = torch.arange(1, n + 1, device=device, dtype=torch.float32) * (-8.0 / n)
    between = (torch.arange(heads - n, device=device, dtype=torch.float32) * 2 + 1) * (-4.0 / n)
    return torch.exp2(torch.cat((whole, between)))
