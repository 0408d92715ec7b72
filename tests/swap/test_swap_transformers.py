"""swap: models of transformers run their attention on the op: masks, caches, dropout, both implementations."""

from __future__ import annotations

import copy
import logging
import pickle

import fastlm
import pytest
import torch
from fastlm.swap import interface, tensors
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
SIZES = dict(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **SIZES)


def make(name, implementation, **options):
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, **SIZES, **options)
        kind = transformers.GPT2LMHeadModel
    elif name == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, **SMALL, **options)
        kind = transformers.LlamaForCausalLM
    else:
        config, kind = transformers.BertConfig(**SMALL, **options), transformers.BertForMaskedLM
    config._attn_implementation = implementation
    return kind(config)


@pytest.fixture
def served(monkeypatch):
    """The calls that the op served."""
    calls = []
    attend = interface.attend
    monkeypatch.setattr(interface, "attend", lambda *a, **k: (calls.append(k), attend(*a, **k))[1])
    return calls


EVERY = [(name, kind) for name in ("gpt2", "llama", "bert") for kind in ("sdpa", "eager")]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_results_and_gradients_with_padding(name, kind, served):
    original = make(name, kind).eval()
    swapped = copy.deepcopy(original)
    report = fastlm.swap(swapped)
    assert sum(row.now == "attention" for row in report.rows) == 2
    tokens = torch.randint(3, 50, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = 0
    for given in ({}, {"attention_mask": mask}):
        real = given.get("attention_mask", torch.ones(3, 11)) > 0
        outs = [m(tokens, **given).logits[real] for m in (swapped, original)]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(out.square().sum(), list(m.parameters()), allow_unused=True)
                 for m, out in zip((swapped, original), outs)]  # fmt: skip
        for got, expected in zip(*grads):
            if expected is not None:
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert len(served) == 4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_generation_with_both_caches(name, kind, served):
    original = make(name, kind).eval()
    swapped = copy.deepcopy(original)
    fastlm.swap(swapped)
    tokens = torch.randint(3, 50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    for cache in ({}, {"cache_implementation": "static"}):
        given = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=mask, **cache)
        before = len(served)
        assert torch.equal(swapped.generate(tokens, **given), original.generate(tokens, **given))
        assert len(served) == before + 12


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_dropout_in_training_follows_the_samples(name, kind, served):
    drop = {"gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "llama": {"attention_dropout": 0.5}}
    options = drop.get(name, {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0})
    model = make(name, kind, **options).train()
    fastlm.swap(model)
    tokens = torch.randint(3, 50, (4, 9))
    fastlm.rng.set(model, 1, 2, [5, 6, 7, 8])
    whole = model(tokens).logits
    assert {call["p"] for call in served} == {0.5}
    fastlm.rng.set(model, 1, 2, [7, 8])
    torch.testing.assert_close(model(tokens[2:]).logits, whole[2:])
    fastlm.rng.set(model, 1, 3, [7, 8])
    assert not torch.allclose(model(tokens[2:]).logits, whole[2:])


def test_weights_that_are_asked_for_come_from_the_models_own(caplog, served):
    tensors._told.clear()
    model = make("gpt2", "eager").eval()
    fastlm.swap(model)
    tokens = torch.randint(3, 50, (2, 9))
    with caplog.at_level(logging.WARNING, "fastlm"):
        weights = model(tokens, output_attentions=True).attentions
    assert [w.shape for w in weights] == [(2, 4, 9, 9)] * 2
    assert not served
    assert any("attention weights were asked for" in record.message for record in caplog.records)


def test_other_implementations_and_functions_are_reported():
    model = make("llama", "sdpa")
    model.config._attn_implementation = "flex_attention"
    left = fastlm.swap(model).left
    assert sum("'flex_attention'" in why for _, _, why in left) == 2

    def sinks(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        scores = torch.cat((query @ key.mT * scaling, torch.zeros(*query.shape[:3], 1)), -1)
        return (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2), None

    def always(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        return (nn.functional.dropout((query @ key.mT * scaling).softmax(-1), dropout) @ value).transpose(1, 2), None

    assert "not plain attention" in interface.recognise(sinks)
    assert "not plain attention" in interface.recognise(always)
    assert "not dropout and scaling" in interface.recognise(lambda module, q, k, v: None)


def test_softcap_and_grouped_heads_are_recognised():
    from transformers.models.bert.modeling_bert import eager_attention_forward as bert
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2

    assert interface.recognise(gemma2)[:4] == (False, True, True, False)
    assert interface.recognise(bert)[:4] == (False, False, False, False)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SMALL,
        head_dim=8,
        num_key_value_heads=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    config._attn_implementation = "eager"
    original = transformers.Gemma2ForCausalLM(config).eval()
    swapped = copy.deepcopy(original)
    assert sum(row.now == "attention" for row in fastlm.swap(swapped).rows) == 2
    tokens = torch.randint(3, 50, (2, 13))
    torch.testing.assert_close(swapped(tokens).logits, original(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_autocast(name, kind, served):
    original = make(name, kind).eval()
    swapped = copy.deepcopy(original)
    fastlm.swap(swapped)
    tokens = torch.randint(3, 50, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = swapped(tokens).logits, original(tokens).logits
    assert len(served) == 2
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_position_biases_and_their_gradients(kind, served):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    config._attn_implementation = kind
    original = transformers.T5ForConditionalGeneration(config).eval()
    swapped = copy.deepcopy(original)
    fastlm.swap(swapped)
    tokens = torch.randint(3, 50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    grads = []
    for model in (swapped, original):
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(served) == 6
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_process_that_unpickles_or_sets_another_implementation_knows_its_functions(kind, served):
    model = make("gpt2", kind).eval()
    fastlm.swap(model)
    tokens = torch.randint(3, 50, (2, 9))
    interface._known.clear()
    expected = model(tokens).logits
    interface._known.clear()
    model.config._attn_implementation = "eager" if kind == "sdpa" else "sdpa"
    torch.testing.assert_close(model(tokens).logits, expected)
    assert len(served) == 4


def test_copies_unswap_and_compiling():
    torch._dynamo.reset()
    original = make("llama", "sdpa").eval()
    model = copy.deepcopy(original)
    fastlm.swap(model)
    tokens = torch.randint(3, 50, (2, 9))
    expected = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, expected)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, expected)
    fastlm.unswap(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert torch.equal(model(tokens).logits, original(tokens).logits)


def test_sinks_are_served_with_their_gradients(served):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SMALL, head_dim=8, num_key_value_heads=2, sliding_window=4, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config._attn_implementation = "eager"
    original = transformers.GptOssForCausalLM(config).eval()
    for layer in original.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    swapped = copy.deepcopy(original)
    fastlm.swap(swapped)
    tokens = torch.randint(3, 50, (2, 13))
    results = []
    for model in (swapped, original):
        out = model(tokens).logits
        grads = torch.autograd.grad(out.square().sum(), [layer.self_attn.sinks for layer in model.model.layers])
        results.append((out, *grads))
    assert len(served) == 2
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def eager(change):
    """An eager attention function whose scores ``change`` makes."""
    lines = """
def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    CHANGE
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2), None
"""
    made = {"torch": torch}
    exec(lines.replace("CHANGE", change), made)
    return made["attend"]


@pytest.mark.parametrize("change", [
    "cap = getattr(module, 'cap', None)", "scores = scores * 2 if hasattr(module, 'temperature') else scores",
    "sinks = getattr(module, 'sinks', None)",
])  # fmt: skip
def test_functions_that_ask_their_module_for_more_are_called(change):
    assert "asks its module" in interface.recognise(eager(change))


def test_sinks_that_are_changed_on_the_way_are_not_recognised():
    change = "scores = torch.cat((scores, module.sinks.clamp(max=4)[:, None, None].expand(*scores.shape[:3], 1)), -1)"
    assert isinstance(interface.recognise(eager(change)), str)
