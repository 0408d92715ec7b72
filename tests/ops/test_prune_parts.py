"""prune_mask over several processes: the bits of one, by sums of counts alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastlm
import pytest
import torch
from fastlm import ops
from fastlm.ops import Part, prune_mask, prune_mask_parts
from fastlm.ops.prune_mask_parts import _Selection
from fastlm.reference import prune_mask as reference
from paths import python_path

WORKER = str(Path(__file__).with_name("prune_parts_worker.py"))
LOW = reference.LOWEST


@pytest.mark.slow  # two and four ranks
@pytest.mark.parametrize(("ranks", "kind"), [(2, "parts"), (4, "parts"), (2, "model")])
def test_ranks_make_the_masks_of_one(tmp_path, ranks, kind):
    command = [sys.executable, WORKER, str(tmp_path / "meeting")]
    out = dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": python_path()}
    )
    found = [subprocess.Popen([*command, str(rank), str(ranks), kind], **out) for rank in range(ranks)]
    try:
        said = [rank.communicate(timeout=400)[0] for rank in found]
        assert [rank.returncode for rank in found] == [0] * ranks, "\n".join(said)[-6000:]
        assert all(text.endswith("done\n") for text in said)
    finally:
        for rank in found:
            rank.kill()
            rank.communicate()


def _backends():
    support = fastlm.backend._support("prune_mask", "cpu", "count", torch.device("cpu"), (torch.zeros(1, 1).byte(),))
    return ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not support.ok, reason="no compiled kernel"))]


@pytest.mark.parametrize("backend", _backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "few", "equal"])
def test_three_passes_of_counts_find_the_threshold(backend, dtype, kind):
    few = torch.tensor([-torch.inf, -2.0, -0.0, 0.0, 1e-40, 1.0, torch.inf])
    make = {
        "normal": torch.randn,
        "few": lambda *shape: few[torch.randint(7, shape)],
        "equal": lambda *shape: torch.full(shape, 3.0),
    }[kind]
    x = [make(9, 43).to(dtype), make(8, 24).to(dtype).T, make(0, 5).to(dtype)]
    scale = [torch.rand(t.shape[-1]) + 0.5 for t in x]
    with fastlm.backend.use(backend):
        for sparsity in (0.0, 0.37, 1.0):
            for magnitude, scales in ((False, None), (True, None), (True, scale)):
                parts = [
                    Part(t, tuple(t.shape), (0,) * t.dim(), (), s) for t, s in zip(x, scales or [None] * 3, strict=True)
                ]
                for scope in ("tensor", "global"):
                    want = prune_mask(x, sparsity=sparsity, scope=scope, magnitude=magnitude, scale=scales)
                    found = _Selection(parts, magnitude, False).run(sparsity, scope == "global")
                    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
                    found = prune_mask_parts(parts, sparsity=sparsity, scope=scope, magnitude=magnitude)
                    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("backend", _backends())
def test_a_histogram_counts_every_score_once(backend):
    x = torch.randn(300, 41)
    with fastlm.backend.use(backend):
        run = lambda low, shift: fastlm.backend.run(
            "prune_mask", "spread", x.device, (x, None, False, low, shift, False)
        )
        found = run(LOW, 21)
        assert found.dtype == torch.int64
        assert found[0] == 0
        assert found[1:].sum() == x.numel()
        for bin in found[1:].nonzero().flatten().tolist():
            assert run(LOW + (bin << 21), 10)[1:].sum() == found[1 + bin]
        x[7, 3] = x[200, 40] = torch.nan
        assert run(LOW, 21)[0] == 2
        with pytest.raises(ValueError, match=r"score holds 2 NaN"):
            _Selection([Part(x, (300, 41), (0, 0))], False, False).run(0.5, False)


def test_counts_are_of_64_bits(monkeypatch):
    """Ranks that hold 2^31 scores each, by a group that only multiplies what one rank counted."""
    x, many = torch.arange(64).float().view(8, 8), 2**31
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, group: t.mul_(many))
    part = Part(x, (8, 8), (0, 0), ("many",))
    selection = _Selection([part], False, False)
    selection.sizes = [64 * many]
    monkeypatch.setattr(selection, "_own", lambda i, key, ties, equal, own: (key, ties, equal))
    cut = []
    run = selection._backend
    monkeypatch.setattr(selection, "_backend", lambda f, part, *a: cut.append(a) if f == "cut" else run(f, part, *a))
    selection.run(0.5, False)
    key = int(torch.tensor(31.0).view(torch.int32))
    assert cut == [(key, (key, many, many))]


def test_a_box_outside_its_whole_and_patterns_of_sums_are_refused():
    x = torch.ones(4, 8)
    with pytest.raises(
        ValueError, match=r"parts\[0\] is a box of shape \[4, 8\] at \[1, 0\]; it must lie in the whole"
    ):
        prune_mask_parts([Part(x, (4, 8), (1, 0))], sparsity=0.5)
    with pytest.raises(ValueError, match="whose sums are of whole tensors"):
        prune_mask_parts([Part(x, (4, 8), (0, 0))], sparsity=0.5, pattern="row")
    with pytest.raises(ValueError, match=r"boxes of parts\[0\] hold 32 scores"):
        prune_mask_parts([Part(x, (8, 8), (0, 0))], sparsity=0.5)
    with pytest.raises(ValueError, match=r"groups of 2:4 must not be cut"):
        prune_mask_parts([Part(x[:, :6], (4, 8), (0, 0))], pattern="2:4")
    assert prune_mask_parts([], sparsity=0.5) == []
    assert torch.equal(ops.prune_mask_parts([Part(x, (4, 8), (0, 0))], pattern="2:4")[0], prune_mask(x, pattern="2:4"))
