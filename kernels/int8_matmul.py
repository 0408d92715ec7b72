"""int8_matmul in Triton: the 8-bit product with scales, bias and activation in one kernel, and weight-only products.

    a int8:       y = activation((float(a @ b) * a_scale) * b_scale + bias)     sums in int32 on the tensor cores, exact
    a floating:   y = activation(a @ (b * b_scale) + bias)                      b becomes a's dtype tile by tile, in registers
    backward:     da = (dout * b_scale) @ b.T                                   scales along the summed axis multiply dout

Each step of the first line is rounded on its own: the kernel is compiled without fused multiply-adds, so that the bits are
those of every other backend. int8 fits bfloat16 and float16 exactly. float32 runs as three products of TF32, whose error is
float32's; a scaled dout of 16 bits as two of bfloat16.

Bytes moved: a, b and y once, since the tiles of a strip read what their neighbours have put into L2; b is a quarter of
float32's. Operations 2 M N K, on tensor cores in all kinds. Up to 16 rows are bound by b's bytes, many by operations.

Any strides, nothing copied. Fastest where K lies apart by one element in both, as in ``x @ weight.t()``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastlm.backend import YES, Support
from fastlm.kernels import table
from fastlm.kernels._common import TL_DTYPE, OfflineCase, arch_of, launch, recording
from fastlm.kernels._int8_matmul_kernel import int8_matmul_kernel
from fastlm.reference.int8_matmul import group_size
from torch import Tensor

_STRIP = 8
_NAME = {**table.DTYPE_NAME, torch.int8: "i8"}


def _support(device: torch.device, dtypes: dict[str, torch.dtype | None]) -> Support:
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in table.DTYPE_NAME and dtype not in (torch.int8, torch.int32):
            return Support(False, f"the triton kernel takes no {str(dtype).removeprefix('torch.')}, which {name} is")
    if device.type == "cuda" and arch_of(device) < 80:
        return Support(False, f"the triton kernels need compute capability 8.0; {device} has {arch_of(device) / 10}")
    return YES


def serves_forward(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype,
) -> Support:  # fmt: skip
    """int8, float32, bfloat16 and float16, any strides; float64 nowhere."""
    found = _support(a.device, {"a": a.dtype, "bias": None if bias is None else bias.dtype, "the result": out_dtype})
    apart = [n for n, t, axis in (("a", a, 1), ("b", b, 0)) if t.shape[axis] > 1 and t.stride(axis) != 1]
    if found.ok and apart:
        return Support(True, f"slower: along K the elements of {' and '.join(apart)} lie apart (weight.t()'s do not)")
    return found


def serves_backward(
    dout: Tensor, b: Tensor, b_scale: Tensor | None, a_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> Support:
    """As the forward."""
    return _support(dout.device, {"the gradient": dout.dtype, "a": a_dtype, "bias": bias_dtype})


def forward(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As ``fastlm.reference.int8_matmul.forward``."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    if out.numel():
        _launch(a, b, a_scale, b_scale, None, bias, activation, out, group_size(b, b_scale))
    return out


def backward(
    dout: Tensor, b: Tensor, b_scale: Tensor | None, a_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """As ``fastlm.reference.int8_matmul.backward``."""
    da, dbias = dout.new_empty(0), dout.new_empty(0)
    if a_dtype is not None:
        da = dout.new_empty((dout.shape[0], b.shape[0]), dtype=a_dtype)
        if da.numel():
            _launch(dout, b.t(), None, None, b_scale, None, "none", da, group_size(b, b_scale))
    if bias_dtype is not None:
        dbias = dout.sum(0, dtype=torch.float32).to(bias_dtype)
    return da, dbias


def _launch(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, k_scale: Tensor | None, bias: Tensor | None,
    activation: str, out: Tensor, group: int,
) -> None:  # fmt: skip
    """``group``: elements of K that share a row of b_scale [G, N], or columns of the result one of k_scale [G, K]; 0: all."""
    (m, k), n = a.shape, b.shape[1]
    config = _config(
        a, b, m, {"backward": k_scale is not None, "group": bool(group), "activation": activation != "none"}
    )
    bm, bn, bk = config["rows"], config["columns"], config["depth"]
    if group and b_scale is not None:
        bk = min(bk, group)
    if group and k_scale is not None:
        bn = min(bn, group)
    steps = lambda scale: (0, 0) if scale is None else scale.stride() if scale.dim() == 2 else (0, scale.stride(0))
    with torch.cuda.device_of(a):
        launch(
            int8_matmul_kernel, (triton.cdiv(m, bm) * triton.cdiv(n, bn),),
            a, b, a_scale, b_scale, k_scale, bias, out, m, n, k, *a.stride(), *b.stride(),
            0 if a_scale is None else a_scale.stride(0), *steps(b_scale), *steps(k_scale),
            0 if bias is None else bias.stride(0),
            kind=tl.int8 if a.dtype == torch.int8 else TL_DTYPE[a.dtype], GROUP=group if b_scale is not None else 0,
            K_GROUP=group if k_scale is not None else 0, ACTIVATION=activation, EVEN=k % bk == 0, BM=bm, BN=bn, BK=bk,
            STRIP=_STRIP, num_warps=config["num_warps"], num_stages=config["num_stages"], enable_fp_fusion=False,
        )  # fmt: skip


def _config(a: Tensor, b: Tensor, rows: int, features: dict[str, bool]) -> dict[str, Any]:
    apart = (a.shape[1] > 1 and a.stride(1) != 1) or (b.shape[0] > 1 and b.stride(0) != 1)
    named = frozenset(name for name, on in {**features, "apart": apart}.items() if on)
    return table.config("int8_matmul", arch=arch_of(a.device), dtype=_NAME[a.dtype], size=rows, features=named)


# ------------------------------------------------------------------------------------------------------- offline cases


def offline_cases() -> list[OfflineCase]:
    """Calls that reach every rule of the table: each dtype at few and many rows, scales by row, column and group, epilogues."""
    cases: list[OfflineCase] = []
    for arch in (80, 90):
        for rows in (16, 64, 4096):
            cases += _offline(arch, rows, torch.int8)
            for dtype in (torch.bfloat16, torch.float32):
                cases += _offline(arch, rows, dtype)
        for activation in ("gelu", "gelu_tanh", "silu"):
            cases += _offline(arch, 4096, torch.int8, activation)
        cases += _offline(arch, 4096, torch.int8, integers=True)
        cases += _offline(arch, 4096, torch.int8, turned=True)
        for group in (32, 128):
            cases += _offline(arch, 4096, torch.bfloat16, group=group)
            cases += _offline(arch, 4096, torch.bfloat16, group=group, back=True)
        cases += _offline(arch, 16, torch.bfloat16, group=32)
        for dtype in (torch.bfloat16, torch.float32):
            cases += _offline(arch, 4096, dtype, back=True)
    return cases


def _offline(
    arch: int, rows: int, dtype: torch.dtype, activation: str = "none", group: int = 0, integers: bool = False,
    turned: bool = False, back: bool = False,
) -> list[OfflineCase]:  # fmt: skip
    k = n = 4096
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
    whole = dtype == torch.int8
    a, weight = empty(rows, k, dtype=dtype), empty(n, k, dtype=torch.int8)
    out_dtype = torch.int32 if integers else torch.bfloat16 if whole else dtype
    a_scale = empty(rows) if whole and not integers else None
    b_scale = None if integers else empty(n, k // group).t() if group else empty(n)
    kind = f"{_NAME[dtype]}{f' groups of {group}' if group else ''}{' turned' if turned else ''}"
    name = f"int8_matmul {'backward ' if back else ''}{rows}x{k}x{n} {kind} {'int32' if integers else activation}"
    moved = rows * k * a.element_size() + n * k + rows * n * out_dtype.itemsize
    cores = {"int8_matmul_kernel"}
    with recording(arch, name, bytes_moved=moved, flops=2 * rows * n * k, tensor_cores=cores) as recorded:
        if back:
            backward(empty(rows, n, dtype=dtype), weight.t(), b_scale, dtype, None)
        else:
            b = weight if turned else weight.t()
            forward(a, b, a_scale, b_scale, None if integers else empty(n), activation, out_dtype)
    return recorded
