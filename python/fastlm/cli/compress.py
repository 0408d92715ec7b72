"""`fastlm compress RUN --int8`, `--prune 2:4 --heal 300`: a trained model made smaller, with what that costs."""

from __future__ import annotations

from typing import Literal

import tyro

from fastlm import console
from fastlm.cli import flags
from fastlm.cli.data import reading
from fastlm.data.bounds import COUNT, SEED, Range, check
from fastlm.train import compressing, job
from fastlm.train.compress_pruning import Prune, Shrink, parts
from fastlm.train.healing import Heal, Stopped


def compress(
    run: tyro.conf.Positional[str] = "",
    text: tyro.conf.Positional[tuple[str, ...]] = (),
    prune: str = "",
    prune_method: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt",
    per_layer: bool = False,
    heal: int = 0,
    heal_lr: float | None = None,
    int8: bool = False,
    weight_only: bool = False,
    group: Literal[32, 64, 128] | None = None,
    smooth: bool = False,
    split: bool = False,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    only_faster: bool = False,
    samples: int = 64,
    seed: int = 1,
    name: str = "",
    device: str = "auto",
    out: str = "runs",
) -> int:
    """Make a trained model smaller.

    Prints size, speed and perplexity before and after, and writes a run's folder that generate, eval, export and
    train --init take.

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run.
        text: Files, folders or globs to measure and calibrate on; without any, the run's own corpus.
        prune: Make this part of the linear layers' weights zero, such as 0.5, or all but n of m, such as 2:4. Or remove whole
            parts: heads (with their keys and values), channels of the MLPs, layers; as a part of them or a number, such as
            heads:0.25,channels:0.3,layers:1.
        prune_method: sparsegpt and wanda calibrate on the training split; magnitude takes the smallest weights.
        per_layer: With --prune heads: or channels: remove as many in all, more of them from layers that need them less. Layers
            then differ, and export --to hf and gguf refuse the model.
        heal: Train so many steps after --prune, on the training split with the run's settings; what is zero stays zero.
        heal_lr: Peak learning rate of --heal; without it a third of the run's.
        int8: Linear layers in int8: weights by row, activations by token, as they come. With --prune after it: zeros stay.
        weight_only: With --int8: weights in int8, activations in float.
        group: With --weight-only: weights that share a scale; without it a whole row does.
        smooth: With --int8: SmoothQuant; outliers of activations move into weights, folded into the norms.
        split: With --int8: columns of activations that stand out stay in float, beside the int8 product.
        include: Layers to take, by path, glob or last name; without it all but the output head.
        exclude: Layers to leave.
        only_faster: Leave layers in float that int8 would make slower on this machine.
        samples: Contexts of the training split to calibrate on.
        seed: Chooses them, and the order in which --heal reads.
        name: Name of the new folder; without it RUN-int8, RUN-pruned, RUN-smaller-healed and so on.
        device: auto, cpu, cuda or mps.
        out: Folder of runs.
    """
    check("samples", samples, Range(1, COUNT))
    check("seed", seed, Range(*SEED))
    check("heal", heal, Range(0, COUNT))
    if heal_lr is not None:
        check("heal_lr", heal_lr, Range(above=0))
    if not int8:
        given = {"--weight-only": weight_only, "--group": group, "--smooth": smooth, "--split": split}
        needs = [flag for flag, on in given.items() if on]
        if needs:
            raise job.InputError(f"{needs[0]} needs --int8")
        if not prune:
            raise job.InputError("fastlm compress needs a method: --int8 or --prune")
    methods: list[compressing.Method] = []
    if per_layer and not {"heads", "channels"} & (parts(prune) or {}).keys():
        raise job.InputError("--per-layer needs --prune heads:... or channels:...")
    if prune:
        amounts = parts(prune)
        if amounts is not None and (include or exclude) and not int8:
            raise job.InputError(f"--prune {prune} is of every layer: leave --include and --exclude out")
        methods.append(Prune(prune, prune_method, include, exclude) if amounts is None else Shrink(amounts, per_layer))
    if heal or heal_lr is not None:
        if not prune or not heal:
            raise job.InputError("--heal needs --prune" if heal else "--heal-lr needs --heal")
        methods.append(Heal(heal, heal_lr))
    if int8:
        methods.append(compressing.Int8(weight_only, group, smooth, include, exclude, only_faster, split))
    try:
        with reading() as note:
            made = compressing.run(
                job.find_run(run, out), methods, text=text, name=name, out=out, device=device, samples=samples, seed=seed,
                note=note,
            )  # fmt: skip
    except Stopped as error:
        console.warn(f"fastlm compress: {error}")
        return error.status
    for line in made.lines:
        console.say(line)
    console.say(made.table())
    console.say(f"run folder: {made.folder}")
    return 0


def main(argv: list[str]) -> int:
    return flags.call(compress, "fastlm compress", argv)
