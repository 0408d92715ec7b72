"""2:4 weights packed: back to the bit, and value for value and bit for bit what torch's conversion makes of them."""

from __future__ import annotations

import pytest
import torch
from fastlm import compress, ops
from torch.sparse import _semi_structured_conversions as theirs


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, part: float = 1.0) -> torch.Tensor:
    """2:4, and of what stays only a part not 0."""
    draw = torch.randn(rows, columns)
    keep = ops.mask_to_bool(ops.prune_mask(draw, pattern="2:4", magnitude=True), columns)
    keep &= torch.rand(rows, columns) < part
    draw = draw * 40 if not dtype.is_floating_point else draw
    return (draw * keep).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 12), (2, 17), (7, 3), (4, 0), (0, 8), (33, 130)])
def test_packed_and_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for part in (1.0, 0.5, 0.0):
        w = weight(*shape, dtype, part)
        assert compress.check_24(w) == 0
        values, metadata = compress.pack_24(w)
        groups = -(-shape[1] // 4)
        assert (values.shape, metadata.shape) == ((shape[0], 2 * groups), (shape[0], -(-groups // 2)))
        assert (values.dtype, metadata.dtype) == (dtype, torch.uint8)
        assert torch.equal(compress.unpack_24(values, metadata, shape[1]), w)
    strided = torch.stack((w, w), -1)[..., 0]
    assert torch.equal(compress.unpack_24(*compress.pack_24(strided), shape[1]), w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("part", [1.0, 0.6, 0.0])
def test_values_and_metadata_are_torch_s(dtype: torch.dtype, part: float) -> None:
    w = weight(64, 128, dtype, part)
    values, metadata = compress.pack_24(w)
    wanted, reordered = theirs.sparse_semi_structured_from_dense_cutlass(w)
    assert torch.equal(values, wanted)
    mine = metadata.view(reordered.dtype)  # bytes in order are the low bits first
    places = theirs._calculate_meta_reordering_scatter_offsets(*mine.shape, reordered.dtype, "cpu")
    assert torch.equal(torch.empty_like(mine).view(-1).scatter_(0, places, mine.reshape(-1)), reordered.view(-1))
    assert torch.equal(
        theirs.sparse_semi_structured_to_dense_cutlass(wanted, reordered), compress.unpack_24(values, metadata)
    )


def test_what_is_not_2_4_is_told() -> None:
    w = weight(4, 16)
    w[2, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    w[3, :4] = 1.0
    assert compress.check_24(w) == 2
    with pytest.raises(
        ValueError, match=r"3 values that are not 0 in columns 8 to 11 of row 2; .* \(2 groups have more\)"
    ):
        compress.pack_24(w)
    for call in (compress.check_24, compress.pack_24):
        with pytest.raises(ValueError, match="two dimensions"):
            call(torch.zeros(4))
    values, metadata = compress.pack_24(weight(4, 16))
    for given, word in (
        ((values[:, :3], metadata), "they must be"),
        ((values, metadata[:, :1]), r"it must be torch\.uint8 \[4, 2\]"),
        ((values, metadata.int()), "metadata is torch.int32"),
        ((values, metadata, 12), "columns is 12; of 4 groups it must be 13 to 16"),
        ((values, torch.zeros_like(metadata)), "name one place of a group twice"),
    ):
        with pytest.raises(ValueError, match=word):
            compress.unpack_24(*given)


def test_a_pruned_layer_packs_into_half_its_bytes_and_one_in_thirty_two() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    compress.prune(model, pattern="2:4")
    values, metadata = compress.pack_24(model[0].weight)
    assert values.numel() * 4 + metadata.numel() == 48 * 64 * 4 * (1 / 2 + 1 / 32)
    assert torch.equal(compress.unpack_24(values, metadata), model[0].weight)
