"""Evaluation: spread over ranks without changing the number, and `fastlm eval` as the run itself measures."""

from __future__ import annotations

import contextlib
import json
import math
import random
from pathlib import Path

import pytest
import torch
from fastlm.cli import main as cli
from fastlm.train import job, mesh
from fastlm.train.files import read_metrics
from test_train import _own_place, book, tiny  # noqa: F401


class Share(mesh.Ranks):
    """One of several ranks that evaluate; `told` holds what each has found so far, and sums are over all of them."""

    def __init__(self, rank: int, size: int, told: list[torch.Tensor]) -> None:
        self.rank = self.data_rank = rank
        self.size = self.size_of_data = size
        self.told = told

    def sum(self, t: torch.Tensor) -> torch.Tensor:
        self.told.append(t)
        return torch.stack(self.told).sum(0)


@pytest.mark.parametrize("size", [2, 3, 64])
def test_batches_spread_over_ranks_give_the_loss_of_one_process_to_the_bit(book: str, size: int) -> None:  # noqa: F811
    config = tiny(name="run", context=32, kernels="fused", val_fraction=0.4, batch=8)
    made = job.start(config, (book,))
    model = made.model.eval()
    count, calls = 0, []

    def counted(*batch: torch.Tensor) -> torch.Tensor:
        calls[-1] += 1
        return model(*batch)

    with torch.no_grad():
        one = job.validation(made.data, config, 32, torch.device("cpu"))(model, True)
        told: list[torch.Tensor] = []
        for rank in range(size):
            calls.append(0)
            ranks = Share(rank, size, told)
            shared = job.validation(made.data, config, 32, torch.device("cpu"), None, ranks)(counted, True)
    assert shared == one  # what the last rank found, when it had heard all others
    count = len(told[0])
    assert count > 2
    assert set(calls) == {-(-count // size)}  # as many forwards on each: a cut model's ranks wait for each other
    assert int((torch.stack(told) != 0).sum()) == count  # each batch on one rank


def rows(path: Path) -> str:
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta"]
    texts = [" ".join(draw.choice(words) for _ in range(draw.randint(1, 12))) for _ in range(600)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_eval_measures_what_the_run_measured(packing: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = rows(Path("a.jsonl"))
    made = job.start(tiny(name="run", packing=packing, lr=1e-2, eval_every=4, context=32), (corpus,))
    why = made.trainer.fit()
    result = made.finish(why, str)
    assert result.val["step"] == made.trainer.best["step"]  # eval takes the best weights
    capsys.readouterr()
    assert cli.main(["eval", "run", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == result.val["val_tokens"]
    assert found["loss"] == pytest.approx(result.val["val_loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(result.val["val_bpb"], rel=1e-5)


def test_eval_of_a_packed_run_keeps_the_documents_of_a_text_apart(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = rows(Path("a.jsonl"))
    made = job.start(tiny(name="run", packing="documents", lr=1e-2, context=32, steps=30), (corpus,))
    made.trainer.fit()
    texts = ["beta gamma", "delta", "alpha beta gamma delta " * 4]
    Path("b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert cli.main(["eval", "run", "b.jsonl", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, total, tokens = made.model.eval(), 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = [0, *text.encode(), 0]  # read from an end mark on, its own end included
            for at in range(0, len(ids) - 1, 32):
                part = torch.tensor(ids[at : at + 33])
                total += float(model(part[None, :-1], part[None, 1:]))
                tokens += len(part) - 1
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / sum(map(len, texts)) / math.log(2), rel=1e-5)


def test_casts_that_an_open_autocast_keeps_are_not_what_a_run_computes_with(book: str) -> None:  # noqa: F811
    """Within an outer autocast PyTorch keeps the casts of the first step's weights: each step is to make its own."""
    losses = []
    for outer in (False, True):
        made = job.start(tiny(name=f"run{outer}", dtype="bfloat16", lr=1e-2, steps=4), (book,))
        with torch.autocast("cpu", dtype=torch.bfloat16) if outer else contextlib.nullcontext():
            made.run(str)
        losses.append([row["loss"] for row in read_metrics(made.folder)] + [made.trainer.latest["val_loss"]])
    assert losses[0] == losses[1]
