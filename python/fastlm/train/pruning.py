"""Pruning while training: masks that grow by a schedule, and that every optimizer holds.

`--prune 0.7` prunes the blocks' linear layers layer by layer by magnitude. Gradual (Zhu and Gupta 2017): at every
`prune_every`-th step t between begin b and end e the part s (1 - (1 - (t - b) / (e - b))^3) is zero. Magnitude, and patterns
such as 2:4: all at once, at the begin. The masks are buffers of the model, so checkpoints hold them and a resume in the
middle goes on to the bit. What is zero stays zero.

SR-STE (Zhou et al. 2021, eq. 9): between begin and end every step chooses the pattern's weights anew. Forward and backward
see the others as 0; the gradient goes to all weights as it is, and prune_decay times the hidden ones joins theirs, which
keeps the choice from wavering. Hidden values lie beside the weights during a step only, so optimizers and checkpoints see
whole weights. Evaluations and readers of a checkpoint apply the mask beside them. The choice before step `end` is held.

Gradients are masked before they are clipped, so moments stay 0. AdamW updates and masks in one pass; other optimizers'
weights are masked after the step, since Muon's is not elementwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlm import compress, ops
from fastlm.compress.masks import MASK, Masks, OnePass
from fastlm.data.errors import InputError
from fastlm.nn import MaskedLinear
from fastlm.train.checkpoint import Stored
from fastlm.train.config import OptimConfig
from fastlm.train.sparsity import target


def bounds(config: OptimConfig) -> tuple[int, int]:
    """The first and the last step before which masks are made; the last is a step of the run, so the target is reached."""
    begin = int(config.prune_begin * config.steps)
    return begin, max(begin, min(int(config.prune_end * config.steps), config.steps - 1))


def settled(config: OptimConfig, step: int) -> bool:
    """Whether the masks are all that --prune asks for after so many steps: a loss measured before is of another model."""
    if not config.prune:
        return True
    begin, end = bounds(config)
    return step > (end if config.grows or config.chooses else begin)


def chooses(config: OptimConfig, step: int) -> bool:
    """Whether this step trains weights that its masks hide (SR-STE)."""
    begin, end = bounds(config)
    return config.chooses and begin <= step < end


def part(config: OptimConfig, step: int) -> float | None:
    """What is to be zero before this step by the schedule; None where nothing changes before it."""
    sparsity, _ = target(config.prune)
    begin, end = bounds(config)
    if sparsity is None or config.prune_method == "magnitude":
        return (1.0 if sparsity is None else sparsity) if step == (end if config.chooses else begin) else None
    if not begin <= step <= end or ((step - begin) % config.prune_every and step != end):
        return None
    return sparsity * (1 - (1 - (step - begin) / (end - begin)) ** 3) if end > begin else sparsity


def begin(model: nn.Module, config: OptimConfig) -> None:
    """Masks that keep everything, of the layers that will be pruned. InputError where the model has none, or SR-STE cannot
    choose since some weights are held at zero already."""
    found = compress.masks(model)
    if config.chooses and found:
        raise InputError(
            f"--prune-method sr-ste chooses among all weights, and {len(found)} layers of --init have some that are held at "
            f"zero: take another method, or a model without masks"
        )
    if config.prune and not found:
        target(config.prune)
        try:
            compress.prune(model, 0.0)
        except ValueError as error:
            raise InputError(f"--prune {config.prune}: {error}") from None


def expect(model: nn.Module, stored: Stored) -> None:
    """Masks, to be filled, of the layers that have one in a checkpoint (of a run that began from a pruned model).

    InputError where the model has masks, since --prune asks for them, and the checkpoint has none."""
    _, found = compress.split(dict.fromkeys(stored.names(), torch.empty(0)))
    apart: frozenset[str] = getattr(model, "saved_apart", frozenset())  # type: ignore[assignment]
    if compress.masks(model).keys() - apart and not found:
        raise InputError(
            f"--prune is for a run that prunes from its start, and {stored} has no masks: leave it out, or give --init "
            f"that run, whose weights a new run prunes then"
        )
    for name in found.keys() - compress.masks(model).keys():
        module = model.get_submodule(name.removesuffix(MASK).rstrip("."))
        device = next(model.parameters()).device
        module.register_buffer(MASK, torch.full(stored.shape(name), 255, dtype=torch.uint8, device=device))
        if type(module) is nn.Linear:
            module.__class__ = MaskedLinear


class Pruning:
    """The masks of a trainer's model and the parts of them that this process holds."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.refresh()
        self.one_pass = [OnePass(part, lambda: self.masks.pairs) for part in trainer.optimizer.parts]

    def refresh(self) -> None:
        """After the model's masks have changed or come."""
        layout = self.trainer.layout
        self.modules = {
            f"{path}.weight" if path else "weight": m for path, m in compress.masked(self.trainer.plain).items()
        }
        sizes = self.trainer.ranks.sizes
        for name in ("tp", "pp"):
            if self.modules and sizes.get(name, 1) > 1:
                raise InputError(f"pruned models with --mesh {name}=... are not built; use dp=... or fsdp=...")
        self.local: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            mask: Tensor = module._buffers[MASK]  # type: ignore[assignment]
            p = layout.params[name]
            if p.shape != module.weight.shape or name in layout.cuts or p is not module.weight:
                keep = ops.mask_to_bool(mask, layout.shape(name)[1])
                mask = ops.bool_to_mask(layout.own(name, keep).contiguous())
            self.local[name] = mask
        self.masks = Masks((layout.params[n], m) for n, m in self.local.items() if layout.params[n].requires_grad)
        self.held = False  # whether weights, moments and average are 0 where these masks say so
        self.hidden: list[tuple[Tensor, Tensor]] = []  # SR-STE: weights, and what this step sees as 0 of each
        self.shown: list[tuple[Tensor, Tensor]] = []  # the same once it is put back

    def before(self, step: int) -> None:
        """The masks that the schedule wants before this step, from the weights as they are."""
        config = self.trainer.config.optim
        self.show()
        if chooses(config, step):
            self.hide(target(config.prune)[1])
            return
        if config.prune and (now := part(config, step)) is not None:
            sparsity, pattern = target(config.prune)
            for name, new in self._masks(None if sparsity is None else now, pattern).items():
                module = self.modules[name]
                old: Tensor = module._buffers[MASK]  # type: ignore[assignment]
                module._buffers[MASK] = new if config.chooses else ops.mask_and(old, new)
            self.refresh()
        if not self.held:
            self.masks.weights()
            self.masks.moments(self.trainer.optimizer.state)
            self.average()
            self.held = True

    # ------------------------------------------------------------------------------------------------------------- SR-STE

    @torch.no_grad()
    def hide(self, pattern: str) -> None:
        """Chooses anew; what is not chosen is 0 until `show`, and no weight is held."""
        params, masks = self.trainer.layout.params, self._own_masks(None, pattern)
        self.masks, self.held = Masks(()), False
        self.hidden = [(params[name], params[name].detach().clone()) for name in masks]
        Masks((params[name], mask) for name, mask in masks.items()).weights()
        for p, value in self.hidden:
            value.sub_(p)

    @torch.no_grad()
    def show(self) -> None:
        """The hidden weights are what they were."""
        for p, value in self.hidden:
            p.add_(value)
        self.shown, self.hidden = self.hidden, []

    @torch.no_grad()
    def decay(self) -> None:
        """After clipping: prune_decay times a weight that was hidden joins its gradient."""
        for p, value in self.shown:
            if p.grad is not None:
                p.grad.add_(value, alpha=self.trainer.config.optim.prune_decay)
        self.shown = []

    def choice(self, step: int) -> dict[str, Tensor]:
        """By weight the masks that the weights after `step` steps give, of this process's part, while none is held; they go
        into the model's buffers. Called by all ranks."""
        config = self.trainer.config.optim
        if not config.chooses or not (step and chooses(config, step - 1)):
            return {}
        self.show()
        found = self._own_masks(None, target(config.prune)[1])
        for name, mask in found.items():
            self.modules[name]._buffers[MASK] = self.trainer.layout.whole(name, mask)
        return found

    # ----------------------------------------------------------------------------------------------------------- all methods

    def _masks(self, sparsity: float | None, pattern: str) -> dict[str, Tensor]:
        """By weight its new mask, whole on every rank."""
        found = self._own_masks(sparsity, pattern)
        return {name: self.trainer.layout.whole(name, mask) for name, mask in found.items()}

    @torch.no_grad()
    def _own_masks(self, sparsity: float | None, pattern: str) -> dict[str, Tensor]:
        """By weight this process's part of its new mask. Of sharded weights ranks tell each other counts and bits alone."""
        layout, out = self.trainer.layout, {}
        parts = {name: layout.score(name) for name in self.modules}
        cut = {n for n, p in parts.items() if pattern == "2:4t" and layout.rows_each(n) % 4}  # blocks on two ranks
        options: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern, "magnitude": True}
        names = [name for name in parts if name not in cut]
        for name, mask in zip(names, ops.prune_mask_parts([parts[n] for n in names], **options), strict=True):
            out[name] = mask
        for name in sorted(cut):
            out[name] = layout.own(name, ops.prune_mask(layout.whole(name, parts[name].score), **options)).contiguous()
        return out

    def gradients(self) -> None:
        """Before clipping: of a weight that is held at zero the gradient is 0; what a step has hidden is put back."""
        self.show()
        self.masks.gradients()

    def after_step(self) -> None:
        """Pruned weights are +0 where the optimizer did not see to it itself."""
        Masks(pair for pair in self.masks.pairs if not any(pair[0] in one.done for one in self.one_pass)).weights()

    def average(self) -> None:
        """The moving average of a pruned weight is 0 too."""
        for name, average in self.trainer.ema.items():
            if name in self.local:
                ops.apply_mask_(average, self.local[name])

    def sparsity(self) -> float | None:
        """The part of the masked layers' weights that is zero; None without masks. Waits for the device."""
        if not self.modules:
            return None
        kept = sum(int(ops.mask_count(m)) for m in compress.masks(self.trainer.plain).values())
        count = sum(torch.Size(self.trainer.layout.shape(n)).numel() for n in self.modules)
        return 1 - kept / count
