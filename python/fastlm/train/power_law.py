"""Loss against the amount of training text: L(n) = c + a n^-b, fitted to a few runs (Hestness et al. 2017).

c is what no amount of text takes away. Two points fix a and b alone (c = 0); three and more fit all, c not below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = (1e-3, 4.0)  # of text; measured ones lie between 0.05 and 0.5


@dataclass(frozen=True)
class Law:
    """`a` is in the unit of the losses, at `unit` of text."""

    a: float
    b: float
    c: float
    unit: float

    def __call__(self, size: float) -> float:
        return self.c + self.a * (size / self.unit) ** -self.b

    def __str__(self) -> str:
        return (f"{self.c:.4f} + " if self.c else "") + f"{self.a:.4f} (n / {self.unit:,.0f})^-{self.b:.4f}"


def fit(sizes: Sequence[float], losses: Sequence[float]) -> Law:
    """The law of least relative squared errors through points of growing size. Raises ValueError for fewer than two."""
    n, y = np.asarray(sizes, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(n) < 2 or len(n) != len(y) or (np.diff(n) <= 0).any() or (n <= 0).any() or not (y > 0).all():
        raise ValueError(f"a power law needs two points or more, of growing sizes above 0; they are {list(zip(n, y))}")
    unit = float(n[-1])
    if len(n) == 2:
        b = float(np.log(y[0] / y[1]) / np.log(n[1] / n[0]))
        return Law(float(y[1]), max(b, 0.0), 0.0, unit) if b > 0 else Law(float(y.mean()), 0.0, 0.0, unit)
    low, high = np.log(EXPONENTS)
    for _ in range(6):  # a grid, finer and finer around the best
        grid = np.linspace(low, high, 200)
        errors, a, c = _at(np.exp(grid), n / unit, y)
        best, step = int(np.argmin(errors)), grid[1] - grid[0]
        low = max(grid[best] - 2 * step, np.log(EXPONENTS[0]))
        high = min(grid[best] + 2 * step, np.log(EXPONENTS[1]))
    return Law(float(a[best]), float(np.exp(grid[best])), float(c[best]), unit)


def _at(b: np.ndarray, n: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(squared relative errors, a, c) of the best law of each exponent, neither a nor c below 0; each [exponents]."""
    x, one = n ** -b[:, None] / y, 1 / y  # the laws' terms as parts of the losses, [exponents, points]
    xx, x1, x_, one_ = (x * x).sum(1), (x * one).sum(1), x.sum(1), one.sum()
    det = xx * (one * one).sum() - x1 * x1
    det = np.where(det > 1e-12, det, np.inf)  # terms that are alike: all is given to a, below
    a, c = (x_ * (one * one).sum() - x1 * one_) / det, (xx * one_ - x1 * x_) / det
    flat, steep = a <= 0, c <= 0
    a, c = np.where(steep, x_ / xx, a), np.where(steep, 0.0, c)
    a, c = np.where(flat & ~steep, 0.0, a), np.where(flat & ~steep, one_ / (one * one).sum(), c)
    return ((a[:, None] * x + c[:, None] * one - 1) ** 2).sum(1), a, c
