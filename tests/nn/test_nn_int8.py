"""Int8Linear: what it computes, what it holds, and every way in which it is saved, moved and loaded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from fastlm import nn as fnn
from fastlm import ops
from fastlm.nn import Int8Linear, Int8TrainingLinear, int8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KINDS = [("dynamic", None), ("weight_only", None), ("weight_only", 32), ("weight_only", 128)]


def layer(mode: str = "dynamic", group: int | None = None, k: int = 72, n: int = 40, bias: bool = True) -> Int8Linear:
    return Int8Linear.from_linear(nn.Linear(k, n, bias), mode=mode, group=group)


def decibels(found: Tensor, true: Tensor) -> float:
    noise = (found.double() - true.double()).square().sum()
    return float(10 * torch.log10(true.double().square().sum() / noise))


@pytest.mark.parametrize("k, dynamic, weight_only", [(768, 38.8, 41.8), (4096, 37.8, 40.7)])
def test_signal_to_noise_on_normal_values(k: int, dynamic: float, weight_only: float) -> None:
    plain = nn.Linear(k, 256, bias=False)
    nn.init.normal_(plain.weight)
    x = torch.randn(256, k)
    true = x.double() @ plain.weight.double().t()
    for mode, group, least in (("dynamic", None, dynamic), ("weight_only", None, weight_only)):
        assert decibels(Int8Linear.from_linear(plain, mode=mode, group=group)(x), true) >= least, mode
    grouped = Int8Linear.from_linear(plain, mode="weight_only", group=32)(x)
    assert decibels(grouped, true) > weight_only + 2  # a scale for 32 columns is finer than one for a row


@pytest.mark.parametrize("made", [lambda p: Int8Linear.from_linear(p), lambda p: int8_training(p)])
def test_the_input_gradient_s_signal_to_noise(made) -> None:
    plain = nn.Linear(768, 512)
    nn.init.normal_(plain.weight)
    x, dy = torch.randn(256, 768, requires_grad=True), torch.randn(256, 512)
    (found,) = torch.autograd.grad(made(plain)(x), x, dy)
    assert decibels(found, dy.double() @ plain.weight.double()) >= 37


def int8_training(plain: nn.Linear, **named) -> Int8TrainingLinear:
    made = Int8TrainingLinear(plain.in_features, plain.out_features, plain.bias is not None, **named)
    made.load_state_dict(plain.state_dict())
    return made


@pytest.mark.parametrize("mode, group", KINDS)
def test_forward_and_gradients_are_those_of_the_integers(mode: str, group: int | None) -> None:
    made = layer(mode, group)
    weight = made.float_weight()
    x = torch.randn(6, 72, requires_grad=True)
    dy = torch.randn(6, 40)
    y = made(x)
    if mode == "weight_only":
        q = x
    else:
        integers, scale = ops.quantize_int8(x.detach())
        q = integers.float() * scale[:, None]
    torch.testing.assert_close(y, F.linear(q, weight, made.bias))
    dx, dbias = torch.autograd.grad(y, (x, made.bias), dy)
    torch.testing.assert_close(dbias, dy.sum(0))
    if mode == "weight_only":
        torch.testing.assert_close(dx, dy @ weight)
    else:
        integers, scale = ops.quantize_int8(dy * made.weight_scale)
        torch.testing.assert_close(dx, (integers.float() * scale[:, None]) @ made.weight.float())


def test_training_is_the_product_of_quantised_rows_and_its_weight_gradient_is_float() -> None:
    plain = nn.Linear(72, 40)
    made = int8_training(plain)
    x, dy = torch.randn(6, 72, requires_grad=True), torch.randn(6, 40)
    (qx, sx), (qw, sw) = ops.quantize_int8(x.detach()), ops.quantize_int8(plain.weight.detach())
    y = made(x)
    torch.testing.assert_close(y, F.linear(qx * sx[:, None], qw * sw[:, None], plain.bias))
    y.backward(dy)
    torch.testing.assert_close(made.weight.grad, dy.t() @ x.detach())
    torch.testing.assert_close(made.bias.grad, dy.sum(0))
    narrow = int8_training(plain, bfloat16_weight_grad=True)
    narrow(x).backward(dy)
    assert narrow.weight.grad.dtype == torch.float32
    assert not torch.equal(narrow.weight.grad, made.weight.grad)
    torch.testing.assert_close(narrow.weight.grad, made.weight.grad, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("mode, group", KINDS)
def test_inputs_of_any_dimensions_and_empty_ones(mode: str, group: int | None) -> None:
    made, training = layer(mode, group), Int8TrainingLinear(72, 40)
    x = torch.randn(2, 1, 3, 2, 72)
    for module in (made, training):
        whole = module(x.reshape(-1, 72))
        assert torch.equal(module(x), whole.view(2, 1, 3, 2, 40))
        assert torch.equal(module(x[0, 0, 0, 0]), module(x[0, 0, 0, :1])[0])
        assert torch.equal(module(x.transpose(0, 2)), module(x).transpose(0, 2))  # no dense rows
        for shape in ((0, 72), (2, 0, 72)):
            empty = torch.empty(shape, requires_grad=True)
            y = module(empty)
            assert y.shape == (*shape[:-1], 40)
            y.sum().backward()
            assert empty.grad.shape == shape


@pytest.mark.parametrize("mode, group", KINDS)
def test_the_state_is_plain_and_is_the_same_by_every_way(mode: str, group: int | None, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    made = layer(mode, group)
    state = made.state_dict()
    assert {k: v.dtype for k, v in state.items()} == {
        "weight": torch.int8, "weight_scale": torch.float32, "bias": torch.float32
    }  # fmt: skip
    assert all(type(t) is Tensor for t in state.values())
    save_file(state, tmp_path / "a.safetensors")  # before any forward
    read = load_file(tmp_path / "a.safetensors")
    x = torch.randn(3, 72)
    y = made(x)
    build = lambda **named: Int8Linear(72, 40, mode=mode, group=group, **named)
    ways = {"copy": copy.copy(made), "deepcopy": copy.deepcopy(made), "pickle": pickle.loads(pickle.dumps(made))}
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    ways["torch.save"] = torch.load(file, weights_only=False)
    for name, target in {"loaded": build(), "meta": build(device="meta").to_empty(device="cpu")}.items():
        target.load_state_dict(read)
        ways[name] = target
    ways["assigned"] = build(device="meta")
    ways["assigned"].load_state_dict(read, assign=True)
    ways["loaded in 16 bits and moved"] = build().to(torch.bfloat16)
    ways["loaded in 16 bits and moved"].load_state_dict(read)
    ways["loaded in 16 bits and moved"].float()
    for name, module in ways.items():
        assert torch.equal(module.weight, made.weight), name
        assert torch.equal(module.weight_scale, made.weight_scale), name
        if "16" not in name:
            assert torch.equal(module(x), y), name


def test_changes_of_dtype_and_device_leave_integers_and_scales() -> None:
    made = layer()
    made.weight_scale.mul_(1e-30)  # in 16 bits these would be zeros, in bfloat16 others
    before = {k: v.clone() for k, v in made.state_dict().items()}
    for change in (nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.float):
        change(made)
        assert made.bias.dtype == made.float_dtype != torch.int8
        assert torch.equal(made.weight, before["weight"])
        assert torch.equal(made.weight_scale.view(torch.int32), before["weight_scale"].view(torch.int32))
    with pytest.raises(TypeError, match="restore a float layer"):
        made.type(torch.float16)
    assert made.to("meta").weight_scale.dtype == torch.float32


def test_float_weights_are_refused_not_cut_to_integers() -> None:
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32; an Int8Linear holds torch\.int8"):
        layer().load_state_dict({**nn.Linear(72, 40).state_dict(), "weight_scale": torch.ones(40)})
    state = layer().state_dict()
    with pytest.raises(RuntimeError, match=r"weight_scale is torch\.float16"):
        layer().load_state_dict({**state, "weight_scale": state["weight_scale"].half()})


@pytest.mark.parametrize("mode, group", [("dynamic", None), ("weight_only", None)])
@pytest.mark.parametrize("k", [768, 352])
def test_one_copy_is_held_and_nothing_of_the_weight_s_size_is_made_by_forward(mode, group, k) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    made = layer(mode, group, k, 512, bias=False)
    held = [*made.parameters(), *made.buffers()] + [v for v in vars(made).values() if type(v) is Tensor]
    size = sum(t.untyped_storage().nbytes() for t in held)
    assert size <= 1.02 * (512 * k + 4 * 512)

    class Packs(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor) and t.numel() >= made.weight.numel():
                    if t.untyped_storage().data_ptr() != made.weight.untyped_storage().data_ptr():
                        self.names.append(str(func))
            return out

    x = torch.randn(3, k)
    made(x)
    with Packs() as packs:
        made(x)
    assert not packs.names
    with packs:
        made.float_weight()
    assert packs.names, "the count sees what makes a copy"


@pytest.mark.parametrize("mode, group", KINDS)
def test_autocast_gives_its_dtype(mode: str, group: int | None) -> None:
    made, training = layer(mode, group), Int8TrainingLinear(72, 40)
    x = torch.randn(4, 72, requires_grad=True)
    for module in (made, training):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert x.grad.dtype == torch.float32
        assert module.bias.grad.dtype == torch.float32
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "mode, group",
    [KINDS[0], pytest.param(*KINDS[2], marks=pytest.mark.slow), pytest.param("training", None, marks=pytest.mark.slow)],
)
def test_one_graph_for_every_number_of_rows(mode: str, group: int | None) -> None:
    made = Int8TrainingLinear(72, 40) if mode == "training" else layer(mode, group)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend=count)
    for rows in (2, 3, 17, 64):
        x = torch.randn(rows, 72)
        assert torch.equal(compiled(x), made(x))
    assert len(graphs) == 1
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 72, requires_grad=True)
    dy = torch.randn(5, 40)
    (found,) = torch.autograd.grad(compiled(x), x, dy)
    (expected,) = torch.autograd.grad(made(x), x, dy)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "training"])
def test_activation_checkpointing_gives_the_same_gradients(mode: str) -> None:
    made = Int8TrainingLinear(72, 40) if mode == "training" else layer(mode)
    x = torch.randn(5, 72, requires_grad=True)
    (plain,) = torch.autograd.grad(made(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(made, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


def test_second_derivatives_raise() -> None:
    for made in (layer(), Int8TrainingLinear(72, 40)):
        x = torch.randn(2, 72, requires_grad=True)
        (dx,) = torch.autograd.grad(made(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            dx.sum().backward()


def test_a_layer_whose_sums_could_pass_int32_is_refused_at_once() -> None:
    for sizes, name in (((131_072, 4), "in_features"), ((4, 131_072), "out_features")):
        with pytest.raises(ValueError, match=f"{name} is 131072 in mode 'dynamic'; it must be at most 131071"):
            Int8Linear(*sizes, device="meta")
        with pytest.raises(ValueError, match=f"{name} is 131072"):
            Int8Linear.from_linear(torch.nn.Linear(*sizes, device="meta"))
        assert Int8Linear(*sizes, device="meta", mode="weight_only").weight.dtype == torch.int8


def test_to_linear_and_bad_arguments() -> None:
    made = layer(bias=False)
    plain = made.to_linear()
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, made.float_weight())
    with pytest.raises(ValueError, match="mode is 'static'"):
        Int8Linear(4, 4, mode="static")
    with pytest.raises(ValueError, match="group is 48"):
        Int8Linear(4, 4, mode="weight_only", group=48)
    with pytest.raises(ValueError, match="group is 32 in mode 'dynamic'"):
        Int8Linear(4, 4, group=32)
    assert fnn.Int8Linear is int8.Int8Linear
