"""`fastlm export [RUN] --to safetensors|hf|gguf`: a trained model as a folder that other programs load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import tyro

from fastlm import console
from fastlm.cli import flags
from fastlm.train import export as exporting
from fastlm.train import gguf, job

EXAMPLES = """
fastlm export myrun --to hf --dtype bfloat16
fastlm export myrun/checkpoints/step-1000 --folder model
"""


def export(
    run: tyro.conf.Positional[str] = "",
    to: Literal["safetensors", "hf", "gguf"] = "safetensors",
    folder: str = "",
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto",
    out: str = "runs",
) -> int:
    """Write a trained model into a folder of its own.

    safetensors: the plain GPT's names, which `fastlm` reads back; hf: what transformers loads as GPT2LMHeadModel or
    LlamaForCausalLM, with the same logits, an int8 run as compressed-tensors, which vLLM reads too; gguf: one file for
    llama.cpp. The tokenizer goes along.

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run.
        to: safetensors, hf or gguf.
        folder: New folder to write; without it, RUN/export-safetensors, RUN/export-hf or RUN/export-gguf.
        dtype: Type of the float weights; auto: float32, and q8_0 in gguf, which alone has it.
        out: Folder of runs.
    """
    origin = job.find_run(run, out)
    target = Path(folder) if folder else origin / f"export-{to}"
    source = exporting.read_model(origin)
    if to == "gguf":
        names = gguf.write(float_origin(origin, source), target, "q8_0" if dtype == "auto" else dtype)
    elif dtype == "q8_0":
        raise job.InputError(
            f"--dtype q8_0 is a type of --to gguf; with --to {to} choose auto, float32, bfloat16 or float16"
        )
    else:
        names = exporting.export(source, to, target, "float32" if dtype == "auto" else dtype)
    print(f"{target}: {', '.join(names)}")
    return 0


def float_origin(folder: Path, source: exporting.Source) -> exporting.Source:
    """The float model that an int8 run was made of where it is still there, since q8_0 rounds once more; else the
    dequantised one. Which one it is, is said."""
    if source.int8 is None:
        return source
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))["compressed"]
    if not record["int8"].get("smooth"):
        try:
            found = exporting.read_model(Path(record["origin"]))
            if found.shape == source.shape and found.int8 is None:
                console.say(f"from the float weights of {record['origin']}")
                return found
        except job.InputError as error:
            console.warn(f"the float weights are gone ({error})")
    console.warn("q8_0 is made of dequantised int8 weights, so they are rounded twice")
    return source


def main(argv: list[str]) -> int:
    return flags.call(export, "fastlm export", argv, EXAMPLES)
