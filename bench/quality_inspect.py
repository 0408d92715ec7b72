"""Does what `fastlm inspect` calls salient matter? It is removed, and random tokens: ``python bench/quality_inspect.py``.

Of 50 texts that the models were not trained on, each 64 bytes, the last 16 are to be predicted. A fifth of the 48 before
them is removed, and the loss of the 16 rises. Beside it: how far the lens, the attention and the integral are from what they
must be. Two small models, one with learned positions and one with rotary ones.
"""

from __future__ import annotations

import argparse
import copy
import time

import fastlm
import numpy as np
import torch
from fastlm import inspect
from fastlm.bench import small
from fastlm.bench.quality import Quality, spread
from fastlm.models.gpt import GPT, named
from torch import Tensor

TEXTS, LENGTH, ASKED, SHARE, DRAWS = 50, 64, 16, 0.2, 5
STEPS, BATCH, WIDTH, CONTEXT = 200, 12, 64, 64


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Prose to train on, and prose to ask about, as bytes."""
    found = small.documents()
    made = [np.frombuffer("\n".join(small.take(found, size)).encode(), dtype=np.uint8) for size in (80_000, 800_000)]
    return made[1], made[0]


def trained(style: str, text: np.ndarray) -> GPT:
    torch.manual_seed(1)
    model = GPT(named("nano", style, layers=2, width=WIDTH, context=CONTEXT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1, betas=(0.9, 0.95))
    draw = np.random.default_rng(1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / STEPS)
        rows = np.stack([text[i : i + CONTEXT + 1] for i in draw.integers(0, len(text) - CONTEXT - 1, BATCH)])
        batch = torch.as_tensor(rows.astype(np.int64))
        loss = model(batch[:, :-1], batch[:, 1:]) / (BATCH * CONTEXT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def loss_of(model: GPT, tokens: Tensor) -> float:
    """Nats a token of the last ones."""
    return float(inspect.surprise(model(tokens)[0], tokens[0])[0][-ASKED:].mean())


def without(tokens: Tensor, gone: list[int]) -> Tensor:
    return tokens[:, [i for i in range(tokens.shape[1]) if i not in set(gone)]]


def rises(model: GPT, samples: list[Tensor], draw: np.random.Generator) -> tuple[dict[str, list[float]], list[float]]:
    """By how much the loss of each text rises when a fifth of it is removed, by what is removed; errors of the integrals."""
    before, count = LENGTH - ASKED, round(SHARE * (LENGTH - ASKED))
    found: dict[str, list[float]] = {"salient": [], "random": [], "nearest": [], "least": []}
    missed = []
    for tokens in samples:
        parts = inspect.find(model, tokens)
        goals = inspect.goals_of(tokens)[-ASKED:]
        salient, gain = inspect.saliency(model, parts, tokens, [goals])
        missed.append(abs(float(salient.sum() - gain[0])) / abs(float(gain[0])))
        order = salient[0, :before].argsort(descending=True).tolist()
        own = loss_of(model, tokens)
        rise = lambda gone, tokens=tokens, own=own: loss_of(model, without(tokens, gone)) - own
        found["salient"].append(rise(order[:count]))
        found["least"].append(rise(order[-count:]))
        found["nearest"].append(rise(list(range(before - count, before))))
        chosen = [draw.choice(before, count, replace=False).tolist() for _ in range(DRAWS)]
        found["random"].append(float(np.mean([rise(one) for one in chosen])))
    return found, missed


def exactness(model: GPT, samples: list[Tensor]) -> tuple[int, float, float]:
    """Texts whose last lens is the logits bit for bit; the largest distance of a row's sum from 1; the largest difference of
    weights between the model and the same one with fused kernels."""
    fused = copy.deepcopy(model)
    fastlm.swap(fused)
    same, off, apart = 0, 0.0, 0.0
    for tokens in samples:
        weights = []
        for one in (model, fused):
            parts = inspect.find(one, tokens)
            with torch.no_grad():
                same += torch.equal(list(inspect.lens(one, parts, tokens))[-1], one(tokens)[0])
            weights.append([w for w in inspect.attention(one, parts, tokens) if w is not None])
        assert len(weights[0]) == len(weights[1]) == model.config.layers
        off = max(off, *(float((w.sum(2) - 1).abs().max()) for w in (*weights[0], *weights[1])))
        apart = max(apart, *(float((a - b).abs().max()) for a, b in zip(*weights)))
    return same, off, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provisional", default="", metavar="WHY", help="why times are not to be trusted")
    modules = ["fastlm.inspect.views", "fastlm.inspect.anatomy", "fastlm.bench.small"]
    evidence = Quality(__file__, of=modules, provisional=parser.parse_args().provisional)
    train, held = texts()
    lines, exact = [], []
    for style, name in (("gpt2", "GPT-2 style"), ("llama", "Llama style")):
        begin, draw = time.perf_counter(), np.random.default_rng(2)
        model = trained(style, train)
        starts = draw.integers(0, len(held) - LENGTH, TEXTS)
        samples = [torch.as_tensor(held[i : i + LENGTH].astype(np.int64))[None] for i in starts]
        found, missed = rises(model, samples, draw)
        better = sum(a > b for a, b in zip(found["salient"], found["random"]))
        own = spread([loss_of(model, t) for t in samples])
        lines.append([name, own, *(spread(found[k]) for k in found), f"{better} of {TEXTS}"])
        same, off, apart = exactness(model, samples[:10])
        exact.append([name, f"{same} of 20", f"{off:.1e}", f"{apart:.1e}", f"{np.median(missed):.2%}"])
        what = f"nats a token by which the loss rises when a fifth of the text is removed: random, most salient; {name}"
        evidence.row(
            "inspect", what, spread(found["random"]), spread(found["salient"]), time.perf_counter() - begin, (1,)
        )
    evidence.table("What the loss rises by when a fifth of the 48 tokens before the 16 asked about is removed",
                   ["model", "loss, nats", *found, "salient above random"], lines,
                   f"{TEXTS} texts, mean ± standard deviation; nearest: the last tokens before those asked about.")  # fmt: skip
    evidence.table("What must hold", ["model", "last lens equals logits", "row sums off 1", "fused weights off",
                                      "integral off"], exact,
                   "Ten texts without and ten with fused kernels; the integral is the median of all texts.")  # fmt: skip
    evidence.save()


if __name__ == "__main__":
    main()
