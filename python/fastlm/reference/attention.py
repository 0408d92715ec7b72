"""Attention in plain PyTorch, forward and backward written out: the definition of the op. It materialises the scores.

    s = scale * q k^T;  softcap > 0: s = softcap * tanh(s / softcap);  s += bias - slope * |i - j|;  hidden keys: -inf
    lse = log(exp(sink) + sum(exp(s)));  out = (exp(s - lse) * keep / keep_probability) v

A sink is a logit of each head that takes probability and gives no value; without sinks exp(sink) is 0.

Query i stands at position q0 + i + shift and key j at k0 + j. shift = (valid keys) - (queries) aligns the lower right
corner (causal 0 and 1, as flash-attention from 2.1 on); it is 0 for causal 2 and 3. A key is visible if it is valid and
left and right of the query by no more than the window and causality allow. Rows that see nothing: out 0, lse -inf, or
the sink where there is one.

Forward returns `rest` beside lse: what rounding to lse's dtype took from it. A row whose scores are all near -3e38 has
an lse of which nothing tells the number of its keys, and exp(s - lse) would be 1 for each: a backward that starts from
saved statistics takes exp(s - lse - rest).

Arithmetic is float32, or float64 for float64 inputs. Slow, and right on every device, without reading from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.backend import YES, Support
from fastlm.reference import philox


class Options(NamedTuple):
    """The schema's options, in its order: what follows q, k and v forward, and lse backward."""

    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    seed: Tensor | None = None
    batch_ids: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqlens_k: Tensor | None = None
    sinks: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    causal: int = 0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    scale: float | None = None
    p: float = 0.0
    head0: int = 0
    q0: int = 0
    k0: int = 0

    @classmethod
    def of(cls, args: Sequence[Any]) -> Options:
        """The first of ``args``."""
        return cls(*args[: len(cls._fields)])


def serves_forward(*args: object) -> Support:
    """The reference serves every call."""
    return YES


serves_backward = serves_forward


def dropout_mask(
    shape: tuple[int, int, int, int],
    seed: Tensor,
    p: float,
    batch_ids: Tensor | None = None,
    head0: int = 0,
    q0: int = 0,
    k0: int = 0,
) -> Tensor:
    """The keep-mask, bool [B, Hq, Lq, Lk]: counter (key // 8, query, head, batch), positions within the sequence."""
    batch, heads, queries, keys = shape
    device = seed.device
    first = k0 // 8
    chunk = torch.arange(first, (k0 + keys + 7) // 8, device=device)
    query = torch.arange(q0, q0 + queries, device=device).view(-1, 1)
    head = torch.arange(head0, head0 + heads, device=device).view(-1, 1, 1)
    ids = torch.arange(batch, device=device) if batch_ids is None else batch_ids.long() & 0xFFFFFFFF
    mask = philox.keep_mask(
        (chunk, query, head, ids.view(-1, 1, 1, 1)), philox.key_of(seed, "attention"), p, k0 + keys - 8 * first
    )
    return mask[..., k0 - 8 * first :]


class _Padding(NamedTuple):
    """How packed tokens map to rows of [sequences, longest] and back."""

    token: Tensor  # [sequences, longest]: the token at each place, some token where there is none
    valid: Tensor  # [sequences, longest]
    sequence: Tensor  # [T]: each token's sequence and place
    place: Tensor
    used: Tensor  # [T]: False for tokens behind the last sequence
    lengths: Tensor  # [sequences]

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, longest: int) -> _Padding:
        cu = cu_seqlens.long().clamp(0, tokens)
        lengths = (cu[1:] - cu[:-1]).clamp(min=0)
        if cu.device.type == "cpu":
            longest = int(lengths.max())
        longest = max(min(longest, tokens), min(tokens, 1))
        place = torch.arange(longest, device=cu.device)
        number = torch.arange(tokens, device=cu.device)
        sequence = torch.searchsorted(cu[1:].contiguous(), number, right=True).clamp(max=len(lengths) - 1)
        return cls(
            (cu[:-1, None] + place).clamp(max=max(tokens - 1, 0)),
            place < lengths[:, None],
            sequence,
            (number - cu[sequence]).clamp(max=max(longest - 1, 0)),
            (number < cu[-1]) & (number - cu[sequence] < longest),
            lengths,
        )

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, D] to [sequences, H, longest, D], zeros where no token is."""
        return x[self.token].masked_fill(~self.valid[:, :, None, None], 0).transpose(1, 2)

    def pack(self, x: Tensor, empty: float = 0.0) -> Tensor:
        """[sequences, H, longest, D] to [T, H, D], ``empty`` for tokens of no sequence."""
        return x.transpose(1, 2)[self.sequence, self.place].masked_fill(~self.used[:, None, None], empty)


class _Call(NamedTuple):
    """The arguments that forward and backward share, dense: packed sequences have been padded."""

    bias: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    batch_ids: Tensor | None
    lengths_q: Tensor | None
    lengths_k: Tensor | None
    sinks: Tensor | None
    causal: int
    window_left: int
    window_right: int
    softcap: float
    scale: float
    p: float
    head0: int
    q0: int
    k0: int

    def position(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Distance i - j by positions, and visibility: int64 and bool [B or 1, 1, queries, keys]."""
        i = torch.arange(queries, device=device).view(-1, 1)
        j = torch.arange(keys, device=device)
        wide = lambda lengths, whole: whole if lengths is None else lengths.long().clamp(0, whole).view(-1, 1, 1, 1)
        valid_q, valid_k = wide(self.lengths_q, queries), wide(self.lengths_k, keys)
        shift = 0 if self.causal >= 2 else valid_k - valid_q
        distance = (self.q0 + i + shift) - (self.k0 + j)
        distance = distance.expand(torch.broadcast_shapes(distance.shape, (1, 1, queries, keys)))
        visible = (i < valid_q) & (j < valid_k) & torch.ones_like(distance, dtype=torch.bool)
        if self.causal in (1, 2):
            visible = visible & (distance >= 0)
        if self.window_left >= 0:
            visible = visible & (distance <= self.window_left)
        if self.window_right >= 0:
            visible = visible & (distance >= -self.window_right)
        return distance, visible

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The masked scores [B, Hq, queries, keys], and what softcap's backward needs: tanh, or an empty tensor."""
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        s = torch.matmul(_grouped(q, k), k.transpose(2, 3)).view(batch, heads, queries, keys) * self.scale
        tanh = s.new_empty(0)
        if self.softcap > 0:
            tanh = torch.tanh(s / self.softcap)
            s = self.softcap * tanh
        distance, visible = self.position(queries, keys, q.device)
        if self.bias is not None:
            if self.bias.dtype == torch.bool:
                visible = visible & self.bias
            else:
                s = s + self.bias.to(s.dtype)
        if self.alibi_slopes is not None:
            s = s - self.alibi_slopes.to(s.dtype).view(-1, heads, 1, 1) * distance.abs()
        return s.masked_fill(~visible, float("-inf")), tanh

    def with_sinks(self, s: Tensor) -> Tensor:
        """The scores with the sink of each head behind the last key."""
        if self.sinks is None:
            return s
        return torch.cat([s, self.sinks.to(s.dtype).view(-1, 1, 1).expand(*s.shape[:3], 1)], 3)

    def keep(self, s: Tensor) -> Tensor | None:
        """What probabilities are multiplied by: 0 or the inverse keep-probability; None without dropout."""
        if self.p == 0:
            return None
        assert self.seed is not None
        shape = (s.shape[0], s.shape[1], s.shape[2], s.shape[3])
        mask = dropout_mask(shape, self.seed, self.p, self.batch_ids, self.head0, self.q0, self.k0)
        return mask.to(s.dtype) * philox.keep_scale(self.p)

    def hide(self, x: Tensor) -> Tensor:
        """Zeros for keys behind the valid part: what a cache holds there must not leak, 0 * NaN being NaN."""
        if self.lengths_k is None:
            return x
        valid = torch.arange(x.shape[2], device=x.device) < self.lengths_k.view(-1, 1)
        return x.masked_fill(~valid[:, None, :, None], 0)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """[B, Hq, L, D] as [B, Hkv, Hq / Hkv * L, D]: each key head meets the queries of its group in one matmul."""
    batch, heads, length, last = q.shape
    return q.reshape(batch, k.shape[1], heads // k.shape[1] * length, last)


def _probabilities(s: Tensor) -> Tensor:
    """The softmax of each row, zeros in rows that see nothing. exp(s - lse) is less exact where lse is huge."""
    if s.shape[3] == 0:
        return s
    return torch.softmax(s, 3).masked_fill((s == float("-inf")).all(3, keepdim=True), 0.0)


def _log_sum(s: Tensor) -> tuple[Tensor, Tensor]:
    """lse of each row of scores, and what rounding took from it."""
    if s.shape[3] == 0:
        lse = s.new_full(s.shape[:3], float("-inf"))
        return lse, torch.zeros_like(lse)
    lse = torch.logsumexp(s, 3)
    top = s.amax(3)
    more = (s - top.masked_fill(~top.isfinite(), 0.0).unsqueeze(3)).exp().sum(3).log()
    rest = more - (lse - top)
    return lse, rest.masked_fill(~(lse.isfinite() & rest.isfinite()), 0.0)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    k, v = call.hide(k), call.hide(v)
    s, _ = call.scores(q, k)
    whole = call.with_sinks(s)
    lse, rest = _log_sum(whole)
    probabilities = _probabilities(whole)[..., : s.shape[3]]
    keep = call.keep(s)
    if keep is not None:
        probabilities = probabilities * keep
    return torch.matmul(_grouped(probabilities, k), v).view(*q.shape[:3], v.shape[3]), lse, rest


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, the gradient of the scores before they meet bias, and that of the sinks, all wide."""
    k, v = call.hide(k), call.hide(v)
    s, tanh = call.scores(q, k)
    whole = call.with_sinks(s)
    if dlse is not None:  # nothing pulls at a row that sees nothing, whatever it is given: 0 * inf is no number
        dlse = dlse.masked_fill((whole == float("-inf")).all(3), 0.0)
    probabilities, sunk = _probabilities(whole).split([s.shape[3], whole.shape[3] - s.shape[3]], 3)
    keep = call.keep(s)
    dropped = probabilities if keep is None else probabilities * keep
    dv = torch.matmul(_grouped(dropped, k).transpose(2, 3), _grouped(dout, k))
    dp = torch.matmul(_grouped(dout, k), v.transpose(2, 3)).view(s.shape)
    if keep is not None:
        dp = dp * keep
    pull = (probabilities * dp).sum(3, keepdim=True)
    ds = dp - pull if dlse is None else dp - pull + dlse.unsqueeze(3)  # dp - pull first: they may be equal
    ds = probabilities * ds
    dsinks = (-sunk * (pull if dlse is None else pull - dlse.unsqueeze(3))).sum((0, 2, 3))
    dscore = ds if call.softcap == 0 else ds * (1 - tanh.square())
    dscore = dscore * call.scale
    dq = torch.matmul(_grouped(dscore, k), k).view(q.shape)
    dk = torch.matmul(_grouped(dscore, k).transpose(2, 3), _grouped(q, k))
    return dq, dk, dv, ds, dsinks


def empty_out(q: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """An output of q's rows and v's head size, laid out as q is."""
    if v.shape[-1] == q.shape[-1]:
        return torch.empty_like(q, dtype=dtype)
    rows = torch.empty_like(q[..., :1], dtype=torch.bool)  # the order of the other axes, as empty_like reads it
    order = sorted(range(q.dim() - 1), key=rows.stride, reverse=True)
    return torch.empty_permuted((*q.shape[:-1], v.shape[-1]), (*order, q.dim() - 1), dtype=dtype, device=q.device)


def nothing_to_attend_to(out: Tensor, lse: Tensor, rest: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, rest) of a call without keys, written to what a kernel allocated."""
    sink = lse.new_full((), float("-inf")) if sinks is None else sinks
    lse.copy_(sink.view(-1, 1) if sink.dim() else sink)
    return out.zero_(), lse, rest.zero_()


def sinks_alone(q: Tensor, dlse: Tensor | None, sinks: Tensor | None) -> Tensor:
    """dsinks of a call without keys: a sink is its rows' lse."""
    if sinks is None:
        return q.new_empty(0)
    if dlse is None:
        return torch.zeros_like(sinks)
    return dlse.movedim(-2, 0).reshape(len(sinks), -1).sum(1).to(sinks.dtype).masked_fill(sinks == float("-inf"), 0.0)


def _like(result: Tensor, model: Tensor, dtype: torch.dtype) -> Tensor:
    """``result`` in ``dtype``, in the memory layout of ``model``."""
    return torch.empty_like(model, dtype=dtype).copy_(result)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    batch_ids: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    p: float,
    head0: int,
    q0: int,
    k0: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, lse, rest): out like q, of v's head size, in ``out_dtype``; lse float32 (float64 for float64)
    [B, Hq, Lq] or [Hq, T], and rest, what rounding took from it, of the same shape and dtype."""
    wide = _wide(q)
    options = (causal, window_left, window_right, softcap, scale, p, head0, q0, k0)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        call = _Call(bias, alibi_slopes, seed, batch_ids, None, seqlens_k, sinks, *options)
        out, lse, rest = _forward(q.to(wide), k.to(wide), v.to(wide), call)
        return empty_out(q, v, out_dtype).copy_(out), lse.contiguous(), rest.contiguous()
    to_q = _Padding.of(cu_seqlens_q, q.shape[0], max_seqlen_q)
    to_k = _Padding.of(cu_seqlens_k, k.shape[0], max_seqlen_k)
    call = _Call(None, alibi_slopes, seed, batch_ids, to_q.lengths, to_k.lengths, sinks, *options)
    out, lse, rest = _forward(to_q.pad(q.to(wide)), to_k.pad(k.to(wide)), to_k.pad(v.to(wide)), call)
    pack = lambda x, empty: to_q.pack(x.unsqueeze(3), empty).squeeze(2).transpose(0, 1).contiguous()
    return empty_out(q, v, out_dtype).copy_(to_q.pack(out)), pack(lse, float("-inf")), pack(rest, 0.0)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    batch_ids: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlens_k: Tensor | None,
    sinks: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    p: float,
    head0: int,
    q0: int,
    k0: int,
    need_dbias: bool,
    dbias_shape: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (dq, dk, dv, dbias, dsinks), each in the dtype of what it is the gradient of; dbias [0] unless needed,
    dsinks [0] without sinks.

    Kernels start from ``out``, ``lse`` and ``rest``, exp(s - lse - rest) and sum(dout * out); this computes them anew.
    """
    wide = _wide(q)
    options = (causal, window_left, window_right, softcap, scale, p, head0, q0, k0)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        call = _Call(bias, alibi_slopes, seed, batch_ids, None, seqlens_k, sinks, *options)
        dq, dk, dv, ds, dsinks = _backward(
            dout.to(wide), None if dlse is None else dlse.to(wide), q.to(wide), k.to(wide), v.to(wide), call
        )
    else:
        to_q = _Padding.of(cu_seqlens_q, q.shape[0], max_seqlen_q)
        to_k = _Padding.of(cu_seqlens_k, k.shape[0], max_seqlen_k)
        call = _Call(None, alibi_slopes, seed, batch_ids, to_q.lengths, to_k.lengths, sinks, *options)
        rows = lambda x: to_q.pad(x.to(wide).transpose(0, 1).unsqueeze(2)).squeeze(3)
        dq, dk, dv, ds, dsinks = _backward(
            to_q.pad(dout.to(wide)), None if dlse is None else rows(dlse), to_q.pad(q.to(wide)), to_k.pad(k.to(wide)),
            to_k.pad(v.to(wide)), call,
        )  # fmt: skip
        dq, dk, dv = to_q.pack(dq), to_k.pack(dk), to_k.pack(dv)
    dbias = q.new_empty(0)
    if need_dbias:
        assert bias is not None
        dbias = ds.sum_to_size(dbias_shape).to(bias.dtype).contiguous()
    dsinks = q.new_empty(0) if sinks is None else dsinks.to(sinks.dtype)
    return _like(dq, q, q.dtype), _like(dk, k, k.dtype), _like(dv, v, v.dtype), dbias, dsinks
