"""How ops meet PyTorch: left out where nothing looks on, the dispatcher must change nothing, and whoever looks must see."""

from __future__ import annotations

import importlib
import importlib.util
import threading

import fastlm
import pytest
import torch
from fastlm import _torch
from fastlm.ops import _library
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def calls() -> dict[str, tuple[list[Tensor], object]]:
    """By op: its differentiable inputs, and a call of them that gives one tensor."""
    x, residual, weight = leaf(3, 40), leaf(3, 40), leaf(40)
    q, k, v = (leaf(2, 2, 9, 8) for _ in range(3))
    turned, angles = leaf(2, 2, 9, 8), torch.randn(9, 4)
    return {
        "dropout_add_norm": (
            [x, residual, weight],
            lambda x, r, w: fastlm.ops.dropout_add_norm(x, r, w, p=0.3, seed=3, return_residual=False),
        ),
        "attention": ([q, k, v], lambda q, k, v: fastlm.ops.attention(q, k, v, causal=True, dropout_p=0.2, seed=5)),
        "rotary": ([turned], lambda x: fastlm.ops.rotary(x, angles.cos(), angles.sin())),
    }


OPS = sorted(calls())


def whole(call, inputs: list[Tensor]) -> list[Tensor]:
    out = call(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_with_and_without_the_dispatcher(op, monkeypatch):
    inputs, call = calls()[op]
    direct = []
    monkeypatch.setattr(
        _library,
        "can_skip_dispatcher",
        lambda args, of=_library.can_skip_dispatcher: direct.append(of(args)) or direct[-1],
    )
    plain = whole(call, inputs)
    assert direct
    assert all(direct)
    monkeypatch.setattr(_library, "can_skip_dispatcher", lambda args: False)
    for ours, theirs in zip(plain, whole(call, inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", OPS)
def test_modes_and_profilers_see_forward_and_backward(op):
    inputs, call = calls()[op]
    with Seen() as seen:
        whole(call, inputs)
    assert {f"fastlm::{op}_forward", f"fastlm::{op}_backward"} <= set(seen.names)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole(call, inputs)
    assert {f"fastlm::{op}", f"fastlm::{op}_forward", f"fastlm::{op}_backward"} <= {e.key for e in profiler.events()}


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op", OPS)
def test_traces_keep_forward_and_backward(op, tracing_mode, pre_dispatch):
    inputs, call = calls()[op]

    def gradient(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(call(*leaves).square().sum(), leaves)

    how = dict(tracing_mode=tracing_mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)  # rotary's angles
    graph = make_fx(gradient, **how)(*inputs).graph
    names = {str(node.target).removesuffix(".default") for node in graph.nodes}
    assert f"fastlm.{op}_backward" in names
    assert (f"fastlm.{op}" if pre_dispatch else f"fastlm.{op}_forward") in names


def test_function_modes_see_a_call():
    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    inputs, call = calls()["rotary"]
    with Functions():
        call(*inputs)
    assert any("rotary" in name for name in names)


@pytest.mark.parametrize("op", OPS)
def test_subclasses_keep_their_own_dispatch(op):
    class Wrapped(Tensor):
        pass

    inputs, call = calls()[op]
    out = call(inputs[0].as_subclass(Wrapped), *inputs[1:])
    assert type(out) is Wrapped
    assert torch.equal(out.as_subclass(Tensor), call(*inputs))


@pytest.mark.parametrize("op", OPS)
def test_a_pending_negation_is_done(op):
    inputs, call = calls()[op]
    first = inputs[0].detach()
    negative = torch.complex(torch.zeros_like(first), -first).conj().imag
    assert negative.is_neg()
    assert torch.equal(call(negative.requires_grad_(), *inputs[1:]), call(*inputs))


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_have_shapes_alone(op):
    inputs, _ = calls()[op]
    if op == "rotary":
        table = torch.empty(9, 4, device="meta")
        out = fastlm.ops.rotary(inputs[0].to("meta"), table, table)
    elif op == "attention":
        out = fastlm.ops.attention(*(t.to("meta") for t in inputs))
    else:
        out = fastlm.ops.dropout_add_norm(*(t.to("meta") for t in inputs), return_residual=False)
    assert out.is_meta
    assert out.shape == inputs[0].shape


@pytest.mark.parametrize("op", OPS)
def test_inference_mode(op):
    inputs, call = calls()[op]
    expected = call(*inputs)
    with torch.inference_mode():
        assert torch.equal(call(*(t.detach().clone() for t in inputs)), expected)
        assert torch.equal(call(*inputs), expected)


@pytest.mark.parametrize("op", OPS)
def test_the_defaults_of_dtype_and_device_change_nothing(op):
    inputs, call = calls()[op]
    expected = whole(call, inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        changed = whole(call, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        elsewhere = whole(call, inputs)
    for a, b, c in zip(expected, changed, elsewhere, strict=True):
        assert a.dtype == b.dtype == c.dtype
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("op", OPS)
def test_an_error_in_a_call_leaves_nothing_behind(op, monkeypatch):
    """A call that nobody looks on and that fails does not hide the next one, which somebody watches."""
    inputs, call = calls()[op]

    def fail(*args):
        raise RuntimeError("as asked for")

    with fastlm.backend.use("reference"), monkeypatch.context() as patch:
        patch.setattr(fastlm.backend, "run", fail)
        with pytest.raises(RuntimeError, match="as asked for"):
            call(*inputs)
    with Seen() as seen:
        call(*inputs)
    assert f"fastlm::{op}_forward" in seen.names


def test_threads_do_not_share_what_they_know():
    inputs, call = calls()["rotary"]
    unnoticed: list[int] = []

    def watched():
        for i in range(50):
            with Seen() as seen:
                call(*inputs)
            if "fastlm::rotary_forward" not in seen.names:
                unnoticed.append(i)
        finished.append(True)

    finished: list[bool] = []

    threads = [threading.Thread(target=watched) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        whole(call, inputs)
    for thread in threads:
        thread.join()
    assert len(finished) == 2
    assert not unnoticed


@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused_on_both_ways(op, monkeypatch):
    inputs, call = calls()[op]
    for unseen in (True, False):
        monkeypatch.setattr(_library, "can_skip_dispatcher", lambda args, unseen=unseen: unseen)
        out = call(*inputs)
        with pytest.raises(RuntimeError, match="no double backward"):
            torch.autograd.grad(out.square().sum(), inputs, create_graph=True)


def without(monkeypatch, owner: object, name: str):
    """`fastlm._torch` as it is imported with a torch that lacks a private name."""
    spec = importlib.util.spec_from_file_location("fence", _torch.__file__)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [
    "_dispatch_keys", "_dispatch_tls_local_include_set", "_len_torch_function_stack", "_autograd", "DispatchKeySet",
    "DispatchKey", "_get_tracing_state",
])  # fmt: skip
def test_without_a_private_name_of_torch_calls_go_through_the_dispatcher(name, monkeypatch):
    args = (torch.ones(3),)
    assert _torch.can_skip_dispatcher(args)
    assert not without(monkeypatch, torch._C, name).can_skip_dispatcher(args)


@pytest.mark.parametrize("op", OPS)
def test_gradients_without_the_guard_below_autograd(op, monkeypatch):
    fence = without(monkeypatch, torch._C, "_AutoDispatchBelowAutograd")
    inputs, call = calls()[op]
    expected = whole(call, inputs)
    monkeypatch.setattr(_library, "below_autograd", fence.below_autograd)
    monkeypatch.setattr(_library, "HAS_BELOW_AUTOGRAD", fence.HAS_BELOW_AUTOGRAD)
    for skip in (True, False):
        monkeypatch.setattr(_library, "can_skip_dispatcher", lambda args, skip=skip: skip)
        assert all(torch.equal(a, b) for a, b in zip(expected, whole(call, inputs), strict=True))


def test_without_the_names_of_transforms_nothing_is_differentiated_wrongly(monkeypatch):
    fence = without(monkeypatch, torch._C, "_are_functorch_transforms_active")
    assert not fence.functorch_active()
    monkeypatch.setattr(_library, "functorch_active", fence.functorch_active)
    inputs, call = calls()["dropout_add_norm"]
    with pytest.raises(RuntimeError):  # torch's own refusal
        torch.func.grad(lambda x: call(x, *inputs[1:]).sum())(inputs[0])
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    assert fence.may_have_tangents()


def test_without_the_other_private_names_the_same_is_done_or_refused(monkeypatch):
    with pytest.raises(RuntimeError, match=r"no torch.*_current_graph_task_id"):
        without(monkeypatch, torch._C, "_current_graph_task_id").in_backward()
    assert not _torch.in_backward()
    with without(monkeypatch, torch._C, "DisableTorchFunction").unseen_by_modes():
        pass
    with without(monkeypatch, torch._C, "_set_tracing_state").untraced():
        pass
    for owner, name, mine in (
        (torch._C, "_set_grad_enabled", "SET_GRAD_ENABLED"),
        (torch.autograd.grad_mode, "_enter_inference_mode", "ENTER_INFERENCE"),
        (torch.autograd.grad_mode, "_exit_inference_mode", "EXIT_INFERENCE"),
    ):
        assert getattr(without(monkeypatch, owner, name), mine) not in (getattr(_torch, mine), None)
    with monkeypatch.context() as patch:
        patch.delattr(torch, "_assert_async")
        patch.delattr(torch, "_foreach_mul_")
        _torch.assert_async(torch.tensor(True), "fits")
        with pytest.raises(RuntimeError, match="does not fit"):
            _torch.assert_async(torch.tensor(False), "does not fit")
        tensors = [torch.ones(2), torch.full((3,), 2.0)]
        _torch.multiply_all(tensors, torch.tensor(3.0))
    assert [t.tolist() for t in tensors] == [[3.0] * 2, [6.0] * 3]
    monkeypatch.delattr(importlib.import_module("torch._inductor"), "list_mode_options")
    with pytest.raises(RuntimeError, match="needs another torch"):
        _torch.inductor(torch.fx.symbolic_trace(torch.nn.Identity()), [], None, {})
