"""attention beside F.scaled_dot_product_attention as PyTorch picks it, each SDPA backend, FlexAttention and peers.

TFLOP/s by the field's convention: 4*B*H*L^2*D, halved when causal, the backward 2.5 times the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import fastlm
import torch
import torch.nn.functional as F
from fastlm.bench.harness import Case, Contender, Goal, Missing, Prepared, pytest_cases, ratio_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
FORWARD, BOTH = "forward", "forward+backward"


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor | None
    seed: Tensor


class Shape(NamedTuple):
    b: int
    h: int
    l: int
    d: int


def _inputs(shape: Shape, dtype: str, device: str, grad: bool, mask: str):
    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

        attend = None
        if mask == "random":
            attend = torch.rand(1, 1, shape.l, shape.l, generator=generator) < 0.9
        elif mask == "padded":
            attend = (torch.arange(shape.l) < shape.l * 3 // 4).expand(1, 1, shape.l, shape.l)
        leaves = [normal().requires_grad_(grad) for _ in range(3)]
        attend = attend.to(device) if attend is not None else None
        return Inputs(*leaves, normal(), attend, torch.tensor(seed + 1, device=device))

    return make


class Call(NamedTuple):
    causal: bool = False
    p: float = 0.0
    window: int = 0
    mask: str = ""


def _ours(i: Inputs, call: Call) -> Tensor:
    return fastlm.ops.attention(
        i.q, i.k, i.v, causal=call.causal, bias=i.mask, dropout_p=call.p, seed=i.seed if call.p else None,
        window=(call.window, 0) if call.window else None,
    )  # fmt: skip


def _ours_plain(i: Inputs, call: Call) -> Tensor:
    """Our own without the dropout, mask or window of the case: what those cost."""
    return fastlm.ops.attention(i.q, i.k, i.v, causal=call.causal)


def _window_mask(i: Inputs, call: Call) -> Tensor | None:
    if not call.window:
        return i.mask
    at = torch.arange(i.q.shape[2], device=i.q.device)
    behind = at[:, None] - at[None, :]
    return (behind >= 0) & (behind <= call.window)


def _sdpa(i: Inputs, call: Call) -> Tensor:
    mask = _window_mask(i, call)
    return F.scaled_dot_product_attention(i.q, i.k, i.v, mask, call.p, is_causal=call.causal and mask is None)


def _sdpa_backend(which: SDPBackend):
    def run(i: Inputs, call: Call) -> Tensor:
        if i.q.device.type == "cpu":
            raise Missing("the CPU has one fused SDPA backend, which SDPA picks by itself")
        with sdpa_kernel(which):
            return _sdpa(i, call)

    return run


def _flex(i: Inputs, call: Call) -> Tensor:
    if call.p:
        raise Missing("FlexAttention has no dropout")
    if i.q.device.type == "cpu" and i.q.requires_grad:
        raise Missing("FlexAttention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask

    rows = i.q.shape[2]
    block = None
    if call.window:
        block = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k <= call.window), None, None, rows, rows,
                                  device=i.q.device.type)  # fmt: skip
    elif call.causal:
        block = create_block_mask(lambda b, h, q, k: q >= k, None, None, rows, rows, device=i.q.device.type)
    elif i.mask is not None:
        dense = i.mask[0, 0]
        block = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, rows, rows, device=i.q.device.type)
    return _compiled_flex()(i.q, i.k, i.v, block_mask=block)


_FLEX: list[Any] = []


def _compiled_flex() -> Any:
    if not _FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        _FLEX.append(torch.compile(flex_attention))
    return _FLEX[0]


def _flash_attn(i: Inputs, call: Call) -> Tensor:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Missing(f"flash-attn is not installed here: {error}") from error
    if i.mask is not None:
        raise Missing("flash-attn takes no mask")
    q, k, v = (t.transpose(1, 2) for t in (i.q, i.k, i.v))
    window = (call.window, 0) if call.window else (-1, -1)
    return flash_attn_func(q, k, v, call.p, causal=call.causal, window_size=window).transpose(1, 2)


def _xformers(i: Inputs, call: Call) -> Tensor:
    try:
        import xformers.ops as xops
    except ImportError as error:
        raise Missing(f"xformers is not installed here: {error}") from error
    if i.mask is not None or call.window:
        raise Missing("this case's mask is not laid out as xformers needs it")
    bias = xops.LowerTriangularMask() if call.causal else None
    q, k, v = (t.transpose(1, 2) for t in (i.q, i.k, i.v))
    return xops.memory_efficient_attention(q, k, v, bias, call.p).transpose(1, 2)


def _contender(name: str, function: Any, call: Call, part: str, kind: str, checked: bool = True) -> Contender:
    def prepare(i: Inputs) -> Prepared:
        if name == "flex":  # the mask is prepared once, as its users do
            function(i, call)

        def forward() -> Any:
            with torch.no_grad():
                return function(i, call)

        def both() -> Any:
            out = function(i, call)
            return out, *torch.autograd.grad(out, (i.q, i.k, i.v), i.dout)

        return forward if part == FORWARD else both

    return Contender(name, prepare, kind, checked and call.p == 0)


def _error(call: Call, part: str):
    def error(result: Any, i: Inputs) -> float:
        with fastlm.backend.use("reference"):
            wide = Inputs(*(t.detach().double() if t is not None and t.is_floating_point() else t for t in i))
            leaves = [t.requires_grad_() for t in wide[:3]]
            out = _ours(wide, call)
            expected = [out.detach()]
            if part != FORWARD:
                expected += torch.autograd.grad(out, leaves, wide.dout)
        return ratio_error(result, expected)

    return error


def _case(shape: Shape, dtype: str, call: Call, part: str, device: str, goals: dict[str, float],
          smoke: bool = False) -> Case:  # fmt: skip
    flops = 4 * shape.b * shape.h * shape.l**2 * shape.d
    if call.causal:
        flops //= 2
    if call.window:
        flops = 4 * shape.b * shape.h * shape.l * min(call.window + 1, shape.l) * shape.d
    if part == BOTH:
        flops = int(flops * 3.5)
    contenders = [_contender("fastlm", _ours, call, part, "ours")]
    if call.p or call.mask or call.window:
        contenders.append(_contender("fastlm plain", _ours_plain, call, part, "self", checked=False))
    contenders.append(_contender("sdpa", _sdpa, call, part, "baseline"))
    if device != "cpu":
        for name, which in (("sdpa flash", SDPBackend.FLASH_ATTENTION), ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
                            ("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION)):  # fmt: skip
            contenders.append(_contender(name, _sdpa_backend(which), call, part, "baseline"))
    contenders.append(_contender("flex", _flex, call, part, "baseline"))
    contenders.append(_contender("flash-attn", _flash_attn, call, part, "peer"))
    contenders.append(_contender("xformers", _xformers, call, part, "peer"))
    words = [f"{'x'.join(map(str, shape))} {dtype}", "causal" if call.causal else "full"]
    words += [w for w in (f"p={call.p:g}" if call.p else "", f"window={call.window}" if call.window else "",
                          f"mask={call.mask}" if call.mask else "", part) if w]  # fmt: skip
    small = shape.b * shape.h * shape.l**2 <= 2**26  # float64 scores of the check must fit
    return Case(
        "attention", " ".join(words), _inputs(shape, dtype, device, part == BOTH, call.mask), tuple(contenders), 0,
        flops, dtype, device, {**shape._asdict(), **call._asdict(), "part": part}, "alone",
        _error(call, part) if small else None, TOLERANCE[dtype], tuple(Goal(k, v) for k, v in goals.items()), smoke,
    )  # fmt: skip


def _decode(heads: int, kv_heads: int, length: int, dtype: str, device: str, goals: dict[str, float]) -> Case:
    """One new token against a full cache: the time is that of reading the cache."""
    d = 64
    valid = torch.tensor([length], dtype=torch.int32, device=device)

    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])
        cache = normal(2, 1, kv_heads, length, d)
        q = normal(1, heads, 1, d)
        return Inputs(q, cache[0], cache[1], q, None, torch.tensor(seed))

    def ours(i: Inputs, call: Call) -> Tensor:
        return fastlm.ops.attention(i.q, i.k, i.v, causal=True, seqlens_k=valid)

    def sdpa(i: Inputs, call: Call) -> Tensor:
        k, v = i.k[:, :, :length], i.v[:, :, :length]
        return F.scaled_dot_product_attention(i.q, k, v, enable_gqa=heads != kv_heads)

    call = Call()
    contenders = (
        _contender("fastlm", ours, call, FORWARD, "ours"),
        _contender("sdpa", sdpa, call, FORWARD, "baseline"),
    )
    return Case(
        "attention", f"decode 1x{heads}/{kv_heads}x{length}x{d} {dtype}", make, contenders,
        2 * kv_heads * length * d * DTYPES[dtype].itemsize, 4 * heads * length * d, dtype, device,
        {"heads": heads, "kv_heads": kv_heads, "l": length, "d": d, "part": FORWARD}, "alone",
        _error(call, FORWARD), TOLERANCE[dtype], tuple(Goal(k, v) for k, v in goals.items()), length == 4096,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """The goals are those of the design's table for two AVX-512 cores, and for an H200-class GPU."""
    if device == "cpu":
        gpt, small, long = Shape(1, 12, 2048, 64), Shape(4, 12, 256, 64), Shape(1, 12, 4096, 64)
        causal, dropped = Call(causal=True), Call(causal=True, p=0.1)
        plain = "fastlm plain"
        for dtype, forward, both in (("float32", 1.15, 1.15), ("bfloat16", 2.0, 1.7)):
            yield _case(gpt, dtype, causal, FORWARD, device, {"sdpa": forward})
            yield _case(gpt, dtype, causal, BOTH, device, {"sdpa": both})
            yield _case(gpt, dtype, dropped, FORWARD, device, {plain: 1 / 1.2})
            yield _case(gpt, dtype, dropped, BOTH, device, {plain: 1 / 1.2})
        for dtype in ("float32", "bfloat16"):
            yield _case(gpt, dtype, Call(mask="random"), FORWARD, device, {"sdpa": 1.5, plain: 1 / 1.2})
            yield _case(gpt, dtype, Call(mask="random"), BOTH, device, {"sdpa": 1.5})
            yield _case(gpt, dtype, Call(mask="padded"), FORWARD, device, {"sdpa": 1.5})
            yield _case(gpt, dtype, Call(mask="padded"), BOTH, device, {"sdpa": 1.5})
        for dtype, forward in (("float32", 1.2), ("bfloat16", 1.5)):
            yield _case(small, dtype, causal, FORWARD, device, {"sdpa": forward}, smoke=True)
            yield _case(small, dtype, causal, BOTH, device, {"sdpa": 1.2}, smoke=True)
        yield _case(long, "float32", Call(causal=True, window=256), FORWARD, device, {plain: 5})
        yield _case(long, "float32", Call(causal=True, window=256), BOTH, device, {plain: 4})
        for heads, kv_heads in ((12, 12), (32, 8)):
            for length in (4096, 16384):
                for dtype in ("float32", "bfloat16"):
                    yield _decode(heads, kv_heads, length, dtype, device, {"sdpa": 1.0})
        return
    best = {"sdpa flash": 0.7, "sdpa cudnn": 0.7, "flex": 0.7, "flash-attn": 0.7}
    best_back = dict.fromkeys(best, 0.65)
    for d in (64, 128):
        for length in (1024, 2048, 4096, 8192, 16384):
            shape = Shape(max(1, 16384 // length), 2048 // d, length, d)
            for is_causal in (True, False):
                call = Call(causal=is_causal)
                smoke = length == 1024 and d == 64
                yield _case(shape, "bfloat16", call, FORWARD, device, best, smoke)
                yield _case(shape, "bfloat16", call, BOTH, device, best_back, smoke)
    shape = Shape(4, 16, 4096, 128)
    yield _case(shape, "bfloat16", Call(causal=True, p=0.1), FORWARD, device, {"fastlm plain": 0.7})
    yield _case(shape, "bfloat16", Call(causal=True, p=0.1), BOTH, device, {})
    yield _case(shape, "bfloat16", Call(causal=True, window=512), FORWARD, device, {})
    yield _case(shape, "bfloat16", Call(mask="random"), FORWARD, device, {"fastlm plain": 0.85})


test_bench = pytest_cases(cases)
