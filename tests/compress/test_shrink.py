"""Whole parts removed: what is left computes what the whole model does without them, mended by least squares."""

from __future__ import annotations

import copy

import pytest
import torch
from fastlm import compress, ops
from fastlm.compress.shrink import count, importance, mended
from fastlm.models.gpt import GPT, GPTConfig, named


def made(style: str = "llama", **changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(named("nano", style, layers=3, width=32, context=16, vocab=50, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def text(rows: int = 12) -> list[torch.Tensor]:
    return list(torch.randint(50, (rows, 16), generator=torch.Generator().manual_seed(1)).split(4))


def plain(model: GPT) -> GPT:
    """A new model of the configuration with the same tensors."""
    again = GPT(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


SHAPES = [
    ("llama", {"heads": 4}, 3, (3, 3)),
    ("llama", {"heads": 4, "kv_heads": 2, "bias": True}, 1, (2, 1)),
    ("llama", {"heads": 4, "kv_heads": 1}, 2, (2, 1)),
    ("gpt2", {"heads": 4, "tied": False}, 1, (1, 1)),
]


@pytest.mark.parametrize("style, changes, left, heads", SHAPES)
def test_a_part_that_gives_nothing_goes_and_nothing_changes(style, changes, left, heads) -> None:
    """Heads and channels whose outputs are read with zero weights are the ones that go; the function stays."""
    model = made(style, **changes)
    c = model.config
    kv = c.kv_heads or c.heads
    units, kinds = (c.heads, "query heads") if c.kv_heads == 1 else (kv, "groups")
    dead = torch.randperm(units, generator=torch.Generator().manual_seed(2))[: units - left].tolist()
    channels = list(range(5, 5 + 24))
    rows = c.heads // units * c.size
    with torch.no_grad():
        for block in model.blocks:
            for unit in dead:
                block.attn.out.weight[:, unit * rows : (unit + 1) * rows] = 0
            block.mlp.down.weight[:, channels] = 0
    tokens = torch.randint(50, (2, 16))
    before = model(tokens)
    report = compress.shrink(model, text(), heads=units - left, channels=24)
    assert (model.config.heads, model.config.kv_heads or model.config.heads) == heads, kinds
    assert (model.config.size, model.config.mlp_width) == (c.size, c.mlp_width - 24)
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain(model)(tokens), model(tokens))
    assert len(report.rows) == 6
    assert all(part < 1e-6 for *_, part in report.rows)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in made(style, **changes).parameters())
    out = model.generate(tokens[:, :3], 8, lambda logits: logits.argmax(-1))  # through the cache
    whole = tokens[:, :3]
    for _ in range(8):
        whole = torch.cat((whole, model(whole)[:, -1].argmax(-1)[:, None]), dim=1)
    assert torch.equal(out, whole)


def test_importance_and_mending_are_those_of_direct_solutions() -> None:
    torch.manual_seed(3)
    x, w = torch.randn(200, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    x[:, 6:] += x[:, :6]  # what is removed can in part be had from the rest
    scores = importance(w, x.T @ x, 3)
    for i in range(4):
        part = slice(3 * i, 3 * i + 3)
        assert scores[i] == pytest.approx(float((x[:, part] @ w[:, part].T).square().sum()))
    keep = torch.tensor([0, 1, 2, 3, 7, 8])
    found = mended(w, x.T @ x, keep)
    gone = [i for i in range(12) if i not in keep.tolist()]
    assert torch.equal(found[:, gone], w[:, gone])
    damping = 0.01 * (x.T @ x).diagonal()[keep].mean()
    # ridge regression of what the removed columns gave on those that stay, as rows added to the data
    rows = torch.cat((x[:, keep], damping.sqrt() * torch.eye(6, dtype=torch.float64)))
    wanted = torch.cat((x[:, gone] @ w[:, gone].T, torch.zeros(6, 7, dtype=torch.float64)))
    more = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found[:, keep], w[:, keep] + more)
    error = lambda v: float((x @ w.T - x[:, keep] @ v.T).square().sum())
    assert error(found[:, keep]) < 0.9 * error(w[:, keep])
    assert torch.equal(mended(w, torch.zeros(12, 12, dtype=torch.float64), keep), w)
    twice = torch.cat((x[:5, :6], x[:5, :6]), 1)  # duplicate inputs, and fewer samples than inputs
    assert mended(w, twice.T @ twice, keep).isfinite().all()


def test_the_layer_that_does_nothing_goes_first() -> None:
    model = made()
    with torch.no_grad():
        model.blocks[1].attn.out.weight.zero_()
        model.blocks[1].mlp.down.weight.zero_()
    tokens = torch.randint(50, (2, 16))
    before, second = model(tokens), copy.deepcopy(model)
    report = compress.shrink(model, text(), layers=1)
    assert (model.config.layers, report.layers) == (2, [1])
    assert report.losses[0] == pytest.approx(report.losses[1], abs=1e-6)
    torch.testing.assert_close(model(tokens), before)
    assert [block.attn.layer for block in model.blocks] == [0, 1]
    compress.shrink(second, text(), layers=2 / 3, heads=0.25, channels=0.3)
    assert (second.config.layers, second.config.heads, second.config.mlp_width) == (1, 3, 72)
    assert torch.equal(plain(second)(tokens), second(tokens))


def test_masks_are_cut_with_their_weights() -> None:
    model = made(heads=4)
    compress.prune(model, 0.6, exclude="qkv")
    compress.shrink(model, text(), heads=0.25, channels=0.5)
    found = compress.masked(model)
    assert len(found) == 9
    for path, module in found.items():
        gone = ~ops.mask_to_bool(module.weight_mask, module.weight.shape[1])
        assert 0.3 < gone.float().mean() < 0.9, path
        assert not module.weight[gone].any()
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model = made(heads=4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for changes, word in (
        ({}, "heads, channels and layers are all 0"),
        ({"heads": 4}, "heads 4 of 4 leaves none"),
        ({"layers": 0.1}, "layers 0.1 of 3 removes none"),
        ({"channels": 1.5}, "channels is 1.5; it must be the part that goes"),
        ({"heads": -1}, "heads is -1"),
    ):
        with pytest.raises(ValueError, match=word):
            compress.shrink(model, text(), **changes)
    with pytest.raises(ValueError, match="calibration is empty"):
        compress.shrink(model, [], heads=1)
    with pytest.raises(ValueError, match="must be fastlm's GPT"):
        compress.shrink(torch.nn.Linear(2, 2), text(), heads=1)
    with torch.no_grad():
        model.blocks[2].mlp.up.weight[3, 3] = before["blocks.2.mlp.up.weight"][3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.down are not finite"):
        compress.shrink(model, text(), channels=8)
    assert model.config == made(heads=4).config
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) or name == "blocks.2.mlp.up.weight"


def test_counts() -> None:
    assert count("channels", 0.3, 352) == 248  # 246, up to a multiple of 8
    assert count("channels", 100, 352) == 252
    assert count("heads", 0.25, 4) == count("layers", 1, 4) == 3
    with pytest.raises(ValueError, match="removes none"):
        count("channels", 0.01, 352)


def test_the_configuration_of_a_shape_is_one() -> None:
    assert GPTConfig(heads=4, width=128, head_size=32) == GPTConfig(heads=4, width=128)
    assert GPTConfig(heads=3, width=128, head_size=32).size == 32
    with pytest.raises(ValueError, match="head_size must be even"):
        GPTConfig(heads=3, width=128, head_size=5, position="rotary")


@pytest.mark.parametrize("style, changes", [(s, c) for s, c, _, _ in SHAPES])
def test_layers_may_differ_and_the_least_of_all_go(style, changes) -> None:
    """Of one layer's parts most are read with small weights: with per_layer they go, and the other layers lose fewer."""
    model = made(style, **changes)
    c = model.config
    kv = c.kv_heads or c.heads
    units = c.heads if c.kv_heads == 1 else kv
    rows = c.heads // units * c.size
    small = list(range(8, c.mlp_width))  # and more of them than all layers lose
    with torch.no_grad():
        model.blocks[1].attn.out.weight[:, rows:] *= 1e-3
        model.blocks[1].mlp.down.weight[:, small] *= 1e-3
    tokens = torch.randint(50, (2, 16))
    before, alike = model(tokens), copy.deepcopy(model)
    compress.shrink(model, text(), channels=0.25, per_layer=True)
    compress.shrink(alike, text(), channels=0.25)
    assert [n for _, _, n in model.config.shapes] == [c.mlp_width, c.mlp_width // 4, c.mlp_width]
    torch.testing.assert_close(model(tokens), before, rtol=1e-2, atol=1e-2)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in alike.parameters())
    if units > 2:
        report = compress.shrink(model, text(), heads=0.25, per_layer=True)
        assert model.config.shapes[1][0] == c.heads // 4
        assert f"heads: {3 * units} -> {3 * units - 3} of all layers together" in str(report)
    shapes = model.config.shapes
    assert all(h // k == c.heads // kv or c.kv_heads == 1 for h, k, _ in shapes)
    assert model.config.size == c.size
    assert torch.equal(plain(model)(tokens), model(tokens))
    out = model.generate(tokens[:, :3], 8, lambda logits: logits.argmax(-1))  # a cache of layers that differ
    whole = tokens[:, :3]
    for _ in range(8):
        whole = torch.cat((whole, model(whole)[:, -1].argmax(-1)[:, None]), dim=1)
    assert torch.equal(out, whole)
    with pytest.raises(ValueError, match="per_layer is False; it must be True"):
        compress.shrink(model, text(), channels=0.25)
    compress.shrink(model, text(), channels=8, per_layer=True)
    assert sum(n for _, _, n in model.config.shapes) == sum(n for _, _, n in shapes) - 24
    compress.shrink(model, text(), layers=1)
    assert model.config.layers == 2
    assert torch.equal(plain(model)(tokens), model(tokens))


def test_one_model_has_one_configuration() -> None:
    same = GPTConfig(layers=2, heads=4, width=32, shapes=((2, 2, 64), (2, 2, 64)))
    assert same == GPTConfig(layers=2, heads=2, width=32, head_size=8, hidden=64)
    differ = GPTConfig(layers=2, heads=4, width=32, shapes=[[2, 1, 64], [1, 1, 96]])  # type: ignore[arg-type]
    assert (differ.heads, differ.kv_heads, differ.mlp_width, differ.size) == (2, 1, 96, 8)
    assert differ.layer(1) == GPTConfig(layers=2, heads=1, width=32, hidden=96, head_size=8, kv_heads=1)
    for shapes, text_ in (((1, 1, 8),), "must be of 2 layers"), (((3, 2, 8), (1, 1, 8)), "a multiple of the second"):
        with pytest.raises(ValueError, match=text_):
            GPTConfig(layers=2, shapes=shapes)  # type: ignore[arg-type]
