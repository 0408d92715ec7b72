"""`fastlm compress RUN --prune 2:4`, `--prune heads:0.25,layers:1`: two methods of `compressing.run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastlm import compress
from fastlm.data import InputError
from fastlm.models.gpt import GPT
from fastlm.train.compressing import Batches
from fastlm.train.sparsity import target


@dataclass
class Prune:
    """Weights that become zero: to a part ("0.5") or a pattern ("2:4"), by magnitude, wanda or sparsegpt."""

    name: ClassVar[str] = "pruned"
    prune: str
    method: str = "sparsegpt"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    report: compress.Pruned | None = None

    def check(self) -> None:
        target(self.prune)

    def apply(self, model: GPT, batches: Batches) -> list[str]:
        sparsity, pattern = target(self.prune)
        try:
            self.report = compress.prune(
                model, sparsity, pattern, method=self.method, include=self.include or None, exclude=self.exclude or None,
                calibration=None if self.method == "magnitude" else batches(),
            )  # fmt: skip
        except ValueError as error:
            raise InputError(str(error)) from None
        return str(self.report).splitlines()

    def record(self) -> dict[str, Any]:
        layers = [] if self.report is None else [row.module for row in self.report.pruned]
        sparsity = None if self.report is None else self.report.sparsity
        return {"prune": self.prune, "method": self.method, "layers": layers, "sparsity": sparsity}


def parts(prune: str) -> dict[str, float] | None:
    """The amounts by kind of `--prune heads:0.25,channels:0.3,layers:1`; None for what is no such list (0.7, 2:4).

    Raises InputError for a list that cannot be.
    """
    found: dict[str, float] = {}
    pieces = [piece.partition(":") for piece in prune.split(",")]
    if not any(kind.strip() in compress.KINDS for kind, _, _ in pieces):
        return None
    for kind, _, amount in pieces:
        try:
            value = float(amount)
            known = kind in compress.KINDS and kind not in found and (0 < value < 1 or value == int(value) >= 1)
        except (ValueError, OverflowError):
            known = False
        if not known:
            raise InputError(
                f"--prune takes heads:, channels: and layers:, each once, with the part that goes or a number, such as "
                f"heads:0.25,layers:1; it is {prune!r}"
            )
        found[kind] = value
    return found


@dataclass
class Shrink:
    """Heads, channels of the MLPs, and layers that go whole: a smaller dense model."""

    name: ClassVar[str] = "smaller"
    amounts: dict[str, float]
    per_layer: bool = False
    report: compress.Shrunk | None = None

    def check(self) -> None:
        """`parts` has."""

    def apply(self, model: GPT, batches: Batches) -> list[str]:
        text = batches()
        try:
            self.report = compress.shrink(model, text, **self.amounts, per_layer=self.per_layer)
        except ValueError as error:
            raise InputError(str(error).replace("shrink: ", "--prune: ", 1)) from None
        return str(self.report).splitlines()

    def record(self) -> dict[str, Any]:
        left = None if self.report is None else {kind: now for kind, (_, now) in self.report.kinds.items()}
        return {
            "prune": self.amounts,
            "per_layer": self.per_layer,
            "left": left,
            "layers_removed": [] if self.report is None else self.report.layers,
        }
