"""The trainer: it learns, stops, saves, and goes on bit for bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastlm.data import DatasetSource, InputError, TokenSource
from fastlm.data.baselines import ngram_bits
from fastlm.train import CheckpointError, Config, Trainer, checkpoint, job, mesh, optim
from fastlm.train.files import read_metrics
from torch import nn

KERNELS = ["torch", "fused"]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def book(tmp_path: Path) -> str:
    draw = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta"]
    path = tmp_path / "book.txt"
    path.write_text("".join(" ".join(words[i] for i in draw.integers(4, size=9)) + "\n" for _ in range(2000)))
    return str(path)


def tiny(**changes: Any) -> Config:
    """A configuration of seconds; keyword arguments change fields of any group."""
    config = Config()
    defaults = {
        "layers": 2,
        "heads": 2,
        "width": 32,
        "context": 16,
        "steps": 12,
        "batch": 4,
        "warmup": 2,
        "kernels": "torch",
    }
    defaults |= {"eval_every": 0, "save_every": 0, "eval_tokens": 512, "sample": 8, "quiet": True, "threads": 1}
    for name, value in {**defaults, **changes}.items():
        group = next(g for g in vars(config).values() if name in {f.name for f in dataclasses.fields(g)})
        setattr(group, name, value)
    return config


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.plain.named_parameters()}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run)]


# ------------------------------------------------------------------------------------------------------------ exact resume


@pytest.mark.grid(fast=3)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_a_run_resumed_is_the_run_never_stopped(book: str, kernels: str, optimizer: str) -> None:
    same = {"dropout": 0.2, "micro": 2, "kernels": kernels, "optimizer": optimizer, "ema": 0.9, "eval_every": 4}
    whole = job.start(tiny(name="whole", **same), (book,))
    whole.trainer.fit()
    half = job.start(tiny(name="half", save_every=6, **same), (book,))
    half.trainer.callbacks.append(StopAt(6))
    half.trainer.fit()
    assert half.trainer.step == 6
    torch.manual_seed(99)  # what else the process did must not matter
    again = job.resume(half.folder, tiny(name="half", **same), (book,), other_data=False, say=str)
    again.trainer.fit()
    assert losses(whole.folder) == losses(half.folder)
    assert [r["step"] for r in read_metrics(half.folder)] == list(range(1, 13))
    for name, w in weights(whole.trainer).items():
        assert torch.equal(w, weights(again.trainer)[name]), name
    for name, w in whole.trainer.ema.items():
        assert torch.equal(w, again.trainer.ema[name]), name


class StopAt:
    def __init__(self, step: int) -> None:
        self.at = step

    def start(self, trainer: Trainer) -> None: ...

    def end(self, trainer: Trainer) -> None: ...

    def step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == self.at:
            trainer.stop = "signal SIGTERM"


@pytest.mark.parametrize("harm", ["random", "sample", "moments"])
def test_the_comparison_can_fail(book: str, harm: str) -> None:
    same = {"dropout": 0.2}
    whole = job.start(tiny(name="whole", **same), (book,))
    whole.trainer.fit()
    half = job.start(tiny(name="half", save_every=6, **same), (book,))
    half.trainer.callbacks.append(StopAt(6))
    half.trainer.fit()
    again = job.resume(half.folder, tiny(name="half", **same), (book,), other_data=False, say=str)
    if harm == "random":
        torch.manual_seed(99)
    elif harm == "sample":
        again.trainer.consumed += 1
    else:
        next(iter(again.trainer.optimizer.state.values()))["exp_avg"].add_(1e-6)
    again.trainer.fit()
    assert losses(whole.folder) != losses(half.folder)


def test_accumulation_changes_only_the_rounding(book: str) -> None:
    runs = []
    for micro in (0, 1):
        made = job.start(tiny(name=f"micro{micro}", micro=micro), (book,))
        made.trainer.fit()
        runs.append(losses(made.folder))
    for (_, a), (_, b) in zip(*runs):
        assert a == pytest.approx(b, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------- checkpoints


def test_one_flipped_byte_in_any_file_is_refused_by_name(book: str) -> None:
    made = job.start(tiny(steps=4, save_every=2, name="run"), (book,))
    made.trainer.fit()
    last = made.folder / "checkpoints" / "step-00000004"
    names = sorted(p.name for p in last.iterdir())
    assert len(names) == 5
    for name in names:
        raw = (last / name).read_bytes()
        for place in (0, len(raw) // 2, len(raw) - 2):
            bad = bytearray(raw)
            bad[place] ^= 1
            (last / name).unlink()  # best shares it by a hard link
            (last / name).write_bytes(bad)
            with pytest.raises(CheckpointError, match=name):
                checkpoint.verify(last)
        assert checkpoint.newest(made.folder, str).name == "step-00000002"
        (last / name).write_bytes(raw)
    checkpoint.verify(last)


def test_a_full_disk_leaves_the_earlier_checkpoint(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.write_safetensors

    def full(file: Any, tensors: Any, meta: Any = None) -> None:
        if "step-00000006" in str(file.path):
            raise OSError(28, "No space left on device")
        real(file, tensors, meta)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    made = job.start(tiny(save_every=3, name="run"), (book,))
    with pytest.raises(CheckpointError, match="No space left on device; earlier checkpoints are untouched"):
        made.trainer.fit()
    assert checkpoint.newest(made.folder).name == "step-00000003"
    assert not list((made.folder / "checkpoints").glob(".draft*"))


def test_old_checkpoints_go_and_the_best_stays(book: str) -> None:
    made = job.start(tiny(save_every=2, keep=2, keep_every=6, eval_every=2, name="run"), (book,))
    made.trainer.fit()
    assert [s for s, _ in checkpoint.steps(made.folder)] == [6, 10, 12]
    (best,) = checkpoint.steps(made.folder, "best")
    rows = [r for r in read_metrics(made.folder) if "val_loss" in r]
    assert best[0] == min(rows, key=lambda r: r["val_loss"])["step"]
    checkpoint.verify(best[1])


def test_what_a_killed_save_had_not_removed_goes_when_the_run_goes_on(
    book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the end of its last save, a run is as one that was not: no further save would remove what is too old."""
    same = {"steps": 6, "save_every": 2, "eval_every": 2, "keep": 1, "lr": 1e-2}

    def names(folder: Path) -> set[str]:
        return {path.name for path in (folder / "checkpoints").iterdir()}

    whole = job.start(tiny(name="whole", **same), (book,))
    whole.trainer.fit()
    with monkeypatch.context() as killed:
        killed.setattr(checkpoint.Saver, "prune", lambda *args: None)
        made = job.start(tiny(name="killed", **same), (book,))
        made.trainer.fit()
    assert names(made.folder) == {f"{kind}-{step:08d}" for kind in ("step", "best") for step in (2, 4, 6)}
    config, corpus = job.read_config(made.folder)
    again = job.resume(made.folder, config, corpus, other_data=False, say=str)
    again.trainer.fit()
    assert names(made.folder) == names(whole.folder) == {"step-00000006", "best-00000006"}


def test_a_resume_that_is_refused_at_its_last_file_removes_nothing(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job.start(tiny(name="run", steps=6, save_every=2, keep=3), (book,))
    made.trainer.fit()
    config, corpus = job.read_config(made.folder)
    config.run.keep, config.optim.steps = 1, 8
    again = job.resume(made.folder, config, corpus, other_data=False, say=str)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job, "write_config", full)
    with pytest.raises(OSError, match="No space left"):
        again.trainer.fit()
    assert [step for step, _ in checkpoint.steps(made.folder)] == [2, 4, 6]


def test_a_damaged_checkpoint_is_none_of_those_to_keep(book: str) -> None:
    made = job.start(tiny(name="run", steps=4, save_every=2, keep=2), (book,))
    made.trainer.fit()
    (made.folder / "checkpoints/step-00000004/manifest.json").write_text("no")
    config, corpus = job.read_config(made.folder)
    config.run.save_every, config.run.keep = 1, 1
    again = job.resume(made.folder, config, corpus, other_data=False, say=str)
    again.trainer.callbacks.append(StopAt(3))
    again.trainer.fit()
    assert checkpoint.newest(made.folder).name == "step-00000003"


def test_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, 2).bfloat16(), "d": torch.tensor(2.0)}
    with checkpoint._Hashed(tmp_path / "x.safetensors") as file:
        checkpoint.write_safetensors(file, tensors)
    again = checkpoint.read_safetensors(tmp_path / "x.safetensors")
    assert all(torch.equal(tensors[k], again[k]) and tensors[k].dtype == again[k].dtype for k in tensors)


def test_other_data_are_refused(book: str, tmp_path: Path) -> None:
    made = job.start(tiny(name="run", save_every=6), (book,))
    made.trainer.fit()
    (tmp_path / "other.txt").write_text(Path(book).read_text().replace("alpha", "omega"))
    other = (str(tmp_path / "other.txt"),)
    with pytest.raises(InputError, match="data"):
        job.resume(made.folder, tiny(name="run"), other, other_data=False, say=str)
    assert job.resume(made.folder, tiny(name="run"), other, other_data=True, say=str).trainer.step == 12


def test_a_run_folder_is_never_overwritten(book: str) -> None:
    job.start(tiny(name="run"), (book,)).begin()
    with pytest.raises(InputError, match="not overwritten"):
        job.start(tiny(name="run"), (book,))


def test_fork_starts_a_new_run_there(book: str) -> None:
    made = job.start(tiny(name="run", save_every=6), (book,))
    made.trainer.fit()
    new = job.fork(made.folder, tiny(name="new", steps=15), (book,), other_data=False, say=str)
    new.trainer.fit()
    assert [r["step"] for r in read_metrics(new.folder)] == [13, 14, 15]
    assert len(read_metrics(made.folder)) == 12


# ------------------------------------------------------------------------------------------------------------------ guards


class Poisoned(nn.Module):
    """A regression whose samples from `start` to `end` are not numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)


def poisoned(config: Config, bad: set[int], factor: float = float("nan"), folder: str = "run") -> Trainer:
    torch.manual_seed(0)

    class Data:
        content = "poison"

        def batch(self, ids: np.ndarray):
            x = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(int(n))) for n in ids])
            y = x.sum(1, keepdim=True) * torch.tensor([[factor if int(n) in bad else 1.0] for n in ids])
            return x, y

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor):
        return (model.layer(x) - y).square().sum(), torch.tensor(len(x))

    Path(folder).mkdir()
    return Trainer(config, Poisoned(), Data(), folder, loss=loss)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str) -> None:
    trainer = poisoned(tiny(steps=3, batch=1, optimizer=optimizer, ema=0.5, warmup=0), bad={1})
    seen = []

    class Watch:
        def start(self, trainer: Trainer) -> None: ...

        def end(self, trainer: Trainer) -> None: ...

        def step(self, trainer: Trainer, row: dict[str, Any]) -> None:
            seen.append((row["bad"], weights(trainer), {k: v.clone() for k, v in trainer.ema.items()}))

    trainer.callbacks.append(Watch())  # type: ignore[arg-type]
    trainer.fit()
    assert [bad for bad, _, _ in seen] == [0, 1, 0]
    for kind in (1, 2):
        for name in seen[0][1]:
            assert torch.equal(seen[0][kind][name], seen[1][kind][name])
            assert not torch.equal(seen[1][kind][name], seen[2][kind][name])
    assert trainer.guard.bad_steps == 1
    assert math.isfinite(float(sum(w.sum() for w in weights(trainer).values())))


def test_too_many_bad_steps_in_a_row_stop_with_a_reason() -> None:
    trainer = poisoned(tiny(steps=40, batch=1, max_bad=4, save_every=5), bad=set(range(12, 40)))
    with pytest.raises(InputError, match=r"4 steps in a row.*step 16"):
        trainer.fit()
    trainer.saver.wait()
    assert checkpoint.newest(Path("run")).name == "step-00000015"


def test_a_spike_rolls_back_and_skips() -> None:
    trainer = poisoned(tiny(steps=40, batch=1, spike=50.0, save_every=10, lr=1e-2), bad={25}, factor=1e4)
    trainer.fit()
    assert trainer.skipped == [(20, 26)]
    assert [r["step"] for r in read_metrics(Path("run"))] == list(range(1, 41))
    assert max(r["loss"] for r in read_metrics(Path("run"))) < 1e4


def test_early_stopping_restores_the_best(book: str) -> None:
    made = job.start(
        tiny(name="run", steps=200, eval_every=2, patience=3, lr=0.5, warmup=0, schedule="constant"), (book,)
    )
    why = made.trainer.fit()
    assert why.startswith("early")
    assert made.trainer.step < 200
    result = made.finish(why, str)
    best = min(r["val_loss"] for r in read_metrics(made.folder) if "val_loss" in r)
    assert abs(result.val["val_loss"] - best) < 0.3


# ------------------------------------------------------------------------------------------------------------ optimisation


def test_schedules_meet_their_ends() -> None:
    for name in ("cosine", "linear", "constant", "wsd"):
        config = tiny(schedule=name, steps=100, warmup=10, min_lr=0.1).optim
        rates = [optim.rate(config, s) for s in range(101)]
        assert rates[0] == pytest.approx(0.1)
        assert max(rates) == pytest.approx(1.0)
        assert rates[10] == pytest.approx(1.0)
        assert rates[100] == pytest.approx(1.0 if name == "constant" else 0.1)
    wsd = tiny(schedule="wsd", steps=100, warmup=10, cooldown=0.2, min_lr=0.1).optim
    assert optim.rate(wsd, 79) == pytest.approx(1.0)
    assert optim.rate(wsd, 90) == pytest.approx(0.55)


def test_orthogonal_brings_singular_values_near_one() -> None:
    for shape in ((8, 32, 32), (2, 64, 16), (2, 16, 64)):
        s = torch.linalg.svdvals(optim.orthogonal(torch.randn(shape)))
        assert s.max() < 1.3
        assert s.median() > 0.6


def test_decay_and_muon_fall_where_they_belong(book: str) -> None:
    made = job.start(tiny(optimizer="muon", style="gpt2"), (book,))
    muon, adamw = made.trainer.optimizer.parts
    names = {id(p): n for n, p in made.model.named_parameters()}
    matrices = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert matrices == {n for n, p in made.model.named_parameters() if "blocks" in n and p.ndim == 2}
    still = {names[id(p)] for g in adamw.param_groups if not g["weight_decay"] for p in g["params"]}
    assert still == {n for n, p in made.model.named_parameters() if p.ndim < 2}
    held = sum(len(g["params"]) for g in made.trainer.optimizer.param_groups)
    assert held == len(names)


def test_the_batch_grows_and_every_sample_is_seen_once(book: str) -> None:
    made = job.start(tiny(ramp=6, batch=16, steps=10, micro=3), (book,))
    ids = np.concatenate(list(made.trainer.plan(0, 0)))
    assert ids.tolist() == list(range(len(ids)))
    assert [made.trainer.batch_size(s) for s in (0, 6, 9)] == [2, 16, 16]
    later = np.concatenate(list(made.trainer.plan(4, sum(made.trainer.batch_size(s) for s in range(4)))))
    assert later.tolist() == ids[-len(later) :].tolist()


def test_bfloat16_and_float16_train(book: str) -> None:
    for dtype in ("bfloat16", "float16"):
        made = job.start(tiny(name=dtype, dtype=dtype, steps=30, lr=1e-2), (book,))
        made.trainer.fit()
        rows = losses(made.folder)
        assert rows[-1][1] < rows[0][1] - 1


def test_costs_count_the_parameters(book: str) -> None:
    for style in ("gpt2", "llama"):
        config = tiny(style=style, width=128)
        shape = config.model.resolve(256)
        from fastlm.models.gpt import GPT

        real = sum(p.numel() for p in GPT(shape).parameters())
        assert job.Costs.of(shape, config).parameters == real


def test_a_model_too_large_is_refused_before_it_is_made(book: str) -> None:
    with pytest.raises(InputError, match="GiB"):
        job.start(tiny(width=1 << 16, layers=96, heads=64), (book,))


def test_ranks_of_one_machine_share_its_memory(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what cannot fit is refused before the corpus is prepared."""

    class Four(mesh.Ranks):
        on_host = 4

    config = tiny()
    need = job.Costs.of(config.model.resolve(256), config).memory
    monkeypatch.setattr(job, "memory_limit", lambda device: 3 * need)
    job.start(config, (book,))
    monkeypatch.setattr(job, "read_data", lambda *_: pytest.fail("the corpus was read"))
    gib = need / 2**30
    with pytest.raises(
        InputError, match=rf"{4 * gib:.1f} GiB \(4 processes of {gib:.1f}\) and the machine has {3 * gib:.1f}"
    ):
        job.start(config, (book,), ranks=Four())


def test_deterministic_asks_pytorch_for_it(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", "")  # what the run sets is taken back with this
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    try:
        made = job.start(tiny(deterministic=True, steps=2), (book,))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert made.trainer.fit() == "all steps done"
    finally:
        torch.use_deterministic_algorithms(False)


def test_tensorboard_gets_every_number_of_every_step(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[int, dict[str, float]] = {}
    opened: list[tuple[str, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.setdefault(step, {})[name] = value

        def close(self) -> None:
            opened.append(("closed", 0))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    made = job.start(tiny(tensorboard=True, steps=3, eval_every=2), (book,))
    made.trainer.fit()
    assert opened == [(str(made.folder / "tensorboard"), 1), ("closed", 0)]
    rows = read_metrics(made.folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "val_loss" in written[2]
    for row in rows:
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        assert written[row["step"]] == numbers
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tensorboard needs the package tensorboard"):
        job.start(tiny(tensorboard=True, steps=3), (book,)).trainer.fit()


# ----------------------------------------------------------------------------------------------------------------- learning


def _short(shuffled: bool, folder: str, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Bits per byte of a run of fixed tokens on the standard library, and the trigram's."""
    if shuffled:
        real = TokenSource.batch

        def batch(self: TokenSource, ids: np.ndarray):
            x, y = real(self, ids)
            order = torch.randperm(y.numel(), generator=torch.Generator().manual_seed(int(ids[0])))
            return x, y.reshape(-1)[order].reshape(y.shape)

        monkeypatch.setattr(TokenSource, "batch", batch)
    config = tiny(
        name=folder, style="llama", width=128, layers=2, heads=4, context=64, batch=12, steps=400, warmup=40, threads=0,
        optimizer="muon", lr=5e-3, kernels=KERNELS[-1],
    )  # fmt: skip
    made = job.start(config, ())
    made.trainer.fit()
    data = made.data[0]
    trigram = ngram_bits(data.text("train"), data.text("val"), (3,))[3]
    return made.trainer.latest["val_bpb"], trigram


@pytest.mark.slow
@pytest.mark.grid
def test_a_short_run_beats_the_trigram(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, trigram = _short(False, "real", monkeypatch)
    print(f"{reached:.3f} bits per byte, trigram {trigram:.3f}")
    assert reached < trigram


@pytest.mark.slow  # as long as the run that it is the control of
def test_shuffled_targets_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, trigram = _short(True, "shuffled", monkeypatch)
    assert reached > trigram


# ------------------------------------------------------------------------------------------------------------ one's own model


def test_one_s_own_module_dataset_and_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(100, 8)
    dataset = torch.utils.data.TensorDataset(x, x[:, :2].sum(1, keepdim=True))

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor):
        return (model(x) - y).square().sum(), torch.tensor(len(x))

    Path("own").mkdir()
    trainer = Trainer(tiny(steps=150, batch=10, lr=1e-2), model, DatasetSource(dataset, seed=1), "own", loss=loss)
    assert trainer.fit() == "all steps done"
    rows = read_metrics(Path("own"))
    assert rows[-1]["loss"] < rows[0]["loss"] / 3


def test_result_and_picture_are_written(book: str) -> None:
    made = job.start(tiny(name="run", eval_every=4), (book,))
    said: list[str] = []
    result = made.run(said.append)
    names = {p.name for p in made.folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "loss.png", "result.json", "sample.txt", "checkpoints"} <= names
    assert set(result.counted) == {"bigram", "5-gram", "zlib -9"}
    assert any("bits per byte" in line for line in said)
    assert Config.from_dict(json.loads((made.folder / "config.json").read_text())["config"]) == made.config
