"""swap(int8=...): which layers become int8, which stay and why, and the way back."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import types

import fastlm
import pytest
import torch
from fastlm import compress
from fastlm.compress import timing
from fastlm.models.gpt import GPT, named
from fastlm.nn import Int8Linear, Int8TrainingLinear
from paths import python_path
from ports import free_port
from torch import nn

MODES = ["dynamic", "weight_only", "training"]
BODY = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")]


def gpt(style: str = "llama", **changes) -> GPT:
    torch.manual_seed(0)
    return GPT(named("nano", style, **{"layers": 2, "width": 32, "context": 16, "vocab": 64, **changes})).eval()


def every(model: nn.Module, mode: str, **options) -> fastlm.swap.Report:
    return fastlm.swap(model, int8=mode, only_faster=False, **options)


@pytest.fixture(params=[True, False], ids=["int8 wins", "int8 loses"])
def clock(request, monkeypatch):
    """Timings as they are told: (float, int8) seconds."""
    calls = []
    times = (2e-3, 1e-3) if request.param else (1e-3, 2e-3)
    monkeypatch.setattr(timing, "seconds", lambda *args: (calls.append(args), times)[1])
    return request.param, calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_s_linear_layers_but_the_head(mode: str, tied: bool) -> None:
    model = gpt(tied=tied)
    tokens = torch.randint(64, (2, 16))
    before = model(tokens)
    modules, ids = dict(model.named_modules()), {p: id(m) for p, m in model.named_modules()}
    report = every(model, mode)
    assert [row.module for row in report.converted] == BODY
    kind = Int8TrainingLinear if mode == "training" else Int8Linear
    assert all(type(modules[path]) is kind for path in BODY)
    assert {p: id(m) for p, m in model.named_modules()} == ids
    assert type(model.head) is nn.Linear
    assert (model.head.weight is model.embed.weight) == tied
    left = {path: why for path, _, why in report.left}
    assert left["embed"] == "an embedding stays in float"
    assert ("tied" if tied and mode != "training" else "GPT.loss reads") in left["head"]
    text = str(report)
    assert "converted to int8" in text
    assert ("parameters stay float" if mode == "training" else "unswap gives dequantised values") in text
    assert 0 < (model(tokens) - before).abs().max() < 0.05 * before.abs().max()
    again = every(model, mode)  # a second time changes nothing
    assert [row.module for row in again.converted] == BODY


@pytest.mark.parametrize("mode", MODES)
def test_where_int8_loses_the_float_layer_stays_and_both_times_are_told(mode: str, clock) -> None:
    wins, calls = clock
    model = gpt()
    report = fastlm.swap(model, int8=mode)
    assert len(calls) == 8
    assert {args[-1] for args in calls} == {{"dynamic": 512, "weight_only": 1, "training": 2048}[mode]}
    assert [row.module for row in report.converted] == (BODY if wins else [])
    assert isinstance(model.blocks[0].mlp.up, (Int8Linear, Int8TrainingLinear)) == wins
    if wins:
        assert "2 ms in float, 1 ms now" in str(report)
    else:
        assert "int8 would be slower here: 2 ms against 1 ms in float" in str(report)
    calls.clear()
    fastlm.swap(gpt(), int8=mode, rows=7)
    assert {args[-1] for args in calls} == {7}


@pytest.mark.parametrize("mode", MODES)
def test_times_are_measured_and_once_for_a_shape(mode: str) -> None:
    timing._seconds.cache_clear()
    one = timing.seconds((24, 16), True, torch.float32, torch.device("cpu"), mode, None, 4)
    assert all(0 < t < 1 for t in one)
    assert timing.seconds((24, 16), True, torch.float32, torch.device("cpu"), mode, None, 4) is one


def test_patterns_of_paths() -> None:
    down = [path for path in BODY if path.endswith("down")]
    for options, expected in (
        ({"include": "blocks.*.mlp.down"}, down),
        ({"include": ["down"]}, down),
        ({"include": "blocks.1"}, BODY[4:]),
        ({"exclude": ["blocks.0", "down"]}, BODY[4:7]),
        ({"include": "blocks.1", "exclude": "qkv"}, BODY[5:]),
    ):
        model = gpt()
        report = every(model, "dynamic", **options)
        assert [row.module for row in report.converted] == expected, options
        assert [p for p, m in model.named_modules() if isinstance(m, Int8Linear)] == expected
    for name in ("include", "exclude"):
        model = gpt()
        with pytest.raises(ValueError, match=f"{name} holds 'qvk', which no linear layer's path matches"):
            every(model, "dynamic", **{name: ["down", "qvk"]})
        assert all(type(m).__module__.startswith(("torch", "fastlm.models")) for m in model.modules())


def test_a_head_that_is_named_and_only_called_becomes_int8() -> None:
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = nn.Linear(16, 16), nn.Linear(16, 64)

        def forward(self, x):
            return self.lm_head(self.body(x))

    model = Plain()
    assert [row.module for row in every(model, "dynamic").converted] == ["body"]
    assert [row.module for row in every(model, "dynamic", include=["lm_head"]).converted] == ["lm_head"]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"int8": "static"}, "int8 is 'static'"),
        ({"int8": "dynamic", "group": 32}, "group is 32 in mode 'dynamic'"),
        ({"int8": "training", "group": 32}, "group is 32; with int8='training'"),
        ({"int8": "weight_only", "group": 48}, "group is 48"),
        ({"int8": "weight_only", "group": 32.0}, "group is 32.0"),
        ({"int8": "dynamic", "rows": 0}, "rows is 0"),
        ({"include": "qkv"}, "int8 is None"),
    ],
)
def test_bad_options_change_nothing(options, word) -> None:
    model = gpt()
    with pytest.raises(ValueError, match=word):
        fastlm.swap(model, **options)
    assert all("swap" not in type(m).__module__ for m in model.modules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unswap_gives_float_layers_of_the_dequantised_values(mode: str, dtype: torch.dtype) -> None:
    model = gpt("gpt2").to(dtype)
    plain = copy.deepcopy(model)
    calls = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *args: calls.append(1))
    every(model, mode)
    expected = {n: m.float_weight() for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert fastlm.unswap(model) >= 8
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules()))
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in plain.named_parameters()}
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(model.modules(), plain.modules()))
    for path in BODY:
        weight, was = model.get_parameter(f"{path}.weight"), plain.get_parameter(f"{path}.weight")
        assert torch.equal(weight, was if mode == "training" else expected[path])
        assert torch.equal(model.get_parameter(f"{path}.bias"), plain.get_parameter(f"{path}.bias"))
    model(torch.randint(64, (1, 4)))
    assert calls


def test_a_converted_model_is_copied_pickled_and_loaded_into_a_meta_model(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = gpt(tied=False)
    every(model, "dynamic")
    tokens = torch.randint(64, (2, 16))
    expected = model(tokens)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens), expected)
        fastlm.unswap(other)
        assert type(other.blocks[0].attn.qkv) is nn.Linear
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = GPT(model.config).eval()
    every(empty, "dynamic")
    empty.load_state_dict(load_file(tmp_path / "m.safetensors"), assign=True)
    assert torch.equal(empty(tokens), expected)


def test_shared_weights_subclasses_and_weights_that_others_read_stay() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Own(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    left = {path: why for path, _, why in every(model, "dynamic").left}
    assert "shared with another module" in left["0"]
    assert "shared with another module" in left["1"]
    assert "subclass" in left["2"]
    assert type(model[3]) is Int8Linear
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()  # its fast path reads linear1.weight
    left = {path: why for path, _, why in every(encoder, "dynamic").left}
    assert "TransformerEncoderLayer.forward reads its weight" in left["linear1"]
    encoder(torch.randn(2, 3, 16))
    attention = nn.MultiheadAttention(16, 2)  # reads out_proj.weight, of a class of its own
    every(attention, "dynamic")
    attention(*[torch.randn(3, 1, 16)] * 3)


def test_a_subclass_without_a_float_form_stops_unswap_before_anything_changes() -> None:
    class Doubled(Int8Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = gpt()
    every(model, "dynamic")
    model.blocks[1].mlp.down.__class__ = Doubled
    kinds, tokens = [type(m) for m in model.modules()], torch.randint(64, (2, 16))
    before = model(tokens)
    for undo in (fastlm.unswap, compress.restore):
        with pytest.raises(TypeError, match=r"blocks\.1\.mlp\.down stays int8: Doubled is a subclass"):
            undo(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    "mode, group", [("weight_only", 64), ("weight_only", None), ("dynamic", None), ("training", None)]
)
def test_a_model_that_is_int8_otherwise_is_left_and_the_report_says_so(mode: str, group: int | None) -> None:
    model = gpt()
    every(model, "weight_only", group=32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = every(model, mode, group=group)
    left = {path: why for path, _, why in report.left}
    assert not report.converted
    assert {left[path] for path in BODY} == {"it is int8 already, weight_only, groups of 32; fastlm.unswap first"}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_layers_too_wide_for_int32_sums_stay_in_float(mode: str) -> None:
    sizes = [(131_072, 1), (1, 131_072), (131_071, 1), (1, 131_071)]
    model = nn.ModuleList([nn.Linear(k, n) for k, n in sizes])
    report = every(model, mode)
    left = {path: why for path, _, why in report.left}
    if mode == "weight_only":
        assert not left
    else:
        assert set(left) == {"0", "1"}
        assert left["0"].startswith("it has 131,072 inputs, and int32")
        assert left["1"].startswith("it has 131,072 outputs, and int32")
    for layer in model:
        x = torch.randn(2, layer.in_features, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None


def test_a_pruned_layer_s_reason_is_its_mask() -> None:
    model = gpt()
    compress.prune(model, 0.5, method="magnitude", include="up")
    left = {path: why for path, _, why in every(model, "dynamic").left}
    assert "it is pruned: its mask" in left["blocks.0.mlp.up"]
    assert type(model.blocks[0].mlp.down) is Int8Linear
    compress.unprune(model)
    assert "blocks.0.mlp.up" in {row.module for row in every(model, "dynamic").converted}


def test_models_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_layer=1, n_embd=32, n_head=2)).eval()
    tokens = torch.randint(64, (2, 9))
    for model, count in ((llama, 7), (gpt2, 4)):
        was = [type(m) for m in model.modules()]
        before = model(tokens).logits
        report = every(model, "dynamic")
        assert len(report.converted) == count
        assert "lm_head" in {path for path, _, _ in report.left}
        assert 0 < (model(tokens).logits - before).abs().max() < 0.1 * before.abs().max()
        fastlm.unswap(model)
        assert [type(m) for m in model.modules()] == was
        assert (model(tokens).logits - before).abs().max() < 0.1 * before.abs().max()


@pytest.mark.slow
def test_the_rest_of_swap_goes_on_around_int8_and_one_graph_holds_both() -> None:
    model = gpt()
    report = every(model, "dynamic")
    assert report.rows
    tokens = torch.randint(64, (2, 16))
    expected = model(tokens)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), expected)


def test_smoothing_is_folded_where_all_readers_take_it_and_said_where_not() -> None:
    for style in ("llama", "gpt2"):
        model = gpt(style)
        tokens = torch.randint(64, (2, 16))
        plant(model)
        before = model(tokens)
        made = compress.smooth(model, [tokens], BODY)
        assert [norm for norm, *_ in made.folded] == [f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)]
        assert {path for path, _ in made.left} == {path for path in BODY if path.endswith(("attn.out", "down"))}
        torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-5)
    model = gpt()
    made = compress.smooth(model, [tokens], [p for p in BODY if "qkv" not in p])
    assert all("norm1" not in norm for norm, *_ in made.folded)


def test_a_norm_that_something_else_reads_is_not_smoothed() -> None:
    class PostNorm(nn.Module):
        def __init__(self, flat: bool):
            super().__init__()
            self.norm, self.up, self.down, self.flat = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), flat

        def forward(self, x):
            y = self.norm(x)
            h = self.down(torch.relu(self.up(y.view(-1, 16))))
            return h if self.flat else y + h.view_as(y)

    x = torch.randn(2, 3, 16)
    assert [f[:2] for f in compress.smooth(PostNorm(True), [x], ["up"]).folded] == [("norm", ("up",))]
    made = compress.smooth(PostNorm(False), [x], ["up", "down"])
    assert not made.folded
    assert dict(made.left) == {
        "up": "its norm norm is read by the function add too",
        "down": "no norm gives its input",
    }
    with pytest.raises(ValueError, match="batches is empty"):
        compress.smooth(PostNorm(True), [], ["up"])
    with pytest.raises(ValueError, match="'norm', which is no"):
        compress.smooth(PostNorm(True), [x], ["norm"])


def test_smoothing_that_would_change_the_function_changes_nothing() -> None:
    class OffsetNorm(nn.Module):  # as Gemma's: 1 + weight, so that dividing the weight is no division of the output
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, (16,), 1 + self.weight)

    model = nn.Sequential(OffsetNorm(), nn.Linear(16, 8))
    with torch.no_grad():
        model[1].weight[:, 0] *= 100
    x = torch.randn(4, 16)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="gives other outputs"):
        compress.smooth(model, [x], ["1"])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class TwoNorms(nn.Module):
    """Two norms whose readers, or weights, are one: each of two folds changes the same tensor."""

    def __init__(self, kind: str):
        super().__init__()
        self.n1, self.n2, self.lin = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 8)
        self.other = self.lin if kind == "reader" else nn.Linear(16, 8)
        if kind == "weight":
            self.n2.weight = self.n1.weight
        with torch.no_grad():
            self.lin.weight[:, 0] *= 100
            self.other.weight[:, 1] *= 100
            self.n1.bias += 0.1

    def forward(self, x):
        return self.lin(self.n1(x)) + self.other(self.n2(2 * x + 1))


@pytest.mark.parametrize("kind", ["reader", "weight"])
def test_a_tensor_that_was_folded_twice_is_put_back(kind: str) -> None:
    model = TwoNorms(kind)
    x = torch.randn(4, 16)
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    with pytest.raises(RuntimeError, match="nothing was changed"):
        compress.smooth(model, [x], ["lin"] if kind == "reader" else ["lin", "other"])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), before)


@dataclasses.dataclass
class Output:
    logits: object


class Wrapped(nn.Module):
    def __init__(self, body: nn.Module, wrap):
        super().__init__()
        self.body, self.wrap = body, wrap

    def forward(self, x):
        return self.wrap(self.body(x))


def test_outputs_of_any_kind_are_compared_and_none_raises() -> None:
    x = torch.randn(4, 16)
    for wrap in (Output, lambda y: [Output({"logits": y})], lambda y: types.MappingProxyType({"y": (y,)})):
        with pytest.raises(RuntimeError, match="gives other outputs"):
            compress.smooth(Wrapped(TwoNorms("reader"), wrap), [x], ["body.lin"])
    for wrap in (lambda y: types.SimpleNamespace(y=y), lambda y: y.argmax(-1)):
        model = Wrapped(TwoNorms("reader"), wrap)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="model gives no floating tensor"):
            compress.smooth(model, [x], ["body.lin"])
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_masked_outputs_are_compared_where_they_are_finite(value: float) -> None:
    mask = torch.arange(8) % 3 == 0
    x = torch.randn(4, 16)
    fill = lambda y: y.masked_fill(mask, value)
    body = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    assert compress.smooth(Wrapped(body, fill), [x], ["body.1"]).folded
    with pytest.raises(RuntimeError, match="gives other outputs"):
        compress.smooth(Wrapped(TwoNorms("reader"), fill), [x], ["body.lin"])


def plant(model: GPT, factor: float = 100.0) -> None:
    """Three channels of each norm's output times ``factor`` and the columns that read them divided: the same function."""
    with torch.no_grad():
        for block in model.blocks:
            for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.up)):
                for t in (norm.weight, getattr(norm, "bias", None)):
                    if t is not None:
                        t[:3] *= factor
                reader.weight[:, :3] /= factor


def test_planted_outliers_hurt_int8_and_smoothing_heals_it() -> None:
    model = gpt(width=64)
    tokens = torch.randint(64, (8, 16))
    before = model(tokens)
    plant(model)
    torch.testing.assert_close(model(tokens), before, rtol=1e-3, atol=1e-4)
    smoothed = copy.deepcopy(model)
    compress.smooth(smoothed, [tokens], BODY)
    errors = []
    for one in (model, smoothed):
        every(one, "dynamic")
        errors.append(float((one(tokens) - before).square().mean()))
    assert errors[0] > 100 * errors[1]


SCRIPT = """
import os, sys, copy, torch, torch.distributed as dist
from torch import nn
sys.path[:0] = sys.argv[1].split(os.pathsep)
import fastlm
mode = sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 50), nn.GELU(), nn.Linear(50, 7))  # 7 rows on two ranks: an uneven shard
fastlm.swap(model, int8="training", only_faster=False)
whole = copy.deepcopy(model)
x = torch.randn(4, 24)
whole(x).square().sum().backward()
if mode == "ddp":
    wrapped = nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard
    for layer in (model[0], model[2]):
        fully_shard(layer)
    wrapped = fully_shard(model)
y = wrapped(x[2 * rank : 2 * rank + 2])
torch.testing.assert_close(y, whole(x)[2 * rank : 2 * rank + 2].detach())
(2 * y.square().sum()).backward()  # the mean over two ranks of twice the sum
for (name, p), q in zip(model.named_parameters(), whole.parameters()):
    grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    torch.testing.assert_close(grad, q.grad, msg=lambda m: name + m)
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort an interpreter that is taken apart while they give back tensors (PyTorch #179291)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_int8_training_on_two_processes_is_that_of_one(mode: str, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    port = str(free_port())
    processes = []
    for rank in range(2):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(script), python_path(), mode]
        processes.append(
            subprocess.Popen(
                command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)
