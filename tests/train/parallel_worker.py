"""What one rank does in tests/train/test_parallel.py: runs named cases under a mesh, writes what came out as JSON.

python parallel_worker.py OUT.json CASE...   with a Trainer per case; alone, or among the ranks that the environment names.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastlm.models.gpt import GPT, named
from fastlm.train import checkpoint, mesh
from fastlm.train.config import Config
from fastlm.train.loop import Trainer

STEPS = 4


class Text:
    """Random tokens by sample number; sample n has n % 5 targets that do not count: ranks get unequal numbers."""

    content = "text"

    def batch(self, ids: np.ndarray) -> tuple[torch.Tensor, ...]:
        rows = [torch.randint(64, (17,), generator=torch.Generator().manual_seed(int(n))) for n in ids]
        tokens = torch.stack(rows)
        targets = tokens[:, 1:].clone()
        for row, n in zip(targets, ids):
            row[: 3 * (int(n) % 5)] = -100
        return tokens[:, :-1].contiguous(), targets


def config(**changes: Any) -> Config:
    made = Config()
    defaults: dict[str, Any] = {"steps": STEPS, "batch": 5, "warmup": 0, "lr": 1e-2, "eval_every": 0, "save_every": 0}
    defaults |= {"threads": 1, "quiet": True, "kernels": "fused", "device": "cpu"}
    for name, value in {**defaults, **changes}.items():
        group = next(g for g in vars(made).values() if name in {f.name for f in dataclasses.fields(g)})
        setattr(group, name, value)
    return made


def evaluate(model: torch.nn.Module, whole: bool) -> dict[str, float]:
    tokens, targets = Text().batch(np.array([901, 902]))
    return {"val_loss": model(tokens, targets).item() / int((targets != -100).sum())}


def trainer(case: dict[str, Any], ranks: mesh.Ranks, folder: Path) -> Trainer:
    case = {k: v for k, v in case.items() if k not in ("name", "until", "from")}
    torch.manual_seed(7 + ranks.rank)  # sharding must not need equal weights to begin with
    style = case.pop("style", "gpt2")
    sizes = {"vocab": 64, "layers": 2, "heads": 2, "width": 36, "context": 16, **case.pop("shape", {})}
    shape = named("nano", style, dropout=case.pop("dropout", 0.0), **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config(**case), GPT(shape), Text(), folder, ranks=ranks, evaluate=evaluate)


def everywhere(ranks: mesh.Ranks, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this rank holds, and what only other stages of a pipeline do."""
    return {n: t for other in ranks.gather(held) for n, t in other.items()} | held


def run(case: dict[str, Any], ranks: mesh.Ranks, out: Path) -> dict[str, Any]:
    made = trainer(case, ranks, out / case["name"])
    if "from" in case:
        made.restore(checkpoint.newest(out / case["from"]))
    grads: dict[str, torch.Tensor] = {}
    real = made.optimizer.step

    def step() -> None:
        if not grads:
            grads.update({n: made.layout.whole(n, p.grad.clone()) for n, p in made.layout.params.items()})
        real()

    made.optimizer.step = step  # type: ignore[method-assign]
    one_step = made.train_step

    def train_step() -> None:
        one_step()
        if made.step == case.get("until"):
            made.stop = "signal SIGTERM"

    made.train_step = train_step  # type: ignore[method-assign]
    made.fit()
    made.save()
    made.saver.wait()
    weights = {n: made.layout.whole(n, p.detach()) for n, p in made.layout.params.items()}
    ema = {n: made.layout.whole(n, t) for n, t in made.ema.items()}
    grads, weights, ema = (everywhere(ranks, held) for held in (grads, weights, ema))
    torch.save({"grads": grads, "weights": weights, "ema": ema}, out / f"{case['name']}-{ranks.rank}.pt")
    rows = [json.loads(line) for line in (out / case["name"] / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [r["loss"] for r in rows],
        "norms": [r["grad_norm"] for r in rows],
        "steps": [r["step"] for r in rows],
        "val_losses": [r["val_loss"] for r in rows if "val_loss" in r],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    groups = {case.get("mesh", "") for case in cases}
    assert len(groups) == 1, "one process group has one mesh"
    ranks = mesh.start(groups.pop(), "cpu")
    results = {case["name"]: run(case, ranks, out) for case in cases}
    if ranks.first:
        (out / f"{sys.argv[3]}.json").write_text(json.dumps(results))
    ranks.close()
    mesh.leave(0)
