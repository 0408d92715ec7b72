"""`fastlm compress RUN --prune 0.7 --heal N`: the smaller model trains N steps on the run's corpus, its masks held.

The run's own settings, but for a lower peak learning rate and an order of the samples of its own. Nothing is saved on the
way: a healing that must survive a kill is `fastlm train --init RUN-pruned`, which holds the masks too.
"""

from __future__ import annotations

import copy
import math
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import fastlm
from fastlm import compress
from fastlm.console import say
from fastlm.data import InputError, TokenSource
from fastlm.data.bounds import COUNT, Range, check
from fastlm.models.gpt import GPT
from fastlm.train.compressing import Text
from fastlm.train.config import Config, OptimConfig, RunConfig
from fastlm.train.loop import Trainer

RATE = 1 / 3  # of the run's peak learning rates, where --heal-lr names none
ORDER = 1 << 40  # turns the seed of calibration into the seed of another order of the samples
EVERY = 10.0  # seconds between two lines that tell how far it is


class Stopped(Exception):
    """A signal ended the healing: there is no healed model. `name` is the signal's."""

    def __init__(self, name: str, step: int, steps: int) -> None:
        super().__init__(f"stopped by {name} after {step} of {steps} steps of healing: nothing is written")
        self.name = name

    @property
    def status(self) -> int:
        """What a command that it ends exits with."""
        return 128 + int(getattr(signal, self.name))


class _Trainer(Trainer):
    """A trainer whose model is taken from memory."""

    def save(self, best: bool = False) -> None:
        self.last_saved = self.step


@dataclass
class Heal:
    """N steps of training after what came before; weights that are zero by a mask stay zero."""

    name: ClassVar[str] = "healed"
    steps: int
    lr: float | None = None
    loss: float = 0.0

    def check(self) -> None:
        check("heal", self.steps, Range(1, COUNT))
        if self.lr is not None:
            check("heal-lr", self.lr, Range(above=0))

    def settings(self, config: Config, seed: int, device: torch.device) -> Config:
        """The run's settings as healing takes them."""
        made = copy.deepcopy(config)
        model, optim, run = made.model, made.optim, made.run
        part = RATE if self.lr is None else self.lr / optim.lr
        model.lora_rank, model.init = 0, ""
        optim.steps, optim.ema, optim.ramp, optim.warmup = self.steps, 0.0, 0, None
        for name in ("prune", "prune_method", "prune_begin", "prune_end", "prune_every", "prune_decay"):
            setattr(optim, name, getattr(OptimConfig, name))
        run.eval_tokens = RunConfig.eval_tokens
        optim.lr *= part
        if optim.optimizer == "muon":
            optim.muon_lr *= part
        run.eval_every = run.save_every = run.keep_every = run.sample = run.patience = run.nproc = 0
        run.mesh, run.pp_stages, run.spike, run.compile = "", 1, 0.0, False
        run.tensorboard, run.wandb, run.device, run.quiet = False, "", device.type, True
        run.seed = seed ^ ORDER
        return made

    def apply(self, model: GPT, text: Text) -> list[str]:
        if not text.data:
            raise InputError(
                f"--heal needs text to train on, and {text.origin} is a model without a run's data: name a TEXT"
            )
        device = next(model.parameters()).device
        config = self.settings(text.config, text.seed, device)
        source = TokenSource(text.data, model.config.context, config.run.seed, config.data.weights)
        before = {name: mask.clone() for name, mask in compress.masks(model).items()}
        folder = tempfile.mkdtemp(prefix="fastlm-heal-")  # of the metrics, which nobody reads
        try:
            trainer = _Trainer(config, model, source, folder)
            seen = _Seen(self.steps, text.config.run.quiet)
            trainer.callbacks.append(seen)
            why = trainer.fit()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            fastlm.unswap(model)
            model.eval()
            for p in model.parameters():
                p.grad = None
        if why.startswith("signal"):
            raise Stopped(why.split()[-1], trainer.step, self.steps)
        after = compress.masks(model)
        assert all(torch.equal(after[name], mask) for name, mask in before.items())
        if not seen.losses:
            raise InputError(f"--heal {self.steps}: no step had a finite loss; a lower --heal-lr may help")
        last, optim = seen.losses[-max(len(seen.losses) // 10, 1) :], config.optim
        self.loss, self.lr = sum(last) / len(last), optim.lr
        rate = f"{optim.optimizer}, learning rate {optim.lr:.3g}" + f" (muon {optim.muon_lr:.3g})" * (
            optim.optimizer == "muon"
        )
        zeros = f"; the zeros of {len(after)} layers stayed" if after else ""
        return [f"healed: {self.steps} steps of {optim.batch} samples, {rate}{zeros}"]

    def record(self) -> dict[str, Any]:
        return {"steps": self.steps, "lr": self.lr, "train_loss": self.loss}


class _Seen:
    """Keeps the training losses, and says now and then how far healing is."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self.losses: list[float] = []
        self.steps, self.quiet, self.told = steps, quiet, time.monotonic()

    def step(self, trainer: Any, row: dict[str, Any]) -> None:
        if row["loss"] is not None:
            self.losses.append(row["loss"])
        if not self.quiet and time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            say(f"healing: step {row['step']} of {self.steps}, loss {self.losses[-1] if self.losses else math.nan:.4f}")
