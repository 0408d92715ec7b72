"""A small model, and prose that every Python has, for the evidence of remedies: minutes on two cores, no download."""

from __future__ import annotations

import ast
import inspect
import math
import random

import numpy as np
import torch

from fastlm.data import TokenSource, corpus
from fastlm.data.prepare import Prepared
from fastlm.models.gpt import GPT, GPTConfig

SEEDS = (1, 2, 3)
CONTEXT = 128


def documents() -> list[str]:
    """Pydoc's topics, and docstrings of 300 characters or more, in an order of their own."""
    import pydoc_data.topics

    found = list(pydoc_data.topics.topics.values())
    for file in corpus.stdlib_files():
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                doc = ast.get_docstring(node, clean=False)
                if doc and len(doc) >= 300:
                    found.append(inspect.cleandoc(doc))
    found = [text for text in dict.fromkeys(found) if len(text) <= 8_000]
    random.Random(0).shuffle(found)
    return found


def take(found: list[str], size: int) -> list[str]:
    """Documents from the front of a list, which loses them, of so many bytes."""
    out, have = [], 0
    while found and have < size:
        out.append(found.pop())
        have += len(out[-1].encode())
    return out


def train(
    data: list[Prepared],
    weights: tuple[float, ...],
    held: Prepared,
    own: Prepared,
    steps: int,
    seed: int,
    width: int = 96,
    batch_size: int = 16,
) -> tuple[float, float]:
    """Bits per byte of the held-out text at the best of eight evaluations, and of the real training text then.

    The order of training depends on `seed` and `data` alone.
    """
    torch.manual_seed(seed)
    config = GPTConfig(vocab=held.tokenizer.vocab, layers=2, heads=4, width=width, context=CONTEXT, dropout=0.0)
    model, source = GPT(config), TokenSource(data, CONTEXT, seed, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    best = (math.inf, math.inf)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        batch = source.batch(np.arange(step * batch_size, (step + 1) * batch_size))
        inputs, targets = (torch.as_tensor(t).long() for t in batch[:2])
        loss = model(inputs, targets) / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 8) == 0:
            best = min(best, (bits(model, held), bits(model, own)))
    return best


@torch.no_grad()
def bits(model: GPT, data: Prepared, limit: int = 30_000) -> float:
    """Bits per byte of a text's first `limit` tokens, in contexts side by side."""
    tokens = torch.as_tensor(np.concatenate([np.asarray(s[:limit]) for s in data.val])[:limit].astype(np.int64))
    rows = (len(tokens) - 1) // CONTEXT
    inputs, targets = tokens[: rows * CONTEXT].view(rows, CONTEXT), tokens[1 : rows * CONTEXT + 1].view(rows, CONTEXT)
    total = sum(float(model(i, t)) for i, t in zip(inputs.split(64), targets.split(64)))
    return total / math.log(2) / len(data.tokenizer.decode(targets.flatten().tolist()))
