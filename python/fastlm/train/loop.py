"""The trainer. Read `fit`, then `train_step`: they are the whole of it, the rest is what they call.

The loss of a step is a sum over target tokens divided by their number over all micro-batches and ranks. Whether a step
is sound is decided on the device and the optimizer told there, so no step waits for the device on a guard's account.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm import _processor
from fastlm._torch import multiply_all
from fastlm.console import warn
from fastlm.data import InputError, Prefetch
from fastlm.data.bounds import flag
from fastlm.data.loader import Source
from fastlm.ops import apply_mask_
from fastlm.train import callbacks as events
from fastlm.train import checkpoint, lock, optim, parallel, pruning, signals, state
from fastlm.train.config import Config
from fastlm.train.guards import Guard, Verdict
from fastlm.train.kernels import Kernels
from fastlm.train.machine import apply, autocast, peak_flops, peak_memory, pick_device
from fastlm.train.measuring import Energy
from fastlm.train.ranks import Ranks, SingleProcess

Loss = Callable[..., tuple[Tensor, Tensor]]
SETTLE = 2.0  # seconds that a failing rank waits for its last save, which may wait for other ranks
FLUSH = 10  # steps whose metrics may wait on a GPU before they are read


def token_loss(
    model: nn.Module, tokens: Tensor, targets: Tensor, *documents: Tensor, **options: float
) -> tuple[Tensor, Tensor]:
    """Summed loss and number of target tokens. Packed batches also say which document each token belongs to."""
    return model(tokens, targets, *documents, **options), (targets != -100).sum()


def pair_loss(
    model: nn.Module, tokens: Tensor, targets: Tensor, documents: Tensor, reference: Tensor, **options: float
) -> tuple[Tensor, Tensor]:
    """Summed loss and number of pairs, whose chosen answers are in the even rows and whose rejected ones in the odd rows."""
    numbers = (documents[::2] + 1).masked_fill(targets[::2] < 0, 0)
    return model(tokens, targets, documents, reference, **options), numbers.amax(1).sum()


def pair_options(config: Config) -> dict[str, float]:
    """What the loss of pairs takes beside the smoothing of training."""
    return {"beta": config.optim.beta, "normalized": config.optim.per_token}


class Trainer:
    """Trains `model` on `data` by `config` into `folder`.

    `loss(model, *batch)` gives a summed loss and the number it is a sum over; `evaluate(model, whole)` a dictionary with
    "val_loss", of all the validation data where `whole` is true. `Trainer(config, model, DatasetSource(dataset, seed),
    folder, loss=...).fit()` trains one's own module. `begin` is called when nothing can refuse the run any more, before its
    files change.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        data: Source,
        folder: Path | str,
        *,
        loss: Loss | None = None,
        evaluate: Callable[[nn.Module, bool], dict[str, float]] | None = None,
        callbacks: Sequence[object] = (),
        ranks: Ranks | None = None,
        flops_per_sample: float = 0.0,
        begin: Callable[[], None] | None = None,
    ) -> None:
        config.check()
        if config.run.patience and evaluate is None:
            raise InputError(f"--patience {config.run.patience} needs validation losses: give Trainer an `evaluate`")
        apply(config.run)
        self.config, self.data, self.folder = config, data, Path(folder)
        self.ranks = ranks or SingleProcess()
        self.device = self.ranks.device or pick_device(config.run.device)
        if self.ranks.first and self.device.type == "cpu" and config.run.dtype != "float32":
            if slow := _processor.slow(getattr(torch, config.run.dtype)):
                warn(f"--dtype {config.run.dtype}: {slow}; --dtype float32 trains faster here")
        if self.ranks.first:
            for note in config.notes():
                warn(note)
        self.plain = model.to(self.device)
        pruning.begin(self.plain, config.optim)
        self.kernels = Kernels(self.plain, config.run.kernels)
        if hasattr(self.plain, "recompute"):
            self.plain.recompute = config.run.recompute  # type: ignore[assignment]
        elif config.run.recompute != "none":
            raise InputError("--recompute needs a model with an attribute `recompute`, as fastlm's GPT has")
        self.model, self.layout = parallel.wrap(self.plain, config, self.ranks)
        self.kernels.part = self.layout.part
        if config.run.compile:
            self.model.compile()
        self.optimizer = optim.make(self.plain, config.optim, self.layout)
        options = {k: v for k, v in (("smoothing", config.optim.smoothing), ("z_loss", config.optim.z_loss)) if v}
        if config.data.dpo and loss is None:
            options |= pair_options(config)
            loss = lambda m, *batch: pair_loss(m, *batch, **options)  # type: ignore[arg-type]
        self.loss: Loss = loss or (lambda m, *batch: token_loss(m, *batch, **options))  # type: ignore[arg-type]
        self.evaluate_with = evaluate
        callbacks = [*events.standard(config.run), *callbacks]  # one rank's, but for those that need all
        events.check(callbacks)
        self.callbacks: list[Any] = [c for c in callbacks if self.ranks.first or getattr(c, "everywhere", False)]
        self.saver = checkpoint.Saver(self.folder, config.run.keep, config.run.keep_every, self.ranks)
        self.ema = self._averages() if config.optim.ema else {}
        self.pruning = pruning.Pruning(self)
        self.energy = Energy(self.device, config.run, self.ranks)
        for note in self.energy.notes() if self.ranks.first else ():
            warn(note)
        self.peak, self.flops_per_sample = peak_flops(self.device), flops_per_sample
        self.step = self.consumed = 0
        self.best: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.waited = 0  # evaluations without improvement
        self.guard = Guard(self.folder, config.run.max_bad, config.run.spike)
        self.skipped: list[tuple[int, int]] = []
        self.scale = torch.tensor(2.0**16 if config.run.dtype == "float16" else 1.0, device=self.device)
        self.good = torch.zeros((), device=self.device)  # sound steps since the scale changed
        self.stop = ""  # why to stop, by the run's own reasons, which all ranks find alike
        self.asked = ""  # the same, by a signal or a pause
        self.on_begin = begin or (lambda: None)
        self.owned = lock.Owned(self.folder, self.ranks)
        self.pending: list[dict[str, Any]] = []
        self.last_saved = -1
        state.seed_all(config.run.seed, self.ranks.rank)

    # ---------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> str:
        """Train to the last step, or until something stops it; returns why it ended."""
        run = self.config.run
        with signals.heard(self._ask), self.ranks.watch(), self.owned.held():
            self.ranks.in_turn(lambda: events.tell(self.callbacks, "ready", self))
            self.on_begin()
            best = int(self.best["step"]) if self.best else None
            self.ranks.in_turn(lambda: self.saver.prune(self.step, best) if self.ranks.first else None)
            events.tell(self.callbacks, "start", self)
            self.load_ahead()
            self._clock = time.perf_counter()
            self.energy.begin()
            try:
                # what the ranks agreed on decides, and is never written back: a signal may come at any point of this
                while not (why := self.ranks.agree(self.stop or self.asked)) and self.step < self.config.optim.steps:
                    self.train_step()
                    last = self.step == self.config.optim.steps
                    improved = False
                    if (run.eval_every and self.step % run.eval_every == 0) or last:
                        improved = self.evaluate(whole=last)
                    due = bool(run.save_every) and self.step % run.save_every == 0
                    if self.flush(force=last or improved or due):  # a saved step's lines are written before it is
                        continue  # a spike sent the run back: there is no such step any more
                    if improved or last or due:
                        self.save(best=improved)
                    if run.patience and self.waited >= run.patience:
                        self.stop = f"early: no better validation loss in {self.waited} evaluations"
                self.flush(force=True)
                if why and self.last_saved != self.step:  # a skipped step left the weights sound
                    self.save()
                self.saver.wait()
                if why.startswith("early") and self.best:
                    self.load_weights(self.folder / "checkpoints" / f"best-{int(self.best['step']):08d}")
            except BaseException:
                self.saver.settle(SETTLE)
                raise
            finally:
                self.pruning.show()
                self.energy.close()
                self.loader.close()
                events.end(self.callbacks, self)
        return why or "all steps done"

    def train_step(self) -> None:
        cfg = self.config.optim
        size = self.batch_size(self.step)
        part = optim.rate(cfg, self.step)
        self.optimizer.set_rate(part)
        self.pruning.before(self.step)
        unit = 1.0 / self.nominal(size)  # keeps the summed gradients near their final size; corrected exactly below
        total = torch.zeros((), device=self.device)
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        number = self.micro_batches(size)
        ahead: dict[tuple[int, int], Tensor] = {}  # losses whose backward is to come
        read: dict[int, tuple[np.ndarray, tuple[Tensor, ...], bool]] = {}  # micro-batches that a stage is to see yet
        for what, i, stage in self.layout.schedule(number):
            with self.layout.last(stage, i == number - 1), autocast(self.device, self.config.run.dtype):
                if what == "backward":
                    ahead.pop((i, stage)).backward()
                    continue
                if stage == 0:
                    read[i] = self._next_micro_batch()
                ids, batch, empty = read[i] if stage + 1 < len(self.layout.stages) else read.pop(i)
                self.kernels.place(self.config.run.seed, self.step, ids)
                loss, tokens = self.loss(self.layout.stages[stage], *batch)
                ahead[i, stage] = loss * (unit * self.scale) * (0.0 if empty else 1.0)
            if not empty:
                total += loss.detach()
                count += tokens * (stage == 0)
        total, count = self.ranks.sum(total), self.ranks.sum(count)
        grads = self.layout.grads()
        self.pruning.gradients()
        factor = self.ranks.size_of_mean / (unit * self.scale * count)
        norm = self.layout.norm() * factor
        found = (~(torch.isfinite(norm) & torch.isfinite(total))).float()
        if cfg.clip:
            factor = factor * (cfg.clip / (norm + 1e-6)).clamp(max=1.0)
        multiply_all(grads, factor)
        self.pruning.decay()
        self.optimizer.set_found_inf(found)
        self.optimizer.step()
        self.pruning.after_step()
        self.layout.zero_grad()
        self._after(found)
        self.step += 1
        self.consumed += size
        row = {"step": self.step, "loss": total / count, "grad_norm": norm, "bad": found}
        self.pending.append(row | {"lr": part * cfg.lr, "size": size})

    def _next_micro_batch(self) -> tuple[np.ndarray, tuple[Tensor, ...], bool]:
        """Sample numbers and tensors; and whether they count nothing, standing in for samples that other ranks have."""
        ids, batch = next(self.loader)
        empty = not len(ids)
        if empty:  # the other ranks wait for this one's collectives
            ids = np.array([self.consumed])
            batch = self.data.batch(ids)
        each = len(batch[0]) // len(ids)  # rows of a sample: of pairs two, whose dropout is not the same
        ids = (ids[:, None] * each + np.arange(each)).reshape(-1)
        return ids, tuple(t.to(self.device, non_blocking=True) for t in batch), empty

    def _after(self, found: Tensor) -> None:
        """Moving average and loss scale, both by the device's own verdict on the step."""
        if self.ema:
            weight = (1 - self.config.optim.ema) * (1 - found)
            with torch.no_grad():
                for name, average in self.ema.items():
                    average.lerp_(self.layout.params[name].detach(), weight)
        if self.config.run.dtype == "float16":  # halve after a bad step, double after 2,000 good ones
            self.good = (self.good + 1) * (1 - found)
            grown = torch.where(self.good >= 2000, self.scale * 2, self.scale)
            self.scale = torch.where(found > 0, self.scale * 0.5, grown)
            self.good = torch.where(self.good >= 2000, torch.zeros_like(self.good), self.good)

    # ------------------------------------------------------------------------------------------- samples and batches

    def batch_size(self, step: int) -> int:
        cfg = self.config.optim
        if step >= cfg.ramp:
            return cfg.batch
        low = max(cfg.batch // 8, 1)  # whatever the ranks: one without a sample of its own joins with none
        return min(cfg.batch, low + (cfg.batch - low) * step // cfg.ramp)

    def nominal(self, size: int) -> float:
        """Tokens of so many samples; a pair of answers is two contexts."""
        contexts = 2 if self.config.data.dpo else 1
        return float(size * contexts * getattr(getattr(self.plain, "config", None), "context", 1))

    def micro_batches(self, size: int) -> int:
        """Micro-batches of this rank in a step; every rank makes as many, a rank with fewer samples ends with less."""
        share = -(-size // self.ranks.size_of_data)
        return -(-share // (self.config.optim.micro or share))

    def plan(self, step: int, sample: int) -> Iterator[np.ndarray]:
        """Sample numbers of each micro-batch of this rank from `step` on, the first sample being `sample`."""
        while step < self.config.optim.steps:
            size = self.batch_size(step)
            own = np.array_split(np.arange(sample, sample + size), self.ranks.size_of_data)[self.ranks.data_rank]
            yield from np.array_split(own, self.micro_batches(size))
            sample, step = sample + size, step + 1

    def load_ahead(self) -> None:
        pin = self.device.type == "cuda"
        self.loader = Prefetch(self.data, self.plan(self.step, self.consumed), pin=pin)
        self._stalled = 0.0

    # --------------------------------------------------------------------------------------- measuring and evaluating

    def flush(self, force: bool = False) -> bool:
        """Read the metrics of the last steps off the device, hand them to the callbacks, and judge them; True when one of
        them sent the run back to a checkpoint, which undoes those after it too."""
        if not self.pending or (self.device.type != "cpu" and len(self.pending) < FLUSH and not force):
            return False
        rows, self.pending = self.pending, []
        keys = ("loss", "grad_norm", "bad")
        values = torch.stack([row[k].float() for row in rows for k in keys]).tolist()
        now = time.perf_counter()
        took = now - self._clock - sum(row.get("aside", 0.0) for row in rows)
        stalled = self.loader.stalled - self._stalled
        self._clock, self._stalled = now, self.loader.stalled
        samples = sum(row["size"] for row in rows)
        for i, (row, used) in enumerate(zip(rows, list(self.energy.lines(len(rows), self.nominal(samples))))):
            loss, norm, bad = values[3 * i : 3 * i + 3]
            row.pop("aside", None)
            line = {
                **row,
                "loss": loss if math.isfinite(loss) else None,
                "grad_norm": norm if math.isfinite(norm) else None,
                "bad": int(bad),
                "samples": row.pop("size"),
                "tokens_per_s": round(self.nominal(samples) / took, 1),
                "stall": round(stalled / took, 5),
                "seconds": round(took / len(rows), 5),
                **used,
            }
            line.pop("size")
            if self.peak and self.flops_per_sample:
                line["mfu"] = self.flops_per_sample * samples / took / self.peak / self.ranks.size
            events.tell(self.callbacks, "step", self, line)
            step, guard = int(line["step"]), self.guard
            verdict = guard.judge(step, loss, bad > 0, can_roll_back=self.last_saved > 0)
            if verdict is Verdict.SKIPPED and self.ranks.first:
                warn(f"step {step}: loss or gradient not finite; step skipped ({guard.bad_in_row} in a row)")
            if verdict is Verdict.ROLL_BACK:
                self.roll_back(step, loss)
                return True
        return False

    def roll_back(self, step: int, loss: float) -> None:
        """After a spike: back to the last checkpoint's weights and mean loss, on with the samples after the spike."""
        self.saver.wait()
        ranks, seen, mean = self.ranks, self.consumed, self.guard.mean_loss
        assert mean is not None
        found = ranks.share(ranks.in_turn(lambda: checkpoint.newest(self.folder, warn) if ranks.first else None))
        assert found is not None
        self.restore(found, verified=True)
        self.guard.count_rollback(self.step, step, loss, mean)
        self.skipped.append((self.consumed, seen))
        self.consumed = seen
        self.latest = {}
        self.pending.clear()
        events.tell(self.callbacks, "rewind", self)
        if ranks.first:
            back = f"back to step {self.step}, skipping samples"
            warn(f"step {step}: loss {loss:.3f} against a mean of {mean:.3f}: {back}")
        self.loader.close()
        self.load_ahead()

    def evaluate(self, whole: bool) -> bool:
        """Validation loss into the step's line; returns whether it is the best so far. None is while masks still grow."""
        if self.evaluate_with is None:
            return False
        start = time.perf_counter()
        self.energy.steps_end()
        found = self.measure(whole)
        self.latest = {"step": self.step, "whole": whole, **found}
        events.tell(self.callbacks, "evaluated", self, self.latest)
        self.pending[-1].update(found)
        self.pending[-1]["aside"] = time.perf_counter() - start
        self.energy.aside_ends()
        if not pruning.settled(self.config.optim, self.step):
            self.best, self.waited = {}, 0
            return False
        better = found["val_loss"] < self.best.get("val_loss", math.inf) - self.config.run.min_delta
        if better:
            self.best = {"step": self.step, **found}
        self.waited = 0 if better else self.waited + 1
        return better

    def measure(self, whole: bool) -> dict[str, float]:
        assert self.evaluate_with is not None
        self.model.eval()
        try:
            with torch.no_grad(), self.averaged(), autocast(self.device, self.config.run.dtype):
                return self.ranks.share(
                    self.evaluate_with(self.model, whole)
                )  # decisions rest on it: one value for all
        finally:
            self.model.train()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in the weights' place, if there is one; and 0 in the place of what --prune hides."""
        hidden = self.pruning.choice(self.step)
        params = {n: self.layout.params[n] for n in (*self.ema, *hidden)}
        own = {n: p.detach().clone() for n, p in params.items()}
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(self.ema.get(n, p))
            for n, mask in hidden.items():
                apply_mask_(params[n], mask)
        try:
            yield
        finally:
            with torch.no_grad():
                for n, p in params.items():
                    p.copy_(own[n])

    def memory(self) -> int:
        return peak_memory(self.device)

    # -------------------------------------------------------------------------------------------------- stop and go on

    def save(self, best: bool = False) -> None:
        self.pruning.choice(self.step)
        groups = {"model": state.model_pieces(self.layout)} | {
            "optimizer": state.optimizer_pieces(self.layout, self.optimizer),
            "ema": state.tensor_pieces(self.layout, self.ema),
        }
        groups = {kind: {n: p for n, p in group.items() if self.layout.keeps(p)} for kind, group in groups.items()}
        groups["random"] = state.random_tensors(self.ranks.rank)
        self.saver.save(self.step, groups, self.values(), best)
        self.last_saved = self.step

    def values(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "consumed": self.consumed,
            "skipped": self.skipped,
            "data": self.data.content,
            "best": self.best,
            "waited": self.waited,
            "bad_in_row": self.guard.bad_in_row,
            "bad_steps": self.guard.bad_steps,
            "mean_loss": self.guard.mean_loss,
            "scale": self.scale.item(),
            "good": self.good.item(),
            **state.surroundings(self.ranks),
            "config": self.config.to_dict(),
        }

    def restore(self, folder: Path, *, other_data: bool = False, verified: bool = False) -> dict[str, Any]:
        """The state of a checkpoint into this trainer. Data that changed are refused unless `other_data`; what else differs,
        with which it goes on but not bit for bit, is said. `verified` saves hashing the files once more."""
        if not verified:
            self._verify(folder)
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if saved["data"] != self.data.content and not other_data:
            raise InputError(
                f"the data of {folder} are not these ({self._moved(saved)}); --other-data goes on with them all the same"
            )
        if (moved := state.moved(saved, self.ranks)) and self.ranks.first:
            warn(f"going on from {folder}, but not bit for bit: {', '.join(moved)}")
        self._load_weights(folder)
        state.load_optimizer(self.layout, self.optimizer, checkpoint.Stored(folder, "optimizer"))
        if not state.load_random(checkpoint.Stored(folder, "random"), self.ranks.rank):
            state.seed_all(self.config.run.seed + saved["step"], self.ranks.rank)
        self._load_average(folder)
        self.step, self.consumed = saved["step"], saved["consumed"]
        self.skipped = [(a, b) for a, b in saved["skipped"]]
        self.best, self.waited = saved["best"], saved["waited"]
        if saved["data"] != self.data.content:  # losses on other data are no measure of these
            self.best, self.waited = {}, 0
        if not pruning.settled(self.config.optim, int(self.best.get("step", 0))):  # nor are those of fuller weights
            self.best, self.waited = {}, 0
        for name in ("bad_in_row", "bad_steps", "mean_loss"):
            setattr(self.guard, name, saved[name])
        self.scale.fill_(saved["scale"])
        self.good.fill_(saved["good"])
        self.last_saved = self.step
        return saved

    def _moved(self, saved: dict[str, Any]) -> str:
        """Which flags tell other data than a checkpoint's."""
        was, now = saved["config"], self.config.to_dict()
        names = [("data", name) for name in now["data"] if name != "workers"] + [("model", "context"), ("run", "seed")]
        moved = [flag(n) for group, n in names if json.loads(json.dumps(now[group][n])) != was[group].get(n)]
        return f"{', '.join(moved)} changed" if moved else "the texts changed"

    def begin_own(self) -> None:
        """After another run's checkpoint: from here on what this folder holds counts, so that it holds this step."""
        self.best, self.waited = {}, 0
        self.save()
        self.saver.wait()

    @property
    def owner(self) -> lock.Lock | None:
        """The lock on the run's folder; None before it is taken, and on ranks after the first."""
        return self.owned.lock

    def _verify(self, folder: Path) -> None:
        """By the first rank for all."""
        self.ranks.in_turn(lambda: checkpoint.verify(folder) if self.ranks.first else None)

    def load_weights(self, folder: Path) -> None:
        """The weights of a checkpoint alone, such as the best."""
        self._verify(folder)
        self._load_weights(folder)
        self._load_average(folder)

    def _load_weights(self, folder: Path) -> None:
        stored = checkpoint.Stored(folder, "model")
        pruning.expect(self.plain, stored)
        state.fill(state.model_pieces(self.layout), stored, self.layout.elsewhere)
        self.pruning.refresh()

    def _averages(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.layout.params.items() if p.requires_grad}

    def _load_average(self, folder: Path) -> None:
        """The moving average; a run that had none yet starts it from the weights."""
        if self.ema and checkpoint.holds(folder, "ema"):
            state.fill(
                state.tensor_pieces(self.layout, self.ema), checkpoint.Stored(folder, "ema"), self.layout.elsewhere
            )
        elif self.ema:
            self.ema = self._averages()

    def pause(self, until: str) -> None:
        """End after this step, with a checkpoint, to go on later. A signal that comes as well counts in its place."""
        self._ask(f"pause until {until}")

    def _ask(self, stop: str) -> None:
        """A signal, or a pause, ends the loop after the step, with a checkpoint; the first signal names it."""
        if not self.asked or self.asked.startswith("pause"):
            self.asked = stop
