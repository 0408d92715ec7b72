"""Models out and in: transformers computes the same logits from an export, and its folders start a run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm.data import InputError
from fastlm.data import tokenizer as tokenizers
from fastlm.models.gpt import GPT, named
from fastlm.train import export, job, state

transformers = pytest.importorskip("transformers")
BYTES = {"kind": "bytes"}


def model(style: str, **changes: Any) -> GPT:
    torch.manual_seed(0)
    made = GPT(named("nano", style, **{"layers": 2, "width": 32, "context": 16, "vocab": 256, **changes})).eval()
    for p in made.parameters():  # norms and biases start at constants that would hide a mistake
        p.data += 0.1 * torch.randn_like(p)
    return made


def source(made: GPT, tokenizer: dict[str, Any] | None = BYTES) -> export.Source:
    return export.Source(made.config, state.model_tensors(made), tokenizer)


CASES = [
    ("gpt2", {}),
    ("gpt2", {"tied": False}),
    ("llama", {}),
    ("llama", {"tied": False, "kv_heads": 2, "rope_base": 500000.0}),
    ("llama", {"kv_heads": 1, "bias": True, "eps": 1e-6}),
    ("llama", {"heads": 2, "head_size": 8, "bias": True}),
    ("llama", {"heads": 3, "kv_heads": 3, "head_size": 4, "hidden": 40}),
]


@pytest.mark.parametrize("style, changes", CASES)
def test_transformers_gives_the_same_logits(style: str, changes: dict[str, Any], tmp_path: Path) -> None:
    made, tokens = model(style, **changes), torch.randint(256, (2, 16))
    export.export(source(made), "hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    kind = "mistral" if changes.get("heads") == 3 else style
    names = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
    assert type(theirs).__name__ == names[kind]
    with torch.no_grad():
        assert (theirs(tokens).logits - made(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("to", ["hf", "safetensors"])
@pytest.mark.parametrize("style, changes", CASES)
def test_an_export_reads_back_to_the_bit(style: str, changes: dict[str, Any], to: str, tmp_path: Path) -> None:
    made, tokens = model(style, **changes), torch.randint(256, (2, 16))
    export.export(source(made), to, tmp_path / "out")
    again, tokenizer = job.load(tmp_path / "out", "cpu")
    assert tokenizer.spec() == BYTES
    with torch.no_grad():
        assert torch.equal(again(tokens), made(tokens))


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_what_transformers_saved_is_read(style: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if style == "gpt2":
        config = transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=4)
        theirs = transformers.GPT2LMHeadModel(config).eval()
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=16, **sizes)
        theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hub")
    found = export.read_model(tmp_path / "hub")
    made, tokens = GPT(found.shape).eval(), torch.randint(300, (2, 16))
    state.load_model(made, found.tensors, "hub")
    with torch.no_grad():
        assert (theirs(tokens).logits - made(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("spec", [BYTES, {"kind": "chars", "characters": "\n abcé"}])
def test_the_tokenizer_goes_along(spec: dict[str, Any], tmp_path: Path) -> None:
    own = tokenizers.load(spec)
    export.export(source(model("gpt2", vocab=own.vocab), spec), "hf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "a cab é\n baa"
    ids = own.encode(text.encode()).tolist()
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text


def test_what_transformers_has_no_class_for_is_one_sentence(tmp_path: Path) -> None:
    for changes, word in (
        ({"kv_heads": 2}, "grouped heads"),
        ({"bias": False}, "biases"),
        ({"head_size": 16}, "width / heads alone"),
    ):
        with pytest.raises(InputError, match=word):
            export.export(source(model("gpt2", **changes)), "hf", tmp_path / "out")
    export.export(source(model("gpt2", kv_heads=2)), "safetensors", tmp_path / "out")
    with pytest.raises(InputError, match="not overwritten"):
        export.export(source(model("gpt2")), "hf", tmp_path / "out")
    with pytest.raises(InputError, match="no run, checkpoint or exported folder"):
        export.read_model(tmp_path)


def test_a_mistral_with_a_window_and_biases_with_odd_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no class for 3 heads at a width of 32"):
        export.export(source(model("llama", heads=3, head_size=4, bias=True)), "hf", tmp_path / "out")
    export.export(source(model("llama", heads=3, head_size=4)), "hf", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 8}))
    with pytest.raises(InputError, match="sees 8 positions back"):
        export.read_model(tmp_path / "out")


def test_a_model_that_the_plain_gpt_cannot_be_is_refused(tmp_path: Path) -> None:
    export.export(source(model("llama")), "hf", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    whole = json.loads(path.read_text())
    for change, word in (
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_hidden_layers": 3}, "lacks the tensor"),
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(InputError, match=word):
            export.read_model(tmp_path / "out")
