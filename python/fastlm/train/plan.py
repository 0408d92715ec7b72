"""Which mesh suits a run: every way to share it out over some devices, counted by costs.py, and the one to take."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from fastlm.data.errors import InputError
from fastlm.models.gpt import GPTConfig
from fastlm.train.config import Config
from fastlm.train.costs import Costs
from fastlm.train.mesh import BUILT


@dataclass(frozen=True)
class Plan:
    """One way to share a run out; `costs` are of one rank."""

    mesh: str
    sizes: dict[str, int]
    micro: int  # samples of one forward
    recompute: str
    costs: Costs
    flops: float  # of one rank in a step, recomputation counted
    fits: bool

    @property
    def sent(self) -> int:
        return sum(self.costs.sent.values())

    @property
    def flags(self) -> str:
        words = [f"--mesh {self.mesh}"] if self.mesh else []
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
    shape: GPTConfig, config: Config, devices: int, memory: int, device: str
) -> tuple[list[Plan], dict[str, str]]:
    """The plans for `devices` devices of `memory` bytes, best first; and the meshes that cannot be, each with its reason.

    For each mesh: the largest micro-batch (--micro, or the rank's share and its halves) that fits without recomputing
    more than asked for; if none does, with every other block or every block recomputed; if still none, the smallest. Of
    what fits, less recomputation is better, then less to send, then the plainer mesh.
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
        for name in ("fsdp", "tp"):
            if sizes[name] > 1 and config.run.compile:
                refused[mesh] = f"--compile with {name} is not built"
        if sizes["tp"] > 1 and config.model.lora_rank:
            refused[mesh] = "--lora-rank with tp is not built"
        if mesh in refused:
            continue
        try:
            found.append(_fit(shape, config, sizes, mesh, memory, device))
        except InputError as error:
            refused[mesh] = str(error)
    order = ("none", "half", "full")
    found.sort(key=lambda p: (not p.fits, order.index(p.recompute) if p.fits else p.costs.memory, p.sent, len(p.mesh)))
    return found, refused


def _fit(shape: GPTConfig, config: Config, sizes: dict[str, int], mesh: str, memory: int, device: str) -> Plan:
    share = -(-config.optim.batch // (sizes["dp"] * sizes["fsdp"]))
    micros = [min(config.optim.micro, share)] if config.optim.micro else [share]
    while not config.optim.micro and micros[-1] > 1:
        micros.append(-(-micros[-1] // 2))
    plan, order = None, ("none", "half", "full")
    for recompute in order[order.index(config.run.recompute) :]:
        for micro in micros:
            changed = copy.deepcopy(config)
            changed.run.recompute, changed.optim.micro = recompute, micro  # type: ignore[assignment]
            costs = Costs.of(shape, changed, device, sizes)
            again = {"none": 0.0, "half": 1 / 2, "full": 1.0}[recompute] / 3  # a forward is a third of a step
            flops = (
                costs.flops_per_sample * config.optim.batch / (sizes["dp"] * sizes["fsdp"] * sizes["tp"]) * (1 + again)
            )
            plan = Plan(mesh, sizes, micro, recompute, costs, flops, costs.memory <= memory)
            if plan.fits:
                return plan
    assert plan is not None
    return plan
