"""Loads the compiled core ``fastlm._C`` and packs tensors for it.

``import torch`` comes first here, so that torch's OpenMP runtime serves both.
"""

from __future__ import annotations

import torch

try:
    import fastlm._C as _C
except ModuleNotFoundError as error:
    if error.name != "fastlm._C":
        raise
    _C = None  # type: ignore[assignment]

ABSENT = (0, 0, 0, 0, 0, 0)
DTYPE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.bool: 3,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.int8: 6,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str:
    """Why the compiled core cannot be used, or "" if it can."""
    if _C is None:
        return (
            "fastlm was installed without its compiled core (no C++ compiler at install time, or FASTLM_NATIVE=OFF); "
            "install g++ or clang++ and install fastlm again"
        )
    return ""


def missing_cuda() -> str:
    """Why the CUDA kernels cannot be used, or ""."""
    if _C is None:
        return missing()
    if not _C.cuda_archs():
        return "fastlm was built without CUDA (install again with FASTLM_CUDA=ON and nvcc on the PATH)"
    if _C.cuda_device_count() == 0:
        return "no CUDA driver or device was found"
    return ""


# --- how tensors cross the border: {address, dtype, stride0, stride1, stride2, stride3}, see csrc/fastlm.h ---
# The caller keeps every tensor alive until the call returns: an address holds nothing.
Packed = tuple[int, int, int, int, int, int]
Sizes = tuple[int, int, int, int]


def scalar(t: torch.Tensor | None) -> Packed:
    """A tensor of one element."""
    return ABSENT if t is None else (t.data_ptr(), DTYPE[t.dtype], 0, 0, 0, 0)


def vector(t: torch.Tensor | None) -> Packed:
    """A tensor [columns]; absent if None or empty."""
    if t is None or t.shape[0] == 0:
        return ABSENT
    return (t.data_ptr(), DTYPE[t.dtype], 0, 0, 0, t.stride(0))


def per_row(t: torch.Tensor | None, sizes: Sizes) -> Packed:
    """A tensor [rows] or one element for all rows; absent if None or empty."""
    if t is None or t.numel() == 0:
        return ABSENT
    step = t.stride(0) if t.dim() else 0
    return (t.data_ptr(), DTYPE[t.dtype], step * sizes[1] * sizes[2], step * sizes[2], step, 0)


def packed_rows(t: torch.Tensor, sizes: Sizes) -> Packed:
    """A contiguous tensor of the shape behind ``sizes``, such as an output; absent if empty, but its dtype is told."""
    if t.numel() == 0:
        return (0, DTYPE[t.dtype], 0, 0, 0, 0)
    _, n1, n2, columns = sizes
    return (t.data_ptr(), DTYPE[t.dtype], n1 * n2 * columns, n2 * columns, columns, 1)


def rows(
    shape: torch.Size, tensors: tuple[torch.Tensor | None, ...], rowscale: torch.Tensor | None = None
) -> tuple[Sizes, list[Packed], Packed, list[torch.Tensor]]:
    """Packs ``tensors`` of ``shape`` [..., columns] and ``rowscale`` of shape[:-1], with any strides, for one call.

    Returns ({n0, n1, n2, columns}, the packed tensors, the packed rowscale, copies to keep alive): the leading axes
    collapsed to at most three for all tensors together. Only where four or more axes remain are copies made.
    """
    columns = shape[-1]
    given = [t for t in tensors if t is not None]
    if rowscale is not None:
        given.append(rowscale)
    if all(t.is_contiguous() for t in given):
        sizes: Sizes = (1, 1, shape.numel() // max(columns, 1), columns)
        scale = ABSENT if rowscale is None else (rowscale.data_ptr(), DTYPE[rowscale.dtype], 0, 0, 1, 0)
        packed = [ABSENT if t is None else (t.data_ptr(), DTYPE[t.dtype], 0, 0, columns, 1) for t in tensors]
        return sizes, packed, scale, []
    axes = collapse(shape[:-1], [t.stride() for t in given])
    if len(axes) > 3:
        copies = [None if t is None else t.contiguous() for t in tensors]
        scale_copy = None if rowscale is None else rowscale.contiguous()
        sizes, packed, scale, _ = rows(shape, tuple(copies), scale_copy)
        return sizes, packed, scale, [t for t in (*copies, scale_copy) if t is not None]
    axes = [(1, (0,) * len(given))] * (3 - len(axes)) + axes
    (n0, s0), (n1, s1), (n2, s2) = axes
    packed, i = [], 0
    for t in tensors:
        if t is None:
            packed.append(ABSENT)
        else:
            packed.append((t.data_ptr(), DTYPE[t.dtype], s0[i], s1[i], s2[i], t.stride(-1)))
            i += 1
    scale = ABSENT
    if rowscale is not None:
        scale = (rowscale.data_ptr(), DTYPE[rowscale.dtype], s0[i], s1[i], s2[i], 0)
    return (n0, n1, n2, columns), packed, scale, []


def copied(tensors: tuple[tuple[str, torch.Tensor | None], ...], rowscale: torch.Tensor | None) -> str:
    """Why ``rows`` copies these tensors whole, for ``serves_*``; empty where it does not."""
    given = [t for _, t in tensors if t is not None]
    if rowscale is not None:
        given.append(rowscale)
    if not given or all(t.is_contiguous() for t in given):
        return ""
    if len(collapse(given[0].shape[:-1], [t.stride() for t in given])) <= 3:
        return ""
    names = ", ".join(name for name, t in tensors if t is not None)
    return f"copied whole first: {names}, whose leading axes together are no three axes of one stride each"


def collapse(shape: torch.Size, strides: list[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    """The axes of ``shape`` as (size, stride of each tensor), those merged that are one axis in every tensor."""
    axes: list[tuple[int, tuple[int, ...]]] = []
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        steps = tuple(s[axis] for s in strides)
        if axes and all(outer == inner * size for outer, inner in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * size, steps)
        else:
            axes.append((size, steps))
    return axes
