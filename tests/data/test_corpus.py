"""Corpora, tokenisers, shards and the split."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastlm.data import InputError, Options, Prepared, TokenSource, prepare
from fastlm.data.corpus import documents, expand
from fastlm.data.cutting import cut
from fastlm.data.shards import Column, open_shard
from fastlm.data.tokenizer import BPETokenizer, CharTokenizer, load


def words(seed: int, size: int) -> str:
    draw = random.Random(seed)
    line = lambda: " ".join(draw.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(9)) + "\n"
    return "".join(line() for _ in range(size // 48 + 1))


@pytest.fixture(name="many")
def _many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i}.txt").write_text(words(i, 300))
    return folder


def ready(path: Path, tmp_path: Path, **options: object):
    return prepare((str(path),), Options(**options), cache=tmp_path / "cache")  # type: ignore[arg-type]


PEAK = """
import sys, torch
from pathlib import Path
from fastlm.data import Options, prepare
from fastlm.train.machine import peak_memory
before = peak_memory(torch.device("cpu"))
prepare((sys.argv[1],), Options(workers=1), cache=Path(sys.argv[2]))
print(before, peak_memory(torch.device("cpu")))
"""


@pytest.mark.grid(fast=1)
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_does_not_grow_with_the_corpus(kind: str, tmp_path: Path) -> None:
    """A book cut into blocks, and rows that are documents: four times the text takes the same memory, in one process."""
    text, peaks = words(0, 1 << 17), []
    for size in (16, 64):
        path = tmp_path / f"{size}.{kind}"
        with path.open("w") as file:
            for i in range(size * 8):  # no two parts are the same
                if kind == "txt":
                    file.write(f"{i}\n{text}")
                else:
                    rows = (f"{i} {at} {text[at : at + 2048]}" for at in range(0, len(text), 2048))
                    file.writelines(json.dumps({"text": row}) + "\n" for row in rows)
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        before, peak = map(int, done.stdout.split())
        assert peak > before
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 12 << 20, peaks  # of the 48 MiB that the text has grown by


# --------------------------------------------------------------------------------------------- formats, jobs and workers


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
    monkeypatch.setattr("fastlm.data.cutting.WHOLE", 100_000)
    path = tmp_path / "big.txt"
    path.write_text(words(2, 3_000_000))
    pieces = list(documents(path))
    assert b"".join(p.text for p in pieces) == path.read_bytes()
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(p.text) for p in pieces) < 3 * 65536


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


def test_a_dataset_saved_to_disk_is_read(tmp_path: Path) -> None:
    """The layout of `datasets`' save_to_disk: Arrow streams beside state.json and dataset_info.json."""
    pa = pytest.importorskip("pyarrow")
    texts = [f"row {i}" for i in range(2500)]
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "dataset_info.json").write_text("{}")
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    for name, part in zip(names, (texts[:1000], texts[1000:])):
        table = pa.table({"text": part, "id": list(range(len(part)))})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table, max_chunksize=300)
    for place in (folder, tmp_path / "saved", tmp_path):
        assert [p.text.decode() for f in expand((str(place),)) for p in documents(f)] == texts
    with pytest.raises(InputError, match="column 'body'"):
        list(documents(folder / names[0], "body"))
    with pytest.raises(InputError, match="must hold a text, it is a int"):
        list(documents(folder / names[0], "id"))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="splits train, test: name one"):
        expand((str(tmp_path / "saved"),))
    if importlib.util.find_spec("datasets"):
        from datasets import Dataset

        Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "real"))
        assert [p.text.decode() for f in expand((str(tmp_path / "real"),)) for p in documents(f)] == texts


def test_hidden_binary_and_odd_files_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", ".hidden.txt", ".git/b.txt", "c.bin"):
        (folder / name).write_text(words(1, 20_000))
    assert [f.name for f in expand((str(folder),))] == ["a.txt"]
    (folder / "utf16.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(InputError, match=r"utf16\.txt is no text"):
        ready(folder, tmp_path)
    (folder / "utf16.txt").write_bytes("né".encode("latin-1"))
    assert ready(folder, tmp_path).manifest["undecodable"] == 1
    (tmp_path / "row.jsonl").write_text(json.dumps({"text": "a\0b"}) + "\n")
    with pytest.raises(InputError, match=r"row\.jsonl.*byte 0"):
        ready(tmp_path / "row.jsonl", tmp_path)
    (tmp_path / "row.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(InputError, match=r"row\.jsonl, line 1: the field must hold a text, it is a int"):
        list(documents(tmp_path / "row.jsonl"))
    (tmp_path / "parts.txt").write_text("oneÂ§two§three")
    assert [p.text.decode() for p in documents(tmp_path / "parts.txt", separator="§")] == ["oneÂ", "two", "three"]


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlm.data.cutting.WHOLE", 300_000)
    monkeypatch.setattr("fastlm.data.cutting.JOB", 200_000)


def whole(pieces: list[Any]) -> list[bytes]:
    """Documents put together again; the pieces of each say where it begins and ends, and share its mark."""
    out: list[list[Any]] = []
    for p in pieces:
        assert p.first == (not out or out[-1][-1].last)
        if p.first:
            out.append([])
        out[-1].append(p)
    assert all(len({p.mark for p in d}) == 1 for d in out)
    return [b"".join(p.text for p in d) for d in out]


@pytest.mark.usefixtures("small_jobs")
@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("size", [300_000, 300_001, 331_072, 331_073, 400_000, 531_072, 531_073, 1_200_001])
def test_long_documents_are_cut_alike_plain_and_compressed(tmp_path: Path, lines: bool, size: int) -> None:
    text = (words(3, size) if lines else "".join(chr(0x3B1 + i % 20) for i in range(size))).encode()[:size]
    if not lines and size % 2:
        text = text[:-1] + b"."
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text, 1))
    plain, packed = list(documents(tmp_path / "a.txt")), list(documents(tmp_path / "b.txt.gz"))
    assert plain == packed
    assert whole(plain) == [text]
    for p in plain[:-1]:
        p.text.decode()  # no character is cut
    (tmp_path / "c.txt").write_bytes(text + b"|" + text[:500] + b"|" + text)
    assert whole(list(documents(tmp_path / "c.txt", separator="|"))) == [text, text[:500], text]


@pytest.mark.usefixtures("small_jobs")
@pytest.mark.parametrize("size", [199_990, 200_000, 200_010, 66_666])
def test_rows_at_the_borders_of_jobs_are_read_once(tmp_path: Path, size: int) -> None:
    rows, at, i = [], 0, 0
    while at < 900_000:
        line = json.dumps(
            {"text": f"{i}" + "x" * ((size - at % size - 20) if i % 7 == 3 and at % size < size - 20 else i % 50)}
        )
        rows.append(line)
        at, i = at + len(line) + 1, i + 1
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows) + "\n")
    assert [p.text.decode() for p in documents(path)] == [json.loads(r)["text"] for r in rows]
    rows[len(rows) // 2] = "{"
    path.write_text("\n".join(rows))
    with pytest.raises(InputError, match=f"line {len(rows) // 2 + 1}: not a JSON"):
        list(documents(path))


def test_workers_write_the_same_bytes_in_any_number(tmp_path: Path) -> None:
    """Real spawned processes over several jobs, a long document, rows and a compressed file."""
    pytest.importorskip("tokenizers")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/long.txt").write_text(words(1, 9_000_000))
    (tmp_path / "c/rows.jsonl").write_text("".join(json.dumps({"text": words(i, 400)}) + "\n" for i in range(500)))
    (tmp_path / "c/packed.txt.gz").write_bytes(gzip.compress(words(7, 200_000).encode(), 1))
    made = BPETokenizer.train(iter([words(0, 5000).encode()]), 300)
    data = [
        prepare((str(tmp_path / "c"),), Options(workers=n, pack=64), tokenizer=made, cache=tmp_path / f"cache{n}")
        for n in (1, 2)
    ]
    first, second = (sorted(d.folder.glob("*.tok")) for d in data)
    assert [f.name for f in first] == [f.name for f in second]
    assert len(first) == 6
    for a, b in zip(first, second):
        assert a.read_bytes() == b.read_bytes()
    assert data[0].content == data[1].content
    (tmp_path / "c/bad.jsonl").write_text('{"no": 1}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 1"):
        prepare((str(tmp_path / "c"),), Options(workers=2), tokenizer=made, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache/corpora").glob("*/manifest.json"))


# -------------------------------------------------------------------------------------------------- shards and the split


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


def test_large_corpora_fill_several_shards(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ready(many, tmp_path)
    monkeypatch.setattr("fastlm.data.shards.SHARD_TOKENS", 10_000)
    data = prepare((str(many),), Options(), cache=tmp_path / "cache2")
    assert len(data.train) > 5
    assert max(map(len, data.train)) == 10_000
    assert b"".join(map(bytes, data.train)) == b"".join(map(bytes, one.train))
    column = Column(data.train)
    n = np.random.default_rng(0).integers(len(column), size=999)
    assert np.array_equal(column.take(n), np.concatenate(data.train)[n])
    (data.folder / data.manifest["train"]["files"][3]).unlink()
    with pytest.raises(InputError, match=r"train-00003\.tok"):
        Prepared(data.folder)


def test_a_large_shard_is_hashed_again_only_when_it_changed(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ready(many, tmp_path)
    module = sys.modules["fastlm.data.prepare"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "ALWAYS_HASHED", 0)
    read = []
    real = open_shard
    monkeypatch.setattr(module, "open_shard", lambda p, t, verify: read.append(verify) or real(p, t, verify))
    Prepared(data.folder)
    assert read == [False, False]
    shard = data.folder / data.manifest["train"]["files"][0]
    raw = bytearray(shard.read_bytes())
    raw[700] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(InputError, match="altered"):
        Prepared(data.folder)


def test_one_document_above_a_twentieth_is_split_by_blocks(many: Path, tmp_path: Path) -> None:
    assert ready(many, tmp_path).manifest["split"] == "documents"
    total = sum(f.stat().st_size for f in many.iterdir())
    (many / "big.txt").write_text("x" * (total // 18))  # with it, 1/19 of all
    assert "blocks" in ready(many, tmp_path).manifest["split"]
    (many / "big.txt").write_text("x" * (total // 20))  # 1/21
    assert ready(many, tmp_path).manifest["split"] == "documents"
    for i in range(101):
        (many / f"{i}.txt").unlink()
    (many / "big.txt").unlink()
    assert "blocks" in ready(many, tmp_path).manifest["split"]  # 199


def test_copies_in_few_documents_fall_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(40):
        for copy in "ab":
            (folder / f"{i}{copy}.txt").write_text(words(i, 3000))
    data = ready(folder, tmp_path, val_fraction=0.3)
    assert "blocks" in data.manifest["split"]
    held = [t for t in data.text("val").split(b"\0") if t]
    assert held
    assert not set(held) & set(data.text("train").split(b"\0"))


def test_an_empty_side_is_an_error(many: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="validation side of the split is empty"):
        ready(many, tmp_path, val_fraction=1e-9)
    (tmp_path / "line.txt").write_text("one line")
    with pytest.raises(InputError, match="side of the split is empty"):
        ready(tmp_path / "line.txt", tmp_path)


def test_a_killed_preparation_leaves_nothing_behind(many: Path, tmp_path: Path) -> None:
    folder = ready(many, tmp_path).folder
    draft = folder.with_name(f".draft-{folder.name}")
    folder.rename(draft)
    (draft / "train-00000.tok").write_bytes(b"half")
    assert ready(many, tmp_path).text("val")
    assert not draft.exists()


# ------------------------------------------------------------------------------------------------------------ tokenisers


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


def test_tokenizers_at_their_edges(tmp_path: Path) -> None:
    chars = CharTokenizer.train(iter([b"abc"]))
    assert chars.decode(chars.encode(b"axb")).decode() == "a\ufffdb"  # x was not in the training text
    lib = pytest.importorskip("tokenizers")
    with pytest.raises(InputError, match="--vocab must be at least 257"):
        BPETokenizer.train(iter([b"abc"]), 100)
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        BPETokenizer("{}")
    bare = lib.Tokenizer(lib.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    with pytest.raises(InputError, match="none of the end-of-text tokens"):
        BPETokenizer(bare.to_str())
    bare.add_special_tokens(["</s>"])
    bare.pre_tokenizer = lib.pre_tokenizers.Whitespace()
    bare.enable_truncation(2)
    own = BPETokenizer(bare.to_str())
    assert (own.eot, own.vocab) == (2, 3)
    assert own.encode(b"a b a a").tolist() == [0, 1, 0, 0]  # the file's truncation is not ours
    twice = [BPETokenizer.train(iter([words(1, 5000).encode()]), 300).hash for _ in range(2)]
    assert twice[0] == twice[1]
