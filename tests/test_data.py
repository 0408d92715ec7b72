"""Corpora, split, shards, tokenisers, addressing of samples and loading ahead."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fastlm.data import DatasetSource, InputError, Options, Prefetch, TokenSource, prepare, validation_batches
from fastlm.data.baselines import ngram_bits
from fastlm.data.corpus import cut, documents, expand
from fastlm.data.sample import Windows, mixture, permute
from fastlm.data.shards import open_shard
from fastlm.data.tokenizer import BPETokenizer, CharTokenizer, load


def words(seed: int, size: int) -> str:
    draw = random.Random(seed)
    line = lambda: " ".join(draw.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(9)) + "\n"
    return "".join(line() for _ in range(size // 48 + 1))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i}.txt").write_text(words(i, 300))
    return folder


def ready(path: Path, tmp_path: Path, **options: object):
    return prepare((str(path),), Options(**options), cache=tmp_path / "cache")  # type: ignore[arg-type]


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


def test_split_stays_when_documents_are_added(many: Path, tmp_path: Path) -> None:
    before = ready(many, tmp_path).text("val").split(b"\0")
    for i in range(300, 400):
        (many / f"{i}.txt").write_text(words(i, 300))
    after = ready(many, tmp_path).text("val").split(b"\0")
    assert set(before) <= set(after)
    assert len(after) > len(before)


def test_copies_fall_on_one_side(many: Path, tmp_path: Path) -> None:
    for i in range(300):
        (many / f"copy{i}.txt").write_text(words(i, 300))
    data = ready(many, tmp_path)
    assert not set(data.text("val").split(b"\0")[:-1]) & set(data.text("train").split(b"\0"))


def test_one_book_is_split_by_blocks_at_line_ends(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(words(1, 400_000))
    data = ready(book, tmp_path)
    assert data.manifest["val"]["bytes"] > 0
    assert data.manifest["train"]["bytes"] + data.manifest["val"]["bytes"] == book.stat().st_size
    assert all(b.endswith(b"\n") for b in cut(book.read_bytes()))
    assert b"".join(cut(book.read_bytes())) == book.read_bytes()


def test_same_text_same_bytes_and_a_second_time_at_once(many: Path, tmp_path: Path) -> None:
    first = ready(many, tmp_path)
    other = prepare((str(many),), Options(), cache=tmp_path / "cache2")
    for a, b in zip(sorted(first.folder.glob("*.tok")), sorted(other.folder.glob("*.tok"))):
        assert a.read_bytes() == b.read_bytes()
    stamp = first.folder.stat().st_mtime_ns
    assert ready(many, tmp_path).folder.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("harm", ["cut", "flip", "header"])
def test_a_damaged_shard_is_refused_by_name(many: Path, tmp_path: Path, harm: str) -> None:
    shard = next(ready(many, tmp_path).folder.glob("train*.tok"))
    raw = bytearray(shard.read_bytes())
    if harm == "cut":
        raw = raw[:-1]
    else:
        raw[600 if harm == "flip" else 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(InputError, match=r"train-00000\.tok"):
        open_shard(shard)


def test_formats_give_the_same_documents(tmp_path: Path) -> None:
    texts = ["one\nline", "zwei", "trois"]
    rows = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("one\nline--zwei--trois")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert [p.text.decode() for p in documents(tmp_path / name)] == texts
    assert [p.text.decode() for p in documents(tmp_path / "e.txt", separator="--")] == texts
    with pytest.raises(InputError, match="column 'body'"):
        list(documents(tmp_path / "d.parquet", "body"))
    with pytest.raises(InputError, match="line 1"):
        list(documents(tmp_path / "a.jsonl", "body"))


def test_a_large_file_streams_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlm.data.corpus.WHOLE", 100_000)
    path = tmp_path / "big.txt"
    path.write_text(words(2, 3_000_000))
    pieces = list(documents(path))
    assert b"".join(p.text for p in pieces) == path.read_bytes()
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(p.text) for p in pieces) < 3 * 65536


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_tokenizers_give_the_text_back(tmp_path: Path, kind: str) -> None:
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    text = "naïve café — 数学 🙂\n\tdef f(x): return x\n" * 3
    made = (
        CharTokenizer.train(iter([text.encode()]))
        if kind == "chars"
        else BPETokenizer.train(iter([text.encode()]), 300)
    )
    again = load(json.loads(json.dumps(made.spec())))
    assert again.hash == made.hash
    assert again.decode(made.encode(text.encode())).decode() == text
    assert made.encode(text.encode()).max() < made.vocab


def test_bpe_through_preparation(many: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    data = ready(many, tmp_path, tokenizer="bpe", vocab=300)
    assert data.tokenizer.vocab <= 300
    assert data.text("train").count(b"alpha") > 100


def test_bad_corpora_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "none").mkdir()
    for name, message in (
        ("missing.txt", "does not exist"),
        ("empty.txt", "empty"),
        ("none", "no file"),
        ("*.x", "matches"),
    ):
        with pytest.raises(InputError, match=message):
            prepare((str(tmp_path / name),), cache=tmp_path / "cache")
    (tmp_path / "bad.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match=r"bad\.txt\.gz"):
        prepare((str(tmp_path / "bad.txt.gz"),), cache=tmp_path / "cache")
    (tmp_path / "short.txt").write_text(words(1, 3000))
    with pytest.raises(InputError, match="shorter than one context"):
        TokenSource([prepare((str(tmp_path / "short.txt"),), cache=tmp_path / "cache")], 100_000, 1)


def test_the_default_corpus_is_python() -> None:
    files = expand(())
    assert len(files) > 300
    assert not [f for f in files if "test" in f.parts or "encodings" in f.parts or f.suffix != ".py"]


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
