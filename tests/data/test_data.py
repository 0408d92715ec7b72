"""Addressing of samples, loading ahead, what a run reads, and `fastlm data`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastlm.cli.main import main as cli
from fastlm.data import DatasetSource, InputError, Options, Prefetch, TokenSource, prepare, validation_batches
from fastlm.data.baselines import ngram_bits
from fastlm.data.sample import Windows, mixture, permute
from fastlm.train import Config, job, parallel
from fastlm.train.callbacks import Callback
from fastlm.train.files import read_metrics
from test_corpus import _many, ready, words  # noqa: F401


def test_permutation_reaches_every_place_once() -> None:
    for size in (1, 2, 3, 5, 64, 1000, 4097):
        assert sorted(permute(np.arange(size), size, 7)) == list(range(size))
    a, b = permute(np.arange(4096), 4096, 1), permute(np.arange(4096), 4096, 2)
    assert (a == b).mean() < 0.01
    assert abs(np.corrcoef(a, np.arange(4096))[0, 1]) < 0.06


def test_sample_n_is_a_function_of_n_alone() -> None:
    windows = Windows([np.arange(1000), np.arange(5000, 5777)], 16, seed=3, name="x")
    n = np.arange(3 * windows.size)
    whole = windows.tokens(n)
    order = np.random.default_rng(0).permutation(len(n))
    assert np.array_equal(windows.tokens(n[order]), whole[order])
    assert np.array_equal(np.concatenate([windows.tokens(n[i : i + 7]) for i in range(0, len(n), 7)]), whole)
    assert (np.diff(whole, axis=1) == 1).all()  # each is a run of the text, across no shard's end
    for epoch in range(3):
        starts = whole[epoch * windows.size : (epoch + 1) * windows.size, 0]
        assert len(set(starts)) == windows.size
    assert set(whole[: windows.size, 0]) != set(whole[windows.size : 2 * windows.size, 0])  # another phase


def test_mixture_holds_its_weights_in_every_round() -> None:
    source, number = mixture(np.arange(4096), [3, 1], seed=5)
    for r in range(4):
        assert np.bincount(source[r * 1024 : (r + 1) * 1024]).tolist() == [768, 256]
    for s in (0, 1):
        assert sorted(number[source == s]) == list(range((source == s).sum()))


def test_validation_predicts_every_token_once() -> None:
    shard = np.arange(1003)
    seen = torch.cat([t[t >= 0] for _, t in validation_batches([shard], 16, 5)])
    assert torch.equal(seen, torch.arange(1, 1003))
    some = sum(int((t >= 0).sum()) for _, t in validation_batches([shard], 16, 5, limit=200))
    assert 150 < some < 260


def test_prefetch_hands_on_errors_and_stops() -> None:
    class Bad:
        content = "bad"

        def batch(self, ids: np.ndarray):
            if ids[0] == 2:
                raise InputError("third")
            return (torch.from_numpy(ids),)

    load = Prefetch(Bad(), iter([np.array([i]) for i in range(5)]))
    assert [int(next(load)[1][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(InputError, match="third"):
        next(load)
    endless = Prefetch(DatasetSource([torch.tensor(1.0)] * 5, 1), (np.arange(3) for _ in iter(int, 1)))
    next(endless)
    endless.close()


def test_datasets_visit_each_item_once_an_epoch() -> None:
    source = DatasetSource(torch.arange(10), 3)
    for epoch in range(2):
        assert sorted(source.batch(np.arange(epoch * 10, epoch * 10 + 10))[0].tolist()) == list(range(10))


def test_ngrams_by_hand() -> None:
    """Bigram by Witten and Bell on 'abab': seen 'ab' twice after 'a', nothing else; P1(b) = (2 + 2/256) / 6."""
    p1 = lambda n: (n + 2 / 256) / 6
    expected = -(np.log2(p1(2)) + np.log2((2 + 1 * p1(2)) / 3)) / 2
    assert ngram_bits(b"abab", b"ab", (2,))[2] == pytest.approx(expected)
    assert ngram_bits(bytes(range(256)) * 40, bytes(range(256)), (1,))[1] == pytest.approx(8.0)


# ------------------------------------------------------------------------------------------------------ what a run reads


def config(**changes: Any) -> Config:
    made = Config()
    for name, value in {
        "layers": 1, "heads": 2, "width": 16, "context": 16, "steps": 8, "batch": 4, "warmup": 2, "kernels": "torch",
        "eval_every": 4, "save_every": 0, "eval_tokens": 256, "sample": 4, "quiet": True, "threads": 1, **changes,
    }.items():  # fmt: skip
        group = next(g for g in vars(made).values() if hasattr(g, name))
        setattr(group, name, value)
    return made


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_further_validation_sets_are_evaluated_whole(many: Path, place: Path) -> None:
    other = place / "other.txt"
    other.write_text("zzz qqq " * 400)
    made = job.start(config(name="a", val=(f"odd={other}", f"same={many}")), (str(many),))
    assert made.named["odd"].manifest["val"]["bytes"] == other.stat().st_size
    made.trainer.fit()
    rows = [r for r in read_metrics(made.folder) if "val_loss" in r]
    assert [r["step"] for r in rows] == [4, 8]
    assert all(r["val_odd_loss"] > r["val_same_loss"] for r in rows)
    assert made.trainer.best["val_loss"] == min(r["val_loss"] for r in rows)
    assert job.read_config(made.folder)[0].data.val[0] == f"odd={other}"
    for bad in ("odd", "=x", "a b=x", "odd="):
        with pytest.raises(InputError, match="--val takes NAME=PATH"):
            job.start(config(name="b", val=(bad,)), (str(many),))


def test_mixed_corpora_share_a_tokenizer_learnt_on_both(place: Path) -> None:
    (place / "a.txt").write_text("abc " * 5000)
    (place / "b.txt").write_text("xyz " * 5000)
    made = job.start(config(name="a", tokenizer="chars", weights=(1.0, 1.0)), ("a.txt", "b.txt"))
    assert made.data[0].tokenizer.hash == made.data[1].tokenizer.hash
    assert made.data[0].tokenizer.vocab == 2 + len("abcxyz ")


class Ranks(parallel.Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.data_rank, self.size_of_data = rank, size


def test_a_run_reads_the_same_samples_on_any_ranks_micro_batches_and_ramp(many: Path, place: Path) -> None:
    made = job.start(config(name="a", steps=20, batch=16), (str(many),))
    trainer = made.trainer
    for ramp in (0, 10):
        for ranks in (1, 2, 3):
            for micro in (0, 1, 3):
                trainer.config.optim.ramp, trainer.config.optim.micro = ramp, micro
                read = []
                for rank in range(ranks):
                    trainer.ranks = Ranks(rank, ranks)
                    read += [n for ids in trainer.plan(0, 0) for n in ids.tolist()]
                assert sorted(read) == list(range(len(read)))
                trainer.ranks = Ranks(0, ranks)
                assert len(read) == sum(trainer.batch_size(step) for step in range(20))


def test_skipped_samples_stay_skipped_after_a_resume(many: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spike at one batch rolls back; what is read after the roll-back, and after a resume, begins behind it."""
    read: list[int] = []
    real = TokenSource.batch

    def batch(self: TokenSource, ids: np.ndarray):
        read.extend(ids.tolist())
        return real(self, ids)

    monkeypatch.setattr(TokenSource, "batch", batch)
    same = {"steps": 16, "save_every": 4, "eval_every": 0, "spike": 3.0}
    made = job.start(config(name="a", **same), (str(many),))
    judged = made.trainer.guard.judge
    bad = iter([1])

    def judge(step: int, loss: float, found: bool, can_roll_back: bool) -> Any:
        return judged(step, loss * (100 if step == 7 and next(bad, 0) else 1), found, can_roll_back)

    made.trainer.guard.judge = judge  # type: ignore[method-assign]

    class Stop(Callback):
        def step(self, trainer: Any, row: dict[str, Any]) -> None:
            if row["step"] == 12 and trainer.skipped:
                trainer.stop = "test"

    made.trainer.callbacks.append(Stop())
    made.trainer.fit()
    assert made.trainer.skipped == [(16, 28)]  # back to step 4 (16 samples), the spike was at step 7 (28 samples)
    assert made.trainer.consumed == 28 + 8 * 4
    read.clear()
    again = job.resume(made.folder, config(name="a", **same), (str(many),), other_data=False, say=str)
    assert again.trainer.skipped == [(16, 28)]
    again.trainer.fit()
    assert sorted(read) == list(range(60, 60 + 4 * 4))


def test_data_commands_prepare_and_show(
    many: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(["data", "prepare", str(many), "--packing", "documents", "--context", "64"]) == 0
    said = capsys.readouterr().out
    for part in ("300 documents", "split by documents", "contexts of 64", "MB/s", str(place / "cache")):
        assert part in said
    assert cli(["data", "show", "5", str(many), "--packing", "documents", "--context", "64"]) == 0
    said = capsys.readouterr().out
    data = prepare((str(many),), Options(pack=64), cache=place / "cache")
    _, targets, _ = TokenSource([data], 64, 1).batch(np.array([5]))
    shown = bytes(targets[targets > 0].tolist()).decode()
    assert "".join(shown.split()) in "".join(re.sub(r"(?m)^(---|sample 5:).*$", "", said).split())
    assert "end of document" in said or "goes on" in said
    assert cli(["data", "show", "-1", str(many)]) == 2
    assert "must be at least 0" in capsys.readouterr().err
    assert cli(["data"]) == 2
