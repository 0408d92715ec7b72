"""Int8Linear with outlier columns: what stands out stays in float, and the rest gets its bits back."""

from __future__ import annotations

import copy

import fastlm
import pytest
import torch
from fastlm import compress
from fastlm.compress import Held, held
from fastlm.nn import Int8Linear
from fastlm.nn.int8 import convert_
from torch import Tensor, nn

COLUMNS = torch.tensor([3, 17])


def drawn(seed: int = 1) -> tuple[nn.Linear, Tensor]:
    """A layer, and rows [64, 48] of which two columns are a thousand times the others."""
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(48, 24)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=draw)
    x = torch.randn(64, 48, generator=draw)
    x[:, COLUMNS] *= 1000
    layer.weight.data[:, COLUMNS] /= 1000
    return layer, x


def split(layer: nn.Linear) -> Int8Linear:
    made = copy.deepcopy(layer)
    convert_(made, "dynamic", split=COLUMNS)
    assert isinstance(made, Int8Linear)
    return made


def test_outlier_columns_take_no_bits_from_the_others() -> None:
    layer, x = drawn()
    wanted = x.double() @ layer.weight.detach().double().T + layer.bias.detach().double()
    error = lambda made: float((made(x).double() - wanted).norm() / wanted.norm())
    made = split(layer)
    rest, ordinary = x.clone(), copy.deepcopy(layer)  # what int8 costs where nothing stands out
    rest[:, COLUMNS] = 0
    convert_(ordinary, "dynamic")
    cost = (ordinary(rest) - layer(rest)).norm() / wanted.norm()
    with torch.no_grad():
        assert error(made) < 1.5 * float(cost)
        assert error(Int8Linear.from_linear(layer)) > 10 * error(made)
    assert not made.weight[:, COLUMNS].any()
    assert torch.equal(made.float_weight()[:, COLUMNS], layer.weight[:, COLUMNS])


def test_gradients_reach_all_columns_of_the_input() -> None:
    layer, x = drawn()
    made, grads = split(layer), []
    for module in (layer, made):
        rows = x.clone().requires_grad_()
        module(rows).square().mean().backward()
        grads.append(rows.grad)
    for columns in (COLUMNS, torch.tensor([i for i in range(48) if i not in COLUMNS])):
        assert (grads[1] - grads[0])[:, columns].norm() < 0.05 * grads[0][:, columns].norm()


def test_rows_that_were_quantised_with_them_are_refused() -> None:
    layer, x = drawn()
    with pytest.raises(ValueError, match="rows were given to a layer with outlier columns"):
        split(layer)(x, fastlm.ops.quantize_int8(x))


def test_tensors_hold_it_and_a_float_layer_comes_back() -> None:
    layer, x = drawn()
    model = nn.Sequential(split(layer))
    other = nn.Sequential(copy.deepcopy(layer))
    found = held(model)
    assert found is not None
    Held.of(model.state_dict(), found.facts()).into(other)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert torch.equal(copy.deepcopy(model).bfloat16()[0].weight_scale, model[0].weight_scale)
        floats = found.floats(model.state_dict())
        assert floats.keys() == {"0.weight", "0.bias"}
        fastlm.unswap(other)
        assert type(other[0]) is nn.Linear
        assert torch.equal(other[0].weight, floats["0.weight"])
        assert other.state_dict().keys() == floats.keys()
    broken = model.state_dict() | {"0.outlier_weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"0\.outliers are no columns with an outlier_weight"):
        Held.of(broken, found.facts())


def test_it_compiles_to_one_graph() -> None:
    layer, x = drawn()
    made = split(layer)
    with torch.no_grad():
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), made(x), rtol=1e-5, atol=1e-4)


def test_columns_are_those_above_the_others_at_most_a_sixteenth() -> None:
    layer, x = drawn()
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(24, 8)).train()
    found = compress.outlier_columns(model, [x[:32], x[32:]], ["0", "2"])
    assert found.keys() == {"0"}
    assert torch.equal(found["0"], COLUMNS)
    assert model.training
    x[:, ::2] *= 1e4
    assert len(compress.outlier_columns(model, [x], ["0"], times=1.5)["0"]) == 3
    for wrong, text in (
        ({"times": 1.0}, "times is 1.0"),
        ({"batches": []}, "batches is empty"),
        ({"layers": ["1"]}, "'1'"),
    ):
        with pytest.raises(ValueError, match=text):
            compress.outlier_columns(**{"model": model, "batches": [x], "layers": ["0"]} | wrong)
