"""What the Triton kernels share: casts that also round in the interpreter, strides of leading axes, launches.

The interpreter computes on bfloat16 as if it were uint16 and truncates casts to it. So every kernel loads, converts to
float32, computes there, and casts with ``to_dtype``, which rounds by hand when interpreted; on a GPU it is the cast.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def to_dtype(value, dtype: tl.constexpr):
    """A float32 tensor in ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        half = tl.add(((bits >> 16) & 1), 0x7FFF, sanitize_overflow=False)
        bits = tl.where(value == value, tl.add(bits, half, sanitize_overflow=False), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def widened(value):
    """A loaded tensor as float32; the interpreter's own cast takes bfloat16's denormals for other numbers."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """A float32 tensor rounded to the values that ``dtype`` has, as float32."""
    if dtype == tl.float32:
        return value
    return to_dtype(value, dtype).to(tl.float32)


@triton.jit
def line_offset(row_R, n1, n2, s0, s1, s2, AXES: tl.constexpr, VEC: tl.constexpr):
    """Offset of the first element of each row, int64: row = (i0 * n1 + i1) * n2 + i2; AXES 1: it is i2. Strides in VEC."""
    if AXES == 1:
        return row_R.to(tl.int64) * s2 * VEC
    i2_R = row_R % n2
    rest_R = row_R // n2
    base_R = i2_R.to(tl.int64) * s2 * VEC
    base_R += (rest_R % n1).to(tl.int64) * s1 * VEC
    return base_R + (rest_R // n1).to(tl.int64) * s0 * VEC


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Merges neighbouring axes of ``shape`` wherever the strides of every tensor allow it; drops axes of size one.

    Returns the sizes and, per tensor, the strides of the axes that remain, at least one.
    """
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(k[-1] == s[axis] * size for k, s in zip(kept, strides)):
            sizes[-1] *= size
            for k, s in zip(kept, strides):
                k[-1] = s[axis]
        else:
            sizes.append(size)
            for k, s in zip(kept, strides):
                k.append(s[axis])
    if not sizes:
        return [1], [[0] for _ in strides]
    return sizes, kept


@dataclass(frozen=True)
class OfflineCase:
    """One kernel as one call launches it, for the offline checks; ``offline_cases()`` of a kernel file returns a list of them.

    ``signature`` maps every argument to its type ("*bf16", "i32", "fp32", "constexpr"), ``constexprs`` the latter to values,
    ``divisible`` names the arguments known to be multiples of 16. ``bytes_moved`` and ``flops`` are those of the whole ``call``.
    """

    call: str
    arch: int
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, int]  # num_warps, num_stages, and enable_fp_fusion where it is off
    programs: int
    bytes_moved: int
    flops: int
    tensor_cores: bool  # it must use them
    call_on_tensor_cores: bool  # the call's flops are theirs, whichever of its kernels this is
    thorough: bool  # compiled by `make test-all` only

    @property
    def name(self) -> str:
        return f"{self.call}: {self.kernel.__name__.strip('_')}"


class _Recording(threading.local):
    arch: int | None = None
    cases: list[OfflineCase] | None = None
    call: dict[str, Any]
    tensor_cores: Collection[str]


_recording = _Recording()


@contextmanager
def recording(
    arch: int, call: str, *, bytes_moved: int, flops: int, tensor_cores: Collection[str] = (), thorough: bool = False
) -> Iterator[list[OfflineCase]]:
    """Inside, ``launch`` writes down what it would launch on a GPU of compute capability ``arch``, and launches nothing.

    Call the op's own ``forward`` or ``backward`` on tensors of the meta device inside: what is compiled offline is then what
    a GPU would run. ``tensor_cores`` names the kernels that must use them.
    """
    _recording.arch, _recording.cases, _recording.tensor_cores = arch, [], tensor_cores
    _recording.call = dict(call=call, arch=arch, bytes_moved=bytes_moved, flops=flops, thorough=thorough,
                           call_on_tensor_cores=bool(tensor_cores))  # fmt: skip
    try:
        yield _recording.cases
    finally:
        _recording.arch = _recording.cases = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, or under ``recording`` a note of it. Constants go by keyword, all else in order."""
    if _recording.cases is None:
        kernel[grid](*args, **constants)
        return
    options: dict[str, int] = {n: constants.pop(n) for n in _OPTIONS if n in constants}
    signature, constexprs, divisible = {}, dict(constants), []
    values = dict(zip(kernel.arg_names, args)) | constants
    for parameter in kernel.params:  # as Triton's own launcher specialises them
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_POINTER[value.dtype]}"
            divisible.append(name)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    _recording.cases.append(
        OfflineCase(
            kernel=kernel, signature=signature, constexprs=constexprs, divisible=tuple(divisible), options=options,
            programs=math.prod(grid), tensor_cores=kernel.__name__ in _recording.tensor_cores, **_recording.call,
        )
    )  # fmt: skip


def arch_of(device: torch.device) -> int:
    """Compute capability of a CUDA device as major*10 + minor; that of the recording; the interpreter passes for 90."""
    if device.type == "cuda":
        return _cuda_arch(device)
    return _recording.arch or 90


@functools.cache
def _cuda_arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_POINTER = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
