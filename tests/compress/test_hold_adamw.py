"""compress.hold on PyTorch's fused AdamW: its masked weights go through one op, with the numbers of step and mask apart."""

from __future__ import annotations

import copy
import weakref

import fastlm
import numpy as np
import pytest
import torch
from fastlm import compress, ops
from torch import Tensor, nn


def made(shape: tuple[int, int] = (32, 48), **options) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(shape[0], shape[1]), nn.Tanh(), nn.Linear(shape[1], shape[0]))
    compress.prune(model, 0.5, include=["0"])
    groups = [{"params": [p], "weight_decay": 0.3 * (p.dim() > 1)} for p in model.parameters()]
    return model, torch.optim.AdamW(groups, lr=1e-2, fused=True, **options)


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    for t in (model[0].weight, *(optimizer.state[model[0].weight][k] for k in ("exp_avg", "exp_avg_sq"))):
        ops.apply_mask_(t, model[0].weight_mask)


def test_two_hundred_steps_are_those_of_step_and_mask_to_the_bit():
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("PyTorch adds no product fused on this processor")
    (model, optimizer), (other, plain) = made(), made()
    compress.hold(optimizer, model)
    for step in range(200):
        gradients(model, step)
        gradients(other, step)
        with fastlm.backend.watched() as seen:
            optimizer.step()
        assert ("prune_mask", fastlm.backend.which("prune_mask", torch.ones(4, 8), sparsity=0.5).backend) in seen
        by_hand(other, plain)
        assert all(p.grad is not None for p in model.parameters())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], plain.state[b][key])


def test_state_is_saved_loaded_and_made_as_pytorchs():
    (model, optimizer), (other, plain) = made(), made()
    compress.hold(optimizer, model)
    for step in range(3):
        gradients(model, step)
        optimizer.step()
        gradients(other, step)
        by_hand(other, plain)
    mine, its = optimizer.state_dict(), plain.state_dict()
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in its["state"].items()}
    again, resumed = made()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(mine))
    compress.hold(resumed, again)
    for m, o in ((model, optimizer), (again, resumed)):
        gradients(m, 7)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_weight_without_a_gradient_and_other_options_are_held_too():
    for options in ({}, {"amsgrad": True}, {"maximize": True}):
        model, optimizer = made((20, 12), **options)
        compress.hold(optimizer, model)
        gradients(model, 1)
        optimizer.step()
        model[0].weight.grad = None
        optimizer.step()
        gone = ~ops.mask_to_bool(model[0].weight_mask, 20)
        assert not model[0].weight.detach()[gone].view(torch.int32).any()
        for value in optimizer.state[model[0].weight].values():
            assert value.dim() == 0 or not value[gone].any()


def test_a_closure_and_a_grad_scaler():
    (model, optimizer), (other, plain) = made(), made()
    compress.hold(optimizer, model)
    x = torch.randn(8, 32)

    def loss(m: nn.Module) -> Tensor:
        return (m(x) - x).square().mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss(model).backward()
        return loss(model)

    optimizer.step(closure)
    loss(other).backward()
    by_hand(other, plain)
    assert torch.allclose(model[0].weight, other[0].weight, atol=1e-6)
    for m, o, hand in ((model, optimizer, False), (other, plain, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        for _ in range(45):  # overflows at first
            o.zero_grad()
            scaler.scale(loss(m) * 2.0**80).backward()
            for p in m.parameters():
                p.grad.mul_(2.0**-80)
            scaler.step(o)
            scaler.update()
            if hand:
                for t in (m[0].weight, *(v for v in o.state[m[0].weight].values() if v.dim())):
                    ops.apply_mask_(t, m[0].weight_mask)
    assert 2 < float(plain.state[other[0].weight]["step"]) < 45  # some were skipped
    assert float(optimizer.state[model[0].weight]["step"]) == float(plain.state[other[0].weight]["step"])
    assert torch.allclose(model[0].weight, other[0].weight, atol=1e-5)
    assert not model[0].weight.detach()[~ops.mask_to_bool(model[0].weight_mask, 32)].any()


def test_no_gradient_outlives_the_caller_s_and_numbers_of_numpy_are_numbers():
    model, optimizer = made()
    compress.hold(optimizer, model)
    for group in optimizer.param_groups:
        group["lr"] = np.float32(1e-3)
    gradients(model, 0)
    kept = weakref.ref(model[0].weight.grad)
    optimizer.step()
    assert model[0].weight.grad is kept()
    optimizer.zero_grad()
    assert kept() is None
