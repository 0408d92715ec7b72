"""attention on the CPU: from tensors to ``fastlm._C``. The kernels are csrc/cpu/attention*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm.backend import Support
from fastlm.reference.attention import empty_out, nothing_to_attend_to, sinks_alone

_C = _native._C
_YES = Support(True)
_STRIDED = Support(True, "the last axis of a tensor has gaps: packing it is slower")


def _serves(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Support:
    if _C is None:
        return Support(False, _native.missing())
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype not in _native.FLOATS:
            return Support(False, f"the cpu kernel takes float32, bfloat16 and float16; {name} is {_name(t)}")
        if t.dtype != q.dtype:
            return Support(False, f"the cpu kernel takes q, k and v of one dtype; q is {_name(q)}, {name} {_name(t)}")
    if max(q.shape[-1], v.shape[-1]) > 512:
        return Support(False, f"the cpu kernel takes head sizes up to 512, not {max(q.shape[-1], v.shape[-1])}")
    if bias is not None and bias.dtype not in (*_native.FLOATS, torch.bool):
        return Support(False, f"the cpu kernel takes a bias of bool, float32, bfloat16 or float16, not {_name(bias)}")
    return _YES if q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 else _STRIDED


def serves_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *options: object) -> Support:
    """Whether the kernel takes these dtypes and this head size."""
    if options[-1] not in _native.FLOATS:
        return Support(False, f"the cpu kernel writes float32, bfloat16 and float16, not {options[-1]}")
    return _serves(q, k, v, bias)


def serves_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    bias: Tensor | None,
    *options: object,
) -> Support:
    """Whether the kernel takes these dtypes and this head size."""
    for name, t in (("dout", dout), ("out", out)):
        if t.dtype not in _native.FLOATS:
            return Support(False, f"the cpu kernel takes float32, bfloat16 and float16; {name} is {_name(t)}")
    return _serves(q, k, v, bias)


def _name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _pack(t: Tensor | None, packed: bool = False) -> _native.Packed:
    """Strides {batch, head, row, column}; of packed [T, H, D] the batch stride is 0."""
    if t is None or t.numel() == 0:
        return _native.ABSENT
    if packed:
        return (t.data_ptr(), _native.DTYPE[t.dtype], 0, t.stride(1), t.stride(0), t.stride(2))
    return (t.data_ptr(), _native.DTYPE[t.dtype], *t.stride())  # type: ignore[return-value]


def _flat(t: Tensor | None) -> _native.Packed:
    """A contiguous tensor; the first stride is that of its first of two axes, 0 if it has one."""
    if t is None or t.numel() == 0:
        return _native.ABSENT
    return (t.data_ptr(), _native.DTYPE[t.dtype], t.stride(0) if t.dim() == 2 else 0, 0, 0, 0)


def _sizes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None) -> tuple[int, int, int, int, int, int, int]:
    if cu_seqlens_q is not None:
        return (cu_seqlens_q.shape[0] - 1, q.shape[1], k.shape[1], q.shape[0], k.shape[0], q.shape[2], v.shape[2])
    return (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


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
    """(out, lse, rest) of the schema."""
    packed = cu_seqlens_q is not None
    out = empty_out(q, v, out_dtype)
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    lse, rest = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    if packed:  # tokens outside every sequence keep this
        out.zero_(), lse.fill_(-torch.inf), rest.zero_()
    if q.numel() == 0:
        return out, lse, rest
    if k.numel() == 0:
        return nothing_to_attend_to(out, lse, rest, sinks)
    _C.attention_forward_cpu(
        _sizes(q, k, v, cu_seqlens_q),
        _pack(q, packed),
        _pack(k, packed),
        _pack(v, packed),
        _pack(bias),
        _flat(alibi_slopes),
        _flat(seed),
        _flat(batch_ids),
        _flat(cu_seqlens_q),
        _flat(cu_seqlens_k),
        _flat(seqlens_k),
        _flat(sinks),
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        p,
        head0,
        q0,
        k0,
        _pack(out, packed),
        _flat(lse),
        _flat(rest),
        torch.get_num_threads(),
    )
    return out, lse, rest


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
    """(dq, dk, dv, dbias, dsinks) of the schema."""
    packed = cu_seqlens_q is not None
    make = torch.zeros_like if packed else torch.empty_like
    dq, dk, dv = make(q), make(k), make(v)
    if q.numel() == 0 or k.numel() == 0:
        dbias = q.new_zeros(dbias_shape, dtype=bias.dtype) if need_dbias and bias is not None else q.new_empty(0)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, sinks_alone(q, dlse, sinks)
    lse, rest = lse.contiguous(), rest.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    of_batches = (
        q.new_zeros((_sizes(q, k, v, cu_seqlens_q)[0], q.shape[1]), dtype=torch.float32) if sinks is not None else None
    )
    sums, whole = None, (True, True)
    if need_dbias:
        assert bias is not None
        full = list(bias.shape)
        over_rows, over_keys = (dbias_shape[i] == 1 and full[i] != 1 for i in (2, 3))
        if over_rows or over_keys:
            # Sums over one axis of scores are taken in the kernel, each head's of its own; the rest below.
            shape = (full[0], full[1], 1 if over_rows else full[2], full[3] if over_rows else 1)
            sums = q.new_zeros(shape, dtype=torch.float32)
        else:
            sums = q.new_zeros(dbias_shape, dtype=torch.float32)
            whole = (dbias_shape[0] == full[0], dbias_shape[1] == full[1])
    _C.attention_backward_cpu(
        _sizes(q, k, v, cu_seqlens_q),
        _pack(dout, packed),
        _flat(dlse),
        _pack(q, packed),
        _pack(k, packed),
        _pack(v, packed),
        _pack(out, packed),
        _flat(lse),
        _flat(rest),
        _pack(bias),
        _flat(alibi_slopes),
        _flat(seed),
        _flat(batch_ids),
        _flat(cu_seqlens_q),
        _flat(cu_seqlens_k),
        _flat(seqlens_k),
        _flat(sinks),
        causal,
        window_left,
        window_right,
        softcap,
        scale,
        p,
        head0,
        q0,
        k0,
        _pack(dq, packed),
        _pack(dk, packed),
        _pack(dv, packed),
        _flat(of_batches),
        _broadcast(sums, bias.shape) if sums is not None and bias is not None else _native.ABSENT,
        *whole,
        torch.get_num_threads(),
    )
    dsinks = q.new_empty(0)
    if of_batches is not None:
        dsinks = torch.zeros_like(of_batches[0])
        heads = (dsinks.data_ptr(), _native.DTYPE[dsinks.dtype], 0, 0, 0, 1)
        _C.reduce_in_order_cpu((1, 1, *of_batches.shape), _pack(of_batches[None, None]), heads)
    if sums is None or bias is None:
        return dq, dk, dv, q.new_empty(0), dsinks
    if list(sums.shape) != dbias_shape:
        dbias = q.new_zeros(dbias_shape, dtype=torch.float32)
        _C.reduce_in_order_cpu(tuple(sums.shape), _pack(sums), _broadcast(dbias, sums.shape))
        sums = dbias
    return dq, dk, dv, sums.to(bias.dtype), dsinks


def _broadcast(t: Tensor, shape: torch.Size) -> _native.Packed:
    """Strides 0 where ``t`` has one element for all of ``shape``."""
    if t.numel() == 0:
        return _native.ABSENT
    a, b, c, d = (0 if t.shape[i] == 1 and shape[i] != 1 else t.stride(i) for i in range(4))
    return (t.data_ptr(), _native.DTYPE[t.dtype], a, b, c, d)
