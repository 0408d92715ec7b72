"""Folds and fractions: what is held out goes by group, covers all once, and is never trained on; parts hold smaller parts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from fastlm.cli.main import main as cli
from fastlm.data import InputError, Options, prepare
from fastlm.data.groups import fold_of, group_of, mark
from fastlm.data.mixing import prepare_each
from fastlm.data.prepare import fold_bounds
from fastlm.data.split import Split, interval, parse_fold
from test_groups_split import named, sides, text, write


def rows(count: int) -> list[dict[str, object]]:
    """Documents, each with a copy in other words that says its source's group."""
    out: list[dict[str, object]] = []
    for n in range(count):
        out += [
            {"text": text(n)},
            {"text": text(n).replace("word1 ", "other ") + "more\n", "group": group_of(text(n).encode())},
        ]
    return out


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_hold_out_every_group_once_and_train_on_the_others(folds: int, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows(300))
    held = []
    for number in range(1, folds + 1):
        train, val = (named(side) for side in sides(path, tmp_path, fold=f"{number}/{folds}"))
        assert not train & val
        assert train | val == set(range(300))
        assert val == {n for n in range(300) if fold_of(mark(group_of(text(n).encode())), folds) == number - 1}
        held.append(val)
    assert not any(a & b for a, b in itertools.combinations(held, 2))


def test_few_groups_are_shared_out_so_that_no_fold_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": text(n), "group": f"cluster {n % 6}"} for n in range(60)])
    found = [sides(path, tmp_path, fold=f"{number}/5") for number in range(1, 6)]
    held = [named(val) for _, val in found]
    assert all(held)
    assert sorted(n for val in held for n in val) == list(range(60))
    for (train, _), val in zip(found, held, strict=True):
        assert not {n % 6 for n in named(train)} & {n % 6 for n in val}
    with pytest.raises(InputError, match=r"--fold 2/7: 7 folds need as many .* the corpus has 6"):
        sides(path, tmp_path, fold="2/7")


def test_a_book_s_folds_are_of_blocks(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(text(n, 20) for n in range(600)))
    whole = book.read_text()
    held = [sides(book, tmp_path, fold=f"{number}/4") for number in range(1, 5)]
    assert sum(len(val) for _, val in held) >= len(whole) - 4
    assert all(len(val) > 2000 for _, val in held)
    assert all(abs(len(train) + len(val) - len(whole)) <= 4 for train, val in held)


def test_intervals_cover_all_marks_and_share_few_evenly() -> None:
    draw = np.random.default_rng(3)
    for count, folds in ((3, 3), (4, 3), (7, 5), (50, 7), (2000, 10)):
        marks = sorted(set(draw.random(count).tolist()))
        ends = [interval(marks, number, folds) for number in range(1, folds + 1)]
        assert ends[0][0] == 0.0
        assert ends[-1][1] == 1.0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
        sizes = [sum(low <= m < high for m in marks) for low, high in ends]
        assert sum(sizes) == len(marks)
        assert min(sizes) >= 1
        if ends[0][1] != 1 / folds:
            assert max(sizes) - min(sizes) <= 1


def test_a_part_of_the_training_side_holds_every_smaller_one_and_validation_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows(400))
    for more in ({}, {"fold": "2/5"}, {"fold": "5/5"}):
        whole, val = sides(path, tmp_path, **more)
        before: set[int] = set()
        for fraction in (0.1, 0.25, 0.5, 1.0):
            train, again = sides(path, tmp_path, fraction=fraction, **more)
            assert again == val
            assert before < named(train) <= named(whole)
            assert abs(len(named(train)) / len(named(whole)) - fraction) < 0.1
            assert train.count("more\n") * 2 == train.count("document ")  # a copy comes with its source
            before = named(train)


def test_a_split_s_sides_go_round_from_what_it_holds_out() -> None:
    marks = np.linspace(0, 1, 1001)[:-1]
    for low, high, part in ((0.0, 0.2, 0.5), (0.4, 0.6, 0.5), (0.8, 1.0, 0.25), (0.4, 0.6, 1.0)):
        found = [Split(0, high, low=low, part=part).side(float(m)) for m in marks]
        assert found.count(True) == pytest.approx(200, abs=1)
        assert found.count(False) == pytest.approx(800 * part, abs=2)
    assert all(Split(0, 2.0).side(float(m)) is True for m in marks)  # a validation set: all of it


def test_corpora_mixed_by_weights_share_their_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    every = rows(40)
    first = write(tmp_path / "first.jsonl", every[::2])
    second = write(tmp_path / "second.jsonl", every[1::2])
    for number in (1, 3):
        found = prepare_each((str(first), str(second)), Options(fold=f"{number}/3"), None, None)
        (train, val), (copies, held) = ([named(one.text(side).decode()) for side in ("train", "val")] for one in found)
        assert (train, val) == (copies, held)
        assert val
        assert not train & val
    low, high = fold_bounds([(str(first),), (str(second),)], Options(fold="3/3"))
    assert (low, high) == (2 / 3, 1.0)


def test_without_a_fold_the_cache_is_what_it_was_and_parts_have_places_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows(250))
    places = [
        prepare((str(path),), options, cache=tmp_path / "cache").folder
        for options in (
            Options(),
            Options(fraction=1.0),
            Options(fraction=0.5),
            Options(fold="1/2"),
            Options(fold="1/2", fraction=0.5),
        )
    ]
    assert places[0] == places[1]
    assert len(set(places)) == 4
    assert "fold" not in repr(Options())


def test_a_prepared_corpus_turned_round_has_its_sides_exchanged(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows(100))
    for pack in (0, 32):
        found = prepare((str(path),), Options(pack=pack), cache=tmp_path / "cache")
        other = found.turned()
        assert other.text("val") == found.text("train")
        assert other.text("train") == found.text("val")
        assert other.bytes_per_target("val") == found.bytes_per_target("train")
        if pack:
            assert other.rows("val").size == found.rows("train").size != found.rows("val").size
        assert found.text("val") == other.turned().text("val")


@pytest.mark.parametrize("given", ["0/5", "6/5", "1/1", "a/b", "3", "1/", "/5", "-1/5", "1/5/2", "½/5"])
def test_what_is_no_fold_is_refused_by_name(given: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--fold must be I/K such as 2/5"):
        parse_fold(given)
    assert cli(["data", "prepare", "none.txt", f"--fold={given}"]) == 2
    assert "--fold must be I/K" in capsys.readouterr().err


def test_an_empty_side_names_the_flag_that_made_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": text(n)} for n in range(250)])
    with pytest.raises(InputError, match=r"the training side of the split is empty.*--fraction \(now 1e-06\)"):
        sides(path, tmp_path, fraction=1e-6)
