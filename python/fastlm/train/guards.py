"""What may end or turn back a run: bad losses and spikes. The trainer asks, `judge` and `roll_back` decide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastlm.console import warn
from fastlm.data import InputError
from fastlm.train import checkpoint
from fastlm.train.callbacks import tell

if TYPE_CHECKING:
    from fastlm.train.loop import Trainer

ROLLBACKS = 3  # to one checkpoint: what spikes again after so many has another cause than a batch


def judge(trainer: Trainer, step: int, loss: float, bad: bool) -> bool:
    """Count a step's outcome; True when its loss sent the run back to a checkpoint. Raises InputError to stop it."""
    run = trainer.config.run
    trainer.bad_in_row = trainer.bad_in_row + 1 if bad else 0
    trainer.bad_steps += bad
    mean = trainer.mean_loss
    if bad:
        if trainer.ranks.first:
            warn(f"step {step}: loss or gradient not finite; step skipped ({trainer.bad_in_row} in a row)")
        if trainer.bad_in_row >= run.max_bad:
            raise InputError(
                f"{trainer.bad_in_row} steps in a row had a non-finite loss or gradient (the last is step {step}): "
                f"training stopped. The last good checkpoint in {trainer.folder} is untouched; try a lower --lr, more "
                f"--warmup, or --dtype float32"
            )
        return False
    if run.spike and mean is not None and loss > run.spike * mean and trainer.last_saved > 0:
        roll_back(trainer, step, loss, mean)
        return True
    trainer.mean_loss = loss if mean is None else 0.98 * mean + 0.02 * loss
    return False


def roll_back(trainer: Trainer, step: int, loss: float, mean: float) -> None:
    """Back to the last checkpoint's weights and mean loss, on with the samples after the spike."""
    trainer.saver.wait()
    ranks, seen = trainer.ranks, trainer.consumed
    found = ranks.share(ranks.in_turn(lambda: checkpoint.newest(trainer.folder, warn) if ranks.first else None))
    assert found is not None
    trainer.restore(found, verified=True)
    times = trainer.rolled_back[1] + 1 if trainer.rolled_back[0] == trainer.step else 1
    trainer.rolled_back = (trainer.step, times)
    if times > ROLLBACKS:
        raise InputError(
            f"step {step}: loss {loss:.3f} against a mean of {mean:.3f}, after {ROLLBACKS} times back to step "
            f"{trainer.step}: training stopped. Skipping samples does not help; try a lower --lr, or a higher --spike "
            f"than {trainer.config.run.spike}"
        )
    trainer.skipped.append((trainer.consumed, seen))
    trainer.consumed = seen
    trainer.latest = {}
    trainer.pending.clear()
    tell(trainer.callbacks, "rewind", trainer)
    if ranks.first:
        back = f"back to step {trainer.step}, skipping samples"
        warn(f"step {step}: loss {loss:.3f} against a mean of {mean:.3f}: {back}")
    trainer.loader.close()
    trainer.load_ahead()


def end(trainer: Trainer, callbacks: Iterable[object]) -> None:
    """Tell each callback of the end. What one cannot write (a full disk) is said: it hides neither the others' end nor
    why training ended."""
    for callback in callbacks:
        try:
            tell([callback], "end", trainer)
        except (InputError, OSError) as error:
            text = str(error) if isinstance(error, InputError) else error.strerror or str(error)
            warn(f"{type(callback).__name__.lower()} in {trainer.folder} is not whole: {text}")
