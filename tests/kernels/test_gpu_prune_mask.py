"""prune_mask on a GPU, by the Triton kernels: the reference's bits, many programs, and no wait for the device."""

from __future__ import annotations

import fastlm
import pytest
import torch
from fastlm import ops

pytestmark = pytest.mark.gpu("prune_mask", "triton")
OPTIONS = [
    {"sparsity": 0.5}, {"sparsity": 0.9}, {"sparsity": 0.5, "scope": "row"}, {"pattern": "2:4"}, {"pattern": "4:8"},
    {"pattern": "3:7"}, {"pattern": "2:4t"}, {"pattern": "row", "sparsity": 0.5}, {"pattern": "column", "sparsity": 0.5},
    {"pattern": "block:8x8", "sparsity": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_are_the_references(options, dtype):
    for x in (torch.randn(516, 1004), torch.randint(0, 3, (64, 88)) - 1.0, torch.zeros(64, 64)):
        x = x.to(dtype)
        with fastlm.backend.use("reference"):
            wanted = ops.prune_mask(x, magnitude=True, **options)
        with fastlm.backend.use("triton"):
            found = ops.prune_mask(x.cuda(), magnitude=True, **options)
            turned = ops.prune_mask(x.cuda().T.contiguous().T, magnitude=True, **options)
        assert torch.equal(found.cpu(), wanted)
        assert torch.equal(turned.cpu(), wanted)


def test_large_tensors_nan_and_wanda():
    x, scale = torch.randn(4096, 8192), torch.rand(8192)
    with fastlm.backend.use("triton"):
        gpu = x.cuda()
        for options in ({"sparsity": 0.7}, {"sparsity": 0.7, "magnitude": True, "scale": scale.cuda()}):
            mask = ops.prune_mask(gpu, **options)
            assert int(ops.mask_count(mask)) == x.numel() - round(0.7 * x.numel())
            cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            with fastlm.backend.use("cpu"):
                assert torch.equal(mask.cpu(), ops.prune_mask(x, **cpu))
        gpu[0, 5] = float("nan")
        keep = ops.mask_to_bool(ops.prune_mask(gpu, sparsity=1 / x.numel()), 8192)
        assert int((~keep).sum()) == 1
        assert not keep[0, 5]
        with pytest.raises(ValueError, match="1 NaN"):
            ops.prune_mask(gpu, sparsity=0.5, check=True)


def test_nothing_waits_for_the_device():
    weight = torch.randn(512, 1000, device="cuda").bfloat16()
    with fastlm.backend.use("triton"):
        ops.prune_mask(weight, sparsity=0.5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            mask = ops.mask_and(ops.prune_mask(weight, sparsity=0.5), ops.prune_mask(weight, pattern="2:4"))
            ops.apply_mask_(weight, mask)
            ops.mask_count(mask)
            ops.bool_to_mask(ops.mask_to_bool(mask, 1000))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_adamw_is_the_cpus_but_for_last_bits_and_waits_for_nothing(dtype):
    w, g, m = (torch.randn(517, 1003).to(dtype) for _ in range(3))
    state = [w, g, m, torch.rand(517, 1003).to(dtype), torch.tensor(6.0)]
    keep = torch.rand(517, 1003) < 0.5
    options = {"lr": 1e-2, "weight_decay": 0.1}
    with fastlm.backend.use("triton"):
        found, mask = [t.cuda() for t in state], ops.bool_to_mask(keep.cuda())
        scale, skip = torch.full((1,), 2.0, device="cuda"), torch.zeros(1, device="cuda")
        ops.masked_adamw_(*([t.clone()] for t in found), [mask], grad_scale=scale, found_inf=skip, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.masked_adamw_(*([t] for t in found), [mask], grad_scale=scale, found_inf=skip, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with fastlm.backend.use("cpu"):
        ops.masked_adamw_(*([t] for t in state), [mask.cpu()], grad_scale=scale.cpu(), found_inf=skip.cpu(), **options)
    rtol = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # an ulp or so
    for a, b in zip(found, state, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=1e-7)
    for i in (0, 2, 3):
        assert not found[i].cpu()[~keep].count_nonzero()


def test_parts_of_a_tensor_are_counted_and_cut():
    from fastlm.ops.prune_mask_parts import Part, _Selection

    for x in (torch.randn(516, 1004), torch.randint(0, 3, (64, 88)) - 1.0):
        part = Part(x.cuda(), tuple(x.shape), (0, 0))
        for sparsity in (0.0, 0.37, 1.0):
            with fastlm.backend.use("triton"):
                (found,) = _Selection([part], False, False).run(sparsity, False)
            with fastlm.backend.use("reference"):
                assert torch.equal(found.cpu(), ops.prune_mask(x, sparsity=sparsity))
