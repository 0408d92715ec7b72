"""`fastlm plan`: what a training run takes of each of several devices under every mesh, and which mesh to take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fastlm.cli import flags
from fastlm.data import tokenizer as tokenizers
from fastlm.data.bounds import Range, check
from fastlm.data.errors import InputError
from fastlm.train.base import read_shape
from fastlm.train.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastlm.train.folders import find_init
from fastlm.train.machine import memory_limit, pick_device
from fastlm.train.plan import Plan, plans


def _vocab(model: ModelConfig, data: DataConfig) -> int:
    if data.tokenizer == "bpe":
        return data.vocab
    if data.tokenizer == "chars":
        if not model.rows:
            raise InputError("--tokenizer chars has as many tokens as its corpus has characters: give --rows")
        return model.rows
    return tokenizers.make(data.tokenizer, data.vocab, lambda: iter(())).vocab


def _size(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} B"


def _flops(count: float) -> str:
    unit, scale = ("TFLOP", 1e12) if count >= 1e12 else ("GFLOP", 1e9)
    return f"{count / scale:,.1f} {unit}"


def _table(found: list[Plan]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    names = ("mesh", "micro", "recompute", "weights", "gradients", "optimizer", "activations", "rest", "memory", "fits")
    for name in (*names, "flops a step", "idle", "sent a step"):
        table.add_column(name, justify="left" if name in ("mesh", "recompute", "fits") else "right", no_wrap=True)
    for plan in found:
        parts = dict(plan.costs.parts)
        shown = [parts.pop(name) for name in ("weights", "gradients", "optimizer", "activations")]
        table.add_row(
            plan.mesh or "one process",
            str(plan.micro),
            plan.recompute,
            *(_size(n) for n in (*shown, sum(parts.values()), plan.costs.memory)),
            "yes" if plan.fits else "no",
            _flops(plan.flops),
            f"{plan.idle:.0%}",
            _size(plan.sent),
        )
    return table


EXAMPLES = """
fastlm plan --size 350M --devices 8 --memory 80
fastlm plan --size 1B --batch 256 --dtype bfloat16 --devices 16 --memory 40
fastlm plan --init RUN-int8 --lora-rank 8 --memory 8
"""


def plan(
    model: ModelConfig,
    data: DataConfig,
    optim: OptimConfig,
    run: RunConfig,
    devices: int = 1,
    memory: float = 0.0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """What training takes of each device under every mesh of so many devices, and which mesh to take.

    Takes the flags of fastlm train; nothing is allocated or trained. Of a model that --init names only the shape is read, and
    which layers are int8. All figures are of one rank: memory at its peak (estimated), floating-point operations and bytes sent
    in a step.

    Args:
        devices: How many devices (processes) the run may have.
        memory: GiB of each; 0: what a GPU of this machine has, or its share of this machine's memory on a CPU.
        as_json: Print JSON.
    """
    config = Config(model, data, optim, run)
    config.check()
    int8 = None
    if model.init:
        model.init = str(find_init(model.init, run.out))
        given, held = read_shape(Path(model.init))
        model.take_shape(given)
        int8 = held if model.lora_rank else None  # else they train in float
    check("memory", memory, Range(0))
    check("devices", devices, Range(1, 65536))
    if memory and run.device in ("cpu", "cuda"):
        kind, limit = run.device, int(memory * 2**30)  # devices of another machine, perhaps
    else:
        device = pick_device(run.device)
        own = memory_limit(device) // (max(devices, 1) if device.type == "cpu" else 1)
        kind, limit = device.type, int(memory * 2**30) or own
        if not limit:
            raise InputError(f"--memory: this machine does not tell how much its {kind} has; give GiB for each device")
    shape = model.resolve(model.rows if model.init else _vocab(model, data))
    found, refused = plans(shape, config, devices, limit, kind, int8)
    if not found:
        raise InputError(f"--devices {devices}: no mesh of as many can be: {'; '.join(refused.values())}")
    best = found[0] if found[0].fits else None
    if as_json:
        rows = [
            {
                "mesh": p.mesh,
                "micro": p.micro,
                "recompute": p.recompute,
                "fits": p.fits,
                "flops": p.flops,
                "idle": p.idle,
            }
            | {"memory": p.costs.parts, "sent": p.costs.sent}
            for p in found
        ]
        print(json.dumps({"plans": rows, "refused": refused, "take": best.flags if best else None}))
        return 0 if best else 1
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    console.print(
        f"{found[0].costs.parameters / 1e6:,.2f} M parameters, {devices} x {kind} of {_size(limit)}, "
        f"batch {optim.batch} of {shape.context} tokens\n"
    )
    console.print(_table(found))
    for mesh, why in refused.items():
        console.print(f"not {mesh}: {why}")
    if best is None:
        console.print(
            "\nnothing fits: more --devices, a smaller --micro, --recompute full or a smaller model would help"
        )
        return 1
    console.print(f"\ntake: fastlm train {best.flags}")
    for title, counts in (("memory", best.costs.parts), ("sent a step", best.costs.sent)):
        console.print(f"  {title}: {', '.join(f'{name} {_size(n)}' for name, n in counts.items() if n) or 'nothing'}")
    return 0


def main(argv: list[str]) -> int:
    return flags.call(plan, "fastlm plan", argv, EXAMPLES)
