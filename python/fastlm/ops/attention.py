"""attention: every kind of softmax attention in one op, forward and backward, without materialised scores.

The public function, the schema, the fake kernels and autograd. The maths is in ``fastlm.reference.attention``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.ops import _flops
from fastlm.ops._attention_arguments import (
    OP,
    Offset,
    bias_4d,
    check_packing,
    check_shapes,
    check_values,
    offset_parts,
    slopes_float32,
    window_sides,
)
from fastlm.ops._library import Op, autocast_dtype, check_p, check_tensor, seed_tensor, sharded
from fastlm.reference.attention import Options, empty_out

_OPTIONS = (
    "Tensor? bias, Tensor? alibi_slopes, Tensor? seed, Tensor? batch_ids, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqlens_k, Tensor? sinks, SymInt max_seqlen_q, SymInt max_seqlen_k, int causal, SymInt window_left, "
    "SymInt window_right, float softcap, float? scale, float p, SymInt head0, SymInt q0, SymInt k0, "
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS} ScalarType out_dtype, bool check) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rest, {_OPTIONS} "
    "bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_N_OPTIONS, _N_TENSORS = len(Options._fields), 8  # the tensors come first
_BIAS, _SINKS = (3 + Options._fields.index(name) for name in ("bias", "sinks"))  # among the forward's arguments
_LARGEST = torch.finfo(torch.float32).max
_NONE, _LOWER_RIGHT, _UPPER_LEFT, _NONE_UPPER_LEFT = 0, 1, 2, 3  # causal in the schema; the last two: no shift


def _fake_forward(q, k, v, *options):
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse_shape = q.shape[:3] if q.dim() == 4 else (q.shape[1], q.shape[0])
    out = empty_out(q, v, options[_N_OPTIONS])
    return out, q.new_empty(lse_shape, dtype=lse), q.new_empty(lse_shape, dtype=lse)


def _fake_backward(dout, dlse, q, k, v, out, lse, rest, bias, *options):
    sinks = options[_SINKS - _BIAS - 1]
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device) if options[-1] else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


def _prepare(direction: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The torch schema's arguments to a backend's: bias expanded, scale resolved, values checked, lengths in int32."""
    first = 3 if direction == "forward" else 8
    q, k, v = args[first - 3 : first] if direction == "forward" else args[2:5]
    given, rest = Options.of(args[first:]), args[first + _N_OPTIONS :]
    if direction == "forward" and (rest[1] or q.device.type == "cpu"):
        check_values(q, k, given)
    options = given._replace(
        bias=None if given.bias is None else given.bias.expand(*q.shape[:3], k.shape[2]),
        scale=1 / math.sqrt(q.shape[-1]) if given.scale is None else given.scale,
        cu_seqlens_q=_int32(given.cu_seqlens_q),
        cu_seqlens_k=_int32(given.cu_seqlens_k),
        seqlens_k=_int32(given.seqlens_k),
    )
    if direction == "forward":
        return (q, k, v, *options, rest[0])
    return (*args[:first], *options, rest[0], list(given.bias.shape) if rest[0] and given.bias is not None else [])


def _int32(lengths: Tensor | None) -> Tensor | None:
    """What is too large for int32 stays too large: unchecked, on a GPU, the kernels cut it to what there is."""
    if lengths is None:
        return None
    if lengths.dtype == torch.int64:
        lengths = lengths.clamp(-(2**31), 2**31 - 1)
    return lengths.to(torch.int32).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, *options):
        out, lse, rest = _operators.forward(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse, rest, *options[:_N_TENSORS])
        ctx.options = options[_N_TENSORS:_N_OPTIONS]
        ctx.mark_non_differentiable(rest)
        ctx.set_materialize_grads(False)
        return out, lse, rest

    @staticmethod
    def backward(ctx: Any, dout, dlse, _drest):
        q, k, v, out, lse, rest, *tensors = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (5 + _N_OPTIONS)
        if dout is None:
            dout = torch.zeros_like(out)
        wants = ctx.needs_input_grad
        dq, dk, dv, dbias, dsinks = _operators.backward(
            dout, dlse, q, k, v, out, lse, rest, *tensors, *ctx.options, wants[_BIAS]
        )
        grads: list[Tensor | None] = [None] * (5 + _N_OPTIONS)
        for place, grad in enumerate((dq, dk, dv)):
            grads[place] = grad if wants[place] else None
        grads[_BIAS] = dbias if wants[_BIAS] else None
        grads[_SINKS] = dsinks if wants[_SINKS] else None
        return tuple(grads)


_operators = Op(OP, _FORWARD, _BACKWARD, _fake_forward, _fake_backward, _Attention, _prepare)


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    offset: Offset | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    check: bool = False,
) -> tuple[torch.device, tuple[Any, ...]]:
    """Checks a public call and turns it into the schema's arguments."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(tensor, name, OP, device=None if name == "q" else q.device)
    device = q.device
    dtype = autocast_dtype(device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_shapes(q, k, v, packed)
    sequences = check_packing(
        q, k, packed, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlens_k, device
    )
    longest_q = longest_k = 0
    if packed:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        longest_q = q.shape[0] if max_seqlen_q is None else max_seqlen_q
        longest_k = k.shape[0] if max_seqlen_k is None else max_seqlen_k
    if bias is not None:
        bias = bias_4d(bias, q, k, device)
    if alibi_slopes is not None:
        alibi_slopes = slopes_float32(alibi_slopes, sequences, q.shape[1], device)
    if sinks is not None:
        check_tensor(sinks, "sinks", OP, shape=(q.shape[1],), device=device)
        sinks = sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()

    kinds = {False: _NONE, True: _LOWER_RIGHT, "upper_left": _UPPER_LEFT}
    kind = kinds.get(causal) if isinstance(causal, (int, str)) else None
    if kind is None:
        raise ValueError(f'{OP}: causal is {causal!r}; it must be False, True or "upper_left"')
    left, right = window_sides(window)
    if kind != _NONE:
        right = -1  # causality is the tighter bound
    for name, value, low in (("softcap", softcap, 0.0), ("scale", scale, -_LARGEST)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat))):
            raise TypeError(f"{OP}: {name} is a {type(value).__name__}; it must be a float")
        if value is not None and not (low <= value <= _LARGEST):
            limit = " and not negative" if low == 0 else ""
            raise ValueError(f"{OP}: {name} is {value}; it must be finite in float32{limit}")
    check_p(dropout_p, OP, "dropout_p")
    p = float(dropout_p) if dropout_p * 65536 > 0.5 else 0.0  # below that nothing would be dropped
    batch_ids, head0, q0, k0 = offset_parts(offset, sequences, device)
    if q0 is not None:  # positions are given: nothing is left to align
        kind = {_NONE: _NONE_UPPER_LEFT, _LOWER_RIGHT: _UPPER_LEFT}.get(kind, kind)
    if p == 0:
        seed = batch_ids = None
        head0 = 0
    else:
        seed = seed_tensor(seed, device, OP)
    return device, (
        q, k, v, bias, alibi_slopes, seed, batch_ids, cu_seqlens_q, cu_seqlens_k, seqlens_k, sinks,
        longest_q, longest_k, kind, left, right, float(softcap), None if scale is None else float(scale), p, head0, q0 or 0,
        k0 or 0, q.dtype, check,
    )  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    offset: Offset | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + bias) v`` with masks, dropout and gradients, fused; memory is linear in the length.

    Args:
        q: [B, Hq, Lq, D], float32, bfloat16 or float16 (float64 on the reference backend); any strides: a transposed
            view of [B, Lq, Hq, D] is not copied. With cu_seqlens: [T, Hq, D].
        k, v: [B, Hkv, Lk, D], Hq a multiple of Hkv (grouped queries); with cu_seqlens: [T of the keys, Hkv, D]. v's
            head size may differ: [..., Dv]. Kernels take head sizes up to 512.
        causal: False; True: key j is visible to query i if j <= i + Lk - Lq (the lower right corners are aligned, as
            in flash-attention); "upper_left": if j <= i, as ``is_causal`` of ``F.scaled_dot_product_attention``.
        window: (left, right), inclusive, -1 unlimited: i + shift - left <= j <= i + shift + right, where shift is
            Lk - Lq, or 0 for "upper_left".
        bias: added to the scores, and differentiable at any shape that broadcasts to [B, Hq, Lq, Lk]; or bool, True
            where a query may attend. Not with cu_seqlens.
        alibi_slopes: [Hq] or [B, Hq]; subtracts slope * |i + shift - j| (Press et al. 2022). No gradient.
        sinks: [Hq], differentiable: a logit of each head that is added to the softmax's denominator, as if to a key
            whose value is 0 (gpt-oss; Xiao et al. 2024). Not scaled, capped or dropped; part of lse.
        softcap: if positive, scores become softcap * tanh(score / softcap) before bias.
        scale: of the scores; None: 1 / sqrt(D).
        dropout_p: probability to drop a probability, 0 <= dropout_p < 1, in steps of 2**-16.
        seed: None (drawn from torch's default generator of the device), an int, or an int64 tensor of one element on
            q's device, which is what torch.compile and CUDA graphs carry without recompiling or synchronising.
        offset: (batch_ids, head0, q0, k0), where this shard stands in the whole. batch_ids: int64 [B] (or one per
            packed sequence), or None for 0, 1, ...; head0: number of the first query head; q0, k0: query i and key j
            stand at q0 + i and k0 + j for dropout, causal, window and ALiBi alike, with no other alignment; None and
            None: these are all of the queries and keys, aligned as without an offset.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where packed sequences begin and end; each attends to itself
            only, and may be empty. cu_seqlens_k None: cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: no sequence is longer; None: T. Never read from the device.
        seqlens_k: int32 [B], the valid keys of each row of the batch, in a cache of fixed size. Causal and window are
            aligned to it; what lies behind is never read into a result.
        return_lse: return log(sum(exp(score))) as well.
        check: check the values of cu_seqlens and seqlens_k on a GPU too, which waits for it. On a CPU they always are.

    DTensors are served where q, k and v are sharded alike by batch or heads (packed: by heads); bias may be a replicated one.
    Every other argument is that of the whole.

    Returns:
        out, or (out, lse). out: [B, Hq, Lq, Dv], laid out like q, in q's dtype (under autocast q, k, v are cast to the
        autocast dtype). lse: float32 [B, Hq, Lq] (packed: [Hq, T]), before dropout, differentiable. A query that
        attends to nothing has out 0, lse -inf (with sinks, its head's sink) and zero gradients.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, range or value; the message names the argument, what it was and must be.
        fastlm.backend.BackendError: a forced backend that cannot serve.
        RuntimeError: on double backward.
    """
    if sharded(q, k, v, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqlens_k):
        from fastlm.ops import _dtensor

        return _dtensor.attention(
            attention, q, k, v, causal=causal, window=window, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks,
            softcap=softcap, scale=scale, dropout_p=dropout_p, seed=seed, offset=offset, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqlens_k=seqlens_k,
            return_lse=return_lse, check=check,
        )  # fmt: skip
    _, args = _arguments(
        q, k, v, causal=causal, window=window, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, softcap=softcap, scale=scale,
        dropout_p=dropout_p, seed=seed, offset=offset, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqlens_k=seqlens_k, check=check,
    )  # fmt: skip
    out, lse, _ = _operators(*args)
    return (out, lse) if return_lse else out


def _backend_arguments(*args: Any, **kwargs: Any) -> tuple[torch.device, tuple[Any, ...]]:
    device, schema_args = _arguments(*args, **kwargs)
    return device, _prepare("forward", schema_args)


def _example(device: str) -> dict[str, Any]:
    q = torch.empty(1, 4, 64, 64, device=device)
    return {"q": q, "k": q, "v": q, "causal": True}


backend.register(OP, _backend_arguments, _example)
_flops.register()
