"""`fastlm compress RUN --prune`: what it writes is a run that everything takes; int8 after it keeps the zeros."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm import compress, ops
from fastlm.cli.main import main
from fastlm.data import InputError
from fastlm.train import compressing, export, healing, job, tensor_parallel
from fastlm.train.compress_pruning import Prune
from fastlm.train.healing import Heal
from test_train import _own_place, book, tiny  # noqa: F401


@pytest.fixture
def base(book: str) -> str:  # noqa: F811
    job.start(tiny(name="base", steps=30, lr=1e-2), (book,)).trainer.fit()
    return book


def test_a_pruned_run_and_its_int8(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--samples", "8"]
    assert main(["compress", "base", base, "--prune", "2:4", *words]) == 0
    said = capsys.readouterr().out
    for word in ("sparsegpt, 2:4: 50.0000% of 8 layers' weights are zero", "do not make a dense matrix product faster",
                 "128 tokens, damping 0.01", "left: it shares embed.weight", "perplexity"):  # fmt: skip
        assert word in said, word
    found = export.read_model(Path("runs/base-pruned"))
    assert len(found.masks) == 8
    zero = {}
    for name, mask in found.masks.items():
        weight = found.tensors[name.removesuffix("_mask")]
        zero[name.removesuffix("_mask")] = weight == 0
        assert not weight[~ops.mask_to_bool(mask, weight.shape[1])].any()
        assert ((weight != 0).view(weight.shape[0], -1, 4).sum(-1) <= 2).all()
    record = json.loads(Path("runs/base-pruned/config.json").read_text())["compressed"]["pruned"]
    assert (record["prune"], record["method"], record["sparsity"]) == ("2:4", "sparsegpt", 0.5)
    assert main(["eval", "runs/base-pruned", "--json", "--device", "cpu"]) == 0

    assert main(["compress", "base-pruned", base, "--int8", "--name", "small", *words]) == 0
    assert main(["compress", "base", base, "--prune", "2:4", "--int8", "--name", "both", *words]) == 0
    for name in ("small", "both"):
        made = export.read_model(Path("runs") / name)
        assert made.int8 is not None
        for key, gone in zero.items():
            assert not made.tensors[key][gone].any(), key

    healed = job.start(tiny(name="healed", init="runs/base-pruned"), (base,))  # and goes on with its zeros
    healed.trainer.fit()
    assert healed.trainer.pruning.sparsity() == 0.5
    assert compress.masks(healed.model)


@pytest.mark.parametrize("rank", [0, 4])
def test_zeros_of_an_int8_model_stay_in_training_and_in_merging(base: str, rank: int) -> None:
    methods = [Prune("0.6", "magnitude"), compressing.Int8(weight_only=True, exclude=("down",))]
    compressing.run(Path("runs/base"), methods, text=(base,), device="cpu", samples=8, name="small")
    before = export.read_model(Path("runs/small"))
    assert len(before.masks) == 8
    assert before.int8 is not None
    assert len(before.int8.layers) == 6
    same = {"lora_rank": rank, "lora_alpha": 8.0, "lr": 1e-2}
    made = job.start(tiny(name="healed", init="runs/small", **same), (base,))
    made.trainer.fit()
    after = export.read_model(made.folder)
    assert after.masks.keys() == before.masks.keys()
    for name, mask in before.masks.items():
        weight = after.tensors[key := name.removesuffix("_mask")]
        gone = ~ops.mask_to_bool(mask, weight.shape[1])
        assert gone.float().mean() == pytest.approx(0.6, abs=1e-3)
        assert not weight[gone].any()
        assert not torch.equal(weight, before.tensors[key])
    merged, _ = job.load(made.folder, "cpu")
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():  # what trained is what is merged
        assert (merged(tokens) - made.model.eval()(tokens)).abs().max() < 1e-4
    config, corpus = job.read_config(made.folder)
    job.resume(made.folder, config, corpus, other_data=False, say=str)


def test_healing_trains_with_the_masks_held(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--samples", "8", "--name", "healed"]
    assert (
        main(["compress", "base", base, "--prune", "0.8", "--heal", "60", "--heal-lr", "0.01", "--int8", *words]) == 0
    )
    said = capsys.readouterr().out
    assert "healed: 60 steps of 4 samples, adamw, learning rate 0.01; the zeros of 8 layers stayed" in said
    assert ["before", "pruned", "healed", "int8"] in [line.split() for line in said.splitlines()]
    record = json.loads(Path("runs/healed/config.json").read_text())["compressed"]
    assert record["healed"]["steps"] == 60
    steps = {name: m["perplexity"] for name, m in record["steps"].items()}
    assert list(steps) == ["pruned", "healed", "int8"]
    assert steps["healed"] < steps["pruned"]
    assert record["after"]["perplexity"] == steps["int8"] == pytest.approx(steps["healed"], rel=0.01)

    compressing.run(Path("runs/base"), [Prune("0.8")], text=(base,), device="cpu", samples=8)
    pruned, healed = (export.read_model(Path(f"runs/{name}")) for name in ("base-pruned", "healed"))
    assert all(torch.equal(mask, healed.masks[name]) for name, mask in pruned.masks.items())
    for name, mask in healed.masks.items():
        weight = healed.tensors[key := name.removesuffix("_mask")]
        assert not weight[~ops.mask_to_bool(mask, weight.shape[1])].any()
        assert not torch.equal(weight, pruned.tensors[key])


@pytest.mark.parametrize("optimizer, kernels", [("muon", "fused"), ("lion", "torch")])
def test_healing_takes_the_run_s_optimizer_and_a_third_of_its_rate(base: str, optimizer: str, kernels: str) -> None:
    job.start(
        tiny(name="other", optimizer=optimizer, kernels=kernels, ema=0.9, lr=3e-3, muon_lr=0.03), (base,)
    ).trainer.fit()
    made = compressing.run(Path("runs/other"), [Prune("2:4", "magnitude"), Heal(5)], text=(base,), device="cpu")
    rate = "learning rate 0.001" + " (muon 0.01)" * (optimizer == "muon")
    assert made.lines[-1] == f"healed: 5 steps of 4 samples, {optimizer}, {rate}; the zeros of 8 layers stayed"
    again = compressing.run(
        Path("runs/other"), [Prune("2:4", "magnitude"), Heal(5)], text=(base,), device="cpu", name="t"
    )
    first, second = (export.read_model(m.folder).tensors for m in (made, again))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert made.folder == Path("runs/other-pruned-healed")


def test_a_healing_that_is_stopped_writes_nothing(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(healing._Trainer, "fit", lambda self: "signal SIGTERM")
    assert main(["compress", "base", base, "--prune", "0.5", "--heal", "9", "--device", "cpu", "--samples", "8"]) == 143
    assert "stopped by SIGTERM after 0 of 9 steps of healing: nothing is written" in capsys.readouterr().err
    assert sorted(p.name for p in Path("runs").iterdir()) == ["base"]


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--int8", "--heal", "5"], "--heal needs --prune"),
        (["--prune", "0.5", "--heal-lr", "0.1"], "--heal-lr needs --heal"),
        (["--prune", "0.5", "--heal", "-1"], "--heal must be at least 0"),
        (["--prune", "0.5", "--heal", "5", "--heal-lr", "0"], "--heal-lr must be above 0"),
    ],
)
def test_flags_of_healing_that_cannot_be(
    base: str, flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "base", *flags, "--device", "cpu"]) == 2
    assert word in capsys.readouterr().err
    assert not Path("runs/base-pruned-healed").exists()


def test_the_methods_differ_and_repeat(base: str) -> None:
    made = {}
    for name, method in (("m", "magnitude"), ("w", "wanda"), ("s", "sparsegpt"), ("t", "sparsegpt")):
        compressing.run(Path("runs/base"), [Prune("0.7", method)], text=(base,), device="cpu", samples=8, name=name)
        made[name] = export.read_model(Path("runs") / name).tensors
    key = "blocks.0.mlp.down.weight"
    assert not torch.equal(made["m"][key], made["w"][key])
    assert not torch.equal(made["w"][key], made["s"][key])
    assert all(torch.equal(made["s"][n], t) for n, t in made["t"].items())


def test_a_smaller_model_is_a_plain_one_that_everything_takes(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["--device", "cpu", "--samples", "8"]
    assert main(["compress", "base", base, "--prune", "heads:0.5,channels:0.5,layers:1", "--heal", "3", *words]) == 0
    said = capsys.readouterr().out
    for word in ("layers: 2 -> 1", "heads: 2 -> 1 of each layer", "channels: 96 -> 48", "smaller dense model",
                 "blocks.0.mlp   96 -> 48, which gave", "healed: 3 steps"):  # fmt: skip
        assert word in said, word
    folder = Path("runs/base-smaller-healed")
    body = json.loads((folder / "config.json").read_text())
    shape = {"layers": 1, "heads": 1, "hidden": 48, "head_size": 16}
    assert body["model"].items() >= shape.items()
    assert body["config"]["model"].items() >= shape.items()
    assert body["compressed"]["smaller"]["left"] == {"layers": 1, "heads": 1, "channels": 48}
    assert body["compressed"]["after"]["size"] < 0.6 * body["compressed"]["before"]["size"]
    assert main(["generate", "base-smaller-healed", "--tokens", "20", "--device", "cpu"]) == 0
    assert main(["eval", "base-smaller-healed", "--json", "--device", "cpu"]) == 0
    assert main(["export", "base-smaller-healed", "--to", "hf"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "export-hf").eval()
    ours, _ = job.load(folder, "cpu")
    again, _ = job.load(folder / "export-hf", "cpu")
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4
        assert torch.equal(again(tokens), ours(tokens))
    for kernels in ("torch", "fused"):
        none = dict.fromkeys(("layers", "heads", "width", "context"))
        on = job.start(tiny(name=kernels, init=str(folder), kernels=kernels, steps=4, save_every=2, **none), (base,))
        assert on.trainer.fit() == "all steps done"
        config, corpus = job.read_config(on.folder)
        assert (config.model.head_size, config.model.heads) == (16, 1)
        job.resume(on.folder, config, corpus, other_data=False, say=str)
    assert main(["compress", "base-smaller-healed", base, "--prune", "2:4", "--int8", "--name", "both", *words]) == 0
    assert main(["generate", "both", "--tokens", "5", "--device", "cpu"]) == 0


def test_a_model_whose_layers_differ(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sys.modules["fastlm.compress.shrink"]
    importance, calls = made.importance, itertools.count()  # type: ignore[attr-defined]

    def uneven(*args: Any) -> torch.Tensor:
        """Every other call, and so layer 1: what comes after the first quarter gives next to nothing."""
        found = importance(*args)
        if next(calls) % 2:
            found[len(found) // 4 :] *= 1e-9
        return found

    monkeypatch.setattr(made, "importance", uneven)
    words = ["--device", "cpu", "--samples", "8"]
    assert main(["compress", "base", base, "--prune", "0.5", "--per-layer", *words]) == 2
    assert "--per-layer needs --prune heads:... or channels:..." in capsys.readouterr().err
    prune = "heads:0.5,channels:0.3"  # of two layers of two heads one head each, and that one stays
    assert main(["compress", "base", base, "--prune", prune, "--per-layer", "--heal", "3", *words]) == 0
    assert "of all layers together" in capsys.readouterr().out
    folder = Path("runs/base-smaller-healed")
    body = json.loads((folder / "config.json").read_text())
    shapes = body["model"]["shapes"]
    assert shapes == [[1, 1, 96], [1, 1, 48]]
    text = ",".join("/".join(map(str, shape)) for shape in shapes)
    assert body["config"]["model"]["shapes"] == text
    assert body["config"]["model"]["hidden"] is None
    assert body["compressed"]["smaller"]["per_layer"] is True
    assert main(["generate", "base-smaller-healed", "--tokens", "20", "--device", "cpu"]) == 0
    assert main(["eval", "base-smaller-healed", "--json", "--device", "cpu"]) == 0
    for to in ("hf", "gguf"):
        capsys.readouterr()
        assert main(["export", "base-smaller-healed", "--to", to]) == 2
        assert "take layers of one shape, and this model's differ" in capsys.readouterr().err
    assert main(["export", "base-smaller-healed", "--to", "safetensors"]) == 0
    ours, _ = job.load(folder, "cpu")
    again, _ = job.load(folder / "export-safetensors", "cpu")
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():
        assert torch.equal(again(tokens), ours(tokens))
    none = dict.fromkeys(("layers", "heads", "width", "context"))
    for kernels in ("torch", "fused"):
        on = job.start(tiny(name=kernels, init=str(folder), kernels=kernels, steps=4, save_every=2, **none), (base,))
        assert on.trainer.fit() == "all steps done"
        assert on.model.config == ours.config
        config, corpus = job.read_config(on.folder)
        assert config.model.shapes == text
        job.resume(on.folder, config, corpus, other_data=False, say=str)
    with pytest.raises(
        InputError, match=f"--hidden is 64, but the model of --init .* has layers of {text}: leave it out"
    ):
        job.start(tiny(name="x", init=str(folder), hidden=64, **none), (base,))
    with pytest.raises(InputError, match="--mesh tp=2 cuts layers of one shape"):
        tensor_parallel.cuts(ours, 2)
    assert main(["compress", "base-smaller-healed", base, "--prune", "channels:8", "--name", "x", *words]) == 2
    assert "per_layer is False" in capsys.readouterr().err
    assert main(["compress", "base-smaller-healed", base, "--prune", "2:4", "--int8", "--name", "both", *words]) == 0
    assert main(["generate", "both", "--tokens", "5", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    "shapes, text",
    [
        ("4/4", "--shapes must be heads/kv-heads/hidden of each layer, such as 4/4/352,2/2/128; it is '4/4'"),
        ("2/2/64", "--shapes is of 1 layers and --layers is 2: they must be as many"),
        ("2/2/64,3/2/64", "--shapes must have three numbers above 0 of each layer, the first a multiple of the second"),
    ],
)
def test_shapes_that_cannot_be(book: str, shapes: str, text: str) -> None:  # noqa: F811
    with pytest.raises(InputError, match=text):
        job.start(tiny(name="bad", shapes=shapes), (book,))


@pytest.mark.parametrize(
    "prune, word",
    [
        ("heads:0.1", "--prune: heads 0.1 of 2 removes none"),
        ("layers:2", "--prune: layers 2 of 2 leaves none"),
        ("heads:x", "--prune takes heads:, channels: and layers:, each once"),
        ("heads:0.5,2:4", "--prune takes heads:, channels: and layers:, each once"),
        ("layers:1,layers:1", "each once"),
        ("channels:1.5", "the part that goes or a number"),
        ("channels:inf", "the part that goes or a number"),
    ],
)
def test_lists_of_parts_that_cannot_be(base: str, prune: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "base", base, "--prune", prune, "--device", "cpu", "--samples", "8"]) == 2
    assert word in capsys.readouterr().err
    assert not Path("runs/base-smaller").exists()


def test_what_cannot_be_is_refused(base: str) -> None:
    for prune, text in (("3", "--prune must be above 0"), ("x", "--prune must be the part")):
        with pytest.raises(InputError, match=text):
            compressing.run(Path("runs/base"), [Prune(prune)], text=(base,), device="cpu")
    with pytest.raises(InputError, match="include names 'query'"):
        compressing.run(Path("runs/base"), [Prune("0.5", "magnitude", ("query",))], text=(base,), device="cpu")
    assert not Path("runs/base-pruned").exists()
