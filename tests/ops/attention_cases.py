"""Cases of attention for every backend's tests: random inputs, the float64 truth, and PyTorch's own result.

The truth goes sequence by sequence through autograd in float64, apart from the op's reference in code and in form.
PyTorch's own result is F.scaled_dot_product_attention where it serves the call on its flash path, else the composition
with float32 intermediates, whose backward starts from what a fused op saves: out at its dtype, and lse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import fastlm
import torch
import torch.nn.functional as F
from accuracy import Result
from fastlm import _native
from fastlm.reference.attention import dropout_mask
from fastlm.reference.philox import keep_scale
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKENDS = ["reference"] + (["cpu"] if not _native.missing() and fastlm.backend.module("attention", "cpu")[0] else [])


@dataclass(frozen=True)
class Case:
    """Which arguments a call has.

    ``bias`` names the shape of an additive bias by the axes it has, "bhqk" or fewer (the others have size 1); ``mask``
    the same of a boolean one. ``lengths``: packed sequences, (queries, keys) of each. ``valid``: seqlens_k. ``layout``:
    "blhd" (a transposed view of [B, L, H, D]) or "bhld" (contiguous).
    """

    batch: int = 2
    heads: int = 6
    kv_heads: int = 6
    queries: int = 65
    keys: int = 65
    head_size: int = 40
    dtype: torch.dtype = F32
    causal: bool | str = False
    window: tuple[int, int] | None = None
    bias: str | None = None
    mask: str | None = None
    alibi: bool = False
    softcap: float = 0.0
    scale: float | None = None
    p: float = 0.0
    valid: tuple[int, ...] | None = None
    lengths: tuple[tuple[int, int], ...] | None = None
    layout: str = "blhd"
    sinks: bool = False
    v_size: int | None = None  # head size of the values; None: head_size

    def __str__(self) -> str:
        plain = Case()
        shape = f"{self.batch}x{self.heads}x{self.queries}x{self.keys}x{self.head_size}"
        parts = [shape, str(self.dtype).removeprefix("torch.")]
        for name in ("kv_heads", "causal", "window", "bias", "mask", "alibi", "softcap", "scale", "p", "valid", "lengths",
                     "layout", "sinks", "v_size"):  # fmt: skip
            value = getattr(self, name)
            if value != getattr(plain, name) and not (name == "kv_heads" and value == self.heads):
                parts.append(f"{name}={value}".replace(" ", ""))
        return "-".join(parts)


LEAVES = ("q", "k", "v", "bias", "sinks")


def _axes(case: Case, axes: str) -> tuple[int, ...]:
    sizes = {"b": case.batch, "h": case.heads, "q": case.queries, "k": case.keys}
    return tuple(sizes[axis] if axis in axes else 1 for axis in "bhqk")


def inputs(case: Case, generator: torch.Generator, device: str = "cpu") -> dict[str, Tensor]:
    """Fresh random inputs, with the gradients of both outputs ("dout", "dlse") and a seed."""

    v_size = case.v_size or case.head_size

    def normal(heads: int, length: int, tokens: int | None, size: int = case.head_size) -> Tensor:
        dtype = case.dtype
        if tokens is not None:
            return torch.randn(tokens, heads, size, generator=generator).to(dtype).to(device)
        shape = (case.batch, length, heads, size)
        if case.layout == "bhld":
            shape = (case.batch, heads, length, size)
        x = torch.randn(shape, generator=generator).to(dtype).to(device)
        return x.transpose(1, 2) if case.layout == "blhd" else x

    total = [None, None] if case.lengths is None else [sum(n) for n in zip(*case.lengths, strict=True)]
    out = {
        "q": normal(case.heads, case.queries, total[0]),
        "k": normal(case.kv_heads, case.keys, total[1]),
        "v": normal(case.kv_heads, case.keys, total[1], v_size),
        "dout": normal(case.heads, case.queries, total[0], v_size),
    }
    rows = (case.batch, case.heads, case.queries) if total[0] is None else (case.heads, total[0])
    out["dlse"] = torch.randn(rows, generator=generator).to(device)
    if case.bias is not None:
        out["bias"] = torch.randn(_axes(case, case.bias), generator=generator).to(case.dtype).to(device)
    if case.mask is not None:
        out["mask"] = (torch.rand(_axes(case, case.mask), generator=generator) < 0.7).to(device)
    if case.sinks:
        wide = torch.float64 if case.dtype == torch.float64 else F32
        out["sinks"] = torch.randn(case.heads, generator=generator).to(wide).to(device)
    if case.alibi:
        out["slopes"] = torch.rand(case.heads, generator=generator).to(device)
    if case.lengths is not None:
        for name, column in (("cu_q", 0), ("cu_k", 1)):
            ends = torch.tensor([0] + [n[column] for n in case.lengths]).cumsum(0)
            out[name] = ends.to(torch.int32).to(device)
    if case.valid is not None:
        out["valid"] = torch.tensor(case.valid, dtype=torch.int32, device=device)
    out["seed"] = torch.randint(-(2**62), 2**62, (), generator=generator).to(device)
    return out


def arguments(case: Case, tensors: dict[str, Tensor]) -> dict:
    """The keyword arguments of the public call."""
    bias = tensors.get("bias", tensors.get("mask"))
    out = {
        "causal": case.causal, "window": case.window, "bias": bias, "alibi_slopes": tensors.get("slopes"),
        "sinks": tensors.get("sinks"),
        "softcap": case.softcap, "scale": case.scale, "dropout_p": case.p,
        "seed": tensors["seed"] if case.p else None, "seqlens_k": tensors.get("valid"),
    }  # fmt: skip
    if case.lengths is not None:
        out["cu_seqlens_q"], out["cu_seqlens_k"] = tensors["cu_q"], tensors["cu_k"]
        out["max_seqlen_q"], out["max_seqlen_k"] = (max(n) for n in zip(*case.lengths, strict=True))
    return out


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {n: tensors[n].detach().to(dtype or tensors[n].dtype).requires_grad_() for n in LEAVES if n in tensors}


def with_gradients(out: Tensor, lse: Tensor | None, inputs: dict[str, Tensor], tensors: dict[str, Tensor]):
    """{"out", "lse", "dq", "dk", "dv", "dbias"}: the gradients of sum(out * dout) + sum(lse * dlse)."""
    outputs, given = [out], [tensors["dout"].to(out.dtype)]
    if lse is not None:
        outputs.append(lse)
        given.append(tensors["dlse"].to(lse.dtype))
    grads = torch.autograd.grad(outputs, list(inputs.values()), given, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs.values(), strict=True)]
    results = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
    return results | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def run(case: Case, tensors: dict[str, Tensor], **extra) -> dict[str, Tensor]:
    """The op itself, forward and backward, on whatever backend serves or is forced."""
    t = leaves(tensors)
    out, lse = fastlm.ops.attention(
        t["q"], t["k"], t["v"], **{**arguments(case, {**tensors, **t}), "return_lse": True, **extra}
    )
    return with_gradients(out, lse, t, tensors)


def _sequence(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask, slopes, sinks, keep, saved):
    """One sequence, q [H, Lq, D], k and v [Hkv, Lk, D]: (out, lse) by plain differentiable steps."""
    queries, keys = q.shape[1], k.shape[1]
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scale = 1 / math.sqrt(q.shape[2]) if case.scale is None else case.scale
    s = (q * scale) @ k.mT
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    if bias is not None:
        s = s + bias
    shift = 0 if case.causal == "upper_left" else keys - queries
    i = torch.arange(queries, device=q.device)[:, None] + shift
    j = torch.arange(keys, device=q.device)[None, :]
    if slopes is not None:
        s = s - slopes.to(s.dtype)[:, None, None] * (i - j).abs()
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if case.causal:
        visible &= j <= i
    if case.window is not None:
        left, right = case.window
        visible &= (j >= i - left) if left >= 0 else True
        visible &= (j <= i + right) if right >= 0 else True
    visible = visible.expand(s.shape)
    if mask is not None:
        visible = visible & mask
    s = s.masked_fill(~visible, float("-inf"))
    if sinks is not None:  # a key that all see, whose value is 0
        s = torch.cat([s, sinks[:, None, None].expand(-1, queries, 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :1]) if keys else v.new_zeros(v.shape[0], 1, v.shape[2])], 1)
        keep = None if keep is None else torch.cat([keep, torch.ones_like(s[..., :1], dtype=torch.bool)], -1)
    elif keys == 0:
        return torch.zeros_like(q) + 0 * q, s.sum(-1) - math.inf
    keep = 1.0 if keep is None else keep.to(s.dtype) * keep_scale(case.p)
    if saved is not None:
        return _FromSaved.apply(s, v, keep, saved)
    alive = (s > float("-inf")).any(-1)
    s = torch.where(alive[..., None], s, torch.zeros_like(s))
    lse = torch.logsumexp(s, -1)
    p = torch.where(alive[..., None], torch.softmax(s, -1), torch.zeros_like(s))
    return (p * keep) @ v, lse.masked_fill(~alive, float("-inf"))


class _FromSaved(torch.autograd.Function):
    """Softmax and product with v; the backward's row sum is that of dout * out, with out as it was stored."""

    @staticmethod
    def forward(ctx, s, v, keep, dtype):
        lse = torch.logsumexp(s, -1)
        p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        out = ((p * keep) @ v).to(dtype).to(s.dtype)
        ctx.save_for_backward(p, v, out)
        ctx.keep = keep
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        p, v, out = ctx.saved_tensors
        dp = (dout @ v.mT) * ctx.keep
        ds = p * (dp - (dout * out).sum(-1, keepdim=True) + dlse[..., None])
        return ds, (p * ctx.keep).mT @ dout, None, None


def compose(case: Case, tensors: dict[str, Tensor], wide: torch.dtype, leaf: torch.dtype | None = None):
    """The whole call through ``_sequence`` in ``wide``.

    On leaves of dtype ``leaf``; None: of their own dtype, to which out is rounded, and by what a fused op would save.
    """
    t = leaves(tensors, leaf)
    w = {name: value.to(wide) for name, value in t.items()}
    outs, lses = [], []
    count = len(case.lengths) if case.lengths is not None else case.batch
    for b in range(count):
        bias = mask = None
        if case.lengths is not None:
            (q0, q1), (k0, k1) = tensors["cu_q"][b : b + 2].tolist(), tensors["cu_k"][b : b + 2].tolist()
            q, k, v = w["q"][q0:q1].transpose(0, 1), *(w[n][k0:k1].transpose(0, 1) for n in "kv")
        else:
            last = case.keys if case.valid is None else case.valid[b]
            q, k, v = w["q"][b], w["k"][b, :, :last], w["v"][b, :, :last]
            pick = lambda x, b=b, last=last: x[b if x.shape[0] > 1 else 0][..., : last if x.shape[-1] > 1 else 1]
            bias = pick(w["bias"]) if "bias" in w else None
            mask = pick(tensors["mask"]) if "mask" in tensors else None
        keep = None
        if case.p:
            ids = torch.tensor([b], device=q.device)
            keep = dropout_mask((1, case.heads, q.shape[1], k.shape[1]), tensors["seed"], case.p, ids)[0]
        out, lse = _sequence(
            case, q, k, v, bias, mask, tensors.get("slopes"), w.get("sinks"), keep, None if leaf else tensors["q"].dtype
        )
        outs.append(out)
        lses.append(lse)
    if case.lengths is not None:
        out, lse = torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1)
    else:
        out, lse = torch.stack(outs), torch.stack(lses)
    return with_gradients(out.to(tensors["q"].dtype if leaf is None else leaf), lse, t, tensors)


def truth(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything in float64."""
    return compose(case, tensors, torch.float64, torch.float64)


def sdpa_serves(case: Case) -> bool:
    """Whether F.scaled_dot_product_attention computes this call on its flash path. (Of its lse nothing is seen.)"""
    aligned = case.causal in (False, "upper_left") or case.queries == case.keys
    plain = (
        case.sinks,
        case.v_size,
        case.window,
        case.bias,
        case.mask,
        case.alibi,
        case.softcap,
        case.p,
        case.valid,
        case.lengths,
    )
    return not any(plain) and aligned and case.queries > 0 and case.keys > 0


def theirs(case: Case, tensors: dict[str, Tensor], lse: bool = True) -> dict[str, Tensor]:
    """PyTorch's own result; ``lse`` False: its gradient does not enter."""
    if lse or not sdpa_serves(case):
        return compose(case, tensors if lse else {**tensors, "dlse": torch.zeros_like(tensors["dlse"])}, torch.float32)
    t = leaves(tensors)
    out = F.scaled_dot_product_attention(
        t["q"], t["k"], t["v"], is_causal=bool(case.causal), scale=case.scale, enable_gqa=case.heads != case.kv_heads
    )
    return with_gradients(out, None, t, tensors)


def draw(case: Case, generator: torch.Generator, device: str = "cpu") -> dict[str, Result]:
    """One draw of ``case`` for ``accuracy.assert_as_exact_as_torch``.

    Where SDPA serves the call it is the measure, and the gradient of lse, which it lacks, is left out.
    """
    tensors = inputs(case, generator, device)
    if sdpa_serves(case):
        tensors["dlse"].zero_()
    ours = run(case, tensors)
    real = truth(case, tensors)
    measure = compose(case, tensors, torch.float32)
    if sdpa_serves(case):
        measure |= theirs(case, tensors, lse=False)
    assert ours.keys() == measure.keys() == real.keys()
    # A gradient of a sink is a sum over all rows, of which a draw has one a head: pooling thousands takes minutes.
    return {name: Result(ours[name], measure[name], real[name]) for name in ours if name != "dsinks"}


FEATURES = (
    Case(),
    Case(causal="upper_left", keys=77),
    Case(causal=True, keys=77, layout="bhld"),
    Case(causal=True, queries=77, keys=33),  # the first queries see nothing
    Case(kv_heads=2, causal=True, p=0.1),
    Case(kv_heads=1, window=(9, 3), keys=77, scale=0.3),
    Case(window=(0, -1), causal="upper_left", keys=40, p=0.3),
    Case(bias="bhqk", causal=True),
    Case(bias="hq", keys=77, p=0.2),
    Case(bias="bk", kv_heads=2, queries=17, keys=129, window=(20, 20)),
    Case(bias="qk", softcap=3.0),
    Case(mask="qk", keys=77),
    Case(mask="bk", causal=True, p=0.1),
    Case(alibi=True, causal=True, keys=77),
    Case(alibi=True, window=(-1, 5), softcap=20.0, p=0.2, kv_heads=2),
    Case(valid=(0, 50), causal=True, queries=33, kv_heads=2, alibi=True, p=0.1),
    Case(valid=(65, 3), queries=1, heads=48, kv_heads=16, bias="bhk"),
    Case(lengths=((17, 17), (0, 5), (1, 40), (30, 0), (33, 33))),
    Case(lengths=((17, 20), (40, 33), (0, 0)), causal=True, kv_heads=2, p=0.1, alibi=True),
    Case(lengths=((64, 64), (31, 31)), window=(8, 8), softcap=5.0),
    Case(p=0.9, scale=0.0),
    Case(sinks=True, causal=True, queries=77, keys=33, kv_heads=2, p=0.1),  # the first queries see the sink alone
    Case(v_size=24, keys=77, bias="hk", layout="bhld"),
    Case(sinks=True, v_size=72, lengths=((17, 20), (40, 33), (3, 0), (0, 0)), window=(8, 8)),
    Case(sinks=True, queries=1, heads=48, kv_heads=16, keys=600, v_size=16, valid=(600, 3)),
)
RICH = Case(batch=1, causal=True, kv_heads=2, bias="hk", p=0.1)
MANY = Case(batch=8, heads=32, kv_heads=8, causal=True, bias="bhk", p=0.1)  # for short lengths
FEW = (  # few queries against many keys: heads that share k and v are worked on together, keys in pieces
    Case(heads=16, kv_heads=4, queries=6, keys=700, causal=True, bias="bhqk", p=0.2, valid=(700, 530)),
    Case(heads=16, kv_heads=4, queries=6, keys=900, window=(300, 2), mask="bhqk", alibi=True, softcap=5.0),
    Case(heads=16, kv_heads=2, queries=7, keys=530, mask="qk", p=0.1, valid=(530, 512), causal=True),
    Case(heads=12, kv_heads=2, lengths=((2, 600), (16, 520), (0, 3), (1, 1)), causal=True, p=0.1, window=(550, -1)),
)
DECODE = Case(batch=2, heads=64, kv_heads=64, head_size=16, causal=True)
LENGTHS = ((1, 1), (17, 129), (127, 128), (128, 127), (129, 17), (1, 1000), (1000, 1000), (0, 5), (5, 0), (64, 192))
HEAD_SIZES = (16, 40, 64, 72, 128, 256)


def grid(backend: str) -> list[Case]:
    """Every feature at one odd shape, every length, every head size; for kernels in every dtype, where it may matter."""
    few = backend == "reference"
    cases = [replace(f, dtype=(F32, BF16, F16)[n % 3]) for n, f in enumerate(FEATURES)]
    if not few:
        cases += [replace(f, dtype=(BF16, F32, F32)[n % 3]) for n, f in enumerate(FEATURES)]
        cases += [replace(f, dtype=d) for f in FEW for d in (F32, BF16)]
    for n, (q, k) in enumerate(LENGTHS):
        if few and q == 1 < k:
            continue
        for dtype in (F32, BF16) if not few else ((F32, BF16)[n % 2],):
            cases.append(replace(MANY if q * k < 6 else DECODE if q == 1 else RICH, queries=q, keys=k, dtype=dtype))
    if not few:
        cases += [replace(RICH, queries=70, keys=50, head_size=a, v_size=b, dtype=d)
                  for a, b, d in ((512, 512, F32), (300, 512, BF16), (192, 128, F32))]  # fmt: skip
    for n, d in enumerate(HEAD_SIZES if not few else ()):
        cases.append(replace(RICH, queries=129, keys=150, head_size=d, dtype=(F32, BF16)[n % 2]))
        cases.append(Case(queries=129, keys=129, causal=True, head_size=d, dtype=(BF16, F32, F16)[n % 3]))
    return cases


def full_grid() -> list[Case]:
    """The product of features, dtypes, lengths and head sizes, as far as a feature leaves the lengths open."""
    lengths = [(q, k) for q in (1, 17, 127, 128, 129, 1000) for k in (1, 17, 127, 128, 129, 1000)]
    open_ended = [f for f in FEATURES if f.valid is None and f.lengths is None]
    cases = [
        replace(f, queries=q, keys=k, head_size=HEAD_SIZES[(n + m) % 6], dtype=(F32, BF16, F16)[(n + m) % 3], batch=1)
        for n, f in enumerate(open_ended)
        for m, (q, k) in enumerate(lengths)
    ]
    return cases + [replace(f, head_size=h, dtype=d) for f in FEATURES for h in HEAD_SIZES for d in (F32, BF16, F16)]


def draw_mixed(
    case: Case, generator: torch.Generator, backends: tuple[str, str], device: str = "cpu"
) -> dict[str, Result]:
    """dq of a forward on one of two backends and the backward on the other, both ways round."""
    tensors = inputs(case, generator, device)
    real, measure, results = truth(case, tensors), compose(case, tensors, F32), {}
    q = tensors["q"].clone().requires_grad_()
    for forward, backward in (backends, backends[::-1]):
        with fastlm.backend.use(forward):
            out, lse = fastlm.ops.attention(
                q, tensors["k"], tensors["v"], causal=True, dropout_p=case.p, seed=tensors["seed"], return_lse=True
            )
        with fastlm.backend.use(backward):
            (dq,) = torch.autograd.grad((out, lse), q, (tensors["dout"], tensors["dlse"]))
        results[f"{forward} {backward}"] = Result(dq, measure["dq"], real["dq"])
    return results
