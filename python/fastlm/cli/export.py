"""`fastlm export [RUN] --to safetensors|hf`: a trained model as a folder that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from fastlm.train import export as exporting
from fastlm.train import job


def export(
    run: tyro.conf.Positional[str] = "",
    to: Literal["safetensors", "hf"] = "safetensors",
    folder: str = "",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    out: str = "runs",
) -> int:
    """Write a trained model into a folder of its own.

    safetensors: the plain GPT's names, which `fastlm` reads back; hf: what transformers loads as GPT2LMHeadModel or
    LlamaForCausalLM, with the same logits. The tokenizer goes along as a tokenizer.json.

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run.
        to: safetensors or hf.
        folder: New folder to write; without it, RUN/export-safetensors or RUN/export-hf.
        dtype: Type of the weights.
        out: Folder of runs.
    """
    origin = job.find_run(run, out)
    target = Path(folder) if folder else origin / f"export-{to}"
    names = exporting.export(exporting.read_model(origin), to, target, dtype)
    print(f"{target}: {', '.join(names)}")
    return 0


def main(argv: list[str]) -> int:
    return tyro.cli(export, prog="fastlm export", args=argv)
