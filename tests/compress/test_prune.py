"""fastlm.compress.prune: masks that live with the model, and the methods against direct solutions in float64."""

from __future__ import annotations

import copy
import io
import pickle

import fastlm
import pytest
import torch
from fastlm import compress, ops
from fastlm.compress import calibrate
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.nn import MaskedLinear
from torch import Tensor, nn

SHAPE = GPTConfig(
    layers=2, heads=2, width=32, vocab=61, context=16, norm="rms", position="rotary", mlp="swiglu", bias=False
)


def gpt() -> GPT:
    torch.manual_seed(1)
    return GPT(SHAPE)


def zeros(weight: Tensor) -> float:
    return 1 - float(weight.count_nonzero()) / weight.numel()


def positive_zeros(module: nn.Module) -> None:
    """What the mask takes is +0 to the bit."""
    keep = ops.mask_to_bool(module.weight_mask, module.weight.shape[1])
    assert not module.weight.detach()[~keep].view(torch.int32).any()


def test_every_linear_is_in_the_table_and_counts_are_exact():
    model = gpt()
    report = compress.prune(model, 0.37)
    assert [r.module for r in report.rows] == [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for row in report.pruned:
        module = model.get_submodule(row.module)
        assert type(module) is MaskedLinear
        count = module.weight.numel()
        assert row.by_mask == row.by_weight == pytest.approx(round(0.37 * count) / count, abs=1e-12)
        assert zeros(module.weight.detach()) == pytest.approx(row.by_weight)
        positive_zeros(module)
    assert [(r.module, r.why) for r in report.rows if r.why] == [("head", "it shares embed.weight")]
    assert not zeros(model.embed.weight.detach())
    text = str(report)
    assert "blocks.1.mlp.down" in text
    assert "left: it shares embed.weight" in text
    assert "do not make a dense matrix product faster" in text


def test_the_untied_head_stays_unless_it_is_named():
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4), "embed": nn.Embedding(4, 8)})
    report = compress.prune(model, 0.5)
    assert [r.module for r in report.pruned] == ["body"]
    assert "output head" in report.rows[1].why
    assert [r.module for r in compress.prune(model, 0.5, include=["head"]).pruned] == ["head"]


def test_patterns_choose_and_one_that_matches_nothing_raises():
    model = gpt()
    names = lambda **given: [r.module for r in compress.prune(copy.deepcopy(model), 0.5, **given).pruned]
    assert names(include="qkv") == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert names(include="blocks.0") == [f"blocks.0.{n}" for n in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")]
    assert names(include="blocks.*.mlp.*", exclude=["down"]) == ["blocks.0.mlp.up", "blocks.1.mlp.up"]
    for given in ({"include": "query"}, {"exclude": ["blocks.7"]}):
        with pytest.raises(ValueError, match="which no linear layer matches; they are down, head, out, qkv, up"):
            compress.prune(model, 0.5, **given)
    with pytest.raises(ValueError, match=r"no layer is left to prune: .*shares embed\.weight"):
        compress.prune(model, 0.5, include="head")
    assert not compress.masks(model)  # a refusal changes nothing


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"sparsity": None}, "sparsity is None"),
        ({"method": "l1"}, "method is 'l1'"),
        ({"scope": "tensor"}, "scope is 'tensor'"),
        ({"method": "wanda"}, "needs calibration"),
        ({"method": "wanda", "calibration": [], "pattern": "row"}, "pattern is 'row'"),
        ({"method": "wanda", "calibration": []}, "calibration is empty"),
        ({"scope": "global", "pattern": "2:4"}, "scope is 'global'"),
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"sparsity": -0.1, "method": "sparsegpt", "calibration": [0]}, "sparsity is -0.1; it must be between 0 and 1"),
        ({"pattern": "2:4", "method": "sparsegpt", "calibration": [0]}, "sparsity is 0.5; with pattern '2:4'"),
        ({"pattern": "2:4", "method": "wanda", "calibration": [0]}, "sparsity is 0.5; with pattern '2:4'"),
    ],
)
def test_what_cannot_be_is_refused(given, text):
    with pytest.raises(ValueError, match=text):
        compress.prune(gpt(), **({"sparsity": 0.5} | given))


def test_the_state_dict_is_the_plain_one_and_a_key_of_bits_for_each_tensor():
    model, plain = gpt(), gpt()
    keys = set(model.state_dict())
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    compress.prune(model, pattern="2:4")
    state = model.state_dict()
    extra = set(state) - keys
    assert extra == set(compress.masks(model)) == {f"blocks.{i}.{n}.weight_mask" for i in range(2) for n in
                                                   ("attn.qkv", "attn.out", "mlp.up", "mlp.down")}  # fmt: skip
    assert sum(t.numel() * t.element_size() for t in state.values()) <= dense * (1 + 1 / 32)
    plain.load_state_dict({k: v for k, v in state.items() if k in keys}, strict=True)
    tokens = torch.randint(0, 61, (2, 16))
    assert torch.equal(plain(tokens), model(tokens))
    other = gpt()
    compress.attach(other, compress.masks(model))
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(tokens), model(tokens))
    wrong = {"blocks.0.attn.weight_mask": next(iter(compress.masks(model).values()))}
    with pytest.raises(ValueError, match="names no linear layer"):
        compress.attach(other, wrong)
    with pytest.raises(ValueError, match=r"for a weight of \[32, 32\]"):
        compress.attach(other, {"blocks.0.attn.out.weight_mask": torch.zeros(3, 3, dtype=torch.uint8)})


def test_copies_and_files_keep_the_masks():
    model = gpt()
    compress.prune(model, 0.6)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert compress.masks(other).keys() == compress.masks(model).keys()
        for key, mask in compress.masks(model).items():
            assert torch.equal(compress.masks(other)[key], mask)
        assert type(other.blocks[0].attn.qkv) is MaskedLinear
        compress.prune(other, 0.7)  # and once more
    layer = MaskedLinear(20, 3)
    assert "kept=60 of 60" in repr(layer)
    layer.load_state_dict({"weight": torch.ones(3, 20), "bias": torch.ones(3), "weight_mask": torch.ones(3, 3).byte()})
    assert layer.weight.sum() == 9


def test_pruning_again_and_less_keeps_what_is_zero():
    model = gpt()
    compress.prune(model, 0.5)
    first = compress.masks(model)
    again = compress.prune(model, 0.5)
    assert again.sparsity == 0.5
    assert all(torch.equal(first[k], m) for k, m in compress.masks(model).items())
    assert compress.prune(model, 0.3).sparsity == 0.5
    report = compress.prune(model, pattern="2:4")
    assert 0.5 < report.sparsity < 0.8
    for key, mask in compress.masks(model).items():
        assert torch.equal(ops.mask_and(mask, first[key]), mask)
    paths = compress.unprune(model)
    assert len(paths) == 8
    assert not compress.masks(model)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    assert zeros(model.blocks[0].attn.qkv.weight.detach()) > 0.5
    assert set(model.state_dict()) == set(gpt().state_dict())


def test_global_warns_and_has_one_threshold():
    model = gpt()
    with torch.no_grad():
        model.blocks[0].attn.out.weight.mul_(100)
    with pytest.warns(UserWarning, match="several times worse"):
        report = compress.prune(model, 0.5, scope="global")
    part = {r.module: r.by_mask for r in report.pruned}
    assert part["blocks.0.attn.out"] < 0.1
    count = sum(r.shape[0] * r.shape[1] for r in report.pruned)
    assert report.sparsity == pytest.approx(round(0.5 * count) / count)


OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.3),
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.3, fused=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_holds_masks_with_one_call(name):
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    optimizer = OPTIMIZERS[name](model.parameters())
    x = torch.randn(32, 24)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    for _ in range(3):
        step()  # moments of weights that are pruned afterwards
    with pytest.raises(ValueError, match="no mask"):
        compress.hold(optimizer, model)
    compress.prune(model, 0.5, include=["0"])
    before = model[0].weight.detach().clone()
    handles = compress.hold(optimizer, model)
    for _ in range(200):
        step()
    keep = ops.mask_to_bool(model[0].weight_mask, 24)
    positive_zeros(model[0])
    assert (model[0].weight.detach() != before)[keep].all()
    for value in optimizer.state[model[0].weight].values():
        if value.dim() == 2:
            assert not value[~keep].any()
    for handle in handles:
        handle.remove()
    step()
    assert zeros(model[0].weight.detach()) < 0.01


def test_moments_stay_zero_with_a_closure_and_when_masks_grow():
    model, x = nn.Linear(24, 24), torch.randn(32, 24)
    compress.prune(model, 0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compress.hold(optimizer, model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        return loss

    for sparsity in (0.3, 0.5, 0.8):
        compress.prune(model, sparsity)
        optimizer.step(closure)
        gone = ~ops.mask_to_bool(model.weight_mask, 24)
        positive_zeros(model)
        for key in ("exp_avg", "exp_avg_sq"):
            moments = optimizer.state[model.weight][key]
            assert not moments[gone].any()
            assert moments[~gone].any()


def test_sharded_weights_are_pruned_and_held():
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model = nn.Linear(24, 9)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        model.bias = nn.Parameter(distribute_tensor(model.bias.detach(), mesh, [Shard(0)]))
        assert compress.prune(model, 0.5).sparsity == 0.5
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        compress.hold(optimizer, model)
        gone = ~ops.mask_to_bool(model.weight_mask, 24)
        for _ in range(3):
            for p in model.parameters():
                p.grad = distribute_tensor(torch.randn(p.shape), mesh, [Shard(0)])
            before = model.weight.to_local().clone()
            optimizer.step()
            local = model.weight.to_local().detach()
            assert not local[gone].view(torch.int32).any()
            assert (local != before)[~gone].all()
            for key in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[model.weight][key].to_local()[gone].any()
    finally:
        dist.destroy_process_group()


def test_a_parametrized_layer_is_left():
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))})
    report = compress.prune(model, 0.5)
    assert {r.module: r.why for r in report.rows} == {
        "plain": "", "normed": "its weight is computed from others (a parametrization)",
    }  # fmt: skip


def test_loading_by_assignment_leaves_the_given_tensors():
    model = nn.Linear(16, 4)
    compress.prune(model, 0.5)
    given = {**model.state_dict(), "weight": torch.ones(4, 16), "bias": torch.ones(4)}
    model.load_state_dict(given, assign=True)
    positive_zeros(model)
    assert zeros(model.weight.detach()) == 0.5
    assert given["weight"].all()
    assert model.weight.requires_grad
    assert model.bias.data_ptr() == given["bias"].data_ptr()


# ------------------------------------------------------------------------------------------ wanda and sparsegpt


def test_wanda_is_the_papers_formula():
    layer, x = nn.Linear(40, 12, bias=False), torch.randn(64, 40) * torch.rand(40) * 5
    weight = layer.weight.detach().clone()
    report = compress.prune(layer, 0.5, method="wanda", calibration=[x[:32], (x[32:],)])
    score = weight.double().abs() * x.double().square().sum(0).sqrt()
    keep = torch.ones_like(weight, dtype=torch.bool).scatter_(1, score.argsort(1)[:, :20], False)
    assert torch.equal(ops.mask_to_bool(layer.weight_mask, 40), keep)
    assert torch.equal(layer.weight.detach(), weight * keep)
    assert report.rows[0].note == "64 tokens"


def loss_of(weight: Tensor, other: Tensor, h: Tensor) -> float:
    d = (weight - other).double()
    return float((d @ h.double() * d).sum())


def direct(weight: Tensor, keep: Tensor, h: Tensor) -> Tensor:
    """For each row the least-squares weights on what is kept, in float64."""
    out = torch.zeros_like(weight, dtype=torch.float64)
    for r in range(weight.shape[0]):
        on = keep[r]
        out[r, on] = torch.linalg.solve(h[on][:, on].double(), (h[on].double() @ weight[r].double()))
    return out


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_is_near_the_best_weights_for_its_mask(pattern):
    weight, x = torch.randn(10, 24), torch.randn(200, 24) @ torch.randn(24, 24)
    h = (x.T @ x).double()
    sparsity = 0.5 if pattern == "unstructured" else None
    found, mask, damping = calibrate.sparsegpt(weight, h, sparsity, pattern)
    keep = ops.mask_to_bool(mask, 24)
    assert int(keep.sum()) == 120
    assert damping == 0.01
    best = loss_of(weight, direct(weight, keep, h), h)
    magnitude = ops.mask_to_bool(ops.prune_mask(weight, sparsity=sparsity, pattern=pattern, magnitude=True), 24)
    assert best <= loss_of(weight, found, h) * 1.0001
    assert loss_of(weight, found, h) < 0.8 * loss_of(weight, weight * magnitude, h)
    if pattern == "2:4":
        assert (keep.view(10, 6, 4).sum(-1) == 2).all()


def test_sparsegpt_of_one_column_at_a_time_is_the_brain_surgeons_step():
    """With one weight to prune of each row the update is w - w_j / [H^-1]_jj * H^-1_j over the columns right of it."""
    weight, x = torch.randn(6, 5).double(), torch.randn(50, 5).double()
    h = x.T @ x
    found, mask, damping = calibrate.sparsegpt(weight, h, 1 / 30, "unstructured")
    gone = (~ops.mask_to_bool(mask, 5)).nonzero()
    assert len(gone) == 1
    r, j = gone[0].tolist()
    inverse = torch.linalg.inv((h + damping * h.diagonal().mean() * torch.eye(5).double())[j:, j:])
    wanted = weight.clone()
    wanted[r, j:] -= weight[r, j] / inverse[0, 0] * inverse[0]
    wanted[r, j] = 0
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["dead", "duplicate", "few", "bfloat16"])
def test_sparsegpt_of_inputs_that_tell_little(case):
    weight, x = torch.randn(16, 48), torch.randn(300, 48)
    if case == "dead":
        x[:, 5:9] = 0
    elif case == "duplicate":
        x[:, 24:] = x[:, :24]
    elif case == "few":
        x = x[:7]
    else:
        x = x.bfloat16().float()
    h = (x.T @ x).double()
    found, mask, _ = calibrate.sparsegpt(weight, h, 0.5, "unstructured")
    assert found.isfinite().all()
    assert int(ops.mask_count(mask)) == 384
    plain = ops.mask_to_bool(ops.prune_mask(weight, sparsity=0.5, magnitude=True), 48)
    assert loss_of(weight, found, h) < loss_of(weight, weight * plain, h)
    if case == "dead":
        assert not found[:, 5:9].any()


def test_damping_is_raised_where_the_matrix_is_none_and_is_told():
    h = torch.eye(4).double()
    h[0, 1] = h[1, 0] = 1.05  # no matrix of inputs: an eigenvalue of -0.05
    _, damping = calibrate.factor(h)
    assert damping == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no Cholesky factor"):
        calibrate.factor(-torch.eye(4).double())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_methods_of_a_model_go_block_by_block_and_twice_alike(method):
    batches = [torch.randint(0, 61, (4, 16)) for _ in range(3)]
    first, second = gpt(), gpt()
    report = compress.prune(first, 0.5, method=method, calibration=batches)
    compress.prune(second, 0.5, method=method, calibration=batches)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all("192 tokens" in row.note for row in report.pruned)
    assert first.training
    seen = gpt()  # the second block saw what the pruned first one gives
    compress.prune(seen, 0.5, method=method, calibration=batches, include="blocks.0")
    inputs = calibrate._see(seen.eval(), {"x": seen.blocks[1].mlp.down}, {"x": [1, 1, 1]}, batches, True)["x"]
    assert inputs.tokens == 192
    other = compress.prune(seen, 0.5, method=method, calibration=batches, include="blocks.1")
    assert torch.equal(seen.blocks[1].mlp.down.weight, first.blocks[1].mlp.down.weight)
    assert len(other.pruned) == 4


def test_calibration_that_is_not_finite_is_refused_and_one_that_calls_no_layer_is_told():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="not finite"):
        compress.prune(layer, 0.5, method="wanda", calibration=[torch.full((2, 4), float("nan"))])

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    report = compress.prune(Half(), 0.5, method="sparsegpt", calibration=[torch.randn(9, 4)])
    assert {r.module: r.why for r in report.rows} == {"used": "", "idle": "the calibration never called it"}


class Unusual(nn.Module):
    """Calls a layer by name and twice, and another only for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.rare, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.twice(input=x))
        return self.last(self.twice(self.rare(x) if len(x) > 5 else x))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_every_call_of_every_batch_counts(method):
    model, batches = Unusual(), [torch.randn(n, 4) for n in (5, 9, 3)]
    model.last.eval()
    report = compress.prune(model, 0.5, method=method, calibration=batches)
    assert [r.note.partition(",")[0] for r in report.rows] == ["34 tokens", "9 tokens", "34 tokens"]
    assert all(r.by_mask == 0.5 for r in report.rows)
    assert [m.training for m in model.modules()] == [True, True, True, False]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("bad", ["weight", "input"])
def test_an_error_comes_before_the_first_change(method, bad):
    model, batches = gpt(), [torch.randint(0, 61, (4, 16))]
    with torch.no_grad():
        (model.blocks[1].mlp.down if bad == "weight" else model.blocks[1].norm2).weight[3] = float("inf")
    before = copy.deepcopy(model.state_dict())
    text = r"blocks\.1\.mlp\.down\.weight is not finite" if bad == "weight" else r"inputs of blocks\.1\.mlp\.up are not"
    with pytest.raises(ValueError, match=text):
        compress.prune(model, 0.5, method=method, calibration=batches)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert model.training


@pytest.mark.parametrize(
    "method, fault", [("sparsegpt", ValueError), ("sparsegpt", KeyboardInterrupt), ("wanda", ValueError)]
)
def test_a_method_that_fails_half_way_leaves_the_model_as_it_was(method, fault, monkeypatch):
    model = gpt()
    compress.prune(model, 0.3, include="qkv")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    classes = {name: type(m) for name, m in model.named_modules()}
    own, calls = getattr(calibrate, method), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 6:
            raise fault("no more")
        return own(*args)

    monkeypatch.setattr(calibrate, method, failing)
    with pytest.raises(fault, match="no more"):
        compress.prune(
            model, 0.6, method=method, calibration=[torch.randint(model.config.vocab, (2, 16)) for _ in range(2)]
        )
    assert len(calls) == 6
    assert {name: type(m) for name, m in model.named_modules()} == classes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())


def test_sparsegpt_keeps_earlier_zeros():
    layer, x = nn.Linear(32, 8), torch.randn(100, 32)
    compress.prune(layer, 0.7)
    old = ops.mask_to_bool(layer.weight_mask, 32)
    compress.prune(layer, pattern="2:4", method="sparsegpt", calibration=[x])
    keep = ops.mask_to_bool(layer.weight_mask, 32)
    assert not (keep & ~old).any()
    assert (keep.view(8, 8, 4).sum(-1) <= 2).all()
    positive_zeros(layer)


def test_fifty_prunes_hold_no_more_memory():
    model = nn.Linear(512, 512)
    import gc

    for i in range(50):
        compress.prune(model, 0.5)
        if i == 5:
            gc.collect()
            before = len(gc.get_objects())
    gc.collect()
    assert len(gc.get_objects()) < before + 200
    assert fastlm.ops.mask_count(model.weight_mask) == 512 * 256
