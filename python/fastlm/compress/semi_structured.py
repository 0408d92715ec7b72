"""2:4 weights without their zeros: of each four along a row the two values that stay, and four bits that say which.

    values    [N, 2 * ceil(K / 4)]    the weight's dtype: half its bytes
    metadata  [N, ceil(K / 8)]        uint8; the low four bits are of the first group of four, the high of the second

Four bits are two numbers of two bits, where the first value stood and where the second did, the first in the low two. They are
those of torch's semi-structured tensors (torch.sparse, and CUTLASS below it) before these reorder them for tensor cores.
This is a format for files: one row at a time a dense product in int8 reads less, so there is no kernel over it here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_24(weight: Tensor) -> int:
    """How many groups of four along the rows of weight [N, K] hold more than two values that are not 0; 0 for a 2:4 weight.

    A last group of fewer than four counts as if zeros followed. Raises ValueError unless weight has two dimensions.
    """
    return int((_groups(weight) != 0).sum(-1).gt(2).sum())


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values and metadata of a 2:4 weight [N, K], of any dtype, K and strides.

    Raises ValueError, naming a row and its columns, where more than two of four are not 0.
    """
    groups = _groups(weight)
    here = groups != 0
    if len(bad := here.sum(-1).gt(2).nonzero()):
        row, group = bad[0].tolist()
        raise ValueError(
            f"pack_24: weight has {int(here[row, group].sum())} values that are not 0 in columns {4 * group} to "
            f"{4 * group + 3} of row {row}; 2:4 has at most 2 ({len(bad)} groups have more)"
        )
    m0, m1, _, m3 = here.unbind(-1)
    # where fewer than two stay, zeros are taken along: by torch's choice among them
    first = (~m0 & m1).long() + 2 * (~m0 & ~m1).long()
    second = ((m0 & m1) | (~m0 & ~m1) | m3).long() + 2 * ((~m0 & m1) | ~m1).long()
    values = groups.gather(-1, torch.stack((first, second), -1)).flatten(1)
    bits = F.pad(first | second << 2, (0, groups.shape[1] % 2))
    return values.contiguous(), (bits[:, ::2] | bits[:, 1::2] << 4).to(torch.uint8)


def unpack_24(values: Tensor, metadata: Tensor, columns: int | None = None) -> Tensor:
    """The weight [N, columns] of what ``pack_24`` gave; without ``columns`` as wide as the groups, twice the values.

    Raises ValueError where shapes do not belong together, or metadata name one place twice.
    """
    if values.dim() != 2 or metadata.dim() != 2 or values.shape[1] % 2:
        raise ValueError(
            f"unpack_24: values are {list(values.shape)} and metadata {list(metadata.shape)}; they must be [N, 2 * groups] and "
            f"[N, ceil(groups / 2)]"
        )
    rows, count = values.shape[0], values.shape[1] // 2
    if metadata.dtype != torch.uint8 or tuple(metadata.shape) != (rows, (count + 1) // 2):
        raise ValueError(
            f"unpack_24: metadata is {metadata.dtype} {list(metadata.shape)}; for values of {list(values.shape)} it must be "
            f"torch.uint8 {[rows, (count + 1) // 2]}"
        )
    width = 4 * count if columns is None else columns
    if not 4 * count - 4 < width <= 4 * count and count:
        raise ValueError(
            f"unpack_24: columns is {columns}; of {count} groups it must be {4 * count - 3} to {4 * count}"
        )
    both = metadata.long()
    bits = torch.stack((both & 15, both >> 4), -1).flatten(1)[:, :count]
    places = torch.stack((bits & 3, bits >> 2), -1)
    if (places[..., 0] == places[..., 1]).any():
        raise ValueError("unpack_24: metadata name one place of a group twice")
    out = values.new_zeros(rows, count, 4).scatter_(-1, places, values.unflatten(1, (count, 2)))
    return out.flatten(1)[:, :width].contiguous()


def _groups(weight: Tensor) -> Tensor:
    """[N, ceil(K / 4), 4]."""
    if weight.dim() != 2:
        raise ValueError(f"2:4: weight is {list(weight.shape)}; it must have two dimensions, [N, K]")
    return F.pad(weight.detach(), (0, -weight.shape[1] % 4)).unflatten(1, (-(-weight.shape[1] // 4), 4))
