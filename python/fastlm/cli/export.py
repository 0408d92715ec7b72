"""`fastlm export [RUN] --to safetensors|hf|gguf`: a trained model as a folder that other programs load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
import tyro

from fastlm import console
from fastlm.cli import flags
from fastlm.cli.harm import measure_harm
from fastlm.data import chat
from fastlm.data.bounds import COUNT, Range, check
from fastlm.nn import int8
from fastlm.train import chat_export, gguf, job, modelcard
from fastlm.train import export as exporting
from fastlm.train.files import write_text
from fastlm.train.folders import has_data

EXAMPLES = """
fastlm export myrun --to hf --dtype bfloat16
fastlm export myrun --filter filter     # its card says how harmful it is
fastlm export myrun/checkpoints/step-1000 --folder model
"""


def export(
    run: tyro.conf.Positional[str] = "",
    to: Literal["safetensors", "hf", "gguf"] = "safetensors",
    folder: str = "",
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto",
    filter: str = "",
    prompts: str = "",
    outputs: int = 100,
    device: str = "auto",
    out: str = "runs",
) -> int:
    """Write a trained model into a folder of its own.

    safetensors: the plain GPT's names, which `fastlm` reads back; hf: what transformers loads as GPT2LMHeadModel or
    LlamaForCausalLM, with the same logits, an int8 run as compressed-tensors, which vLLM reads too; gguf: one file for
    llama.cpp. The tokenizer goes along, a chat template, and the model card (README.md).

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run.
        to: safetensors, hf or gguf.
        folder: New folder to write; without it, RUN/export-safetensors, RUN/export-hf or RUN/export-gguf.
        dtype: Type of the float weights; auto: float32, and q8_0 in gguf, which alone has it.
        filter: Folder of a filter: the card says in how many outputs it finds something, of this model and of the one that it
            was tuned from.
        prompts: File of prompts for these outputs, as `fastlm review` takes it; by default beginnings of held-out documents.
        outputs: How many to draw for that.
        device: Where they are drawn: auto, cpu, cuda or mps.
        out: Folder of runs.
    """
    check("outputs", outputs, Range(1, COUNT))
    if prompts and not filter:
        raise job.InputError("--prompts are for outputs that a filter reads: give --filter too")
    origin = job.find_run(run, out)
    target = Path(folder) if folder else origin / f"export-{to}"
    if filter:
        if not has_data(origin):
            raise job.InputError(f"--filter measures the outputs of a run, and {origin} is none")
        measure_harm(origin, filter, prompts, outputs, device)
        modelcard.write(origin)
    source = exporting.read_model(origin)
    template = chat.of_folder(origin)
    if to == "gguf":
        spoken = chat_export.jinja(template, source.tokenizer) if template and source.tokenizer else ""
        names = gguf.write(float_origin(origin, source), target, "q8_0" if dtype == "auto" else dtype, spoken)
    elif dtype == "q8_0":
        raise job.InputError(
            f"--dtype q8_0 is a type of --to gguf; with --to {to} choose auto, float32, bfloat16 or float16"
        )
    else:
        more = chat_export.files(template, source.tokenizer, to)
        names = exporting.export(source, to, target, "float32" if dtype == "auto" else dtype, more)
    if card := modelcard.of_export(origin, target, to):
        write_text(target / modelcard.NAME, card)
        names = sorted({*names, modelcard.NAME})
    print(f"{target}: {', '.join(names)}")
    return 0


def float_origin(folder: Path, source: exporting.Source) -> exporting.Source:
    """The float model that an int8 run was made of, since q8_0 rounds once more; the dequantised one where that is gone or
    is another model now, or where more was done to it than int8 (pruning, SmoothQuant). Which one it is, is said."""
    if source.int8 is None:
        return source
    origin = json.loads((folder / "config.json").read_text(encoding="utf-8"))["compressed"].get("origin", "")
    try:
        found = exporting.read_model(Path(origin))
    except job.InputError as error:
        console.warn(f"the float weights are gone ({error})")
    else:
        if becomes(found, source):
            console.say(f"from the float weights of {origin}")
            return found
        console.warn(f"the weights of {origin} are not those that became int8")
    console.warn("q8_0 is made of dequantised int8 weights, so they are rounded twice")
    return source


def becomes(found: exporting.Source, source: exporting.Source) -> bool:
    """Whether int8 alone makes `source` of `found`: the same integers and scales, and the same tensors beside them."""
    held = source.int8
    if (
        held is None
        or found.int8 is not None
        or found.shape != source.shape
        or set(found.tensors) != set(source.tensors)
    ):
        return False
    for name, weight in found.tensors.items():
        values = held.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if values is None:
            same = torch.equal(weight, source.tensors[name])
        else:
            same = all(map(torch.equal, int8.quantize_weight(weight, held.group), values))
        if not same:
            return False
    return True


def main(argv: list[str]) -> int:
    return flags.call(export, "fastlm export", argv, EXAMPLES)
