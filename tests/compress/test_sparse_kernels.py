"""sparse_24: which pruned layers get torch's 2:4 weight, and the way back. The kernels themselves are a GPU's."""

from __future__ import annotations

import pytest
import torch
from fastlm import compress
from fastlm.compress import sparse_kernels, timing
from torch import Tensor, nn

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 64)).bfloat16()
    compress.prune(layers, pattern="2:4", include=["0", "2"])
    compress.prune(layers, 0.25, include=["1"])
    return layers


def test_only_what_is_2_4_and_measured_faster_changes_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []

    def sparse(weight: Tensor) -> Tensor:  # in the place of torch's, which a GPU alone makes
        taken.append(weight)
        return weight.clone()

    times = iter([(2e-3, 1e-3), (1e-3, 3e-3)])
    monkeypatch.setattr(sparse_kernels, "_no_gpu", lambda device: "")
    monkeypatch.setattr(sparse_kernels, "_sparse", sparse)
    monkeypatch.setattr(timing, "alternate", lambda one, two, device: (one(), two()) and next(times))
    made = model()
    before = {name: t.clone() for name, t in made.state_dict().items()}
    first, second, third = compress.sparse_24(made, rows=8)
    assert (first.module, first.dense_s, first.sparse_s, first.why) == ("0", 2e-3, 1e-3, "")
    assert second.why.startswith("it is not 2:4: ")
    assert third.why == "2:4 would be slower: 3 ms against 1 ms dense, with 8 rows"
    assert [len(taken), made[0].weight.requires_grad, made[2].weight.requires_grad] == [2, False, True]
    assert compress.dense_24(made) == ["0"]
    assert made[0].weight.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())
    assert compress.dense_24(made) == []


def test_what_stays_dense_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    assert {row.why for row in compress.sparse_24(made)} == {"it lies on cpu; the kernels are a GPU's"}
    monkeypatch.setattr(sparse_kernels, "_no_gpu", lambda device: "")
    assert "only cuda tensors" in compress.sparse_24(made)[0].why.lower()  # torch's word
    assert compress.sparse_24(made.float())[0].why == "its weight is float32; the kernels are for float16 and bfloat16"
    with pytest.raises(ValueError, match="rows is 0; it must be at least 1"):
        compress.sparse_24(made, rows=0)
    with pytest.raises(ValueError, match="no pruned layer"):
        compress.sparse_24(nn.Linear(4, 4))


@pytest.mark.skipif(not GPU, reason="torch's 2:4 kernels need a GPU of sm_80 or newer")
def test_torchs_kernels_compute_what_the_dense_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "alternate", lambda one, two, device: (one(), two()) and (2.0, 1.0))
    layer = nn.Linear(256, 128).cuda().half()
    compress.prune(layer, pattern="2:4")
    x = torch.randn(32, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        wanted = layer(x)
        assert compress.sparse_24(layer, rows=32)[0].why == ""
        torch.testing.assert_close(layer(x), wanted, rtol=1e-2, atol=1e-2)
        compress.dense_24(layer)
        assert torch.equal(layer(x), wanted)
