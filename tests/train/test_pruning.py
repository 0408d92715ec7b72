"""--prune: masks that grow while training, are held by every optimizer, and resume in the middle to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastlm import compress, ops
from fastlm.cli import main as cli
from fastlm.data import InputError
from fastlm.models.gpt import GPT
from fastlm.train import Trainer, checkpoint, export, job, pruning, report, state
from fastlm.train.files import read_metrics
from test_train import StopAt, _own_place, book, tiny  # noqa: F401


def check_zeros(trainer: Trainer, moments: bool = True) -> None:
    """Pruned weights are +0 to the bit; what optimizer and average keep of them is 0."""
    found = compress.masked(trainer.plain)
    assert found
    for path, module in found.items():
        gone = ~ops.mask_to_bool(module.weight_mask, module.in_features)
        assert not module.weight.detach()[gone].view(torch.int32).any()
        assert bool(module.weight.detach()[~gone].count_nonzero() == (~gone).sum())
        for value in trainer.optimizer.state[module.weight].values():
            if moments and value.shape == module.weight.shape:
                assert not value[gone].any()
        if trainer.ema:
            assert not trainer.ema[f"{path}.weight"][gone].any()


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_every_optimizer_holds_masks_for_two_hundred_steps(book: str, optimizer: str) -> None:  # noqa: F811
    changes = {
        "optimizer": optimizer,
        "weight_decay": 0.5,
        "clip": 0.3,
        "ema": 0.9,
        "batch": 2,
        "context": 8,
        "layers": 1,
    }
    config = tiny(name="held", steps=220, prune="0.5", prune_method="magnitude", prune_begin=0.05, **changes)
    made = job.start(config, (book,))
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.trainer.fit()
    assert made.trainer.pruning.sparsity() == pytest.approx(0.5, abs=1e-3)
    check_zeros(made.trainer)
    assert not any(torch.equal(p, before[n]) for n, p in made.model.named_parameters())


@pytest.mark.slow  # float16 on a CPU
def test_a_loss_scale_and_bad_steps_change_no_mask(book: str) -> None:  # noqa: F811
    config = tiny(name="scaled", steps=12, prune="2:4", prune_begin=0.2, dtype="float16", layers=1, batch=1, max_bad=20)
    made = job.start(config, (book,))
    made.trainer.scale.fill_(2.0**20)  # overflows at first, and halves
    made.trainer.fit()
    assert made.trainer.guard.bad_steps > 0
    check_zeros(made.trainer)
    mask = made.model.blocks[0].attn.qkv.weight_mask
    assert (ops.mask_to_bool(mask, 32).view(-1, 4).sum(-1) == 2).all()


def test_the_schedule_is_the_cubic_one_and_only_grows() -> None:
    config = tiny(steps=1000, prune="0.8", prune_begin=0.1, prune_end=0.6, prune_every=50).optim
    found = {step: part for step in range(1000) if (part := pruning.part(config, step)) is not None}
    assert list(found) == list(range(100, 601, 50))
    for step, part in found.items():
        assert part == pytest.approx(0.8 + (0.0 - 0.8) * (1 - (step - 100) / 500) ** 3)  # Zhu and Gupta 2017, eq. 1
    assert list(found.values()) == sorted(found.values())
    assert found[600] == 0.8
    config.prune_method = "magnitude"
    assert [s for s in range(1000) if pruning.part(config, s) is not None] == [100]


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumed_while_masks_grow_is_the_run_never_stopped(book: str, kernels: str, optimizer: str) -> None:  # noqa: F811
    same = {"dropout": 0.2, "micro": 2, "kernels": kernels, "optimizer": optimizer, "ema": 0.9, "prune": "0.7"}
    same |= {"prune_every": 2, "prune_begin": 0.1, "prune_end": 0.8}
    whole = job.start(tiny(name="whole", **same), (book,))
    whole.trainer.fit()
    half = job.start(tiny(name="half", save_every=6, **same), (book,))
    half.trainer.callbacks.append(StopAt(6))
    half.trainer.fit()
    middle = half.trainer.pruning.sparsity()
    assert middle is not None
    assert 0.1 < middle < 0.69
    config, corpus = job.read_config(half.folder)
    again = job.resume(half.folder, config, corpus, other_data=False, say=str)
    assert again.trainer.pruning.sparsity() == middle
    again.trainer.fit()
    assert [r["loss"] for r in read_metrics(whole.folder)] == [r["loss"] for r in read_metrics(half.folder)]
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert again.trainer.pruning.sparsity() == pytest.approx(0.7, abs=1e-3)
    check_zeros(again.trainer)


def test_the_best_of_a_run_that_prunes_is_pruned(book: str) -> None:  # noqa: F811
    job.start(tiny(name="full", steps=60, lr=1e-2, eval_every=20), (book,)).trainer.fit()
    same = {"init": "runs/full", "lr": 1e-5, "prune": "0.7", "eval_every": 2, "patience": 4, "min_delta": 0.5}
    made = job.start(tiny(name="thin", steps=40, prune_every=4, save_every=20, **same), (book,))
    made.trainer.callbacks.append(StopAt(20))
    made.trainer.fit()  # the losses rise with the zeros: one that counted would end the run early
    assert made.trainer.step == 20
    assert not made.trainer.best
    assert not checkpoint.steps(made.folder, "best")
    (made.folder / "checkpoints" / "best-00000006").mkdir()  # as versions before left one
    export.read_model(made.folder)
    config, corpus = job.read_config(made.folder)
    again = job.resume(made.folder, config, corpus, other_data=False, say=str)
    again.trainer.best = {"step": 6, "val_loss": 0.0}
    assert again.trainer.fit().startswith("early")
    assert [step for step, _ in checkpoint.steps(made.folder, "best")] == [30]
    losses = {row["step"]: row["val_loss"] for row in read_metrics(made.folder) if "val_loss" in row}
    assert report.summary(made.folder).best_loss == min(v for step, v in losses.items() if step >= 30)
    assert losses[2] < losses[38]
    for path in (made.folder, checkpoint.steps(made.folder, "best")[0][1]):
        found = export.read_model(path)
        gone = [
            1 - float(found.tensors[n.removesuffix("_mask")].count_nonzero()) / (8 * m.numel())
            for n, m in found.masks.items()
        ]
        assert gone == pytest.approx([0.7] * 8, abs=1e-3)


@pytest.mark.parametrize(("method", "last"), [("gradual", 11), ("magnitude", 2)])
def test_the_target_is_reached_though_growth_ends_with_the_run(book: str, method: str, last: int) -> None:  # noqa: F811
    config = tiny(name="late", prune="0.7", prune_end=1.0, prune_method=method)
    assert [s for s in range(13) if pruning.settled(config.optim, s)] == list(range(last + 1, 13))
    made = job.start(config, (book,))
    made.trainer.fit()
    assert made.trainer.pruning.sparsity() == pytest.approx(0.7, abs=1e-3)
    assert made.trainer.best["step"] == 12


def test_flags_of_pruning_without_effect_are_named() -> None:
    given = {"prune_method": "magnitude", "prune_begin": 0.1, "prune_end": 0.9, "prune_every": 3, "prune_decay": 0.5}
    named = lambda **more: [note.split()[0] for note in tiny(**given | more).notes() if "--prune" in note.split()[0]]
    assert named() == ["--prune-method", "--prune-begin", "--prune-end", "--prune-every", "--prune-decay"]
    assert named(prune="0.5") == ["--prune-end", "--prune-every", "--prune-decay"]
    assert named(prune="2:4") == ["--prune-method", "--prune-end", "--prune-every", "--prune-decay"]
    assert named(prune="0.5", prune_method="gradual") == ["--prune-decay"]
    assert named(prune="2:4", prune_method="sr-ste") == ["--prune-every"]
    assert named(prune_method="sr-ste") == named()


@pytest.fixture
def base(book: str) -> str:  # noqa: F811
    made = job.start(tiny(name="base", steps=14, lr=1e-2, prune="0.6", prune_method="magnitude"), (book,))
    made.trainer.fit()
    return book


def test_a_pruned_run_loads_exports_and_is_a_plain_model(base: str) -> None:
    found = export.read_model(Path("runs/base"))
    assert len(found.masks) == 8
    assert not any("mask" in name for name in found.tensors)
    plain = GPT(found.shape).eval()
    plain.load_state_dict({**plain.state_dict(), **found.tensors}, strict=True)
    model, _ = job.load(Path("runs/base"), "cpu")
    tokens = torch.randint(256, (2, 16))
    assert torch.equal(model(tokens), plain(tokens))
    export.export(found, "safetensors", Path("out"), "float32")
    again = export.read_model(Path("out"))
    assert again.tensors.keys() == found.tensors.keys()
    stored = checkpoint.Stored(checkpoint.newest(Path("runs/base")), "model")
    assert sum(name.endswith("weight_mask") for name in stored.names()) == 8


def test_a_run_from_a_pruned_model_keeps_its_zeros_and_resumes(base: str) -> None:
    same = {"init": "runs/base", "optimizer": "muon", "ema": 0.5}
    whole = job.start(tiny(name="healed", **same), (base,))
    assert whole.trainer.pruning.sparsity() == pytest.approx(0.6, abs=1e-3)
    whole.trainer.fit()
    check_zeros(whole.trainer)
    half = job.start(tiny(name="half", save_every=6, **same), (base,))
    half.trainer.callbacks.append(StopAt(6))
    half.trainer.fit()
    config, corpus = job.read_config(half.folder)
    again = job.resume(half.folder, config, corpus, other_data=False, say=str)
    again.trainer.fit()
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_lora_merges_into_a_pruned_base_without_filling_it(base: str) -> None:
    same = {"init": "runs/base", "lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2}
    made = job.start(tiny(name="lora", **same), (base,))
    made.trainer.fit()
    found = export.read_model(made.folder)
    old = export.read_model(Path("runs/base"))
    assert len(found.masks) == 8
    changed = 0
    for name, mask in found.masks.items():
        weight = found.tensors[name.removesuffix("_mask")]
        gone = ~ops.mask_to_bool(mask, weight.shape[1])
        assert not weight[gone].view(torch.int32).any()
        changed += not torch.equal(weight, old.tensors[name.removesuffix("_mask")])
    assert changed == 8
    merged, _ = job.load(made.folder, "cpu")
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():
        assert (merged(tokens) - made.model.eval()(tokens)).abs().max() < 1e-4
    config, corpus = job.read_config(made.folder)
    job.resume(made.folder, config, corpus, other_data=False, say=str)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prune": "much"}, "--prune must be the part .* it is 'much'"),
        ({"prune": "1.0"}, "--prune must be above 0 and below 1"),
        ({"prune": "row"}, "--prune must be the part"),
        ({"prune": "0.5", "init": "x", "lora_rank": 2}, "exclude each other"),
        ({"prune": "0.5", "prune_begin": 1.0}, "--prune-begin"),
        ({"prune": "0.5", "prune_begin": 0.8}, r"--prune-begin must not be above --prune-end; they are 0\.8 and 0\.7"),
    ],
)
def test_what_cannot_be_pruned_is_refused(book: str, changes: dict, text: str) -> None:  # noqa: F811
    with pytest.raises(InputError, match=text):
        job.start(tiny(name="bad", **changes), (book,))
    assert not Path("runs").exists()


@pytest.mark.parametrize("fork", [False, True])
def test_a_run_that_was_not_pruned_is_not_pruned_later(book: str, fork: bool) -> None:  # noqa: F811
    made = job.start(tiny(name="dense"), (book,))
    made.trainer.fit()
    before = (made.folder / "config.json").read_bytes()
    config, corpus = job.read_config(made.folder)
    config.optim.prune, config.run.name = "0.5", "forked" if fork else "dense"
    with pytest.raises(InputError, match=r"--prune is for a run that prunes from its start, .* --init"):
        job.resume(made.folder, config, corpus, other_data=False, say=str, fork=fork)
    assert (made.folder / "config.json").read_bytes() == before
    assert not Path("runs/forked").exists()


@pytest.mark.slow  # two ranks
@pytest.mark.parametrize(
    ("mesh", "prune", "method"),
    [("fsdp=2", "0.5", "gradual"), ("dp=2", "0.5", "gradual"), ("fsdp=2", "2:4t", "gradual"),
     ("fsdp=2", "2:4", "sr-ste"), ("dp=2", "2:4", "sr-ste"), ("fsdp=2", "2:4t", "sr-ste")],
)  # fmt: skip
def test_masks_of_two_ranks_are_those_of_one(book: str, mesh: str, prune: str, method: str) -> None:  # noqa: F811
    shape = "--layers 1 --heads 2 --width 36 --context 16 --batch 8 --steps 30 --eval-every 0 --sample 0 --dropout 0"
    words = ["train", book, *shape.split(), "--prune", prune, "--prune-method", method, "--threads", "1", "--quiet"]
    assert cli.main([*words, "--name", "one"]) == 0
    two = [sys.executable, "-m", "fastlm", *words, "--name", "two", "--mesh", mesh, "--nproc", "2"]
    subprocess.run(two, check=True, timeout=300)
    one, found = (export.read_model(Path("runs") / name) for name in ("one", "two"))
    assert found.masks
    same = {}
    for key, mask in one.masks.items():
        name = key.removesuffix("_mask")
        columns = one.tensors[name].shape[-1]
        same[name] = ops.mask_to_bool(mask, columns) == ops.mask_to_bool(found.masks[key], columns)
        # gradients summed over ranks differ in last bits, so a weight at the threshold may fall on its other side
        assert same[name].float().mean() >= 0.995, name
    for name, tensor in one.tensors.items():
        where = same.get(name, torch.ones_like(tensor, dtype=torch.bool))
        torch.testing.assert_close(found.tensors[name][where], tensor[where], rtol=1e-3, atol=1e-5)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    from fastlm.data import DatasetSource

    model = torch.nn.Sequential(torch.nn.Embedding(4, 4))
    with pytest.raises(InputError, match=r"--prune 0\.5: .*no layer is left"):
        Trainer(tiny(prune="0.5"), model, DatasetSource([torch.zeros(2)] * 8, 1), tmp_path / "x")
    assert state.model_tensors(model).keys() == {"0.weight"}
