"""attention on the CPU: from tensors to ``fastlm._C``. The kernels are csrc/cpu/attention*.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm import _native
from fastlm.backend import Support

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
    if q.shape[-1] > 256:
        return Support(False, f"the cpu kernel takes head sizes up to 256, not {q.shape[-1]}")
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


def _sizes(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None) -> tuple[int, int, int, int, int, int]:
    if cu_seqlens_q is not None:
        return (cu_seqlens_q.shape[0] - 1, q.shape[1], k.shape[1], q.shape[0], k.shape[0], q.shape[2])
    return (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])


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
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the schema."""
    packed = cu_seqlens_q is not None
    make = torch.zeros_like if packed else torch.empty_like
    out = make(q, dtype=out_dtype)
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    lse = q.new_empty(shape, dtype=torch.float32)
    if packed:  # tokens outside every sequence keep this
        lse.fill_(-torch.inf)
    if q.numel() == 0:
        return out, lse
    if k.numel() == 0:  # nothing to attend to
        return out.zero_(), lse.fill_(-torch.inf)
    _C.attention_forward_cpu(
        _sizes(q, k, cu_seqlens_q),
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
        torch.get_num_threads(),
    )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    batch_ids: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlens_k: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias) of the schema."""
    packed = cu_seqlens_q is not None
    make = torch.zeros_like if packed else torch.empty_like
    dq, dk, dv = make(q), make(k), make(v)
    if q.numel() == 0 or k.numel() == 0:
        dbias = q.new_zeros(dbias_shape, dtype=bias.dtype) if need_dbias and bias is not None else q.new_empty(0)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
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
        _sizes(q, k, cu_seqlens_q),
        _pack(dout, packed),
        _flat(dlse),
        _pack(q, packed),
        _pack(k, packed),
        _pack(v, packed),
        _pack(out, packed),
        _flat(lse),
        _pack(bias),
        _flat(alibi_slopes),
        _flat(seed),
        _flat(batch_ids),
        _flat(cu_seqlens_q),
        _flat(cu_seqlens_k),
        _flat(seqlens_k),
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
        _broadcast(sums, bias.shape) if sums is not None and bias is not None else _native.ABSENT,
        *whole,
        torch.get_num_threads(),
    )
    if sums is None or bias is None:
        return dq, dk, dv, q.new_empty(0)
    if list(sums.shape) != dbias_shape:
        dbias = q.new_zeros(dbias_shape, dtype=torch.float32)
        _C.reduce_in_order_cpu(tuple(sums.shape), _pack(sums), _broadcast(dbias, sums.shape))
        sums = dbias
    return dq, dk, dv, sums.to(bias.dtype)


def _broadcast(t: Tensor, shape: torch.Size) -> _native.Packed:
    """Strides 0 where ``t`` has one element for all of ``shape``."""
    if t.numel() == 0:
        return _native.ABSENT
    a, b, c, d = (0 if t.shape[i] == 1 and shape[i] != 1 else t.stride(i) for i in range(4))
    return (t.data_ptr(), _native.DTYPE[t.dtype], a, b, c, d)
