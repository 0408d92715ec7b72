"""The one rule by which every result of every op is judged: as exact as PyTorch.

- Errors are taken against float64. The largest is at most twice that of PyTorch's best path at the same dtype, plus one
  unit in the last place at the tensor's largest reference magnitude. The mean is at most 1.5 times PyTorch's, plus the same.
- A case is drawn until each output has pooled 4,096 finite elements, or MAX_DRAWS times; an output that has them pools no
  more. On few elements two equally valid orders of a short sum may differ by more than 2x.
- An output whose pool breaks the rule is drawn on to eight times its draws, and that pool alone decides: a largest error is
  the tail of a distribution.
- No other rule holds an op's exactness. Wider bounds in some tests compare whole modules, or extreme magnitudes with a
  float64 limit of their own.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

POOL = 4096
AGAIN = 8
MAX_DRAWS = 128  # conftest lifts it in `make test-all`: a gradient of one element pools 4,096 only in as many draws


@dataclass
class Result:
    """One output of one draw: what the op gave, what PyTorch's best path gives, and the float64 truth."""

    ours: Tensor
    torch: Tensor
    reference: Tensor


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """One unit in the last place of ``dtype`` at ``magnitude``."""
    info = torch.finfo(dtype)
    magnitude = max(magnitude, info.tiny)
    return info.eps * 2.0 ** torch.tensor(magnitude, dtype=torch.float64).log2().floor().item()


def violation(results: list[Result]) -> str | None:
    """Why pooled draws of one output break the rule, or None."""
    largest = [0.0, 0.0]
    total = [0.0, 0.0]
    count, magnitude = 0, 0.0
    dtype = results[0].ours.dtype
    for result in results:
        if result.ours.shape != result.reference.shape:
            return f"shape {list(result.ours.shape)}, expected {list(result.reference.shape)}"
        if result.ours.dtype != dtype or (result.torch.dtype != dtype):
            return f"dtype {result.ours.dtype}, PyTorch's is {result.torch.dtype}"
        reference = result.reference.double()
        finite = reference.isfinite()
        if not torch.equal(result.ours.double()[~finite].nan_to_num(7.0), reference[~finite].nan_to_num(7.0)):
            return "differs where the reference is not finite"
        ours = result.ours.double()[finite]
        if not ours.isfinite().all():
            return f"{int((~ours.isfinite()).sum())} values are not finite where the reference is"
        reference = reference[finite]
        if reference.numel() == 0:
            continue
        magnitude = max(magnitude, reference.abs().max().item())
        count += reference.numel()
        for i, value in enumerate((ours, result.torch.double()[finite])):
            error = (value - reference).abs()
            largest[i] = max(largest[i], error.max().item())
            total[i] += error.sum().item()
    if count == 0:
        return None
    unit = ulp(dtype, magnitude)
    if largest[0] > 2 * largest[1] + unit:
        return f"largest error {largest[0]:.3e}, PyTorch's {largest[1]:.3e}, one ulp {unit:.3e} ({count} values)"
    if total[0] / count > 1.5 * total[1] / count + unit:
        return (
            f"mean error {total[0] / count:.3e}, PyTorch's {total[1] / count:.3e}, one ulp {unit:.3e} ({count} values)"
        )
    return None


def assert_as_exact_as_torch(
    draw: Callable[[torch.Generator], dict[str, Result]], seed: int | None = None, again: bool = True
) -> None:
    """Draws until every output has pooled ``POOL`` finite elements, then applies the rule to each.

    ``draw`` gets a CPU generator for its fresh random inputs and returns its outputs by name. ``again`` False is for tests
    of wrong kernels, whose errors are gross: the first pool decides. The seed of a failure is in the message;
    FASTLM_TEST_SEED=<seed> replays it. Where CI is set a test draws from a seed of its name: what is to decide on a change
    must say the same of it every time, while everybody else's runs go on looking.
    """
    replay = os.environ.get("FASTLM_TEST_SEED")
    if replay is not None:
        seed = int(replay)
    elif seed is None:
        name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        seed = zlib.crc32(name.encode()) if os.environ.get("CI") else torch.seed() % 2**32
    generator = torch.Generator().manual_seed(seed)
    pooled = {name: [result] for name, result in draw(generator).items()}
    finite = {name: _finite(results[0]) for name, results in pooled.items()}
    draws = 1

    def pool(names: Collection[str]) -> None:
        """One draw more for those outputs; the others have enough, and millions of values each cost seconds to judge."""
        nonlocal draws
        draws += 1
        for name, result in draw(generator).items():
            if name in names:
                pooled[name].append(result)
                finite[name] += _finite(result)

    def lacking() -> list[str]:
        """An output that has had no finite element in sixteen draws has none."""
        return [
            name
            for name, results in pooled.items()
            if results[0].reference.numel() and finite[name] < POOL and (finite[name] or len(results) < 16)
        ]

    while draws < MAX_DRAWS and (names := lacking()):
        pool(names)
    broken = {name: why for name, results in pooled.items() if (why := violation(results))}
    doubtful = [name for name, why in broken.items() if why.startswith(("largest", "mean"))]
    if again and doubtful:
        wanted = {name: AGAIN * len(pooled[name]) for name in doubtful}
        for _ in range(min((AGAIN - 1) * draws, POOL)):
            if not (names := [name for name in doubtful if len(pooled[name]) < wanted[name]]):
                break
            pool(names)
        for name in doubtful:
            broken[name] = violation(pooled[name]) or ""
    if text := "; ".join(f"{name}: {why}" for name, why in broken.items() if why):
        raise AssertionError(f"{text}. Replay with FASTLM_TEST_SEED={seed}")


def _finite(result: Result) -> int:
    return int(result.reference.isfinite().sum())
