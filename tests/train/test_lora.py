"""LoRA: starts as the base, trains the adapters alone, resumes to the bit, and merges into the same model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import fastlm
import pytest
import torch
from fastlm.data import InputError
from fastlm.models.gpt import GPT, named
from fastlm.train import checkpoint, export, job, lora, mesh, state
from fastlm.train.files import read_metrics
from test_train import StopAt, _own_place, book, tiny  # noqa: F401

LORA = {"init": "runs/base", "lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2}


@pytest.fixture
def base(book: str) -> str:  # noqa: F811
    made = job.start(tiny(name="base", steps=20, lr=1e-2), (book,))
    made.trainer.fit()
    return book


def test_a_fine_tuning_starts_at_the_base_s_loss(base: str) -> None:
    found = export.read_model(Path("runs/base"))
    plain = GPT(found.shape).eval()
    state.load_model(plain, found.tensors, "base")
    tokens = torch.randint(256, (2, 16))
    for name, changes in (("full", {"init": "runs/base"}), ("lora", LORA)):
        made = job.start(tiny(name=name, **changes), (base,))
        with torch.no_grad():
            assert torch.equal(made.model.eval()(tokens), plain(tokens)), name


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_only_adapters_train_and_are_saved_and_merge(base: str, kernels: str) -> None:
    made = job.start(tiny(name="lora", dropout=0.1, ema=0.5, kernels=kernels, **LORA), (base,))
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.trainer.fit()
    for name, p in made.model.named_parameters():
        assert torch.equal(p, before[name]) != (".lora_" in name), name
    saved = checkpoint.read_safetensors(checkpoint.newest(made.folder) / "model.safetensors")
    assert saved
    assert all(".lora_" in name for name in saved)
    merged, _ = job.load(made.folder, "cpu")
    assert not any("lora" in n for n, _ in merged.named_parameters())
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad(), made.trainer.averaged():
        assert (merged(tokens) - made.model.eval()(tokens)).abs().max() < 1e-4


def test_an_adapted_run_resumed_is_the_run_never_stopped(base: str) -> None:
    same = {"dropout": 0.2, "kernels": "fused", **LORA}
    whole = job.start(tiny(name="whole", **same), (base,))
    whole.trainer.fit()
    half = job.start(tiny(name="half", save_every=6, **same), (base,))
    half.trainer.callbacks.append(StopAt(6))
    half.trainer.fit()
    Path("runs/base").rename("gone")  # a run needs nothing but its own folder
    config, corpus = job.read_config(half.folder)
    again = job.resume(half.folder, config, corpus, other_data=False, say=str)
    again.trainer.fit()
    assert [r["loss"] for r in read_metrics(whole.folder)] == [r["loss"] for r in read_metrics(half.folder)]
    ends = zip(whole.model.named_parameters(), again.model.parameters())
    assert all(torch.equal(p, q) for (_, p), q in ends)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({**LORA, "lora_targets": ("query",)}, "--lora-targets names query"),
        ({"lora_rank": 4}, "--lora-rank needs"),
        ({"init": "runs/base", "width": 64}, "--width is 64, but the model of --init runs/base has 32"),
        ({"init": "runs/base", "tokenizer": "chars"}, "another tokenizer"),
    ],
)
def test_what_does_not_fit_the_base_is_one_sentence(base: str, changes: dict, word: str) -> None:
    free = dict.fromkeys(("layers", "heads", "width", "context"))
    with pytest.raises(InputError, match=word):
        job.start(tiny(name="bad", **{**free, **changes}), (base,))


@pytest.mark.slow
def test_two_processes_adapt_as_one_does_and_go_on(base: str) -> None:
    words = [
        "train",
        base,
        "--init",
        "runs/base",
        "--lora-rank",
        "4",
        "--dropout",
        "0.2",
        "--lr",
        "1e-2",
        "--batch",
        "5",
    ]
    words += ["--warmup", "2", "--eval-every", "4", "--save-every", "4", "--sample", "8", "--device", "cpu", "--quiet"]

    def run(*more: str) -> str:
        command = [sys.executable, "-m", "fastlm", *more, "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*words, "--steps", "8", "--name", "one")
    run(*words, "--steps", "8", "--name", "two", "--mesh", "dp=2")
    one, two = read_metrics(Path("runs/one")), read_metrics(Path("runs/two"))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-4)
    assert [r["val_loss"] for r in two if "val_loss" in r] == pytest.approx(
        [r["val_loss"] for r in one if "val_loss" in r], rel=1e-4
    )
    saved = checkpoint.Stored(checkpoint.newest(Path("runs/two")), "model")
    assert all(".lora_" in name for name in saved.names())
    run(*words, "--steps", "12", "--name", "whole", "--mesh", "dp=2", "--schedule", "constant")
    run(*words, "--steps", "8", "--name", "half", "--mesh", "dp=2", "--schedule", "constant")
    assert "going on from step 8 of 12" in run("train", "--resume", "half", "--steps", "12")
    ends = [checkpoint.Stored(checkpoint.newest(Path("runs") / name), "model").load() for name in ("whole", "half")]
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())
    job.load(Path("runs/two"), "cpu")


def test_a_mesh_that_cuts_matrices_is_refused_for_adapters() -> None:
    class Cut(mesh.Ranks):
        sizes: ClassVar[dict[str, int]] = {"dp": 1, "fsdp": 2}

    with pytest.raises(InputError, match=r"--lora-rank with --mesh fsdp=\.\.\. is not built"):
        job.Job(tiny(**LORA), (), ranks=Cut())


def test_unswap_keeps_adapters_on_an_int8_base() -> None:
    torch.manual_seed(0)
    model = GPT(named("nano", "llama", layers=1, width=32, context=16, vocab=64)).eval()
    fastlm.swap(model, int8="weight_only", only_faster=False)
    paths = lora.apply(model, 4, 8.0, ["qkv", "down"])
    for n, p in model.named_parameters():
        if n.endswith("lora_b"):
            torch.nn.init.normal_(p)
    tokens = torch.randint(64, (2, 16))
    with torch.no_grad():
        before = model(tokens)
        with pytest.raises(TypeError, match="would lose what LoraInt8Linear adds"):
            model.get_submodule(paths[0]).to_linear()
        assert fastlm.unswap(model) >= 4
        torch.testing.assert_close(model(tokens), before)
    assert all(type(model.get_submodule(path)) is lora.LoraLinear for path in paths)
    assert not any("scale" in n for n in model.state_dict())
    trained = {n for n, p in model.named_parameters() if p.requires_grad} & {f"{p}.weight" for p in paths}
    assert not trained
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad and paths[0] in n} == {
        "lora_a",
        "lora_b",
    }
