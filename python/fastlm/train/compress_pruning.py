"""`fastlm compress RUN --prune 2:4`: one method of `compressing.run`."""

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
