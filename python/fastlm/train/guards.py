"""What may end or turn back a run, bad losses and spikes: a pure state with verdicts. The trainer acts on them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from fastlm.data import InputError

ROLLBACKS = 3  # to one checkpoint: what spikes again after so many has another cause than a batch


class Verdict(enum.Enum):
    OK = "ok"
    SKIPPED = "skipped"  # loss or gradient not finite: the optimizer left the weights alone
    ROLL_BACK = "roll back"  # a spike: go back to the last checkpoint and skip the samples since


@dataclass
class Guard:
    """Counts the steps' outcomes and judges each.

    `max_bad` is the number of non-finite steps in a row that ends a run. `spike` is the multiple of the mean loss that sends
    it back to a checkpoint; 0 for never.
    """

    folder: Path  # of the run, for what is said
    max_bad: int
    spike: float
    bad_in_row: int = 0
    bad_steps: int = 0
    mean_loss: float | None = None  # moving average of the good steps' losses
    rolled_back: tuple[int, int] = (-1, 0)  # to which step, how often in a row

    def judge(self, step: int, loss: float, bad: bool, can_roll_back: bool) -> Verdict:
        """The verdict on a step. Raises InputError where too many steps in a row were bad."""
        self.bad_in_row = self.bad_in_row + 1 if bad else 0
        self.bad_steps += bad
        mean = self.mean_loss
        if bad:
            if self.bad_in_row >= self.max_bad:
                raise InputError(
                    f"{self.bad_in_row} steps in a row had a non-finite loss or gradient (the last is step {step}): "
                    f"training stopped. The last good checkpoint in {self.folder} is untouched; try a lower --lr, more "
                    f"--warmup, or --dtype float32"
                )
            return Verdict.SKIPPED
        if self.spike and mean is not None and loss > self.spike * mean and can_roll_back:
            return Verdict.ROLL_BACK
        self.mean_loss = loss if mean is None else 0.98 * mean + 0.02 * loss
        return Verdict.OK

    def count_rollback(self, to: int, step: int, loss: float, mean: float) -> None:
        """Note that the spike at `step` sent the run back to step `to`. Raises InputError when that does not help."""
        times = self.rolled_back[1] + 1 if self.rolled_back[0] == to else 1
        self.rolled_back = (to, times)
        if times > ROLLBACKS:
            raise InputError(
                f"step {step}: loss {loss:.3f} against a mean of {mean:.3f}, after {ROLLBACKS} times back to step {to}: "
                f"training stopped. Skipping samples does not help; try a lower --lr, or a higher --spike than {self.spike}"
            )
