"""flash_attn's functions over ``ops.attention``: the same signatures, for models that call them by name.

    from fastlm import flash_attn_func, flash_attn_varlen_func      # in place of: from flash_attn import ...

Signatures and meaning are those of flash_attn 2.8's ``flash_attn_interface``: positions come before heads, causal is
aligned at the lower right, a window is (left, right) with -1 for unlimited.
"""

from __future__ import annotations

from torch import Tensor

from fastlm.ops.attention import attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """``flash_attn.flash_attn_func`` by ``ops.attention``, differentiable in q, k and v.

    Args:
        q: [B, Lq, Hq, D]; k, v: [B, Lk, Hkv, D], Hq a multiple of Hkv.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes: as there. Dropout draws from torch's default
            generator, another mask than flash_attn's.
        deterministic: accepted; the op always is.
        return_attn_probs: also return the log-sum-exp [B, Hq, Lq], and None in place of the probabilities, which
            flash_attn gives for its own tests alone.

    Returns:
        out [B, Lq, Hq, D], or (out, softmax_lse, None).

    Raises what ``ops.attention`` raises.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = attention(
        q, k, v, causal=causal, window=_window(window_size), alibi_slopes=alibi_slopes, softcap=softcap,
        scale=softmax_scale, dropout_p=dropout_p, return_lse=True,
    )  # fmt: skip
    return (out.transpose(1, 2), lse, None) if return_attn_probs else out.transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """``flash_attn.flash_attn_varlen_func`` by ``ops.attention``: sequences packed one behind the other.

    Args:
        q: [T, Hq, D]; k, v: [Tk, Hkv, D]; cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where sequences begin and
            end; max_seqlen_q, max_seqlen_k: no sequence is longer. The others as in ``flash_attn_func``.
        block_table: None; paged caches are not served.

    Returns:
        out [T, Hq, D], or (out, softmax_lse [Hq, T], None).

    Raises ValueError for a block_table, else what ``ops.attention`` raises.
    """
    if block_table is not None:
        raise ValueError(
            f"flash_attn_varlen_func: block_table has shape {list(block_table.shape)}; it must be None (no paged caches)"
        )
    out, lse = attention(
        q, k, v, causal=causal, window=_window(window_size), alibi_slopes=alibi_slopes, softcap=softcap,
        scale=softmax_scale, dropout_p=dropout_p, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, return_lse=True,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def _window(window_size: tuple[int, int]) -> tuple[int, int] | None:
    return None if tuple(window_size) == (-1, -1) else (window_size[0], window_size[1])
