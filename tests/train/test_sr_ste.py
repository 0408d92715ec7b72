"""--prune 2:4 --prune-method sr-ste: weights chosen anew in each step, whole in optimizers and checkpoints, held at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastlm import compress, ops
from fastlm.data import DatasetSource, InputError
from fastlm.train import Trainer, checkpoint, export, job, pruning, report
from fastlm.train.files import read_metrics
from test_pruning import check_zeros
from test_train import StopAt, _own_place, book, tiny  # noqa: F401
from torch import Tensor, nn

CHOICE = {"prune": "2:4", "prune_method": "sr-ste", "prune_begin": 0.1, "prune_end": 0.8}  # of 12 steps: from 1 to 9


def two_of_four(w: Tensor) -> Tensor:
    """The mask of 2:4 by a sort: of four weights the two largest, of equal ones the later."""
    groups = w.detach().abs().view(-1, 4)
    gone = groups.argsort(dim=1, stable=True)[:, :2]
    return torch.ones_like(groups).scatter_(1, gone, 0.0).view_as(w)


class Straight(torch.autograd.Function):
    """Zhou et al. 2021: forward the masked weight; backward its gradient, to the whole weight."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w * two_of_four(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def small(draw: torch.Generator) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """Two linear layers, and eight samples, which are one batch."""
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw) * 0.5
    return model, [(torch.randn(12, generator=draw), torch.randn(4, generator=draw)) for _ in range(8)]


def squares(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (model(x) - y).square().sum(), torch.tensor(y.numel())


def trainer(tmp_path: Path, model: nn.Module, samples: Any, loss: Any = squares, **changes: Any) -> Trainer:
    same = {"steps": 6, "batch": 8, "warmup": 0, "schedule": "constant", "sample": 0}
    config = tiny(**same | CHOICE | {"prune_begin": 0.0} | changes)
    return Trainer(config, model, DatasetSource(samples, 1), tmp_path / "run", loss=loss)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_step_is_that_of_the_paper(tmp_path: Path, clip: float) -> None:
    """Chosen in steps 0 to 3, held from step 4 on; written out with an autograd function and PyTorch's AdamW."""
    draw = torch.Generator().manual_seed(3)
    model, samples = small(draw)
    other = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
    other.load_state_dict(model.state_dict())
    decay = 0.3  # so large that a wrong place of the term shows
    made = trainer(tmp_path, model, samples, clip=clip, lr=0.02, weight_decay=0.1, prune_decay=decay)
    made.fit()

    x, y = (torch.stack(t) for t in zip(*samples, strict=True))
    weights = [other[0].weight, other[2].weight]
    groups = [{"params": weights}, {"params": [other[0].bias, other[2].bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    held: list[Tensor] = []
    for step in range(6):
        if step == 4:
            held = [two_of_four(w) for w in weights]
            for w, mask in zip(weights, held, strict=True):
                w.data.mul_(mask)
                for name in ("exp_avg", "exp_avg_sq"):
                    adamw.state[w][name].mul_(mask)
        first, second = weights if held else [Straight.apply(w) for w in weights]
        hidden = torch.tanh(nn.functional.linear(x, first, other[0].bias))
        loss = (nn.functional.linear(hidden, second, other[2].bias) - y).square().mean()
        adamw.zero_grad()
        loss.backward()
        for w, mask in zip(weights, held, strict=False):
            w.grad.mul_(mask)
        if clip:
            nn.utils.clip_grad_norm_(other.parameters(), clip)
        if not held:
            for w in weights:
                w.grad.add_(w.detach() * (1 - two_of_four(w)), alpha=decay)
        adamw.step()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(
        held[0], two_of_four(small(torch.Generator().manual_seed(3))[0][0].weight)
    )  # it did choose anew
    check_zeros(made)


def test_a_step_that_fails_or_is_skipped_leaves_whole_weights(tmp_path: Path) -> None:
    model, samples = small(torch.Generator().manual_seed(4))
    calls: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total, count = squares(model, x, y)
        calls.append(model[0].weight.detach().clone())
        return total * (float("nan") if len(calls) == 2 else 1.0), count

    made = trainer(tmp_path, model, samples, loss, steps=40)
    made.load_ahead()
    seen = [model[0].weight.detach().clone()]
    for _ in range(3):
        made.train_step()
        seen.append(model[0].weight.detach().clone())
    assert torch.equal(seen[1], seen[2])  # the step without a number
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])
    for whole, masked in zip(seen, calls, strict=False):
        assert torch.equal(masked, whole * two_of_four(whole))
        assert whole.count_nonzero() == whole.numel()
    made.pruning.before(made.step)  # what an exception in the forward leaves behind
    assert not torch.equal(model[0].weight, seen[3])
    made.save()
    made.saver.wait()
    assert torch.equal(model[0].weight, seen[3])
    stored = checkpoint.Stored(checkpoint.newest(tmp_path / "run"), "model")
    assert torch.equal(stored.read("0.weight"), seen[3])
    made.loader.close()


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_every_optimizer_holds_the_last_choice(book: str, optimizer: str) -> None:  # noqa: F811
    same = {"optimizer": optimizer, "weight_decay": 0.5, "clip": 0.3, "ema": 0.9, "lr": 1e-2}
    made = job.start(tiny(name="held", **CHOICE | same | {"steps": 30}), (book,))
    first: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    original = made.trainer.pruning.hide

    def hide(pattern: str) -> None:
        original(pattern)
        found = {n: m.weight.detach() != 0 for n, m in compress.masked(made.model).items()}
        first.update({} if first else found)
        last.update(found)

    made.trainer.pruning.hide = hide
    made.trainer.fit()
    check_zeros(made.trainer)
    changed = 0
    for path, module in compress.masked(made.model).items():
        keep = ops.mask_to_bool(module.weight_mask, module.in_features)
        assert (keep.view(-1, 4).sum(-1) == 2).all()
        changed += int((first[path] != last[path]).sum())
    assert changed > 0
    assert made.trainer.best["step"] == 30


@pytest.mark.parametrize(
    ("kernels", "optimizer", "at"),  # in the middle, and before the step that holds
    [("torch", "adamw", 6), ("fused", "muon", 6), ("fused", "adamw", 9), ("torch", "muon", 9)],
)
def test_a_run_resumed_while_it_chooses_is_the_run_never_stopped(
    book: str,  # noqa: F811
    kernels: str,
    optimizer: str,
    at: int,
) -> None:
    same = {
        "dropout": 0.2,
        "micro": 2,
        "kernels": kernels,
        "optimizer": optimizer,
        "ema": 0.9,
        "eval_every": 3,
    } | CHOICE
    whole = job.start(tiny(name="whole", **same), (book,))
    whole.trainer.fit()
    half = job.start(tiny(name="half", save_every=at, **same), (book,))
    half.trainer.callbacks.append(StopAt(at))
    half.trainer.fit()
    config, corpus = job.read_config(half.folder)
    again = job.resume(half.folder, config, corpus, other_data=False, say=str)
    again.trainer.fit()
    for key in ("loss", "val_loss"):
        assert [r.get(key) for r in read_metrics(whole.folder)] == [r.get(key) for r in read_metrics(half.folder)]
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    check_zeros(again.trainer)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_checkpoint_on_the_way_holds_whole_weights_and_reads_as_what_was_measured(book: str, ema: float) -> None:  # noqa: F811
    made = job.start(tiny(name="way", eval_every=3, save_every=6, ema=ema, **CHOICE), (book,))
    made.trainer.callbacks.append(StopAt(6))
    made.trainer.fit()
    assert not made.trainer.best  # it is of weights that a later choice may still take
    assert report.summary(made.folder).best_loss is None
    folder = checkpoint.newest(made.folder)
    stored = checkpoint.Stored(folder, "model")
    found = export.read_model(made.folder)
    assert len(found.masks) == 8
    for name, mask in found.masks.items():
        weight = found.tensors[name.removesuffix("_mask")]
        whole = stored.read(name.removesuffix("_mask"))
        assert bool((whole != 0).all())
        keep = ops.mask_to_bool(mask, weight.shape[1])
        assert torch.equal(keep, two_of_four(whole).bool())
        assert torch.equal(weight != 0, keep)
    checkpoint.verify(folder)
    model, _ = job.load(made.folder, "cpu")
    measured = {row["step"]: row["val_loss"] for row in read_metrics(made.folder) if "val_loss" in row}
    config, corpus = job.read_config(made.folder)
    again = job.resume(made.folder, config, corpus, other_data=False, say=str)
    assert again.trainer.measure(whole=False)["val_loss"] == measured[6]
    assert again.trainer.evaluate_with is not None
    with torch.no_grad():
        assert again.trainer.evaluate_with(model, False)["val_loss"] == pytest.approx(measured[6], rel=1e-6)


def test_another_method_holds_from_a_checkpoint_what_was_chosen_there(book: str) -> None:  # noqa: F811
    made = job.start(tiny(name="turned", save_every=6, **CHOICE), (book,))
    made.trainer.callbacks.append(StopAt(6))
    made.trainer.fit()
    chosen = {n: m.clone() for n, m in compress.masks(made.model).items()}
    config, corpus = job.read_config(made.folder)
    config.optim.prune_method = "magnitude"
    again = job.resume(made.folder, config, corpus, other_data=False, say=str)
    again.trainer.fit()
    check_zeros(again.trainer)
    assert all(torch.equal(mask, chosen[name]) for name, mask in compress.masks(again.model).items())


def test_what_sr_ste_cannot_choose_among_is_refused(book: str) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"--prune-method sr-ste is for a pattern .* --prune is 0\.5"):
        job.start(tiny(name="bad", prune="0.5", prune_method="sr-ste"), (book,))
    with pytest.raises(InputError, match=r"--prune-begin must not be above --prune-end; they are 0\.9 and 0\.8"):
        job.start(tiny(name="bad", **CHOICE | {"prune_begin": 0.9}), (book,))
    job.start(tiny(name="thin", steps=2, prune="2:4"), (book,)).trainer.fit()
    with pytest.raises(InputError, match="--prune-method sr-ste chooses among all weights, and 8 layers of --init"):
        job.start(tiny(name="bad", init="runs/thin", **CHOICE), (book,))
    assert not Path("runs/bad").exists()


def test_steps_that_choose_and_the_one_that_holds() -> None:
    config = tiny(steps=1000, prune="2:4", prune_method="sr-ste", prune_begin=0.1, prune_end=0.6).optim
    assert [s for s in range(1000) if pruning.chooses(config, s)] == list(range(100, 600))
    assert [s for s in range(1000) if pruning.part(config, s) is not None] == [600]
    assert [s for s in (100, 599, 600, 601) if pruning.settled(config, s)] == [601]
    config.prune_begin, config.prune_end = 0.0, 1.0  # as in the paper, but for the last step, which holds
    assert [s for s in range(1000) if pruning.chooses(config, s)] == list(range(999))
