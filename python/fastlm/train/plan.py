"""Which mesh suits a run: every way to share it out over some devices, counted by costs.py, and the one to take."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

from fastlm.compress import Held
from fastlm.data.errors import InputError
from fastlm.models.gpt import GPTConfig
from fastlm.train.config import Config
from fastlm.train.costs import Costs
from fastlm.train.mesh import BUILT
from fastlm.train.parallel import unbuilt
from fastlm.train.stages import idle


@dataclass(frozen=True)
class Plan:
    """One way to share a run out; `costs` are of one rank."""

    mesh: str
    sizes: dict[str, int]
    micro: int  # samples of one forward
    recompute: str
    stages: int  # of a pipeline, on each rank
    costs: Costs
    flops: float  # of one rank in a step, recomputation counted
    idle: float  # part of the step in which a rank of a pipeline has nothing to do
    fits: bool

    @property
    def sent(self) -> int:
        return sum(self.costs.sent.values())

    @property
    def flags(self) -> str:
        words = [f"--mesh {self.mesh}"] if self.mesh else []
        words += [f"--pp-stages {self.stages}"] if self.stages > 1 else []
        return " ".join([*words, f"--micro {self.micro}", f"--recompute {self.recompute}"])


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    """Sizes by dimension whose product is `devices`."""

    def split(left: int, names: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(names) == 1:
            yield {names[0]: left}
            return
        for size in (n for n in range(1, left + 1) if left % n == 0):
            for rest in split(left // size, names[1:]):
                yield {names[0]: size, **rest}

    return split(devices, BUILT)


def plans(
    shape: GPTConfig, config: Config, devices: int, memory: int, device: str, int8: Held | None = None
) -> tuple[list[Plan], dict[str, str]]:
    """The plans for `devices` devices of `memory` bytes, best first; and the meshes that cannot be, each with its reason.

    Of each mesh the best micro-batch (--micro, or the rank's share and its halves) and recomputation (--recompute, or more)
    are taken. Best is what fits; of that, what computes and idles least; then what sends least, in the fewest pieces. `int8`:
    the int8 layers of LoRA's base.
    """
    if devices < 1:
        raise InputError(f"--devices must be at least 1; it is {devices}")
    found, refused = [], {}
    for sizes in _meshes(devices):
        mesh = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        data = sizes["dp"] * sizes["fsdp"]
        if data > config.optim.batch:
            refused[mesh] = f"--batch {config.optim.batch} has no sample for each of {data} ranks"
            continue
        stages = sizes["pp"] * config.run.pp_stages
        if sizes["pp"] > 1 and stages > shape.layers:
            several = f" with --pp-stages {config.run.pp_stages}" if config.run.pp_stages > 1 else ""
            refused[mesh] = (
                f"pp={sizes['pp']}{several} needs a block for each of {stages} stages; --layers is {shape.layers}"
            )
            continue
        if why := unbuilt(config, sizes):
            refused[mesh] = why
            continue
        try:
            found.append(_fit(shape, config, sizes, mesh, memory, device, int8))
        except InputError as error:
            refused[mesh] = str(error)
    found.sort(key=lambda plan: (*_worth(plan), len(plan.mesh)))
    return found, refused


def _worth(plan: Plan) -> tuple[float, ...]:
    """Smaller is better."""
    if not plan.fits:
        return (1, plan.costs.memory, 0, 0)
    return (0, plan.flops / (1 - plan.idle), plan.sent, -plan.micro)


def _fit(
    shape: GPTConfig, config: Config, sizes: dict[str, int], mesh: str, memory: int, device: str, int8: Held | None
) -> Plan:
    share = -(-config.optim.batch // (sizes["dp"] * sizes["fsdp"]))
    order: tuple[str, ...] = ("none", "half", "full")
    micros = [min(config.optim.micro, share)] if config.optim.micro else [share]
    while not config.optim.micro and micros[-1] > 1:
        micros.append(-(-micros[-1] // 2))
    found, each = [], config.run.pp_stages if sizes["pp"] > 1 else 1
    if config.run.compile:
        order = ("none",)  # Config.check refuses both
    for recompute in order[order.index(config.run.recompute) :]:
        for micro in micros:
            changed = copy.deepcopy(config)
            changed.run.recompute, changed.optim.micro = recompute, micro  # type: ignore[assignment]
            costs = Costs.of(shape, changed, device, sizes, int8)
            again = {"none": 0.0, "half": 1 / 2, "full": 1.0}[recompute] / 3  # a forward is a third of a step
            flops = costs.flops_per_sample * config.optim.batch / math.prod(sizes.values()) * (1 + again)
            waits = idle(sizes["pp"], each, -(-share // micro))
            found.append(Plan(mesh, sizes, micro, recompute, each, costs, flops, waits, costs.memory <= memory))
    return min(found, key=_worth)
