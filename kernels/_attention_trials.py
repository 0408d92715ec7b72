"""What attention's kernels are compiled for offline, and the configurations that ``fastlm bench --tune`` compares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from fastlm.kernels import table
from fastlm.kernels._common import OfflineCase, recording
from fastlm.kernels.attention import backward, forward
from fastlm.reference.attention import Options
from torch import Tensor

_LIGHT = ("_bias_kernel", "_sum_kernel")
_TENSOR_CORES = ("_forward_kernel", "_keys_kernel", "_queries_kernel", "_bias_kernel")


def _recorded(
    arch: int,
    dtype: torch.dtype,
    size: int,
    *,
    causal: bool = False,
    p: float = 0.0,
    bias: str = "",
    rows: int = 2048,
    sinks: bool = False,
    thorough: bool = False,
) -> list[OfflineCase]:
    """Forward and backward of one call (forward alone of few rows, which decode); ``bias`` names the axes it has."""
    batch, heads, kv_heads, keys = 4, 16, 4 if rows < 17 else 16, 2048

    def drawn(heads: int, length: int) -> Tensor:
        return torch.empty(batch, length, heads, size, dtype=dtype, device="meta").transpose(1, 2)

    q, k, v = drawn(heads, rows), drawn(kv_heads, keys), drawn(kv_heads, keys)
    lse = torch.empty(batch, heads, rows, device="meta")
    added, shape = None, [0, 0, 0, 0]
    if bias:
        whole = dict(b=batch, h=heads, q=rows, k=keys)
        shape = [whole[axis] if axis in bias else 1 for axis in "bhqk"]
        added = torch.empty(shape, dtype=dtype, device="meta").expand(*whole.values())
    seed = torch.empty((), dtype=torch.int64, device="meta") if p else None
    valid = torch.empty(batch, dtype=torch.int32, device="meta") if rows < 17 else None
    sink = torch.empty(heads, device="meta") if sinks else None
    options = Options(
        bias=added, seed=seed, seqlens_k=valid, sinks=sink, causal=int(causal), scale=size**-0.5, p=p
    )  # fmt: skip
    kind = table.DTYPE_NAME[dtype]
    name = f"{size} {kind}{' causal' if causal else ''}{' dropout' if p else ''}{' bias ' + bias if bias else ''}"
    name += " sinks" if sinks else ""
    flops = 4 * batch * heads * rows * keys * size // (2 if causal else 1)
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    cores = _TENSOR_CORES if dtype != torch.float32 else ()
    direction = "attention" if rows > 16 else "attention decode"
    with recording(
        arch, f"{direction} {name}", bytes_moved=moved, flops=flops, tensor_cores=cores, thorough=thorough
    ) as recorded:
        forward(q, k, v, *options, dtype)
    cases = list(recorded)
    if rows > 16:
        with recording(
            arch, f"{direction} {name} backward", bytes_moved=2 * moved + q.numel() * q.element_size(),
            flops=flops * 5 // 2, tensor_cores=cores, thorough=thorough,
        ) as recorded:  # fmt: skip
            backward(q, None, q, k, v, q, lse, lse, *options, bool(bias), shape)
        cases += recorded
    return cases


def _light(cases: list[OfflineCase], light: bool = True) -> list[OfflineCase]:
    return [replace(c, thorough=not light or c.kernel.__name__ not in _LIGHT) for c in cases]


def offline_cases() -> list[OfflineCase]:
    """Head sizes 64, 128 and 256 in bfloat16 and float32: causal with dropout, with a bias, at 128 plain; decoding.
    512 as well, causal with dropout, with a bias, and decoding; decoding at 64 with sinks. Not the
    bias in bfloat16 at 512 whose gradient is summed over batch or heads: ``_bias_kernel`` keeps two left operands of 512 in
    registers and spills 172 bytes there (sm_90: 164), and with 4 or 16 warps more.

    At 64 in bfloat16 also a bias whose gradient is summed over queries, over keys, over both, over heads. Each kernel is compiled
    by the default tests in one call at least: ``_LIGHT`` names those that a plain call does not reach. Grouped heads change
    only the grid and run-time arguments: they compile to the same thing.
    """
    cases: list[OfflineCase] = []
    for arch in (80, 90):
        for dtype in (torch.bfloat16, torch.float32):
            brief = dtype == torch.float32
            for size in (64, 128, 256):
                cases += _recorded(arch, dtype, size, causal=True, p=0.1, thorough=brief or size != 128)
                cases += _light(_recorded(arch, dtype, size, bias="hqk"), light=size == 64 and not brief)
                if size == 128:
                    cases += _recorded(arch, dtype, size, causal=True, thorough=True)
                    cases += _recorded(arch, dtype, size, causal=True, rows=1, thorough=brief)
            cases += _recorded(arch, dtype, 512, causal=True, p=0.1, thorough=True)
            cases += _recorded(arch, dtype, 512, causal=True, rows=1, thorough=True)
            cases += _recorded(arch, dtype, 512, bias="hqk" if brief else "bhqk", thorough=True)
            cases += _recorded(arch, dtype, 64, causal=True, rows=1, sinks=True, thorough=True)
        for axes in ("hk", "hq", "h", "bqk"):
            cases += _light(_recorded(arch, torch.bfloat16, 64, bias=axes))
    dtypes = {name: dtype for dtype, name in table.DTYPE_NAME.items()}
    for kernel in CANDIDATES:  # what --tune measured, by the calls that it was measured on
        for rule in table.rules(kernel):
            if rule.get("exact"):
                p, bias = 0.1 if "dropout" in rule["features"] else 0.0, "hqk" if "bias" in rule["features"] else ""
                cases += _recorded(
                    rule["arch"], dtypes[rule["dtype"][0]], rule["size"], causal=True, p=p, bias=bias,
                    rows=1 if kernel == "attention_decode" else 2048, thorough=True,
                )  # fmt: skip
    return cases + [case for arch in (80, 90) for case in _featured(arch)]


def _featured(arch: int) -> list[OfflineCase]:
    """What the other cases lack, one small call each: every option, float16, head sizes that are padded, odd strides.

    Not float32 at a padded head size: on sm_80 dq's kernel spills 8 bytes up to 128, and 64 bytes at 192, where that of dk
    and dv spills 116.
    """
    batch, heads, length = 2, 4, 512

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ends = meta(batch + 1, dtype=torch.int32)
    packed = Options(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=length, max_seqlen_k=length)
    mask = meta(1, 1, length, length, dtype=torch.bool).expand(batch, heads, -1, -1)
    plain, whole = torch.bfloat16, meta(batch, heads, length, length)
    calls: tuple[tuple[str, int, torch.dtype, Options], ...] = (
        ("float16", 128, torch.float16, Options(causal=1)),
        ("alibi window", 64, plain, Options(causal=1, window_left=256, alibi_slopes=meta(heads, dtype=torch.float32))),
        ("softcap", 128, plain, Options(causal=1, softcap=30.0)),
        ("mask", 64, plain, Options(bias=mask)),
        ("whole bias", 64, plain, Options(bias=whole)),
        ("packed", 128, plain, packed._replace(causal=1)),
        ("size 32", 32, plain, Options(causal=1)),
        ("size 16", 16, plain, Options()),
        ("size 96", 96, plain, Options(causal=1)),
        ("odd strides", 64, plain, Options(causal=1)),
        ("gaps", 64, plain, Options(causal=1)),
        ("sinks", 64, plain, Options(causal=1, sinks=meta(heads, dtype=torch.float32))),
        ("values of 128", 192, plain, Options(causal=1)),
    )
    cases: list[OfflineCase] = []
    for name, size, dtype, options in calls:
        options = options._replace(scale=size**-0.5)
        gap = dict(zip(("odd strides", "gaps"), (1, 2))).get(name, 0)  # rows of a size + 1; every second element
        last = size + 1 if gap == 1 else size * max(gap, 1)
        x = meta(batch, length, heads, last, dtype=dtype)[..., :: max(gap, 1)][..., :size].transpose(1, 2)
        lse = meta(batch, heads, length, dtype=torch.float32)
        v = meta(batch, length, heads, 128, dtype=dtype).transpose(1, 2) if "values of" in name else x
        if options.cu_seqlens_q is not None:
            x = v = meta(batch * length, heads, size, dtype=dtype)
            lse = meta(heads, batch * length, dtype=torch.float32)
        given: dict[str, Any] = dict(
            bytes_moved=4 * x.numel() * x.element_size(), flops=4 * batch * heads * length * length * size,
            tensor_cores=_TENSOR_CORES if dtype != torch.float32 else (), thorough=True,
        )  # fmt: skip
        with recording(arch, f"attention {name}", **given) as recorded:
            forward(x, x, v, *options, dtype)
        cases += recorded
        added = options.bias is not None and options.bias.dtype != torch.bool
        with recording(arch, f"attention {name} backward", **given) as recorded:
            backward(v, None, x, x, v, v, lse, lse, *options, added, [batch, heads, length, length] if added else [])
        cases += recorded
    return cases


def _configs(*tiles: tuple[int, int, int, int]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(("m", "n", "num_warps", "num_stages"), tile)) for tile in tiles)


# By kernel and padded head size: (queries, keys, warps, stages) to be timed beside the standing choice, which is the
# largest that does not spill. Some of these spill on sm_80, or with a bias; the clock decides.
CANDIDATES = {
    "attention_forward": {
        64: _configs(
            (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 3)
        ),
        128: _configs(
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3)
        ),
        256: _configs((128, 32, 8, 2), (128, 64, 8, 1), (64, 64, 4, 1), (64, 64, 8, 2), (64, 32, 4, 2)),
    },
    "attention_backward_kv": {
        64: _configs((64, 64, 4, 1), (64, 64, 8, 1), (64, 128, 8, 1), (32, 64, 4, 2), (32, 128, 8, 1), (64, 64, 4, 2)),
        128: _configs((64, 64, 8, 1), (32, 64, 8, 1), (32, 64, 4, 1), (64, 128, 8, 1), (16, 64, 4, 2), (32, 128, 8, 1)),
        256: _configs((32, 32, 8, 1), (16, 32, 8, 1), (16, 64, 8, 1), (16, 32, 4, 1), (32, 64, 8, 1)),
    },
    "attention_backward_q": {
        64: _configs((64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 4, 2), (64, 128, 8, 1), (128, 32, 8, 2)),
        128: _configs((64, 64, 4, 1), (64, 64, 8, 1), (128, 64, 8, 1), (128, 32, 8, 2), (64, 64, 8, 2)),
        256: _configs((64, 32, 8, 1), (64, 64, 8, 1), (32, 64, 8, 1), (64, 16, 4, 1)),
    },
    "attention_decode": {
        size: _configs((16, 128, 4, 2), (16, 64, 4, 3), (16, 32, 4, 3), (16, 64, 2, 3), (16, 128, 8, 2))
        for size in (64, 128, 256)
    },
}


def candidates() -> list[table.Trial]:
    """For ``fastlm bench --tune``: bfloat16, causal, head sizes 128, 64 and 256, plain, with dropout, with a bias; decoding."""
    trials = []
    for size in (128, 64, 256):
        for features in (frozenset(), frozenset({"dropout"}), frozenset({"bias"})):
            for kernel in ("attention_forward", "attention_backward_kv", "attention_backward_q"):
                trials.append(trial(kernel, size, torch.bfloat16, features, CANDIDATES[kernel][size]))
        trials.append(
            trial("attention_decode", size, torch.bfloat16, frozenset(), CANDIDATES["attention_decode"][size])
        )
    return trials


def trial(
    kernel: str, size: int, dtype: torch.dtype, features: frozenset[str], configs: tuple[dict[str, Any], ...],
    length: int = 2048, heads: int = 16,
) -> table.Trial:  # fmt: skip
    """A call of two sequences; decoding is one query of each against a cache of sixteen times ``length``."""
    batch, decode = 2, kernel == "attention_decode"
    keys = 16 * length if decode else length
    kv_heads = max(heads // 4, 1) if decode else heads
    p = 0.1 if "dropout" in features else 0.0

    def arguments(device: str) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
            return drawn.transpose(1, 2)

        q, k, v, dout = (
            normal(batch, n, h, size)
            for n, h in ((1 if decode else length, heads), (keys, kv_heads), (keys, kv_heads), (length, heads))
        )
        added, shape = None, [0, 0, 0, 0]
        if "bias" in features:
            shape = [1, heads, length, length]
            added = normal(1, length, heads, length).expand(batch, -1, -1, -1)
        seed = torch.tensor(1, device=device) if p else None
        valid = torch.full((batch,), keys, dtype=torch.int32, device=device) if decode else None
        options = Options(bias=added, seed=seed, seqlens_k=valid, causal=1, scale=size**-0.5, p=p)
        if "backward" not in kernel:
            return (q, k, v, *options, dtype)
        return (dout, None, q, k, v, *forward(q, k, v, *options, dtype), *options, added is not None, shape)

    back = "backward" in kernel
    element = torch.empty((), dtype=dtype).element_size()
    rows = (1 if decode else length) * heads
    flops = 4 * batch * rows * keys * size // (1 if decode else 2)
    return table.Trial(
        op="attention", direction="backward" if back else "forward", kernel=kernel, dtype=table.DTYPE_NAME[dtype], size=size,
        features=features, configs=configs, arguments=arguments, flops=flops * 5 // 2 if back else flops,
        bytes_moved=2 * batch * size * element * (rows + keys * kv_heads) * (2 if back else 1),
        compared=None if back else 2,  # not `rest`: what rounding took from lse is each kernel's own
    )  # fmt: skip
