"""attention beside F.scaled_dot_product_attention as PyTorch picks it, each SDPA backend, FlexAttention and peers.

TFLOP/s by the field's convention: 4*B*H*L^2*D, halved when causal, the backward 2.5 times the forward. Bytes: q, k, v and
a mask in, the output out; in the backward all of these and the output's gradient in, three gradients out.

Results are compared with float64 on the last head, since no head sees another. A case with dropout checks our own
with its mask; PyTorch and its peers draw masks of their own, so their function is checked without dropout.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fastlm
import torch
import torch.nn.functional as F
from fastlm.bench import peers
from fastlm.bench.harness import DTYPES, Case, Contender, Goal, Missing, Prepared, pytest_cases, ratio_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
FORWARD, BOTH = "forward", "forward+backward"


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor | None
    seed: Tensor
    matrix: Tensor | None = None  # of the projection behind the op, [H*D, H*D]


class Shape(NamedTuple):
    b: int
    h: int
    l: int
    d: int


def _inputs(shape: Shape, dtype: str, device: str, grad: bool, mask: str, then: str):
    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

        attend = None
        if mask == "random":
            attend = torch.rand(1, 1, shape.l, shape.l, generator=generator) < 0.9
        elif mask == "padded":
            attend = (torch.arange(shape.l) < shape.l * 3 // 4).expand(1, 1, shape.l, shape.l)
        q, k, v = (normal().requires_grad_(grad) for _ in range(3))
        attend = attend.to(device) if attend is not None else None
        matrix = None
        if then:
            width = shape.h * shape.d
            matrix = (torch.randn(width, width, generator=generator) / width**0.5).to(device, DTYPES[dtype])
        return Inputs(q, k, v, normal(), attend, torch.tensor(seed + 1, device=device), matrix)

    return make


class Call(NamedTuple):
    causal: bool = False
    p: float = 0.0
    window: int = 0
    mask: str = ""


# A way to compute it takes inputs and a call, prepares once what its users prepare once (masks, compilation), and returns
# the function of q, k and v that is timed.
Function = Callable[[Tensor, Tensor, Tensor], Any]  # a tensor
Way = Callable[[Inputs, Call], Function]


def _ours(i: Inputs, call: Call) -> Function:
    return lambda q, k, v: fastlm.ops.attention(
        q, k, v, causal=call.causal, bias=i.mask if call.mask else None, dropout_p=call.p,
        seed=i.seed if call.p else None, window=(call.window, 0) if call.window else None,
    )  # fmt: skip


def _sdpa(i: Inputs, call: Call) -> Function:
    mask = i.mask if call.mask else None
    if call.window:
        at = torch.arange(i.q.shape[2], device=i.q.device)
        behind = at[:, None] - at[None, :]
        mask = (behind >= 0) & (behind <= call.window)
    causal = call.causal and mask is None
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, call.p, is_causal=causal)


def _sdpa_compiled(i: Inputs, call: Call) -> Function:
    return torch.compile(_sdpa(i, call))


def _sdpa_backend(which: SDPBackend) -> Way:
    def way(i: Inputs, call: Call) -> Function:
        function = _sdpa(i, call)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(which):
                return function(q, k, v)

        return run

    return way


def _flex(i: Inputs, call: Call) -> Function:
    if call.p:
        raise Missing("FlexAttention has no dropout")
    if i.q.device.type == "cpu" and i.q.requires_grad:
        raise Missing("FlexAttention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rules = []
    if call.causal:
        rules.append(lambda b, h, q, k: q >= k)
    if call.window:
        rules.append(lambda b, h, q, k: q - k <= call.window)
    if i.mask is not None:
        dense = i.mask[0, 0].contiguous()
        rules.append(lambda b, h, q, k: dense[q, k])
    block = None
    if rules:
        both = lambda b, h, q, k: functools.reduce(operator.and_, (rule(b, h, q, k) for rule in rules))
        block = create_block_mask(both, None, None, i.q.shape[2], i.k.shape[2], device=i.q.device.type)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block)


def _flash_attn(i: Inputs, call: Call) -> Function:
    flash = peers.load("flash-attn", "flash_attn")
    if call.mask:
        raise Missing("flash-attn takes no mask")
    window = (call.window, 0) if call.window else (-1, -1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flash.flash_attn_func(q, k, v, call.p, causal=call.causal, window_size=window).transpose(1, 2)

    return run


def _xformers(i: Inputs, call: Call) -> Function:
    xops = peers.load("xformers", "xformers.ops")
    if call.mask or call.window:
        raise Missing("this case's mask is not laid out as xformers needs it")
    bias = xops.LowerTriangularMask() if call.causal else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return xops.memory_efficient_attention(q, k, v, bias, call.p).transpose(1, 2)

    return run


def _calls(way: Way, i: Inputs, call: Call, part: str) -> Prepared:
    """What is timed: the output, and the gradients of q, k and v; in front of a projection where inputs have its matrix."""
    function, leaves = way(i, call), (i.q, i.k, i.v)

    def project(out: Tensor, matrix: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(out.shape[0] * out.shape[2], -1) @ matrix

    def forward() -> Any:
        with torch.no_grad():
            out = function(*leaves)
            if i.matrix is not None:
                project(out, i.matrix)
            return (out,)

    def both() -> Any:
        out = function(*leaves)
        if i.matrix is None:
            return out, *torch.autograd.grad(out, leaves, i.dout)
        dout = i.dout.transpose(1, 2).reshape(-1, len(i.matrix))
        return out, *torch.autograd.grad(project(out, i.matrix), leaves, dout)

    return forward if part == FORWARD else both


def _contender(name: str, way: Way, call: Call, part: str, kind: str) -> Contender:
    def without_dropout(_: Any, i: Inputs) -> float:
        calm = call._replace(p=0.0)
        return _error(calm, part)(_calls(way, i, calm, part)(), i)

    own_mask = name != "fastlm" and (call.p > 0 or kind == "self")  # a variant of our own is checked as itself
    return Contender(name, lambda i: _calls(way, i, call, part), kind, check=without_dropout if own_mask else None)


def _error(call: Call, part: str) -> Callable[[Any, Inputs], float]:
    """Largest error of the output, and of the gradients, on the last head: no head sees another."""

    def error(result: Any, i: Inputs) -> float:
        dout, head = i.dout.double(), i.q.shape[1] - 1
        if i.matrix is not None:
            flat = dout.transpose(1, 2).reshape(-1, len(i.matrix)) @ i.matrix.double().T
            dout = flat.view(dout.shape[0], dout.shape[2], head + 1, -1).transpose(1, 2)
        leaves = [t.detach()[:, head:].double().requires_grad_(part != FORWARD) for t in (i.q, i.k, i.v)]
        offset = (torch.arange(i.q.shape[0], device=i.q.device), head, 0, 0) if call.p else None
        with fastlm.backend.use("reference"):
            out: Any = fastlm.ops.attention(
                *leaves, causal=call.causal, bias=i.mask if call.mask else None, dropout_p=call.p,
                seed=i.seed if call.p else None, window=(call.window, 0) if call.window else None, offset=offset,
            )  # fmt: skip
            grads = torch.autograd.grad(out, leaves, dout[:, head:]) if part != FORWARD else ()
        return ratio_error([t[:, head:] for t in result], [out.detach(), *grads])

    return error


def _case(shape: Shape, dtype: str, call: Call, part: str, device: str, goals: dict[str, float],
          then: str = "", tiny: bool = False, compiled: bool = True) -> Case:  # fmt: skip
    """``tiny``: of the smoke pass alone. ``compiled``: beside what is compiled for each case, seconds at a time, as well."""
    b, h, l, d = shape
    pairs = l * min(call.window + 1, l) if call.window else l**2 // (2 if call.causal else 1)
    item = DTYPES[dtype].itemsize
    tensor, mask = b * h * l * d * item, l * l if call.mask else 0  # the mask is one byte an element, for all heads
    passes = 1 if part == FORWARD else 3.5
    flops = int(passes * 4 * b * h * d * pairs)
    nbytes = 4 * tensor + mask if part == FORWARD else 12 * tensor + 2 * mask
    if then:  # the projection's input, matrix and output; its backward is the input's gradient alone
        times = 1 if part == FORWARD else 2
        flops += times * 2 * b * l * (h * d) ** 2
        nbytes += times * (2 * tensor + (h * d) ** 2 * item)
    contenders = [_contender("fastlm", _ours, call, part, "ours")]
    if call.p or call.mask or call.window:
        plain = Call(causal=call.causal)  # our own without the dropout, mask or window of the case: what those cost
        contenders.append(_contender("fastlm plain", _ours, plain, part, "self"))
    contenders.append(_contender("sdpa", _sdpa, call, part, "baseline"))
    if compiled:
        contenders.append(_contender("torch.compile", _sdpa_compiled, call, part, "baseline"))
    if device != "cpu":  # a CPU has one fused backend, which SDPA picks by itself
        for name, which in (("sdpa flash", SDPBackend.FLASH_ATTENTION), ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
                            ("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION)):  # fmt: skip
            contenders.append(_contender(name, _sdpa_backend(which), call, part, "baseline"))
    if compiled:
        contenders.append(_contender("flex", _flex, call, part, "baseline"))
    contenders.append(_contender("flash-attn", _flash_attn, call, part, "peer"))
    contenders.append(_contender("xformers", _xformers, call, part, "peer"))
    words = [f"{'x'.join(map(str, shape))} {dtype}", "causal" if call.causal else "full"]
    words += [w for w in (f"p={call.p:g}" if call.p else "", f"window={call.window}" if call.window else "",
                          f"mask={call.mask}" if call.mask else "", part, f"then {then}" if then else "") if w]  # fmt: skip
    return Case(
        "attention", " ".join(words), _inputs(shape, dtype, device, part == BOTH, call.mask, then), tuple(contenders),
        nbytes, flops, dtype, device, {**shape._asdict(), **call._asdict(), "part": part},
        "before a matmul" if then else "alone", _error(call, part), TOLERANCE[dtype],
        tuple(Goal(k, v) for k, v in goals.items()), tiny, not tiny,
    )  # fmt: skip


def _decode(heads: int, kv_heads: int, length: int, dtype: str, device: str, goals: dict[str, float],
            d: int = 64, tiny: bool = False) -> Case:  # fmt: skip
    """One new token against a full cache: the time is that of reading the cache."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])
        cache = normal(2, 1, kv_heads, length, d)
        q = normal(1, heads, 1, d)
        return Inputs(q, cache[0], cache[1], q, None, torch.tensor(seed))

    def ours(i: Inputs, call: Call) -> Function:
        valid = torch.tensor([length], dtype=torch.int32, device=i.q.device)
        return lambda q, k, v: fastlm.ops.attention(q, k, v, causal=True, seqlens_k=valid)

    def sdpa(i: Inputs, call: Call) -> Function:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)

    def compiled(i: Inputs, call: Call) -> Function:
        return torch.compile(sdpa(i, call))

    def error(result: Any, i: Inputs) -> float:
        with fastlm.backend.use("reference"):
            return ratio_error(result, [fastlm.ops.attention(*(t.double() for t in i[:3]))])

    call = Call()
    contenders = (
        _contender("fastlm", ours, call, FORWARD, "ours"),
        _contender("sdpa", sdpa, call, FORWARD, "baseline"),
        *(() if tiny else (_contender("torch.compile", compiled, call, FORWARD, "baseline"),)),
    )
    return Case(
        "attention", f"decode 1x{heads}/{kv_heads}x{length}x{d} {dtype}", make, contenders,
        2 * kv_heads * length * d * DTYPES[dtype].itemsize, 4 * heads * length * d, dtype, device,
        {"heads": heads, "kv_heads": kv_heads, "l": length, "d": d, "part": FORWARD}, "alone",
        error, TOLERANCE[dtype], tuple(Goal(k, v) for k, v in goals.items()), tiny, not tiny,
    )  # fmt: skip


def _tiny(device: str) -> Iterator[Case]:
    """The smoke pass: each kind of call once, on shapes that cost nothing."""
    shape = Shape(1, 2, 67, 32)
    kinds = [Call(), Call(causal=True, p=0.1), Call(causal=True, window=16), Call(mask="random"), Call(mask="padded")]
    for call in kinds:
        yield _case(shape, "float32", call, BOTH, device, {}, tiny=True, compiled=False)
    yield _case(shape, "bfloat16", Call(causal=True), BOTH, device, {}, tiny=True, compiled=False)
    yield _case(shape, "float32", Call(causal=True), FORWARD, device, {}, tiny=True)
    yield _case(shape, "float32", Call(causal=True), BOTH, device, {}, "matmul", tiny=True, compiled=False)
    yield _decode(4, 2, 67, "float32", device, {}, d=32, tiny=True)
    yield _decode(4, 2, 67, "bfloat16", device, {}, d=32, tiny=True)


def cases(device: str) -> Iterator[Case]:
    """The goals are those of the design's table for two AVX-512 cores, and for an H200-class GPU."""
    yield from _tiny(device)
    if device == "cpu":
        gpt, small, long = Shape(1, 12, 2048, 64), Shape(4, 12, 256, 64), Shape(1, 12, 4096, 64)
        causal, dropped = Call(causal=True), Call(causal=True, p=0.1)
        plain = "fastlm plain"
        for dtype, forward, both in (("float32", 1.15, 1.15), ("bfloat16", 2.0, 1.7)):
            yield _case(gpt, dtype, causal, FORWARD, device, {"sdpa": forward})
            yield _case(gpt, dtype, causal, BOTH, device, {"sdpa": both})
            yield _case(gpt, dtype, dropped, FORWARD, device, {plain: 1 / 1.2})
            yield _case(gpt, dtype, dropped, BOTH, device, {plain: 1 / 1.2})
            yield _case(gpt, dtype, causal, FORWARD, device, {}, then="matmul")
            yield _case(gpt, dtype, causal, BOTH, device, {}, then="matmul")
        for dtype in ("float32", "bfloat16"):
            yield _case(gpt, dtype, Call(mask="random"), FORWARD, device, {"sdpa": 1.5, plain: 1 / 1.2})
            yield _case(gpt, dtype, Call(mask="random"), BOTH, device, {"sdpa": 1.5})
            yield _case(gpt, dtype, Call(mask="padded"), FORWARD, device, {"sdpa": 1.5})
            yield _case(gpt, dtype, Call(mask="padded"), BOTH, device, {"sdpa": 1.5})
        for dtype, forward in (("float32", 1.2), ("bfloat16", 1.5)):
            yield _case(small, dtype, causal, FORWARD, device, {"sdpa": forward})
            yield _case(small, dtype, causal, BOTH, device, {"sdpa": 1.2})
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
                yield _case(shape, "bfloat16", call, FORWARD, device, best)
                yield _case(shape, "bfloat16", call, BOTH, device, best_back)
    shape = Shape(4, 16, 4096, 128)
    yield _case(shape, "bfloat16", Call(causal=True, p=0.1), FORWARD, device, {"fastlm plain": 0.7})
    yield _case(shape, "bfloat16", Call(causal=True, p=0.1), BOTH, device, {})
    yield _case(shape, "bfloat16", Call(causal=True, window=512), FORWARD, device, {})
    yield _case(shape, "bfloat16", Call(mask="random"), FORWARD, device, {"fastlm plain": 0.85})
    yield _case(shape, "bfloat16", Call(causal=True), FORWARD, device, {}, then="matmul")
    yield _case(shape, "bfloat16", Call(causal=True), BOTH, device, {}, then="matmul")
    for heads, kv_heads in ((32, 32), (32, 8)):
        for length in (16384, 131072):
            yield _decode(heads, kv_heads, length, "bfloat16", device, {}, d=128)


# By kind: the odd shapes for the sanitizer, the real one for the profiler, the same for Triton's interpreter.
SHORT = {"odd": [(2, 4, 129, 64), (2, 4, 65, 128)], "profile": [(4, 16, 4096, 128)],
         "interpreted odd": [(1, 2, 65, 64)], "interpreted profile": [(1, 1, 128, 128)]}  # fmt: skip


def short(device: str, dtype: torch.dtype, kind: str) -> Iterator[Callable[[], Tensor]]:
    """Calls, each returning a loss, for the sanitizer and the profiler (fastlm.bench.short)."""
    for shape in SHORT[kind]:
        leaves = [torch.randn(*shape, device=device).to(dtype).requires_grad_() for _ in range(3)]

        def train(leaves: list[Tensor] = leaves, **options: Any) -> Tensor:
            out = fastlm.ops.attention(*leaves, **options)
            assert isinstance(out, Tensor)
            return out.float().square().sum()

        def generate(leaves: list[Tensor] = leaves, batch: int = shape[0], bias: Tensor | None = None) -> Tensor:
            q, k, v = (t.detach() for t in leaves)
            valid = torch.full((batch,), k.shape[2], dtype=torch.int32, device=device)
            return train([q[:, :, :1], k, v], causal=True, seqlens_k=valid, bias=bias)

        yield functools.partial(train, causal=True, dropout_p=0.1, seed=1)
        yield generate
        if "odd" in kind:  # the kernels that a plain call does not reach: a bias's gradient, packed sequences
            _, heads, length, _ = shape
            for rows, keys in ((length, length), (length, 1), (1, length)):
                bias = torch.randn(1, heads, rows, keys, device=device).to(dtype).requires_grad_()
                yield functools.partial(train, bias=bias, window=(50, 20), softcap=5.0)
            yield functools.partial(generate, bias=torch.randn(1, heads, 1, length, device=device).to(dtype))
            ends = torch.tensor([0, length // 3, length // 3, length], dtype=torch.int32, device=device)
            packed = [t.detach()[0].transpose(0, 1).requires_grad_() for t in leaves]
            yield functools.partial(train, packed, causal=True, cu_seqlens_q=ends, dropout_p=0.1, seed=1)


test_bench = pytest_cases(cases)
