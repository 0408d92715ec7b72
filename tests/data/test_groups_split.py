"""Copies stay together: a row's group decides its side, so no copy of a held-out document is trained on."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
from fastlm.cli.main import main as cli
from fastlm.data import InputError, Options, prepare
from fastlm.data.augment import Augment
from fastlm.data.augment import job as augment_job
from fastlm.data.groups import fold_of, group_of, mark
from fastlm.data.prepare import held, joint_limit, split_units, strangers

WORDS = [f"word{n}" for n in range(400)]


def text(seed: int, size: int = 60) -> str:
    draw = random.Random(seed)
    return f"document {seed}: " + " ".join(draw.choice(WORDS) for _ in range(size)) + "\n"


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sides(path: Path, tmp_path: Path, **options: object) -> tuple[str, str]:
    found = prepare((str(path),), Options(**options), cache=tmp_path / "cache")  # type: ignore[arg-type]
    return found.text("train").decode(), found.text("val").decode()


def named(side: str) -> set[int]:
    """The numbers of the documents that have a part in a side."""
    return {int(part.split(":")[0]) for part in side.split("document ")[1:]}


def test_an_augmented_copy_and_a_near_duplicate_do_not_leak(tmp_path: Path) -> None:
    """300 documents, each with a copy that says its source's group, each fifth with a near-duplicate of its cluster."""
    rows: list[dict[str, object]] = []
    for n in range(300):
        source, group = text(n), group_of(text(n).encode())
        rows.append({"text": source} if n % 2 else {"text": source, "group": group})
        rows.append({"text": source.replace("word1 ", "augmented "), "group": group})
        if n % 5 == 0:
            rows.append({"text": source + "one more line\n", "group": group})
    train, val = sides(write(tmp_path / "rows.jsonl", rows), tmp_path)
    assert named(val)
    assert len(named(train)) > 250
    assert not named(train) & named(val)


def test_without_their_groups_the_same_rows_leak(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for n in range(300):
        rows += [{"text": text(n)}, {"text": text(n).replace("word1 ", "augmented ") + "more\n"}]
    train, val = sides(write(tmp_path / "rows.jsonl", rows), tmp_path)
    assert named(train) & named(val)


def test_copies_of_blocks_follow_the_blocks_of_a_book(tmp_path: Path) -> None:
    """A book is split by blocks; rows made from its blocks fall where the blocks do, in one corpus and in two by weight."""
    book = tmp_path / "book.txt"
    book.write_text("".join(text(n, 20) for n in range(600)))
    units = list(split_units((str(book),)))
    assert len(units) > 10
    copies = write(
        tmp_path / "copies.jsonl", [{"text": t.decode().replace("word1 ", "other "), "group": g} for t, g in units]
    )
    both = prepare((str(book), str(copies)), cache=tmp_path / "cache")
    assert both.manifest["split"].endswith("and groups")
    train, val = both.text("train").decode(), both.text("val").decode()
    assert named(val)
    assert not named(train) & named(val)
    least = joint_limit([(str(book),), (str(copies),)], Options(), cache=tmp_path / "cache")
    apart = [prepare((str(p),), least=least, cache=tmp_path / "cache") for p in (book, copies)]
    held_out = set.union(*(named(one.text("val").decode()) for one in apart))
    assert held_out
    assert not held_out & set.union(*(named(one.text("train").decode()) for one in apart))


def copies_of(books: list[Path], path: Path) -> Path:
    """What `fastlm data augment BOOK ...` writes of them: copies with the groups of their blocks."""
    options = Augment(shuffle=1)
    found = augment_job.sources(tuple(map(str, books)), options)
    return write(path, [{"text": one.text.replace("word1 ", "other "), "group": one.group} for one in found])


def test_copies_of_blocks_of_a_validation_set_are_left_out(tmp_path: Path) -> None:
    """--val FILE, where FILE is split by blocks alone: its copies are no training text, and neither are, where the copies
    are the set, the blocks that they were made from."""
    book, other, cache = tmp_path / "book.txt", tmp_path / "other.txt", tmp_path / "cache"
    book.write_text("".join(text(n, 20) for n in range(600)))
    other.write_text("".join(text(n, 20) for n in range(1000, 1900)))
    copies = copies_of([book], tmp_path / "copies.jsonl")
    count = len(copies.read_text().splitlines())
    assert count > 10
    without = held([(str(book),)], Options(), cache=cache)
    found = prepare((str(other), str(copies)), without=without, cache=cache)
    assert found.manifest["left_out"] == count
    assert min(named(found.text("train").decode()) | named(found.text("val").decode())) == 1000
    half = copies.read_text().splitlines(keepends=True)[::2]
    some = tmp_path / "half.jsonl"
    some.write_text("".join(half))
    found = prepare((str(book),), without=held([(str(some),)], Options(), cache=cache), cache=cache)
    assert found.manifest["left_out"] == len(half)
    left = found.text("train").decode() + found.text("val").decode()
    assert not set(left.splitlines()) & set("".join(json.loads(r)["text"] for r in half).splitlines())


def test_groups_that_name_no_text_of_the_corpus_are_counted(tmp_path: Path) -> None:
    """Augmented alone and trained with a further book, copies name blocks of another size than the corpus is cut into."""
    book, other, cache = tmp_path / "book.txt", tmp_path / "other.txt", tmp_path / "cache"
    book.write_text("".join(text(n, 20) for n in range(600)))
    other.write_text("".join(text(n, 20) for n in range(1000, 1900)))
    copies = copies_of([book], tmp_path / "copies.jsonl")
    count = len(copies.read_text().splitlines())
    names = str(book), str(copies)
    assert strangers([names], Options(), cache=cache) == (0, count)
    assert strangers([names[:1], names[1:]], Options(), cache=cache) == (0, count)  # --weights
    assert strangers([(str(other), names[1]), names[:1]], Options(), cache=cache) == (0, count)  # --val book
    strange, every = strangers([(*names, str(other))], Options(), cache=cache)
    assert every == count
    assert strange > count // 2
    both = copies_of([book, other], tmp_path / "both.jsonl")
    assert strangers([(str(book), str(both), str(other))], Options(), cache=cache)[0] == 0
    # a cleaned corpus: groups name their own rows, or the first of a cluster; a name of another kind is no hash
    rows: list[dict[str, object]] = [{"text": text(n), "group": group_of(text(n - n % 2).encode())} for n in range(40)]
    rows.append({"text": text(40), "group": "my own"})
    assert strangers([(str(write(tmp_path / "clean.jsonl", rows)),)], Options(), cache=cache) == (0, 20)


def test_a_corpus_that_was_not_augmented_as_it_is_trained_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    book, other = tmp_path / "book.txt", tmp_path / "other.txt"
    book.write_text("".join(text(n, 20) for n in range(600)))
    other.write_text("".join(text(n, 20) for n in range(1000, 1900)))
    copies = copies_of([book], tmp_path / "copies.jsonl")
    assert cli(["data", "prepare", str(book), str(copies)]) == 0
    assert "augment the very corpus" not in capsys.readouterr().err
    assert cli(["data", "prepare", str(book), str(other), str(copies)]) == 0
    assert "augment the very corpus" in capsys.readouterr().err


def test_few_groups_give_a_validation_side(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": text(n), "group": f"g{n % 3}"} for n in range(30)]
    train, val = sides(write(tmp_path / "rows.jsonl", rows), tmp_path, val_fraction=0.001)
    assert len(named(val)) == 10
    assert {n % 3 for n in named(val)}.isdisjoint(n % 3 for n in named(train))


def test_training_leaves_out_what_shares_a_group_with_a_validation_set(tmp_path: Path) -> None:
    """The group of a training row is that of a row, or the hash of a document, of the --val set; or the other way round.
    Equal documents without a group stay, as ever."""
    copies: dict[int, dict[str, object]] = {n: {"text": text(n), "group": f"cluster-{n}"} for n in range(250, 300)}
    copies[299]["group"] = group_of(b"the source\n")
    corpus = write(tmp_path / "rows.jsonl", [copies.get(n, {"text": text(n)}) for n in range(300)])
    rows: list[dict[str, object]] = [{"text": text(7)}, {"text": "other words\n", "group": "cluster-270"}]
    rows += [{"text": "the source\n"}, {"text": "a copy\n", "group": group_of(text(8).encode())}]
    without = held([(str(write(tmp_path / "val.jsonl", rows)),)], Options(), cache=tmp_path / "cache")
    found = prepare((str(corpus),), without=without, cache=tmp_path / "cache")
    assert found.manifest["left_out"] == 3
    either = named(found.text("train").decode()) | named(found.text("val").decode())
    assert set(range(300)) - either == {8, 270, 299}


def test_folds_keep_a_group_together_and_cover_all() -> None:
    folds = defaultdict(set)
    for n in range(500):
        folds[fold_of(mark(f"g{n % 100}"), 5)].add(n % 100)
    assert sorted(folds) == [0, 1, 2, 3, 4]
    assert sum(map(len, folds.values())) == 100
    with pytest.raises(ValueError, match="at least 2"):
        fold_of(0.5, 1)


@pytest.mark.parametrize("group", [["a"], {"b": 1}, 1.5, True])
def test_a_group_that_is_no_name_is_refused_by_file_and_line(group: object, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a\n"}, {"text": "b\n", "group": group}])
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: the group must be a string"):
        prepare((str(path),), cache=tmp_path / "cache")


def test_parquet_and_csv_have_groups_too(tmp_path: Path) -> None:
    rows = [(text(n), f"g{n % 20}") for n in range(300)]
    (tmp_path / "rows.csv").write_text("text,group\n" + "".join(f'"{t}",{g}\n' for t, g in rows))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [t for t, _ in rows], "group": [g for _, g in rows]}), tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        train, val = sides(tmp_path / name, tmp_path)
        assert named(val)
        assert {n % 20 for n in named(val)}.isdisjoint(n % 20 for n in named(train))
