"""Exports of int8 models, read back by the libraries they are for."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastlm import compress
from fastlm.cli import export as cli_export
from fastlm.cli.main import main
from fastlm.data import InputError
from fastlm.models.gpt import GPT, named
from fastlm.train import compress_pruning, compressed_tensors, compressing, export, gguf, job, state
from test_train import _own_place  # noqa: F401

BYTES = {"kind": "bytes"}
KINDS: list[dict[str, Any]] = [{}, {"weight_only": True}, {"weight_only": True, "group": 32}]


def source(style: str = "llama", **changes: Any) -> export.Source:
    torch.manual_seed(0)
    made = GPT(named("nano", style, **{"layers": 2, "width": 64, "context": 16, "vocab": 256, **changes})).eval()
    for p in made.parameters():  # norms and biases start at constants that would hide a mistake
        p.data += 0.1 * torch.randn_like(p)
    return export.Source(made.config, state.model_tensors(made), BYTES)


def shrunk(options: dict[str, Any], **changes: Any) -> tuple[GPT, export.Source]:
    """An int8 GPT, and its source."""
    plain = source(**changes)
    made = GPT(plain.shape).eval()
    state.load_model(made, plain.tensors, "test")
    compressing.Int8(**options).apply(made, list)
    found = compress.held(made)
    assert found is not None
    return made, export.Source(plain.shape, found.floats(state.model_tensors(made)), BYTES, found)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("changes", [{}, {"tied": False, "kv_heads": 2, "bias": True}])
def test_transformers_reads_what_compressed_tensors_configures(options: dict, changes: dict, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install -c constraints.txt compressed-tensors")
    transformers = pytest.importorskip("transformers")
    made, found = shrunk(options, **changes)
    export.export(found, "hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():
        ours, got = made(tokens), theirs(tokens).logits
        plain = copy.deepcopy(made)
        compress.restore(plain)
        wide = plain(tokens)
    apart = lambda a, b: float((a - b).norm() / b.norm())
    # two that round activations differ by about as much as either does from one that does not
    assert apart(got, ours) < (0.04 if options == {} else 1e-5)
    assert apart(got, wide) < 0.04
    assert options or apart(got, wide) > 1e-3
    with pytest.raises(InputError, match="holds quantized weights"):
        export.read_model(tmp_path / "out")


def test_packed_values_unpack_as_compressed_tensors_does() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = torch.randint(-128, 128, (5, 11), dtype=torch.int8)
    assert torch.equal(compressed_tensors.packed(q), helpers.pack_to_int32(q, 8))


def test_what_compressed_tensors_cannot_hold_is_written_in_float_and_said(tmp_path: Path, capsys) -> None:
    for changes, options, word in (
        ({"style": "gpt2"}, {}, "Conv1D"),
        ({"hidden": 96}, {"weight_only": True, "group": 64}, "no multiple of 64"),
    ):
        _, found = shrunk(options, **changes)
        out = tmp_path / word
        export.export(found, "hf", out)
        assert word in capsys.readouterr().err
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert set(export.read_model(out).tensors) == set(found.tensors)


@pytest.mark.parametrize("style, changes", [("llama", {}), ("llama", {"tied": False, "kv_heads": 2}), ("gpt2", {})])
def test_a_gguf_file_holds_every_tensor(style: str, changes: dict, tmp_path: Path) -> None:
    library = pytest.importorskip("gguf", reason="pip install -c constraints.txt gguf")
    found = source(style, **changes)
    for dtype, most in (("float32", 0.0), ("float16", 2**-10), ("q8_0", 1 / 127 * 0.51)):
        assert gguf.write(found, tmp_path / dtype, dtype) == ["model.gguf"]
        reader = library.GGUFReader(tmp_path / dtype / "model.gguf")
        assert reader.fields["general.architecture"].contents() == style
        assert reader.fields[f"{style}.block_count"].contents() == 2
        assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 256
        wanted = gguf.names(found)
        assert {t.name for t in reader.tensors} == set(wanted)
        for t in reader.tensors:
            value = torch.from_numpy(np.array(library.quants.dequantize(t.data, t.tensor_type)))
            true = wanted[t.name]
            assert value.shape == true.shape
            assert (value - true).abs().max() <= most * true.abs().max(), t.name
            if true.dim() == 2:
                assert t.tensor_type.name == {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}[dtype]


def test_llama_cpp_gives_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="pip install -c constraints.txt gguf")
    library = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (it compiles llama.cpp)")
    for style in ("llama", "gpt2"):
        found = source(style)
        made = GPT(found.shape).eval()
        state.load_model(made, found.tensors, "test")
        gguf.write(found, tmp_path / style, "float32")
        theirs = library.Llama(str(tmp_path / style / "model.gguf"), n_ctx=16, logits_all=True, verbose=False)
        tokens = torch.randint(256, (1, 12))
        theirs.eval(tokens[0].tolist())
        got = torch.from_numpy(np.array(theirs.scores[:12]))
        with torch.no_grad():
            expected = made(tokens)[0]
        assert (got - expected).abs().max() < 0.02 * expected.abs().max(), style


def test_pairs_are_the_rotation_of_neighbours() -> None:
    t = torch.arange(8.0).view(8, 1)
    assert gguf.paired(t, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_command_takes_the_float_weights_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="pip install -c constraints.txt gguf")
    export.export(source(), "safetensors", Path("plain"))
    compressing.run(Path("plain"), [compressing.Int8()], device="cpu")
    assert main(["export", "plain-int8", "--to", "gguf"]) == 0
    assert "from the float weights of" in capsys.readouterr().out
    shutil.rmtree("plain")
    assert main(["export", "plain-int8", "--to", "gguf", "--folder", "again"]) == 0
    assert "rounded twice" in capsys.readouterr().err
    assert main(["export", "plain-int8", "--to", "hf", "--dtype", "q8_0"]) == 2
    assert "--dtype q8_0 is a type of --to gguf" in capsys.readouterr().err
    job.load(Path("runs/plain-int8"), "cpu")


@pytest.mark.parametrize("change", ["pruned", "smoothed", "trained on", "as it was"])
def test_float_weights_are_taken_only_where_int8_alone_made_the_run(change: str, capsys) -> None:
    library = pytest.importorskip("gguf", reason="pip install -c constraints.txt gguf")
    plain = source(bias=True)
    export.export(plain, "safetensors", Path("plain"))
    methods: list[Any] = [compressing.Int8(weight_only=True, group=32)]
    if change == "pruned":
        methods.insert(0, compress_pruning.Prune("0.5", method="magnitude"))
    compressing.run(Path("plain"), methods, device="cpu", name="small")
    found = export.read_model(Path("runs/small"))
    if change == "smoothed":
        found.tensors["blocks.0.norm1.weight"].mul_(2)  # what SmoothQuant leaves: norms that are not the origin's
        assert not cli_export.becomes(plain, found)
        return
    if change == "trained on":
        shutil.rmtree("plain")
        plain.tensors["blocks.1.mlp.up.weight"].mul_(1.01)
        export.export(plain, "safetensors", Path("plain"))
    assert main(["export", "runs/small", "--to", "gguf", "--dtype", "float32", "--folder", "made"]) == 0
    said = capsys.readouterr()
    taken = plain if change == "as it was" else found
    assert ("from the float weights of" in said.out) == (change == "as it was")
    assert ("are not those that became int8" in said.err) == (change != "as it was")
    wanted = gguf.names(taken)
    for t in library.GGUFReader("made/model.gguf").tensors:
        assert np.array_equal(np.array(t.data).reshape(wanted[t.name].shape), wanted[t.name].numpy()), t.name
