"""`fastlm compress`: what it writes is a run that everything takes; LoRA trains on an int8 base and goes on."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm import compress
from fastlm.cli.main import main
from fastlm.data import InputError
from fastlm.nn import Int8Linear
from fastlm.train import checkpoint, compressing, export, job, lora, state
from fastlm.train.base import read_shape
from fastlm.train.files import read_metrics
from test_train import StopAt, _own_place, book, tiny  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

LORA = {"init": "runs/base-int8", "lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with book.txt and a trained run, made once."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def base(book: str, trained: Path) -> str:  # noqa: F811
    if not (trained / "runs").exists():
        made = job.start(tiny(name="base", steps=60, lr=1e-2, width=64), (book,))
        made.trainer.fit()
        shutil.copytree("runs", trained / "runs")
    else:
        shutil.copytree(trained / "runs", "runs")
    return book


def shrink(book: str, **options: Any) -> compressing.Compressed:  # noqa: F811
    return compressing.run(Path("runs/base"), [compressing.Int8(**options)], text=(book,), device="cpu", samples=8)


def test_the_command_measures_and_writes_a_run_that_all_take(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "base", base, "--int8", "--smooth", "--device", "cpu", "--samples", "8"]) == 0
    said = capsys.readouterr().out
    for word in ("int8, dynamic: qkv (2), out (2), up (2), down (2)", "folded into 4 norms", "not smoothed: out, down",
                 "float: head", "size", "tokens/s", "perplexity", "run folder: runs/base-int8"):  # fmt: skip
        assert word in said, word
    body = json.loads(Path("runs/base-int8/config.json").read_text())
    record = body["compressed"]
    assert record["int8"]["mode"] == "dynamic"
    assert record["calibration"] == {"samples": 8, "seed": 1, "split": "train"}
    before, after = record["before"], record["after"]
    assert after["size"] < before["size"]
    assert before["tokens"] == after["tokens"] > 0
    assert abs(after["perplexity"] / before["perplexity"] - 1) < 0.01

    found = {}
    for name in ("base", "base-int8"):
        assert main(["eval", f"runs/{name}", "--json", "--device", "cpu"]) == 0  # its own validation split
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["base-int8"]["perplexity"] == pytest.approx(found["base"]["perplexity"], rel=0.01)
    assert main(["generate", "base-int8", "--tokens", "5", "--device", "cpu"]) == 0
    for to in ("safetensors", "hf"):
        assert main(["export", "base-int8", "--to", to]) == 0
    assert main(["runs"]) == 0


def test_the_written_integers_are_read_back_to_the_bit(base: str) -> None:
    for options in ({}, {"weight_only": True}, {"weight_only": True, "group": 32}):
        shutil.rmtree("runs/base-int8", ignore_errors=True)
        shrink(base, **options)
        stored = checkpoint.read_safetensors(Path("runs/base-int8/model.safetensors"))
        model, _ = job.load(Path("runs/base-int8"), "cpu")
        found = compress.held(model)
        assert (found.mode, found.group) == ("weight_only" if options else "dynamic", options.get("group"))
        assert len(found.layers) == 8
        for path, (weight, scale) in found.layers.items():
            assert torch.equal(weight, stored[f"{path}.weight"])
            assert torch.equal(scale, stored[f"{path}.weight_scale"])
        plain = export.read_model(Path("runs/base")).tensors
        floats = export.read_model(Path("runs/base-int8")).tensors
        assert floats.keys() == plain.keys()
        for name, t in floats.items():
            assert (t - plain[name]).abs().max() <= plain[name].abs().max() / 127, name


def test_a_damaged_file_is_told_and_a_folder_is_not_overwritten(base: str) -> None:
    shrink(base)
    with pytest.raises(InputError, match="exists and is not overwritten"):
        shrink(base)
    with pytest.raises(InputError, match="is an int8 model already"):
        compressing.run(Path("runs/base-int8"), [compressing.Int8()], text=(base,), device="cpu")
    file = Path("runs/base-int8/model.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(InputError, match="does not match its hash"):
        job.load(Path("runs/base-int8"), "cpu")


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--weight-only"], "--weight-only needs --int8"),
        ([], "needs a method: --int8"),
        (["--int8", "--group", "32"], "--group 32 needs --weight-only"),
        (["--int8", "--weight-only", "--smooth"], "--smooth and --weight-only exclude"),
        (["--int8", "--weight-only", "--split"], "--split and --weight-only exclude"),
        (["--split"], "--split needs --int8"),
        (["--int8", "--include", "qvk"], "include holds 'qvk'"),
        (["--int8", "--samples", "0"], "--samples must be"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    base: str, flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "base", *flags, "--device", "cpu"]) == 2
    assert word in capsys.readouterr().err
    assert sorted(p.name for p in Path("runs").iterdir()) == ["base"]


def test_an_exported_model_without_data_is_measured_on_a_text_or_by_size_alone(base: str) -> None:
    export.export(export.read_model(Path("runs/base")), "safetensors", Path("plain"))
    made = compressing.run(Path("plain"), [compressing.Int8()], device="cpu")
    assert made.after.perplexity is None
    assert "perplexity" not in made.table()
    assert made.folder == Path("runs/plain-int8")
    job.load(made.folder, "cpu")
    with pytest.raises(InputError, match="name a TEXT to calibrate on"):
        compressing.run(Path("plain"), [compressing.Int8(smooth=True)], name="other", device="cpu")
    assert compressing.run(Path("plain"), [compressing.Int8()], text=(base,), name="t", device="cpu").after.perplexity


def test_calibration_text_is_of_the_training_split_and_of_its_seed(base: str) -> None:
    model, tokenizer = job.load(Path("runs/base"), "cpu")
    config, corpus = job.read_config(Path("runs/base"))
    data = job.read_data(corpus, config.data, 16, kept=tokenizer)
    draw = lambda seed: torch.cat(compressing._calibration(Path("runs/base"), data, model, 12, seed))
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    train = b"".join(bytes(bytearray(shard.astype("uint8"))) for shard in data[0].train)
    assert all(bytes(bytearray(row.tolist())) in train for row in draw(3))


def test_smoothing_and_splitting_heal_planted_outliers(base: str) -> None:
    """Three channels times 100 and the weights that read them by 1/100: the float function is the same, int8 is not."""
    model, _ = job.load(Path("runs/base"), "cpu")
    config, corpus = job.read_config(Path("runs/base"))
    config.run.eval_tokens = 2048
    data = job.read_data(corpus, config.data, 16)
    with torch.no_grad():
        for block in model.blocks:
            for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.up)):
                norm.weight[:3] *= 100
                reader.weight[:, :3] /= 100
    measure = lambda m: compressing._measure(m, config, data).perplexity
    plain = measure(model)
    batches = lambda: compressing._calibration(Path("runs/base"), data, model, 16, 1)
    changes = []
    for options in ({}, {"smooth": True}, {"split": True}):
        one = copy.deepcopy(model)
        method = compressing.Int8(**options)
        lines = method.apply(one, batches)
        changes.append(measure(one) / plain - 1)
    assert changes[0] > 0.05
    # of so small a model; bench/quality_int8.py holds the default job's to 0.0005
    assert max(map(abs, changes[1:])) < 0.002
    planted = {path: columns for path, columns in method.outliers.items() if path.endswith(("qkv", "up"))}
    assert len(planted) == 4
    assert all({0, 1, 2} <= set(columns) for columns in planted.values())
    assert any(line.startswith("split: ") and "qkv" in line for line in lines)
    assert {"outliers", "outlier_weight"} <= dict(one.blocks[0].attn.qkv.named_buffers()).keys()


def test_a_split_model_is_written_read_adapted_and_exported(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = torch.tensor([1, 5])
    monkeypatch.setattr(
        compress, "outlier_columns", lambda model, batches, layers: {p: columns.clone() for p in layers}
    )
    assert main(["compress", "base", base, "--int8", "--split", "--device", "cpu", "--samples", "8"]) == 0
    path = Path("runs/base-int8")
    assert json.loads((path / "config.json").read_text())["compressed"]["int8"]["split"]["blocks.0.attn.qkv"] == [1, 5]
    model, _ = job.load(path, "cpu")
    floats, was = export.read_model(path), export.read_model(Path("runs/base"))
    weight = floats.tensors["blocks.1.mlp.up.weight"]
    assert torch.equal(weight[:, columns], was.tensors["blocks.1.mlp.up.weight"][:, columns])
    assert torch.equal(weight, model.blocks[1].mlp.up.float_weight())
    assert floats.tensors.keys() == was.tensors.keys()
    for to in ("hf", "safetensors"):
        assert main(["export", "base-int8", "--to", to]) == 0
    same = {"width": None, "layers": None, "heads": None, "context": None, **LORA}
    made = job.start(tiny(name="lora", **same), (base,))
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():
        assert torch.equal(made.model.eval()(tokens), model(tokens))
    assert made.costs.parts["weights"] == weight_bytes(made.model)
    made.trainer.fit()
    config, corpus = job.read_config(made.folder)
    job.resume(made.folder, config, corpus, other_data=False, say=str)
    merged, layer = job.load(made.folder, "cpu")[0], made.model.blocks[0].attn.qkv
    wanted = layer.float_weight() + layer.lora_scale * (layer.lora_b @ layer.lora_a)
    torch.testing.assert_close(merged.blocks[0].attn.qkv.weight, wanted)


def weight_bytes(model: torch.nn.Module) -> int:
    """What the parameters take, and weights and scales in int8."""
    ends = (".weight", ".weight_scale", ".outliers", ".outlier_weight")
    held = [b for n, b in model.named_buffers() if n.endswith(ends)]
    return sum(t.nbytes for t in (*model.parameters(), *held))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="dynamic"),
        pytest.param({"weight_only": True, "group": 32}, id="groups", marks=pytest.mark.slow),
    ],
)
def test_lora_trains_on_an_int8_base_and_goes_on(base: str, options: dict[str, Any]) -> None:
    shrink(base, **options)
    same = {"width": None, "layers": None, "heads": None, "context": None, "dropout": 0.2, **LORA}
    whole = job.start(tiny(name="whole", **same), (base,))
    int8 = {n: m for n, m in whole.model.named_modules() if isinstance(m, Int8Linear)}
    assert len(int8) == 8
    assert all(type(m) is lora.LoraInt8Linear for m in int8.values())
    before = {n: b.clone() for n, b in whole.model.named_buffers()}
    # the base's layers take at most 0.3 of their bytes in float32
    held = sum(m.weight.numel() + 4 * m.weight_scale.numel() for m in int8.values())
    assert held <= 0.3 * sum(4 * m.weight.numel() for m in int8.values())
    assert whole.costs.parts["weights"] == weight_bytes(whole.model)
    floats = job.start(tiny(name="floats", **{**same, "init": "runs/base"}), (base,))
    assert floats.costs.parts["weights"] == weight_bytes(floats.model) > 2 * weight_bytes(whole.model)
    whole.trainer.fit()
    losses = [r["loss"] for r in read_metrics(whole.folder)]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(torch.equal(b, before[n]) for n, b in whole.model.named_buffers())
    assert any(p.abs().max() > 0 for n, p in whole.model.named_parameters() if n.endswith("lora_b"))
    saved = checkpoint.read_safetensors(checkpoint.newest(whole.folder) / "model.safetensors")
    assert saved
    assert all(".lora_" in name for name in saved)
    stored = checkpoint.read_safetensors(whole.folder / "base/model.safetensors")
    assert stored["blocks.0.attn.qkv.weight"].dtype == torch.int8

    half = job.start(tiny(name="half", save_every=6, **same), (base,))
    half.trainer.callbacks.append(StopAt(6))
    half.trainer.fit()
    shutil.rmtree("runs/base-int8")  # a run needs nothing but its own folder
    config, corpus = job.read_config(half.folder)
    again = job.resume(half.folder, config, corpus, other_data=False, say=str)
    assert again.costs == whole.costs
    again.trainer.fit()
    assert losses == [r["loss"] for r in read_metrics(half.folder)]
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters()))

    merged, _ = job.load(whole.folder, "cpu")  # float, with the adapters in it
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():
        assert (merged(tokens) - whole.model.eval()(tokens)).abs().max() < 0.1


class Floats(TorchDispatchMode):
    """Counts the float matrices of some shapes that are made, but for meta ones."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.seen = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.is_meta:
                self.seen += tuple(t.shape) in self.shapes
        return out


def test_no_float_matrix_is_made_of_an_int8_base(base: str) -> None:
    shrink(base)
    path, same = Path("runs/base-int8"), {"width": None, "layers": None, "heads": None, "context": None, **LORA}
    layers = job.load(path, "cpu")[0].named_modules()
    shapes = {tuple(m.weight.shape) for _, m in layers if isinstance(m, Int8Linear)}
    with Floats(shapes) as floats:
        job.load(path, "cpu")
        made = job.start(tiny(name="thin", **same), (base,))
    assert floats.seen == 0
    made.trainer.fit()
    config, corpus = job.read_config(made.folder)
    config.optim.steps += 1
    with Floats(shapes) as floats:
        job.resume(made.folder, config, corpus, other_data=False, say=str)
    assert floats.seen == 0
    with Floats(shapes) as floats:  # it does count
        export.read_model(path)
    assert floats.seen > 0


def test_a_plan_reads_the_shape_of_init(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    shrink(base)
    for path in (Path("runs/base"), checkpoint.newest(Path("runs/base")), Path("runs/base-int8")):
        shape, int8 = read_shape(path)
        found = export.read_model(path)
        assert shape == found.shape
        assert (int8 is None) == (found.int8 is None)
    assert int8 is not None
    assert all(t.is_meta for pair in int8.layers.values() for t in pair)
    capsys.readouterr()
    words = ["--device", "cpu", "--memory", "8", "--batch", "4", "--json", "--init", "base-int8"]
    weights = []
    for more in ([], ["--lora-rank", "4"]):
        assert main(["plan", *words, *more]) == 0
        weights.append(json.loads(capsys.readouterr().out)["plans"][0]["memory"]["weights"])
    same = {"width": None, "layers": None, "heads": None, "context": None, **LORA}
    made = job.start(tiny(name="thin", **same), (base,))
    assert weights[1] == made.costs.parts["weights"] == weight_bytes(made.model)
    assert weights[0] == 4 * made.costs.parameters
    assert main(["plan", *words, "--width", "96"]) == 2
    assert "--width is 96, but the model of --init" in capsys.readouterr().err


def test_training_without_adapters_starts_at_the_dequantised_weights(base: str, capsys) -> None:
    shrink(base, weight_only=True)
    same = {"width": None, "layers": None, "heads": None, "context": None, "init": "runs/base-int8"}
    made = job.start(tiny(name="full", **same), (base,))
    floats = export.read_model(Path("runs/base-int8")).tensors
    assert all(torch.equal(t, floats[n]) for n, t in state.model_tensors(made.model).items())
    made._announce(print)
    assert "training starts at its dequantised weights, in float" in capsys.readouterr().out
