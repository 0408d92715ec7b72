"""The arguments of attention, checked: each error names the argument, what it was and what it must be."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._library import check_tensor
from fastlm.reference.attention import Options

OP = "attention"
Offset = tuple[Tensor | None, int, int | None, int | None]


def check_values(q: Tensor, k: Tensor, options: Options) -> None:
    """Raises ValueError where lengths lead outside the tensors."""
    seqlens_k = options.seqlens_k
    for name, cu, tokens, longest in (
        ("q", options.cu_seqlens_q, q.shape[0], options.max_seqlen_q),
        ("k", options.cu_seqlens_k, k.shape[0], options.max_seqlen_k),
    ):
        if cu is None:
            continue
        lengths = cu.diff()
        if int(cu[0]) != 0 or int(cu[-1]) != tokens or bool((lengths < 0).any()):
            raise ValueError(
                f"{OP}: cu_seqlens_{name} runs from {int(cu[0])} to {int(cu[-1])} with lengths {_few(lengths)}; it "
                f"must start at 0, never fall and end at the number of packed tokens, {tokens}"
            )
        if int(lengths.max()) > longest:
            raise ValueError(
                f"{OP}: max_seqlen_{name} is {longest}, and cu_seqlens_{name} has a sequence of {int(lengths.max())}"
            )
    if (
        seqlens_k is not None
        and seqlens_k.numel()
        and not 0 <= int(seqlens_k.min()) <= int(seqlens_k.max()) <= k.shape[2]
    ):
        raise ValueError(f"{OP}: seqlens_k is {_few(seqlens_k)}; each must be between 0 and the {k.shape[2]} keys of k")


def _few(values: Tensor) -> str:
    listed = ", ".join(str(v) for v in values[:8].tolist())
    return f"[{listed}{', ...' if len(values) > 8 else ''}]"


def check_shapes(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    layout = "[T, heads, head size] with cu_seqlens" if packed else "[batch, heads, length, head size]"
    dims = 3 if packed else 4
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise ValueError(f"{OP}: {name} has shape {list(tensor.shape)}; it must be {layout}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{OP}: {name} is {tensor.dtype} and q is {q.dtype}; q, k and v must have one dtype")
    if q.shape[-1] == 0:
        raise ValueError(f"{OP}: q has shape {list(q.shape)}; the head size must be at least 1")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"{OP}: v has shape {list(v.shape)}; it must be {list(k.shape)} like k, but for the last axis")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{OP}: k has shape {list(k.shape)}; its last axis must be q's head size, {q.shape[-1]}")
    if v.shape[-1] == 0:
        raise ValueError(f"{OP}: v has shape {list(v.shape)}; its head size must be at least 1")
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"{OP}: k has shape {list(k.shape)}; its batch must be q's, {q.shape[0]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{OP}: k has {k.shape[1]} heads (shape {list(k.shape)}); q's {q.shape[1]} must be a multiple")


def check_packing(q, k, packed, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlens_k, device) -> int:
    """Returns the number of sequences: the batch, or those that are packed."""
    integers = (torch.int32, torch.int64)
    if not packed:
        for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if longest is not None:
                raise ValueError(f"{OP}: {name} is {longest} without cu_seqlens_q; it belongs to packed sequences")
        check_tensor(seqlens_k, "seqlens_k", OP, shape=(q.shape[0],), device=device, dtypes=integers)
        return q.shape[0]
    if cu_seqlens_q is None:
        raise ValueError(f"{OP}: cu_seqlens_k was given without cu_seqlens_q; packed sequences need both")
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{OP}: cu_seqlens_k is None, which means cu_seqlens_q, but k packs {k.shape[0]} tokens and q {q.shape[0]}"
        )
    check_tensor(cu_seqlens_q, "cu_seqlens_q", OP, device=device, dtypes=integers)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 2:
        raise ValueError(f"{OP}: cu_seqlens_q has shape {list(cu_seqlens_q.shape)}; it must be [sequences + 1]")
    check_tensor(cu_seqlens_k, "cu_seqlens_k", OP, shape=cu_seqlens_q.shape, device=device, dtypes=integers)
    if bias is not None:
        raise ValueError(f"{OP}: bias was given with cu_seqlens; packed sequences take alibi_slopes, window and causal")
    if seqlens_k is not None:
        raise ValueError(f"{OP}: seqlens_k was given with cu_seqlens, which says the lengths already")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None and (isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt))):
            raise TypeError(f"{OP}: {name} is a {type(longest).__name__}; it must be None or an int")
        if longest is not None and longest < 0:
            raise ValueError(f"{OP}: {name} is {longest}; it must not be negative")
    sequences: int = cu_seqlens_q.shape[0] - 1
    return sequences


def bias_4d(bias: Tensor, q: Tensor, k: Tensor, device: torch.device) -> Tensor:
    floats = (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_tensor(bias, "bias", OP, device=device, dtypes=floats)
    whole = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    given = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(given) != 4 or any(have != 1 and have != need for have, need in zip(given, whole)):
        raise ValueError(f"{OP}: bias has shape {list(bias.shape)}; it must be broadcastable to {list(whole)}")
    return bias.reshape(given)  # a view: axes of size 1 fit any strides


def slopes_float32(slopes: Tensor, sequences: int, heads: int, device: torch.device) -> Tensor:
    check_tensor(slopes, "alibi_slopes", OP, device=device)
    if slopes.shape not in ((heads,), (sequences, heads)):
        raise ValueError(
            f"{OP}: alibi_slopes has shape {list(slopes.shape)}; it must be [{heads}] or [{sequences}, {heads}]"
        )
    if slopes.requires_grad:
        raise ValueError(f"{OP}: alibi_slopes requires a gradient, which is not computed; pass alibi_slopes.detach()")
    return slopes.to(torch.float32).contiguous()


def window_sides(window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{OP}: window is {window!r}; it must be None or (left, right)")
    for side in window:
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"{OP}: window is {window!r}; it must hold two ints")
        if side < -1:
            raise ValueError(f"{OP}: window is {tuple(window)}; each side must be at least 0, or -1 for unlimited")
    return window[0], window[1]


def offset_parts(
    offset: Offset | None, sequences: int, device: torch.device
) -> tuple[Tensor | None, int, int | None, int | None]:
    if offset is None:
        return None, 0, None, None
    if not isinstance(offset, (tuple, list)) or len(offset) != 4:
        raise TypeError(f"{OP}: offset is {offset!r}; it must be None or (batch_ids, head0, q0, k0)")
    batch_ids, head0, q0, k0 = offset
    check_tensor(
        batch_ids, "offset's batch_ids", OP, shape=(sequences,), device=device, dtypes=(torch.int64, torch.int32)
    )
    if (q0 is None) != (k0 is None):
        raise ValueError(f"{OP}: offset has q0 {q0} and k0 {k0}; both or none must be None")
    for name, value in (("head0", head0), ("q0", q0), ("k0", k0)):
        if value is None and name != "head0":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{OP}: offset's {name} is a {type(value).__name__}; it must be an int")
        if not 0 <= value < 2**31:
            raise ValueError(f"{OP}: offset's {name} is {value}; it must be at least 0 and below 2**31")
    return None if batch_ids is None else batch_ids.long().contiguous(), head0, q0, k0
