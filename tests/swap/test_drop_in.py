"""swap is a drop-in: dtypes under autocast, in-place changes, replaced functions, hooks, tracing, and what it reports."""

from __future__ import annotations

import copy
import functools
import logging
import pickle

import fastlm
import pytest
import torch
import torch.nn.functional as F
from fastlm import backend
from fastlm.swap import classes, norms
from torch import nn
from torch.nn.utils import parametrizations, parametrize

transformers = pytest.importorskip("transformers")
C = 32
SIZES = dict(
    vocab_size=60, hidden_size=C, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)


def llama(kind: str = "sdpa") -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    config._attn_implementation = kind
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    sizes = dict(vocab_size=60, n_embd=C, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def bart() -> nn.Module:
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
    config = transformers.BartConfig(vocab_size=60, d_model=C, encoder_layers=2, decoder_layers=2, **heads)
    return transformers.BartModel(config)


def encoder() -> nn.Module:
    return nn.Sequential(nn.Embedding(60, C), nn.TransformerEncoderLayer(C, 4, 48, batch_first=True))


MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "bart": bart,
    "encoder": encoder,
    "gpt2": gpt2,
    "llama": llama,
}


@pytest.fixture
def ops(monkeypatch):
    calls, run = [], backend.run
    monkeypatch.setattr(backend, "run", lambda op, *rest: (calls.append(op), run(op, *rest))[1])
    return calls


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.grid(fast=2)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_under_autocast_keep_dtype_and_twice_the_error(name):
    errors = {"ours": [], "torch": []}
    for draw in range(4):
        torch.manual_seed(draw)
        original = MODELS[name]().eval()
        swapped = copy.deepcopy(original)
        assert fastlm.swap(swapped).rows
        ids = torch.randint(3, 60, (3, 16))
        exact = first(copy.deepcopy(original).double()(ids))
        with torch.autocast("cpu", torch.bfloat16):  # with gradients: PyTorch's fused inference path has other dtypes
            outs = {"ours": first(swapped(ids)), "torch": first(original(ids))}
        assert outs["ours"].dtype == outs["torch"].dtype
        for who, out in outs.items():
            errors[who].append((out.double() - exact).abs().max().item())
    assert max(errors["ours"]) <= 2 * max(errors["torch"])


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_has_the_originals_dtype_with_and_without_autocast(dtype, weight):
    t5 = transformers.models.t5.modeling_t5.T5LayerNorm
    rms = transformers.models.llama.modeling_llama.LlamaRMSNorm
    for make in (nn.LayerNorm, nn.RMSNorm, rms, t5):
        norm = make(C).to(weight)
        swapped = copy.deepcopy(norm)
        assert fastlm.swap(swapped).rows
        x = torch.randn(3, C, dtype=dtype)
        for on in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                try:
                    expected = norm(x)
                except RuntimeError:  # PyTorch takes no such mixture
                    continue
                assert swapped(x).dtype == expected.dtype, (make, on)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.norm, self.act = nn.Linear(8, 8), nn.Dropout(0.1), nn.LayerNorm(8), nn.ReLU(True)


class ByFunction(Block):
    def forward(self, x):
        x = x + self.drop(self.linear(x))
        F.relu(x, inplace=True)
        return self.norm(x)


class ByModule(Block):
    def forward(self, x):
        x = x + self.drop(self.linear(x))
        self.act(x)
        return self.norm(x)


class ByView(Block):
    def forward(self, x):
        x = x + self.drop(self.linear(x))
        x[:, 0].fill_(0)
        return self.norm(x)


class ByAlias(Block):
    def forward(self, x):
        x = x + self.drop(self.linear(x))
        other = x
        torch.relu_(other)
        return self.norm(x)


class Before(Block):  # the input of the dropout is changed between the dropout and the sum
    def forward(self, x):
        y = self.linear(x)
        z = self.drop(y)
        y.mul_(0)
        return self.norm(x + z)


class InBranch(Block):
    def forward(self, x):
        x = x + self.drop(self.linear(x))
        if x.shape[0] > 1:
            x.relu_()
        return self.norm(x)


@pytest.mark.parametrize("kind", [ByFunction, ByModule, ByView, ByAlias, Before, InBranch])
def test_what_changes_in_place_changes_before_the_norm(kind):
    model = kind()
    swapped = copy.deepcopy(model)
    fastlm.swap(swapped)
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(swapped.eval()(x), model.eval()(x))
        if kind is Before:
            torch.manual_seed(0)
            model.train().drop.p = swapped.train().drop.p = 1e-4
            torch.testing.assert_close(swapped(x), model(x), rtol=1e-2, atol=1e-2)


def plain_attention(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
    scores = (query @ key.mT * scaling).softmax(-1)
    return (scores @ value).transpose(1, 2), scores


SEEN = []


def recording(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
    SEEN.append(tuple(query.shape))
    return plain_attention(module, query, key, value, mask, scaling)


def writing(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
    module.last = query
    return plain_attention(module, query, key, value, mask, scaling)


def calling(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
    module.seen.append(query)
    return plain_attention(module, query, key, value, mask, scaling)


def test_functions_that_do_more_than_attend_are_found():
    from fastlm.swap import purity

    counter = []

    def closure(module, query, key, value, mask, scaling, dropout=0.0):
        counter.append(1)

    def default(module, query, key, value, mask, scaling, dropout=0.0, log=[]):  # noqa: B006
        log.append(1)

    for function in (recording, writing, calling, closure, default, print):
        assert purity.impure(function)
    assert not purity.impure(plain_attention)
    assert not purity.impure(transformers.models.llama.modeling_llama.eager_attention_forward)
    sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward
    assert purity.is_own(sdpa, "transformers.integrations.sdpa_attention", "sdpa_attention_forward")
    assert purity.reads(sdpa) >= {"softcap", "output_attentions", "is_causal"}


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_replaced_attention_function_is_called_every_time(kind, monkeypatch):
    import functools

    from transformers.models.llama import modeling_llama

    calls = []
    if kind == "eager":
        old = modeling_llama.eager_attention_forward
    else:
        old = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]

    @functools.wraps(old)
    def wrapped(*args, **kwargs):
        calls.append(1)
        return old(*args, **kwargs)

    model = llama(kind)
    fastlm.swap(model)
    if kind == "eager":
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", wrapped)
    else:
        monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", wrapped)
    for _ in range(3):
        model(torch.randint(3, 60, (2, 5)))
    calls_of_probes = 0
    assert len(calls) - calls_of_probes == 6


def test_a_replaced_scaled_dot_product_attention_is_called(monkeypatch):
    model = llama()
    fastlm.swap(model)
    calls, own = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), own(*a, **k))[1])
    model(torch.randint(3, 60, (2, 5)))
    assert len(calls) == 2


def test_mixture_of_experts_is_served_and_seen(ops):
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config).eval()
    original = copy.deepcopy(model)
    report = fastlm.swap(model)
    ids = torch.randint(3, 60, (2, 7))
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    assert ops.count("attention") == 2
    rows = {row.module: row for row in report.seen}
    assert rows["model.layers.0.self_attn"].ran == 1
    assert all(row.ran + row.idle for row in rows.values())
    assert "ran 1 times" in str(report.seen)


def test_the_report_names_what_did_not_run(caplog):
    class Half(nn.ModuleDict):
        def forward(self, x):
            return self["used"](x)

    model = Half({"used": nn.LayerNorm(8), "unused": nn.LayerNorm(8)})
    report = fastlm.swap(model)
    with caplog.at_level(logging.WARNING, "fastlm"):
        for _ in range(3):
            model(torch.randn(2, 8))
    assert not model._forward_hooks
    assert [r.message for r in caplog.records if "did not run unused" in r.message] == [
        "fastlm.swap: the first forward did not run unused, which swap reported as served"
    ]
    assert [row.ran for row in report.seen] == [3, 0]
    assert "never called" in str(report.seen)


class Twice(nn.Module):
    """One dropout called before and behind the norm, as T5 does."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.drop(self.drop(x)))


def test_a_module_called_twice_ends_no_forward(caplog):
    model = Twice()
    fastlm.swap(model)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with caplog.at_level(logging.WARNING, "fastlm"):
        for each in (model, *twins):
            each(torch.randn(2, 8))
            assert not each._forward_hooks
    assert "did not run" not in caplog.text
    fastlm.unswap(model)
    fastlm.swap(model)
    assert model._forward_hooks
    fastlm.unswap(model)
    assert not model._forward_hooks


def test_compiled_parts_are_not_said_to_be_missed(caplog):
    torch._dynamo.reset()
    model = nn.Sequential(Twice(), nn.LayerNorm(8))
    fastlm.swap(model)
    model[0].compile(backend="eager")
    with caplog.at_level(logging.WARNING, "fastlm"):
        model(torch.randn(2, 8))
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 8))
    assert "did not run" not in caplog.text


def by_partial(module: nn.Module) -> None:
    module.forward = functools.partial(module.forward)


def by_partial_of_a_wrapper(module: nn.Module) -> None:
    def wrapper(old, *args, **kwargs):
        return old(*args, **kwargs)

    module.forward = functools.partial(wrapper, module.forward)


def by_partial_of_the_class(module: nn.Module) -> None:
    module.forward = functools.partial(type(module).forward, module)


def by_hand(module: nn.Module) -> None:
    module._old_forward = module.forward
    module.forward = lambda *a, _m=module, **k: _m._old_forward(*a, **k)


def in_a_closure(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda *a, **k: old(*a, **k)


@pytest.mark.parametrize("put", [by_hand, in_a_closure, by_partial, by_partial_of_a_wrapper])
def test_instance_forwards_run_what_is_swapped(put, ops):
    model = llama()
    expected = model(ids := torch.randint(3, 60, (2, 5))).logits
    for module in model.modules():
        put(module)
    fastlm.swap(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert ops.count("attention") == 2
    fastlm.unswap(model)
    ops.clear()
    assert torch.equal(model(ids).logits, expected)
    assert not ops


@pytest.mark.parametrize("put", [by_hand, in_a_closure, by_partial, by_partial_of_a_wrapper])
def test_unswap_below_a_forward_that_was_put_on_later(put, ops):
    model = llama()
    expected = model(ids := torch.randint(3, 60, (2, 5))).logits
    fastlm.swap(model)
    for block in model.model.layers:
        put(block)
    fastlm.unswap(model)
    assert torch.equal(model(ids).logits, expected)
    assert not ops


def test_an_own_forward_that_cannot_be_followed_is_left_or_named():
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x
    report = fastlm.swap(norm)
    assert not report.rows
    assert "a forward of its own" in report.left[0][2]
    del norm.forward
    fastlm.swap(norm)
    norm.forward = lambda x: x
    with pytest.raises(RuntimeError, match="nothing was changed"):
        fastlm.unswap(norm)
    assert isinstance(norm, classes.Swapped)


def test_attention_in_matmuls_has_a_reason():
    model = transformers.BloomModel(transformers.BloomConfig(vocab_size=60, hidden_size=C, n_layer=1, n_head=4))
    report = fastlm.swap(model)
    said = [row.module for row in report.rows if "attention" in row.now]
    said += [path for path, _, why in report.left if "attention" in why]
    assert "h.0.self_attention" in said


@pytest.mark.parametrize("first_swap", [True, False])
def test_parametrizations_come_off_before_and_after_unswap(first_swap):
    for module, name in ((nn.MultiheadAttention(16, 2), "in_proj_weight"), (nn.LayerNorm(16), "weight")):
        kind = type(module)
        if first_swap:
            fastlm.swap(module)
        if name == "weight":
            parametrize.register_parametrization(module, name, nn.Softplus(), unsafe=True)
        else:
            parametrizations.spectral_norm(module, name)
        if not first_swap:
            fastlm.swap(module)
        x = torch.randn(2, 5, 16)
        expected = module(x) if name == "weight" else module(x, x, x, need_weights=False)[0]
        assert expected.shape == x.shape
        parametrize.remove_parametrizations(module, name)
        assert isinstance(module, classes.Swapped)
        fastlm.unswap(module)
        assert type(module) is kind


def test_fx_traces_modules_of_torch_as_leaves_and_blocks_through():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop, self.norm = nn.Linear(8, 8), nn.Dropout(0.1), nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x + self.drop(self.linear(x)))

    model = Net().eval()
    expected = model(x := torch.randn(2, 8))
    fastlm.swap(model)
    traced = torch.fx.symbolic_trace(model)
    assert {n.target for n in traced.graph.nodes if n.op == "call_module"} == {"linear", "drop", "norm"}
    torch.testing.assert_close(traced(x), expected)


def test_jit_traces_and_scripts(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval()
    expected = model(x := torch.randn(2, 8))
    fastlm.swap(model)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), expected)
    with caplog.at_level(logging.WARNING, "fastlm"):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), expected)
    assert "torch.jit.script" in caplog.text
    assert "TorchScript" in fastlm.swap(scripted).left[0][2]


def test_dry_run_changes_nothing_and_says_the_same():
    model = llama()
    kinds = [type(m) for m in model.modules()]
    state = [set(m.__dict__) for m in model.modules()]
    dry = fastlm.swap(model, dry_run=True)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == state
    assert {r.module for r in dry.rows} == {r.module for r in fastlm.swap(model).rows}


def test_an_error_in_the_middle_rolls_back(monkeypatch):
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    describe, count = norms.NormRule.describe, []

    def failing(self, module, facts):
        count.append(1)
        if len(count) > 1:
            raise KeyError("broken")
        return describe(self, module, facts)

    monkeypatch.setattr(norms.NormRule, "describe", failing)
    with pytest.raises(KeyError):
        fastlm.swap(model)
    assert [type(m) for m in model] == [nn.LayerNorm, nn.LayerNorm]
    assert "_fastlm_seen" not in model[0].__dict__


def test_verify_leaves_everything_and_undoes_a_wrong_rule(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.2))
    model.register_buffer("kept", torch.ones(2))
    x = torch.randn(16, 8)
    model[0].weight.grad = torch.ones(8, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    assert {row.module for row in fastlm.swap(model, verify=x).rows} == {"1", "2"}
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].weight.grad, torch.ones(8, 8))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    fastlm.unswap(model)

    options = norms.NormArguments.options
    monkeypatch.setattr(norms.NormArguments, "options", lambda self: {**options(self), "eps": 0.5})
    report = fastlm.swap(model, verify=x)
    assert [row.module for row in report.rows] == ["2"]
    assert [(name, "undone" in why) for _, name, why in report.left] == [("rule 'norm'", True)]


def test_a_forward_that_cannot_follow_is_told():
    model = nn.Sequential(nn.LayerNorm(8))
    by_partial_of_the_class(model[0])
    report = fastlm.swap(model)
    assert not report.rows
    assert "a forward of its own (partial) stands in it" in report.left[0][2]


def test_verify_names_the_rule_that_raises_and_changes_no_input(monkeypatch):
    class Changes(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2) if not x.requires_grad else x)

    model = Changes(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.2))
    x = torch.randn(16, 8)
    before = x.clone()
    with torch.no_grad():
        assert {row.module for row in fastlm.swap(model, verify=x, dry_run=True).rows} == {"1", "2"}
    leaf = before.clone().requires_grad_()
    fastlm.swap(model, verify=leaf)
    assert leaf.grad is None
    assert torch.equal(x, before)

    def broken(self):
        raise RuntimeError("broken")

    monkeypatch.setattr(norms.NormArguments, "options", broken)
    report = fastlm.swap(model, verify=x)  # swapped before: the norm is put back
    assert [row.module for row in report.rows] == ["2"]
    assert type(model[1]) is nn.LayerNorm
    ((_, name, why),) = report.left
    assert name == "rule 'norm'"
    assert "undone, since the swapped model raised RuntimeError: broken" in why


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_verify_takes_gradients_where_they_are_off(mode, monkeypatch):
    """A rule whose outputs are right and whose gradients are wrong is found."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    forward = norms.NormForward.forward
    monkeypatch.setattr(norms.NormForward, "forward", lambda self, x: forward(self, x).detach())
    with mode():
        report = fastlm.swap(model, verify=torch.randn(4, 8))
    assert [name for _, name, _ in report.left] == ["rule 'norm'"]


def test_one_key_head_is_broadcast(ops):
    class MultiQuery(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 1, 6, 8), torch.randn(2, 1, 6, 8)
    model = MultiQuery()
    expected = model(q, k, v)
    fastlm.swap(model)
    torch.testing.assert_close(model(q, k, v), expected)
    assert ops == ["attention"]


@pytest.mark.parametrize("seed", range(4))
def test_verify_allows_for_what_batch_statistics_magnify(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, 4))
    assert not fastlm.swap(model, verify=torch.randn(4, 8)).left


class CastingNorm(nn.Module):
    """A norm that casts its vectors, so that it takes dtypes which ``F.layer_norm`` does not take together."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def forward(self, x):
        return F.layer_norm(x, (16,), self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_that_cast_their_vectors_are_read(autocast):
    model, x = CastingNorm(), torch.randn(3, 16)
    for dtype in (torch.float32, torch.bfloat16):
        fastlm.unswap(model.to(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = model(x)
            fastlm.swap(model)
            got = model(x)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


class AxisNorm(nn.LayerNorm):
    """As ConvNeXt's: one class normalises the last axis or the first, by a setting."""

    def __init__(self, columns, data_format):
        super().__init__(columns)
        self.data_format = data_format

    def forward(self, x):
        if self.data_format == "channels_first":
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


def test_norms_of_one_class_with_other_settings_are_told_apart():
    model = nn.Sequential(AxisNorm(4, "channels_last"), AxisNorm(16, "channels_last"), AxisNorm(16, "channels_first"))
    x = torch.randn(2, 16, 4, 16)
    inputs = (x[..., :4], x, x)
    expected = [m(t) for m, t in zip(model, inputs, strict=True)]
    fastlm.swap(model)
    for module, given, known in zip(model, inputs, expected, strict=True):
        torch.testing.assert_close(module(given), known)
