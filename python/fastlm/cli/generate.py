"""`fastlm generate [RUN] --prompt "..."`: continue a prompt, token by token, to the terminal."""

from __future__ import annotations

import os
import sys

import torch
import tyro

from fastlm.cli import flags
from fastlm.cli.data import SpecialTokens, special_tokens_of
from fastlm.train import job
from fastlm.train.bounds import COUNT, SEED, Range, check
from fastlm.train.generation import TextStream

EXAMPLES = """
fastlm generate --prompt "def main("    # the last run
fastlm generate myrun --tokens 200 --num 3 --temperature 0.7 --top-p 0.95
"""


def generate(
    run: tyro.conf.Positional[str] = "",
    prompt: str = "",
    tokens: int = 400,
    num: int = 1,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 1,
    special_tokens: SpecialTokens = "run",
    device: str = "auto",
    out: str = "runs",
) -> int:
    """Continue a prompt with a trained model.

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run.
        prompt: Text to go on from.
        tokens: Tokens to generate.
        num: Texts to generate, one after the other.
        temperature: 0 takes the likeliest token, 1 samples as trained.
        top_k: Sample from this many likeliest tokens only; 0: from all.
        top_p: Sample from the likeliest tokens that hold this probability together.
        min_p: Leave out tokens less likely than this part of the likeliest.
        seed: Seed of the sampling.
        special_tokens: text: what looks like a special token in the prompt is text. read: it becomes that token, and those
            generated are shown. run: as the run was trained.
        device: auto, cpu, cuda or mps.
        out: Folder of runs.
    """
    for name, value, allowed in (
        ("tokens", tokens, Range(0, COUNT)),
        ("num", num, Range(1, COUNT)),
        ("temperature", temperature, Range(0)),
        ("top_k", top_k, Range(0, COUNT)),
        ("top_p", top_p, Range(above=0, high=1)),
        ("min_p", min_p, Range(0, 1)),
        ("seed", seed, Range(*SEED)),
    ):
        check(name, value, allowed)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise job.InputError(f"--prompt must be UTF-8; it is {os.fsencode(prompt)!r}") from None
    model, tokenizer = job.load(job.find_run(run, out), device, special_tokens_of(special_tokens))
    ids = tokenizer.encode(prompt.encode()).astype("int64") if prompt else [tokenizer.eot]
    start = torch.as_tensor(ids, device=next(model.parameters()).device)[None]
    choose = job.sampler(temperature, top_k, top_p, min_p, seed, tokenizer.vocab)
    for number in range(num):
        if num > 1:
            print(f"--- {number + 1} of {num}")
        text = TextStream(tokenizer, ids if prompt else ())

        def stream(logits: torch.Tensor, text: TextStream = text) -> torch.Tensor:
            token = choose(logits)
            sys.stdout.write(text.push(int(token)))
            sys.stdout.flush()
            return token

        sys.stdout.write(prompt)
        model.generate(start, tokens, stream)
        sys.stdout.write(text.end() + "\n")
    return 0


def main(argv: list[str]) -> int:
    return flags.call(generate, "fastlm generate", argv, EXAMPLES)
