"""Model sizes as published, the memory of the loss, and options of the trainer in combination."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastlm.models.gpt import GPT, named
from fastlm.train import Trainer, checkpoint, job
from fastlm.train.files import read_metrics
from test_train import StopAt, _own_place, book, losses, tiny, weights  # noqa: F401
from torch import nn


@pytest.mark.parametrize(
    "size, style, vocab, count",
    [
        ("124M", "gpt2", 50257, 124_439_808),  # GPT-2 small, tied
        ("350M", "gpt2", 50257, 354_823_168),  # GPT-2 medium, tied
        ("1B", "llama", 128256, 1_235_814_400),  # Llama 3.2 1B, tied
        ("7B", "llama", 32000, 6_738_415_616),  # Llama 2 7B
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(size: str, style: str, vocab: int, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(named(size, style, vocab=vocab)).parameters()) == count


# ------------------------------------------------------------------------------------------------- memory of the loss

LOSS = """
import sys, torch
from fastlm.models.loss import linear_cross_entropy
from fastlm.train.machine import peak_memory

torch.set_num_threads(1)
tokens, vocab, cpu = int(sys.argv[2]), 32768, torch.device("cpu")
x = torch.randn(tokens, 16, requires_grad=True)
w = torch.randn(vocab, 16, requires_grad=True)
t = torch.randint(vocab, (tokens,))
linear_cross_entropy(x[:256], w, t[:256]).backward()  # two chunks, and what libraries take once
before = peak_memory(cpu)
if sys.argv[1] == "chunks":
    loss = linear_cross_entropy(x, w, t)
else:
    loss = torch.nn.functional.cross_entropy(x @ w.t(), t, reduction="sum")
loss.backward()
print(peak_memory(cpu) - before)
"""


def grown(how: str, tokens: int) -> int:
    """Bytes by which a loss of `tokens` tokens over 32,768 classes and its backward pass the peak of one of 256."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back: the peak is what is held at once
    command = [sys.executable, "-c", LOSS, how, str(tokens)]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the allocator is told by glibc's environment to give back"
)
def test_the_loss_never_holds_the_logits_of_all_tokens() -> None:
    whole = 1024 * 32768 * 4
    assert grown("chunks", 1024) < whole / 16
    assert grown("whole", 1024) > whole  # the measurement sees what a whole matrix takes


# ------------------------------------------------------------------------------------------------------- combinations


def test_average_resume_and_early_stopping_together(book: str) -> None:  # noqa: F811
    same = {"steps": 200, "ema": 0.5, "eval_every": 2, "patience": 3, "lr": 0.5, "warmup": 0, "schedule": "constant"}
    same |= {"dropout": 0.1, "kernels": "fused"}
    whole = job.start(tiny(name="whole", **same), (book,))
    why = whole.trainer.fit()
    assert why.startswith("early")
    stopped = whole.trainer.step
    half = job.start(tiny(name="half", save_every=1, **same), (book,))
    half.trainer.callbacks.append(StopAt(stopped - 3))  # between two of the evaluations that patience counts
    half.trainer.fit()
    assert 0 < half.trainer.waited < 3
    again = job.resume(half.folder, tiny(name="half", **same), (book,), other_data=False, say=str)
    assert again.trainer.fit() == why
    assert again.trainer.step == stopped
    assert again.trainer.best == whole.trainer.best
    results = [made.finish(why, str) for made in (whole, again)]
    assert results[0].val == results[1].val
    assert losses(whole.folder) == losses(half.folder)
    for name, w in weights(whole.trainer).items():
        assert torch.equal(w, weights(again.trainer)[name]), name
        assert torch.equal(whole.trainer.ema[name], again.trainer.ema[name]), name
    best = checkpoint.Stored(checkpoint.steps(whole.folder, "best")[-1][1], "ema")
    assert all(torch.equal(best.read(name), t) for name, t in whole.trainer.ema.items())


class Noise:
    """Sample n is noise of seed n."""

    content = "noise"

    def batch(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(int(n))) for n in ids])
        return x, x[:, :2].sum(1, keepdim=True)


def regression(folder: str, **changes: Any) -> Trainer:
    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (model(x) - y).float().square().sum(), torch.tensor(len(x))

    Path(folder).mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return Trainer(tiny(dtype="float16", warmup=0, **changes), model, Noise(), folder, loss=loss)


class Watch:
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, dict[str, torch.Tensor]]] = []

    def start(self, trainer: Trainer) -> None: ...

    def end(self, trainer: Trainer) -> None: ...

    def step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self.seen.append((row["bad"], trainer.scale.item(), weights(trainer)))


def test_a_loss_scale_that_overflows_falls_until_steps_are_sound_and_survives_a_resume() -> None:
    changes = {"steps": 30, "max_bad": 30, "lr": 1e-2}
    trainer, watch = regression("run", **changes), Watch()
    start = weights(trainer)
    trainer.scale.fill_(2.0**24)  # float16 ends at 65,504
    trainer.callbacks += [watch, StopAt(20)]  # type: ignore[list-item]
    trainer.fit()
    bad = [b for b, _, _ in watch.seen]
    assert 3 < sum(bad) < 20
    assert bad[:3] == [1, 1, 1]
    assert bad[-3:] == [0, 0, 0]
    for i, (b, scale, now) in enumerate(watch.seen):
        assert scale == 2.0 ** (24 - sum(bad[: i + 1]))
        before = watch.seen[i - 1][2] if i else start
        assert all(torch.equal(now[n], before[n]) for n in start) == bool(b)
    again = regression("run", **changes)
    again.restore(checkpoint.newest(Path("run")))
    assert again.scale.item() == watch.seen[-1][1]
    assert again.guard.bad_steps == sum(bad)
    again.good.fill_(1998)
    seen = Watch()
    again.callbacks.append(seen)  # type: ignore[arg-type]
    again.fit()
    fell, rose = watch.seen[-1][1], [scale for _, scale, _ in seen.seen]
    assert rose[0] == fell
    assert rose[1] == 2 * fell  # after 2,000 sound steps
    assert [r["step"] for r in read_metrics(Path("run"))] == list(range(1, 31))


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("recompute", ["half", "full"])
def test_recomputation_with_fused_kernels_and_dropout_changes_no_bit(
    book: str,  # noqa: F811
    style: str,
    recompute: str,
) -> None:
    runs = []
    for mode in ("none", recompute):
        config = tiny(name=mode, recompute=mode, style=style, kernels="fused", dropout=0.3, micro=2, steps=4)
        made = job.start(config, (book,))
        grads: dict[str, torch.Tensor] = {}
        step = made.trainer.optimizer.step

        def keep(grads: Any = grads, made: Any = made, step: Any = step) -> None:
            grads.update({n: p.grad.clone() for n, p in made.model.named_parameters()} if not grads else {})
            step()

        made.trainer.optimizer.step = keep  # type: ignore[method-assign]
        made.trainer.fit()
        runs.append((grads, losses(made.folder), weights(made.trainer)))
    (grads, rows, ends), (grads2, rows2, ends2) = runs
    assert rows == rows2
    for name in grads:
        assert torch.equal(grads[name], grads2[name]), name
        assert torch.equal(ends[name], ends2[name]), name


@pytest.mark.slow
def test_compiled_fused_and_resumed_is_the_run_never_stopped(book: str) -> None:  # noqa: F811
    same = {"compile": True, "kernels": "fused", "dropout": 0.2, "micro": 2, "ema": 0.9, "layers": 1}
    whole = job.start(tiny(name="whole", **same), (book,))
    whole.trainer.fit()
    half = job.start(tiny(name="half", save_every=6, **same), (book,))
    half.trainer.callbacks.append(StopAt(6))
    half.trainer.fit()
    again = job.resume(half.folder, tiny(name="half", **same), (book,), other_data=False, say=str)
    again.trainer.fit()
    assert losses(whole.folder) == losses(half.folder)
    for name, w in weights(whole.trainer).items():
        assert torch.equal(w, weights(again.trainer)[name]), name
    eager = job.fork(  # and what was compiled goes on eagerly, on the same samples with the same masks
        whole.folder, tiny(name="eager", **{**same, "compile": False, "steps": 15}), (book,), other_data=False, say=str
    )
    compiled = job.fork(
        whole.folder, tiny(name="compiled", **{**same, "steps": 15}), (book,), other_data=False, say=str
    )
    for made in (eager, compiled):
        made.trainer.fit()
    for (_, a), (_, b) in zip(losses(eager.folder), losses(compiled.folder)):
        assert a == pytest.approx(b, rel=1e-4)
