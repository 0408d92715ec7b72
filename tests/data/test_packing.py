"""Documents packed into contexts: every token once, nothing seen across a border, and the trainer on top of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fastlm
import numpy as np
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch
from fastlm.data import InputError, Options, Prepared, TokenSource, corpus_batches, prepare
from fastlm.data.pack import BUFFER, Packer, best_fit
from fastlm.models.gpt import GPT, STYLES, named
from fastlm.train import Config, job
from fastlm.train.files import read_metrics

CONTEXT = 32


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))


def rows(path: Path, seed: int, count: int = 400) -> tuple[Path, list[bytes]]:
    """A .jsonl of documents, each with letters of its own order; some longer than a context."""
    draw = np.random.default_rng(seed)
    texts = [bytes(draw.integers(97, 123, draw.integers(1, 90)).tolist()) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": t.decode()}) + "\n" for t in texts))
    return path, texts


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Prepared, list[bytes]]:
    path, texts = rows(tmp_path / "a.jsonl", 0)
    return prepare((str(path),), Options(pack=CONTEXT)), texts


def spans(batch: tuple[Any, ...]) -> list[tuple[bytes, bytes]]:
    """(inputs, targets) of each document in a batch, without what pads a row."""
    found = []
    for inputs, targets, documents in zip(*map(np.asarray, batch)):
        for number in np.unique(documents):
            here = documents == number
            if (targets[here] >= 0).all():
                found.append((bytes(inputs[here].tolist()), bytes(targets[here].tolist())))
            else:
                assert (targets[here] == -100).all()
    return found


@pytest.mark.parametrize("lengths", [[5] * 9, [10, 1, 9, 2, 8, 3], [1], [], list(range(1, 11)) * 7])
def test_best_fit_places_each_once_and_fits(lengths: list[int]) -> None:
    packed = best_fit(lengths, 10)
    assert sorted(i for row in packed for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 10 for row in packed)
    lefts = [10 - sum(lengths[i] for i in row) for row in packed]
    assert sum(left >= min(lengths, default=0) for left in lefts) <= 1  # else one more would have gone there


def test_every_token_of_every_document_is_a_target_once_an_epoch(corpus: tuple[Prepared, list[bytes]]) -> None:
    data, texts = corpus
    source = TokenSource([data], CONTEXT, seed=1)
    size = source.parts[0].size
    sides = {"train": data.train, "val": data.val}
    whole = {side: b"".join(bytes(s) for s in shards) for side, shards in sides.items()}
    assert sorted(whole["train"].split(b"\0")[:-1] + whole["val"].split(b"\0")[:-1]) == sorted(texts)
    for epoch in range(2):
        order = np.arange(epoch * size, (epoch + 1) * size)
        found = spans(source.batch(order))
        assert sum(len(t) for _, t in found) == len(whole["train"])
        # put together again: a span that opens a document reads the end mark first, one that goes on reads what was before
        assert all(i[1:] == t[:-1] for i, t in found)
        assert sorted(t for i, t in found if i[0] == 0) == sorted(
            (d + b"\0")[:CONTEXT] for d in whole["train"].split(b"\0")[:-1]
        )
        later = [t for i, t in found if i[0] != 0]
        parts = [
            (d + b"\0")[at : at + CONTEXT]
            for d in whole["train"].split(b"\0")[:-1]
            for at in range(CONTEXT, len(d) + 1, CONTEXT)
        ]
        assert sorted(later) == sorted(parts)
    first, second = source.batch(np.arange(size)), source.batch(np.arange(size, 2 * size))
    assert not torch.equal(first[0], second[0])  # another order


def test_sample_n_of_packed_data_is_a_function_of_n_alone(corpus: tuple[Prepared, list[bytes]], tmp_path: Path) -> None:
    other = prepare((str(rows(tmp_path / "b.jsonl", 5)[0]),), Options(pack=CONTEXT))
    source = TokenSource([corpus[0], other], CONTEXT, seed=3, weights=[3, 1])
    n = np.arange(2048)
    whole = source.batch(n)
    order = np.random.default_rng(0).permutation(len(n))
    for a, b in zip(source.batch(n[order]), whole):
        assert torch.equal(a, b[order])
    for start in (0, 1000):
        for a, b in zip(source.batch(n[start : start + 7]), whole):
            assert torch.equal(a, b[start : start + 7])
    again = TokenSource([Prepared(corpus[0].folder), other], CONTEXT, seed=3, weights=[3, 1])
    assert again.content == source.content
    assert all(torch.equal(a, b) for a, b in zip(again.batch(n), whole))


def test_packing_and_context_are_fixed_when_shards_are_written(
    corpus: tuple[Prepared, list[bytes]], tmp_path: Path
) -> None:
    data = corpus[0]
    with pytest.raises(InputError, match="contexts of 32"):
        TokenSource([data], 64, 1)
    files = (str(tmp_path / "a.jsonl"),)
    contents = {prepare(files, Options(pack=pack)).content for pack in (0, CONTEXT, 64)}
    assert len(contents) == 3
    assert data.content in contents
    index = data.folder / data.manifest["train"]["spans"][0]
    raw = bytearray(index.read_bytes())
    raw[-1] ^= 1
    index.write_bytes(raw)
    with pytest.raises(InputError, match=index.name):
        Prepared(data.folder)


def test_the_index_is_written_in_bounded_memory(tmp_path: Path) -> None:
    packer = Packer(tmp_path, "train", 8, "x")
    held = 0
    for _ in range(BUFFER + 10):
        packer.add(3, begins=True)
        held = max(held, len(packer._waiting))
    packer.close()
    assert held < BUFFER
    assert packer.rows == BUFFER // 2 + 5


def test_evaluation_is_packed_and_takes_every_token_once(corpus: tuple[Prepared, list[bytes]]) -> None:
    data = corpus[0]
    found = [span for batch in corpus_batches(data, CONTEXT, 5) for span in spans(batch)]
    assert sum(len(t) for _, t in found) == data.manifest["val"]["tokens"]
    some = sum(int((t >= 0).sum()) for _, t, _ in corpus_batches(data, CONTEXT, 5, limit=200))
    assert 100 < some < 400


def test_blocks_of_a_book_are_documents_of_their_own(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    draw = np.random.default_rng(0)
    lines = ["".join(chr(c) for c in draw.integers(97, 123, 30)) + "\n" for _ in range(4000)]
    book.write_text("".join(lines))
    data = prepare((str(book),), Options(pack=CONTEXT))
    found = spans(TokenSource([data], CONTEXT, 1).batch(np.arange(data.manifest["train"]["contexts"])))
    text = book.read_bytes() + b"\0"
    assert all(t in text for _, t in found)  # no span runs over what validation took out
    assert sum(len(t) for _, t in found) == data.manifest["train"]["tokens"]


# -------------------------------------------------------------------------------------------------- losses and gradients


def model_of(style: str, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(0)
    model = GPT(named("nano", style, layers=2, width=32, heads=4, kv_heads=2, context=CONTEXT)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # a new model hardly attends: its weights must matter
    return model


def one_by_one(model: GPT, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for inputs, targets in spans(batch):
        total = total + model(torch.tensor([list(inputs)]), torch.tensor([list(targets)]))
    return total


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("style", STYLES)
def test_a_packed_batch_is_its_documents_one_by_one(
    corpus: tuple[Prepared, list[bytes]], style: str, kernels: str
) -> None:
    """Loss and every gradient, in float64 (but for the sum of the loss and RMSNorm's row statistics)."""
    batch = TokenSource([corpus[0]], CONTEXT, 1).batch(np.arange(6))
    model = model_of(style)
    if kernels == "fused":
        fastlm.swap(model)
    packed, apart = model(*batch), one_by_one(model, batch)
    torch.testing.assert_close(packed.double(), apart, rtol=1e-6, atol=0.0)  # the loss is summed in float32
    for a, b in zip(
        torch.autograd.grad(packed, list(model.parameters())), torch.autograd.grad(apart, list(model.parameters()))
    ):
        assert (a - b).norm() <= 1e-6 * b.norm()
    crossing = model(*batch[:2])  # the same rows without borders are something else
    assert abs(float(crossing.detach()) - float(apart.detach())) > 5e-5 * float(apart.detach())


@pytest.mark.parametrize("style", STYLES)
def test_fused_kernels_keep_documents_apart(corpus: tuple[Prepared, list[bytes]], style: str) -> None:
    """Logits at the packed places by fused kernels are as near to the documents' own in float64 as PyTorch's."""
    source = TokenSource([corpus[0]], CONTEXT, 1)

    def draw(generator: torch.Generator) -> dict[str, Result]:
        ids = torch.randint(source.parts[0].size, (4,), generator=generator).numpy()
        inputs, _, documents = source.batch(ids)
        plain, fused, exact = model_of(style, torch.float32), model_of(style, torch.float32), model_of(style)
        fastlm.swap(fused)
        with torch.no_grad():
            truth = exact(inputs, None, documents)
            alone = [exact(inputs[r, here][None])[0] for r, here in (
                (r, documents[r] == d) for r in range(4) for d in documents[r].unique())]  # fmt: skip
            assert (torch.cat(alone) - truth.reshape(-1, truth.shape[-1])).abs().max() < 1e-9
            return {"logits": Result(fused(inputs, None, documents), plain(inputs, None, documents), truth)}

    assert_as_exact_as_torch(draw, seed=1)


def test_documents_do_not_go_with_a_cache() -> None:
    from fastlm.models.gpt import Cache

    model, tokens = model_of("llama"), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="documents and cache"):
        model(tokens, None, tokens, cache=Cache(2, 8))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_recomputation_keeps_the_borders(corpus: tuple[Prepared, list[bytes]], recompute: str) -> None:
    batch = TokenSource([corpus[0]], CONTEXT, 1).batch(np.arange(4))
    model = model_of("gpt2")
    model.recompute = recompute
    grads = torch.autograd.grad(model(*batch), list(model.parameters()))
    for a, b in zip(grads, torch.autograd.grad(one_by_one(model, batch), list(model.parameters()))):
        assert (a - b).norm() <= 1e-6 * b.norm()


# ----------------------------------------------------------------------------------------------------------- the trainer


def tiny(**changes: Any) -> Config:
    config = Config()
    defaults = {"layers": 2, "heads": 2, "width": 32, "context": CONTEXT, "steps": 12, "batch": 4, "warmup": 2}
    defaults |= {"eval_every": 4, "save_every": 0, "eval_tokens": 512, "sample": 8, "quiet": True, "threads": 1}
    for name, value in {**defaults, "packing": "documents", **changes}.items():
        group = next(g for g in vars(config).values() if name in {f.name for f in dataclasses.fields(g)})
        setattr(group, name, value)
    return config


class StopAt:
    def __init__(self, step: int) -> None:
        self.at = step

    def start(self, trainer: Any) -> None: ...

    def end(self, trainer: Any) -> None: ...

    def step(self, trainer: Any, row: dict[str, Any]) -> None:
        if row["step"] == self.at:
            trainer.stop = "test"


@pytest.mark.parametrize("kernels", ["fused", "torch"])
def test_a_packed_mixture_resumes_bit_for_bit(tmp_path: Path, kernels: str) -> None:
    files = tuple(str(rows(tmp_path / f"{i}.jsonl", i)[0]) for i in range(2))
    same = {"kernels": kernels, "weights": (2.0, 1.0), "dropout": 0.1, "micro": 2}
    whole = job.start(tiny(name="whole", **same), files)
    whole.trainer.fit()
    half = job.start(tiny(name="half", save_every=6, **same), files)
    half.trainer.callbacks.append(StopAt(6))
    half.trainer.fit()
    again = job.resume(half.folder, tiny(name="half", **same), files, other_data=False, say=str)
    again.trainer.fit()
    lines = [[(r["step"], r["loss"], r.get("val_loss")) for r in read_metrics(j.folder)] for j in (whole, half)]
    assert lines[0] == lines[1]
    with pytest.raises(InputError, match="not these"):
        job.resume(half.folder, tiny(name="half", **{**same, "packing": "blocks"}), files, other_data=False, say=str)
