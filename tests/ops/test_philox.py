"""Philox4x32-7 of PyTorch and of the C++ header, against Random123's published vectors and against each other."""

from __future__ import annotations

import pytest
import torch
from fastlm import _native
from fastlm.reference import philox

ALL = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]  # fmt: skip


def _reference(counter, key):
    words = philox.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    return tuple(int(w) for w in words)


@pytest.mark.parametrize("counter,key,expected", KNOWN)
def test_reference_gives_the_published_words(counter, key, expected):
    assert _reference(counter, key) == expected


@pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")
@pytest.mark.parametrize("counter,key,expected", KNOWN)
def test_header_gives_the_published_words(counter, key, expected):
    assert tuple(_native._C.philox4x32(counter, key)) == expected


@pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")
def test_header_and_reference_agree_on_random_counters():
    values = torch.randint(0, 2**32, (200, 6), generator=torch.Generator().manual_seed(1))
    words = torch.stack(philox.philox4x32(tuple(values[:, :4].T), tuple(values[:, 4:].T)), 1)
    for row, expected in zip(values.tolist(), words.tolist(), strict=True):
        assert _native._C.philox4x32(row[:4], row[4:]) == expected


def test_seven_rounds_are_not_six():
    assert (
        tuple(int(w) for w in philox.philox4x32((torch.tensor(0),) * 4, (torch.tensor(0),) * 2, rounds=6))
        != KNOWN[0][2]
    )


@pytest.mark.parametrize(
    "p,threshold", [(0.0, 0), (2**-17, 0), (0.1, 6554), (0.5, 32768), (1 - 2**-17, 65535), (0.9999999, 65535)]
)
def test_p_is_served_in_steps_and_never_drops_all(p, threshold):
    assert philox.threshold_of(p) == threshold
    assert philox.keep_scale(p) == 65536 / (65536 - threshold)


def test_key_takes_all_64_bits_of_negative_seeds():
    low, high = philox.key_of(torch.tensor(-1), "attention")
    key = (2**64 - 1) ^ philox.OP_KEY["attention"]
    assert (int(low), int(high)) == (key & ALL, key >> 32)
