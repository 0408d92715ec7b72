"""fastlm.swap: what is swapped computes what it did, and nothing but the class of a module changes."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys

import fastlm
import pytest
import torch
import torch.nn.functional as F
from accuracy import Result, assert_as_exact_as_torch
from torch import nn

C = 256


class OwnLayerNorm(nn.Module):
    """nanoGPT's way: functional, eps written in the forward."""

    def __init__(self, columns=C):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(columns)), nn.Parameter(torch.zeros(columns))

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class RMS(nn.Module):
    """Llama's way, with eps under a name of its own beside a decoy."""

    def __init__(self, columns=C, offset=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(columns) - offset)
        self.momentum, self.tiny, self.offset = 1e-6, 1e-6, offset

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.tiny)
        return (y * (self.offset + self.scale)).to(x.dtype)


class GatedNorm(RMS):
    def forward(self, x, gate=None):
        y = super().forward(x)
        return y if gate is None else y * gate


class WrongEpsNorm(RMS):
    def forward(self, x):  # agrees with RMSNorm at ordinary scales alone
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True).clamp(min=1e-7)) * self.scale


class BatchMeanNorm(RMS):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean() + 1e-6) * self.scale


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(C),
    "LayerNorm without bias": lambda: nn.LayerNorm(C, eps=1e-3, bias=False),
    "LayerNorm without parameters": lambda: nn.LayerNorm(C, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(C),
    "RMSNorm with eps": lambda: nn.RMSNorm(C, eps=1e-4),
    "own LayerNorm": OwnLayerNorm,
    "own RMSNorm": RMS,
    "own RMSNorm, weight + 1": lambda: RMS(offset=1.0),
}


def randomise(module: nn.Module, generator=None) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return module


def compare(make, shape, *, dtype=torch.float32, scale=1.0, call=None):
    """Asserts the rule for outputs and gradients of ``make()`` swapped, against itself as it was, and in float64."""
    call = call or (lambda module, x: module(x))

    def draw(generator):
        original = randomise(make(), generator)
        swapped = copy.deepcopy(original)
        report = fastlm.swap(swapped)
        assert report.rows
        x = torch.randn(*shape, generator=generator) * scale
        dy = torch.randn(*shape, generator=generator).to(dtype)
        results = []
        for module, kind in ((swapped, dtype), (original, dtype), (copy.deepcopy(original), torch.float64)):
            module.to(kind)
            for part in module.modules():
                if isinstance(part, nn.RMSNorm) and part.eps is None and kind == torch.float64:
                    part.eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # float64 would take its own
            leaf = x.to(dtype).to(kind).clone().requires_grad_()
            y = call(module, leaf)
            y.backward(dy.to(y.dtype))
            grads = {n: p.grad for n, p in module.named_parameters()}
            results.append({"y": y.detach(), "dx": leaf.grad, **grads})
        return {name: Result(*(r[name] for r in results)) for name in results[0]}

    assert_as_exact_as_torch(draw, seed=1)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_as_exact_as_the_original(name, scale):
    compare(NORMS[name], (16, C), scale=scale)


def test_norm_attributes_are_read_at_each_call():
    norm = RMS()
    other = copy.deepcopy(norm)
    fastlm.swap(norm)
    norm.tiny = other.tiny = 0.5
    x = torch.randn(4, C)
    torch.testing.assert_close(norm(x), other(x))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (GatedNorm, r"takes \(x, gate=None\)"),
        (WrongEpsNorm, "neither LayerNorm nor RMSNorm"),
        (BatchMeanNorm, "depends on more than the row"),
        (lambda: nn.LayerNorm((4, C)), "2 dimensions"),
        (lambda: nn.Dropout(0.1, inplace=True), "in place"),
    ],
)
def test_what_only_looks_like_a_norm_is_left_and_reported(make, why):
    module = nn.Sequential(make())
    before = type(module[0])
    report = fastlm.swap(module)
    assert type(module[0]) is before
    assert not report.rows
    ((path, name, reason),) = report.left
    assert (path, name) == ("0", before.__name__)
    assert re.search(why, reason)
    assert reason in str(report)


def test_modules_that_are_no_norms_are_not_mentioned():
    report = fastlm.swap(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.PReLU(3)))
    assert not report.rows
    assert not report.left
    assert "nothing to swap" in str(report)


def test_report_is_a_table():
    text = str(fastlm.swap(nn.Sequential(nn.LayerNorm(C), nn.LayerNorm(C), nn.Dropout(0.1))))
    head, _, norms, dropout = text.splitlines()[:4]
    assert head.split() == ["module", "was", "is", "backend"]
    assert norms.split()[:4] == ["*", "(2)", "LayerNorm", "norm(layer)"]
    assert norms.split()[-1] == fastlm.backend.which("dropout_add_norm", torch.ones(1, C)).backend
    assert dropout.split()[1] == "Dropout"


# ---- nothing but the class changes


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.Dropout(0.2), RMS(), nn.Linear(C, C))


def test_swap_twice_and_unswap():
    net = model()
    classes = [type(m) for m in net.modules()]
    objects = list(net.modules())
    first = fastlm.swap(net)
    swapped = [type(m) for m in net.modules()]
    again = fastlm.swap(net)
    assert [type(m) for m in net.modules()] == swapped
    assert [(r.module, r.was, r.now) for r in again.rows] == [(r.module, r.was, r.now) for r in first.rows]
    with torch.no_grad():
        net[1].weight.fill_(3.0)
    assert fastlm.unswap(net) == 3
    assert [type(m) for m in net.modules()] == classes
    assert all(a is b for a, b in zip(net.modules(), objects))
    assert net[1].weight[0] == 3.0
    assert fastlm.unswap(net) == 0


def test_state_dict_hooks_and_dict_stay():
    net = model()
    keys, attributes = list(net.state_dict()), [dict(m.__dict__) for m in net.modules()]
    seen = []
    net[1].register_forward_hook(lambda m, i, o: seen.append(o))
    fastlm.swap(net)
    y = net.eval()(torch.randn(2, C))
    assert len(seen) == 1
    assert y.shape == (2, C)
    assert list(net.state_dict()) == keys
    beside = {"_fastlm_seen", "__module__"}  # what the report counts, and what torch.fx asks
    assert all(set(a) == set(m.__dict__) - beside for a, m in zip(attributes, net.modules()))
    fresh = model()
    fresh.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _through_torch_save(m)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_swapped_and_apart(clone):
    net = model().eval()
    net.second = net[0]  # tied
    fastlm.swap(net)
    other = clone(net)
    x = torch.randn(3, C)
    assert torch.equal(net(x), other(x))
    assert [type(m) for m in net.modules()] == [type(m) for m in other.modules()]
    assert other.second is other[0]
    with torch.no_grad():
        other[1].weight.zero_()
    assert not torch.equal(net(x), other(x))
    fastlm.unswap(other)
    assert type(other[1]) is nn.LayerNorm
    assert type(net[1]) is not nn.LayerNorm


def _through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_classes_are_importable_in_another_process(tmp_path):
    net = nn.Sequential(nn.LayerNorm(C), nn.Dropout(0.5), nn.RMSNorm(C)).eval()
    fastlm.swap(net)
    x = torch.randn(2, C)
    (tmp_path / "m").write_bytes(pickle.dumps((net, x, net(x))))
    code = (
        "import pickle, sys, torch\n"
        "net, x, y = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(net(x), y)\n"
        "assert type(net[0]).__module__.startswith('fastlm.'), type(net[0])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=True)
    for m in net:
        module = __import__(type(m).__module__, fromlist=["x"])
        assert getattr(module, type(m).__qualname__) is type(m)
    assert [type(m).__name__ for m in net] == ["LayerNorm", "Dropout", "RMSNorm"]


def test_dropout_respects_p_and_training_at_run_time():
    net = nn.Sequential(nn.Dropout(0.5))
    fastlm.swap(net)
    x = torch.ones(64, 64)
    assert 0.4 < (net(x) == 0).float().mean() < 0.6
    net[0].p = 0.1
    assert 0.05 < (net(x) == 0).float().mean() < 0.15
    net[0].p = 1.0
    assert (net(x) == 0).all()
    assert net.eval()(x) is x


def test_swap_wants_a_module():
    with pytest.raises(TypeError, match="model is a list"):
        fastlm.swap([nn.LayerNorm(3)])
