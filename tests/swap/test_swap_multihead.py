"""swap: nn.MultiheadAttention and the transformer layers of torch.nn run on the op, masks and dropout included."""

from __future__ import annotations

import copy
import logging
import pickle

import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch
from fastlm.swap import tensors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

E, H, B, L, S = 64, 4, 3, 10, 14
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


class Ops(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def padding(generator, size):
    """True where a key is padding; at least three keys stay."""
    return torch.arange(size) >= torch.randint(3, size + 1, (B, 1), generator=generator)


def masks(generator, name, lengths):
    """The keyword arguments of a mask of kind ``name``; boolean masks hide, and leave the first key to all."""
    hidden = torch.rand(lengths, generator=generator) < 0.4
    hidden[:, 0] = False
    each = torch.rand(B * H, *lengths, generator=generator) < 0.4
    each[..., 0] = False
    pad = padding(generator, lengths[1])
    float_pad = torch.zeros(B, lengths[1]).masked_fill(pad, -torch.inf)
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "bool per head": {"attn_mask": each},
        "float": {"attn_mask": torch.randn(lengths, generator=generator)},
        "float per head": {"attn_mask": torch.randn(B * H, *lengths, generator=generator)},
        "padding": {"key_padding_mask": pad},
        "float padding": {"key_padding_mask": float_pad},
        "bool and padding": {"attn_mask": hidden, "key_padding_mask": pad},
        "float and float padding": {
            "attn_mask": torch.randn(lengths, generator=generator),
            "key_padding_mask": float_pad,
        },
        "causal hint": {"attn_mask": CAUSAL, "is_causal": True},
        "causal hint and padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": pad},
    }[name]


NAMES = ("none", "bool", "bool per head", "float", "float per head", "padding", "float padding", "bool and padding",
         "float and float padding", "causal hint", "causal hint and padding")  # fmt: skip


def compare(make, name, *, cross=False, first=True, batched=True):
    """The rule for outputs and gradients, those of a float mask included."""

    def draw(generator):
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))  # weights too are replayed
        original = make()
        swapped = copy.deepcopy(original)
        assert [row.now for row in fastlm.swap(swapped).rows]
        shapes = [(L, E), (S, original.kdim), (S, original.vdim)] if cross else [(L, E)]
        if batched:
            shapes = [(B, *s) if first else (s[0], B, s[1]) for s in shapes]
        inputs = [torch.randn(s, generator=generator) for s in shapes]
        given = masks(generator, name, (L, S if cross else L))
        if not batched and "key_padding_mask" in given:
            given["key_padding_mask"] = given["key_padding_mask"][0]
        dy = torch.randn(shapes[0], generator=generator)
        results = []
        for module, kind in (
            (swapped, torch.float32),
            (original, torch.float32),
            (copy.deepcopy(original), torch.float64),
        ):
            module.to(kind)
            leaves = [x.to(kind).clone().requires_grad_() for x in inputs]
            call = {
                k: v.to(kind) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()
            }
            mask = call.get("attn_mask")
            if mask is not None and mask.is_floating_point():
                mask = call["attn_mask"] = mask.clone().requires_grad_()
            q, k, v = leaves if cross else leaves * 3
            with Ops() as ops:
                y, weights = module(q, k, v, need_weights=False, **call)
            assert weights is None
            assert ("fastlm::attention_forward" in ops.seen) == (module is swapped)
            y.backward(dy.to(kind))
            grads = {n: p.grad for n, p in module.named_parameters()}
            # The key's bias moves all scores of a query alike: its gradient is rounding and nothing else.
            biases = {n: grads.pop(n) for n in ("in_proj_bias", "out_proj.bias") if n in grads}
            if biases:
                q_bias, _, v_bias = biases["in_proj_bias"].chunk(3)
                grads["biases"] = torch.cat((q_bias, v_bias, biases["out_proj.bias"]))
            results.append({"y": y.detach(), **grads, **{f"d{i}": x.grad for i, x in enumerate(leaves)}})
            if mask is not None and mask.is_floating_point():
                results[-1]["dmask"] = mask.grad
        return {n: Result(*(r[n] for r in results)) for n in results[0]}

    assert_as_exact_as_torch(draw, seed=1)  # the op's own tests draw anew each time


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_self_attention_with_every_mask(name, first):
    compare(lambda: nn.MultiheadAttention(E, H, batch_first=first), name, first=first)


@pytest.mark.parametrize("name", ["none", "bool", "float per head", "padding", "bool and padding"])
def test_cross_attention(name):
    compare(lambda: nn.MultiheadAttention(E, H, batch_first=True), name, cross=True)
    compare(lambda: nn.MultiheadAttention(E, H, bias=False, kdim=24, vdim=40), name, cross=True, first=False)


@pytest.mark.parametrize("name", ["none", "bool", "causal hint", "padding"])
def test_without_a_batch(name):
    compare(lambda: nn.MultiheadAttention(E, H), name, batched=False)


@pytest.mark.parametrize(
    ("options", "call", "why"),
    [
        ({}, {"need_weights": True}, "need_weights=True"),
        ({}, {"need_weights": True, "average_attn_weights": False}, "need_weights=True"),
        ({"dropout": 1.0}, {"need_weights": False}, "dropout is 1.0"),
    ],
)
def test_what_is_not_served_is_torchs_and_said(options, call, why, caplog):
    tensors._told.clear()
    original = nn.MultiheadAttention(E, H, batch_first=True, **options)
    swapped = copy.deepcopy(original)
    fastlm.swap(swapped)
    x = torch.randn(B, L, E)
    with caplog.at_level(logging.WARNING, "fastlm"):
        got, expected = swapped(x, x, x, **call), original(x, x, x, **call)
    assert torch.equal(got[0], expected[0])
    assert (got[1] is None) == (expected[1] is None)
    assert [why in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_of_its_own_are_reported(options):
    module = nn.MultiheadAttention(E, H, **options)
    report = fastlm.swap(module)
    assert type(module) is nn.MultiheadAttention
    assert "adds keys of its own" in report.left[0][2]


def test_wrong_arguments_raise_what_torch_raises():
    module = nn.MultiheadAttention(E, H, batch_first=True)
    fastlm.swap(module)
    x = torch.randn(B, L, E)
    with pytest.raises(RuntimeError, match="attn_mask"):
        module(x, x, x, need_weights=False, attn_mask=torch.zeros(L, L + 1))
    with pytest.raises(RuntimeError, match="is_causal"):
        module(x, x, x, need_weights=False, is_causal=True)
    nested = torch.nested.nested_tensor([torch.randn(4, E), torch.randn(7, E)])
    with torch.no_grad():
        assert module.eval()(nested, nested, nested, need_weights=False)[0].is_nested


def test_rows_that_may_attend_to_nothing_give_the_projections_bias_and_no_nan():
    module = nn.MultiheadAttention(E, H, batch_first=True)
    nn.init.normal_(module.out_proj.bias)
    fastlm.swap(module)
    x = torch.randn(B, L, E, requires_grad=True)
    hidden = torch.zeros(L, L, dtype=torch.bool)
    hidden[4] = True
    y = module(x, x, x, attn_mask=hidden, need_weights=False)[0]
    assert torch.equal(y[:, 4], module.out_proj.bias.expand(B, E))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("first", [True, False])
def test_dropout_masks_follow_the_samples(first):
    module = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=first)
    fastlm.swap(module)
    x = torch.randn(4, L, E)

    def run(x, step, ids):
        assert fastlm.rng.set(module, 1, step, ids, batch_dim=0 if first else 1) == 1
        y = module(*[x if first else x.transpose(0, 1)] * 3, need_weights=False)[0]
        return y if first else y.transpose(0, 1)

    whole = run(x, 2, [10, 11, 12, 13])
    torch.testing.assert_close(run(x[2:], 2, [12, 13]), whole[2:])
    assert not torch.allclose(run(x[2:], 3, [12, 13]), whole[2:])


def encoder(norm_first=True, p=0.0, **options):
    options = dict(batch_first=True, activation="gelu") | options
    return nn.TransformerEncoderLayer(E, H, 48, p, norm_first=norm_first, **options)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_encoder_layers_run_one_op_a_chain_in_training_and_evaluation(norm_first, mode):
    original = encoder(norm_first, p=0.3 if mode != "train" else 0.0).train(mode == "train")
    swapped = copy.deepcopy(original)
    report = fastlm.swap(swapped)
    assert any("fused" in row.now for row in report.rows)
    assert any("inference path" in row.now for row in report.rows)
    x, pad = torch.randn(B, L, E), padding(torch.Generator().manual_seed(0), L)
    with torch.inference_mode(mode == "inference"), Ops() as ops:
        got = swapped(x, src_mask=CAUSAL, src_key_padding_mask=pad)
    seen = [name.removesuffix("_forward") for name in ops.seen]
    assert seen.count("fastlm::attention") == 1
    assert (
        seen.count("fastlm::dropout_add_norm") == 2
    )  # with norms first the last sum has none, and the first norm no sum
    assert not [name for name in seen if "layer_norm" in name or "_transformer" in name]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = original(x, src_mask=CAUSAL, src_key_padding_mask=pad)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norm_first", [True, False])
def test_training_with_dropout_is_one_op_a_chain(norm_first):
    for make, attentions, chains in (
        (encoder, 1, 2),
        (lambda n, p: nn.TransformerDecoderLayer(E, H, 48, p, norm_first=n), 2, 3),
    ):
        layer = make(norm_first, 0.3)
        fastlm.swap(layer)
        x = torch.randn(B, L, E)
        with Ops() as ops:
            layer(x) if attentions == 1 else layer(x, x)
        assert ops.seen.count("fastlm::attention_forward") == attentions
        # A chain each, the dropout inside the feed-forward, and with norms first the first norm alone.
        assert ops.seen.count("fastlm::dropout_add_norm_forward") == chains + 1 + norm_first
        assert not [n for n in ops.seen if "native_dropout" in n or "bernoulli" in n or "layer_norm" in n]


def test_stacks_of_encoders_with_padding_agree_where_something_is_defined():
    original = nn.TransformerEncoder(encoder(False), 2).eval()
    swapped = copy.deepcopy(original)
    fastlm.swap(swapped)
    x, pad = torch.randn(B, L, E), padding(torch.Generator().manual_seed(1), L)
    with torch.no_grad():
        got, expected = swapped(x, src_key_padding_mask=pad), original(x, src_key_padding_mask=pad)
    torch.testing.assert_close(got[~pad], expected[~pad])
    fastlm.unswap(swapped)
    assert [type(m) for m in swapped.modules()] == [type(m) for m in original.modules()]
    with torch.no_grad():
        assert torch.equal(swapped(x, src_key_padding_mask=pad), expected)


def test_copies_hooks_and_compiling():
    torch._dynamo.reset()
    model = encoder().eval()
    fastlm.swap(model)
    x = torch.randn(B, L, E)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert twin.__dict__["activation_relu_or_gelu"] == 2
        fastlm.unswap(twin)
        assert type(twin) is nn.TransformerEncoderLayer
        assert twin.activation_relu_or_gelu == 2
    seen = []
    handle = model.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    model(x)
    handle.remove()
    assert seen == [x.shape]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_autocast_gives_its_dtype():
    module = nn.MultiheadAttention(E, H, batch_first=True)
    original = copy.deepcopy(module)
    fastlm.swap(module)
    x = torch.randn(B, L, E)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (m(x, x, x, need_weights=False, attn_mask=CAUSAL)[0] for m in (module, original))
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
