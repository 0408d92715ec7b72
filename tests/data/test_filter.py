"""`fastlm data filter`: folding, attacks, what is learnt, the policy, the folder, and bad input."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fastlm.cli.main import main
from fastlm.data.errors import InputError
from fastlm.data.filter import attacks, features, identity, labelled, learn, lists, load, model, policy
from fastlm.data.filter.fold import _SIGNED, fold
from filter_rows import BAD, texts

# ----------------------------------------------------------------------------------------------------- folding and attacks


@pytest.mark.parametrize("written", [
    "grobble", "GROBBLE", "g r o b b l e", "g.r.o.b.b.l.e", "g-r-o-b-b-l-e", "gr0bbl3", "grоbblе", "ｇｒｏｂｂｌｅ", "𝐠𝐫𝐨𝐛𝐛𝐥𝐞",
    "gr\u200bob\u00adble", "gróbblé", "g̶r̶o̶b̶b̶l̶e̶", "grobbbble", "gro_bble", "gr*obble", "&#103;robble",
])  # fmt: skip
def test_folding_undoes_what_hides_a_word(written: str) -> None:
    assert fold(f"you {written} there") == ["you", "grobble", "there"]


@pytest.mark.parametrize(("written", "words"), [
    ("The 3rd of 10 at 24h, 5k runs", ["the", "3rd", "of", "10", "at", "24h", "5k", "runs"]),
    ("Hello! Is it good?", ["hello", "is", "it", "good"]), ("a good book", ["a", "good", "book"]),
    ("see https://a.example/b?c=1 now", ["see", "now"]), ("naïve café", ["naive", "cafe"]), ("", []), ("\u200b", []),
])  # fmt: skip
def test_folding_leaves_what_is_plain(written: str, words: list[str]) -> None:
    assert fold(written) == words


def test_folding_survives_any_string() -> None:
    draw = random.Random()
    for _ in range(300):
        text = "".join(chr(draw.choice((draw.randrange(0x300), draw.randrange(0x110000)))) for _ in range(30))
        assert all(isinstance(word, str) and word for word in fold(text)), ascii(text)
        features.places(text.encode("utf-8", "replace").decode())


@pytest.mark.parametrize("family", attacks.FAMILIES)
def test_a_family_changes_the_word_and_nothing_else(family: str) -> None:
    draw, changed = random.Random(), 0
    for word in BAD:
        made = attacks.rewrite(f"the {word}, at home.", family, BAD, draw)
        assert made.startswith("the ")
        assert made.endswith(", at home.")
        changed += made != f"the {word}, at home."
    assert changed >= 3, "one of the words has no sound that is written otherwise"
    assert attacks.rewrite("", family, BAD, draw) == ""
    assert attacks.rewrite("1 2 3 !", family, BAD, draw) == "1 2 3 !"
    for letters in ("a", "ab", "abc", "zzzz", "ñandú", "ßß", "İstanbul", "KIRIKKALEİ", "İ"):
        for _ in range(20):
            attacks.FAMILIES[family](letters, draw)


def test_families_that_folding_undoes_leave_no_trace() -> None:
    draw = random.Random()
    for family in ("look-alikes", "zero-width", "accents"):
        for _ in range(20):
            assert fold(attacks.FAMILIES[family]("plimbus", draw)) == ["plimbus"], family


def test_one_edit_leaves_features_in_common() -> None:
    """A letter dropped, added, exchanged or swapped with the next: two words share a word with a letter left out."""
    own = set(features.of_word("plimbus").tolist())
    far = len(own & set(features.of_word("teacher").tolist()))
    for edited in ("plmbus", "plimbuss", "plimbxus", "plimbas", "pilmbus", "plimbsu", "plmbs"):
        assert len(own & set(features.of_word(edited).tolist())) > far + 3, edited
    assert set(features.places("pli mbus").tolist()) & own


def _seconds(what: Callable[[], object]) -> float:
    """Of this process, the least of three."""
    took = []
    for _ in range(3):
        begin = time.process_time()
        what()
        took.append(time.process_time() - begin)
    return min(took)


def test_runs_with_signs_are_those_of_the_plain_expression() -> None:
    plain, draw = re.compile(r"[a-z0-9@$!|+]*[0-9@$!|+][a-z0-9@$!|+]*"), random.Random()
    for _ in range(3000):
        text = "".join(draw.choices("abz019@$!|+ .-\n'é", k=draw.randrange(30)))
        assert [m.span() for m in _SIGNED.finditer(text)] == [m.span() for m in plain.finditer(text)], text


def test_passages_are_those_of_the_plain_expression() -> None:
    plain = re.compile(r"\S[^\n]{0,240}(?=\s*(?:\n|\Z))|\S[^\n]{0,240}[.!?][\"')\]’”]*(?=\s)|\S[^\n]{0,240}\S*")
    draw = random.Random()
    for _ in range(300):
        some = ["word", ".", " ", "\n", "\t", "\r\n", "\u2028", '?"', " " * 300, "x" * 100, "x" * 250, "a b c. " * 20]
        text = "".join(draw.choices(some, k=draw.randrange(30)))
        assert [m.span() for m in model.PASSAGE.finditer(text)] == [m.span() for m in plain.finditer(text)], ascii(text)


def test_a_word_of_any_length_is_folded_in_time_of_its_length() -> None:
    draw = random.Random()
    letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=40_000))
    fold("a1")
    for made in (letters, "1" * 40_000 + "x!", "a" * 40_000 + "!" * 40_000, "a." * 20_000):
        short = _seconds(lambda made=made: fold(made[:2000]))
        assert _seconds(lambda made=made: fold(made)) < 20 * short + 0.2, made[:20]


def test_a_run_of_blanks_is_read_few_times() -> None:
    blanks, words = "a" + " " * 40_000 + "b", "word " * 8_000
    took, usual = (_seconds(lambda text=text: [*model.PASSAGE.finditer(text)]) for text in (blanks, words))
    assert took < 10 * usual + 0.1  # the old expression takes seconds
    assert [m[0] for m in model.PASSAGE.finditer(blanks)] == ["a" + " " * 240, "b"]


def test_caches_hold_the_beginnings_of_words_alone() -> None:
    scorer = model.Linear(np.ones((1, features.SIZE), np.float32), np.zeros(1, np.float32))
    begin = ("bcdfg" * features.READ)[: features.READ]  # no letter twice in a row, which folding would take away
    for end in ("", "x", "y" * 1000):
        np.testing.assert_array_equal(features.of_word(begin + end), features.of_word(begin))
        scorer.scores(begin + end)
    assert scorer._of_word.cache_info().currsize == 1


# --------------------------------------------------------------------------------------------------------- what is learnt


def test_a_filter_finds_what_it_learnt_and_names_the_category(folder: Path) -> None:
    found = load(folder)
    assert found.categories == ("insult", "threat", "any")
    for word, name in ((BAD[0], "insult"), (BAD[3], "threat")):
        verdict = found.judge(f"the garden {word} window")
        assert verdict is not None
        assert (verdict.action, verdict.category) == ("drop", name)
    assert found.judge("the garden and the window") is None
    assert found.judge("") is None
    assert found.judge("I am a gay man and I love my garden") is None


def test_the_score_is_the_regression_of_scikit_learn(rows: Path, folder: Path) -> None:
    """Scores by cached words equal the sparse matrix product that was learnt."""
    found = load(folder)
    assert isinstance(found.scorer, model.Linear)
    some = [row["text"] for row in texts(2, 60)] + ["I am a " + word for word in BAD]
    logits = learn.matrix(some) @ found.scorer.weights.T + found.scorer.bias
    mine = np.array([found.scorer.scores(text) for text in some])
    np.testing.assert_allclose(mine, 1 / (1 + np.exp(-logits)), rtol=1e-4)


def test_the_same_seed_gives_the_same_filter(rows: Path, folder: Path) -> None:
    made, text, _ = learn.learn(labelled.read((str(rows),)))
    assert made.hash == load(folder).hash
    assert text == (folder / policy.NAME).read_text()
    other, _, _ = learn.learn(labelled.read((str(rows),)), seed=2)
    assert other.hash != made.hash


@pytest.mark.slow
def test_attacked_copies_raise_recall_on_families_never_seen(rows: Path) -> None:
    """Learnt with every family but one, the filter finds more of that one than a filter without attacks."""
    pytest.importorskip("sklearn")
    found = labelled.read((str(rows),))
    plain, _, _ = learn.learn(found)
    made, _, figures = learn.learn(found, attack=True)
    assert {f.name for f in figures.families} == set(attacks.FAMILIES)
    assert np.mean([f.known for f in figures.families]) > 0.85
    assert np.mean([f.unseen for f in figures.families]) > 0.75
    draw = random.Random()
    bad = [attacks.rewrite(r.text, f, BAD, draw) for r in found[:90] if r.categories for f in attacks.FAMILIES]
    caught = [np.mean([f.judge(text) is not None for text in bad]) for f in (plain, made)]
    assert caught[1] > caught[0]
    assert figures.alarms_attacked < 0.2


def test_threshold_takes_all_from_the_lowest_score_of_the_wanted_precision() -> None:
    draw = np.random.default_rng()
    for _ in range(20):
        truth = draw.random(300) < 0.4
        scores = np.round(draw.random(300) + truth * 0.4, 2)
        for wanted in (0.6, 0.8, 0.95):
            found = learn.threshold(scores, truth, wanted)
            fit = [t for t in np.unique(scores) if t > 0 and (took := scores >= t).sum() and truth[took].mean() >= wanted
                   and truth[took].sum() >= truth.sum() / 20]  # fmt: skip
            assert (found is None) == (not fit)
            if found is not None:
                assert scores[scores >= found].min() == min(fit)
    assert learn.threshold(np.zeros(10), np.arange(10) < 5, 0.9) is None


def test_a_threshold_is_never_zero_and_takes_no_lower_score() -> None:
    every = np.ones(4, bool)
    assert learn.threshold(np.zeros(4), every, 0.9) is None
    assert learn.threshold(np.array([0.3, 0.2, 0.0, 0.0]), every, 0.9) == 0.1
    assert learn.threshold(np.array([1e-9, 3e-9, 0.5, 0.6]), np.arange(4) > 0, 0.9) == pytest.approx(2e-9)
    high = np.nextafter(0.3, 1)
    found = learn.threshold(np.array([0.3, high, 0.9]), np.array([False, True, True]), 0.9)
    assert found == high, "no number lies between"


def test_the_threshold_of_the_file_is_the_one_that_was_measured(rows: Path, folder: Path) -> None:
    made, _, figures = learn.learn(labelled.read((str(rows),)))
    loaded = load(folder)
    assert {c.name: c.threshold for c in loaded.policy.categories} == {
        c.name: c.threshold for c in made.policy.categories
    }
    assert {c.name: c.threshold for c in loaded.policy.categories} == {
        n: f["threshold"] for n, f in figures.categories.items()
    }
    tried = [r for r in labelled.read((str(rows),)) if learn.HELD_OUT <= r.mark < 2 * learn.HELD_OUT]
    for one in loaded.policy.categories:
        scores = [loaded.scores(r.text)[loaded.categories.index(one.name)] for r in tried]
        truth = np.array([bool(r.categories) if one.name == "any" else one.name in r.categories for r in tried])
        said = learn.judged(np.array(scores) >= one.threshold, truth)
        assert {key: figures.categories[one.name][key] for key in said} == said


def test_small_thresholds_are_written_in_full(tmp_path: Path) -> None:
    draw = random.Random()
    some = tuple(
        policy.Category(str(i), x) for i, x in enumerate((1e-27, 2.5e-9, 1 / 3, *(draw.random() for _ in range(50))))
    )
    path = tmp_path / policy.NAME
    path.write_text(policy.text(some, {}), encoding="utf-8")
    assert policy.read(path, tuple(c.name for c in some), "x").categories == some


def test_too_few_texts_to_learn_from_are_named() -> None:
    pytest.importorskip("sklearn")
    bad = [labelled.Row("grobble", frozenset({"toxic"}), mark) for mark in (0.05, 0.15, *[0.5] * 19)]
    good = [labelled.Row("garden", frozenset(), at / 300) for at in range(300)]
    with pytest.raises(InputError, match=r"321 labelled texts are too few: .* toxic has 19 texts, 20 are needed"):
        learn.learn(bad + good)


def test_harmless_sentences_name_every_group() -> None:
    made = identity.sentences(1)
    assert len(set(made)) > 2000
    assert all("{" not in text for text in made)
    low = "\n".join(made).lower()
    assert all(term.lower() in low for term in (*identity.ADJECTIVES, *identity.GROUPS))


# ------------------------------------------------------------------------------------------------------- policy and folder


def test_the_policy_decides(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path, first = tmp_path / policy.NAME, load(folder)
    path.write_text("# other comments\n" + path.read_text())
    assert load(tmp_path).hash == first.hash, "comments change nothing"
    path.write_text('format = 1\n[category.insult]\nthreshold = 0.5\naction = "mask"\n')
    mask = load(tmp_path)
    assert mask.hash != first.hash
    good = "the garden and the window in summer."
    long = "\n".join([good] * 30 + [f"you {BAD[0]}, you {BAD[0]}"])
    verdict = mask.judge(long)
    assert verdict is not None
    assert verdict.action == "mask"
    assert [long[a:b] for a, b in verdict.spans] == [f"you {BAD[0]}, you {BAD[0]}"]
    assert mask.masked(long) == "\n".join([good] * 30 + [model.MASK])
    assert mask.judge(f"a {BAD[3]}") is None, "threat is not in the policy"
    path.write_text("format = 1\n[category.insult]\nthreshold = 0.5\nshare = 0.2\n")
    assert load(tmp_path).judge(long) is None, "a small part of a long text"
    assert load(tmp_path).judge(long, whole=True) is not None


@pytest.mark.parametrize(("text", "said"), [
    ("format = 1\n[category.spam]\nthreshold = 0.5", "category 'spam' is unknown to the filter; it knows insult, threat, any"),
    ("format = 1\n[category.any]\nthreshold = 2", "threshold of the category 'any' must be a number from 0 to 1; it is 2"),
    ("format = 1\n[category.any]\nthreshold = true", "must be a number from 0 to 1"),
    ("format = 1\n[category.any]\nthreshold = nan", "must be a number from 0 to 1"),
    ("format = 1\n[category.any]\naction = 'drop'", "has no threshold"),
    ("format = 1\n[category.any]\nthreshold = 0.5\naction = 'burn'", "must be one of drop, review, mask; it is 'burn'"),
    ("format = 1\n[category.any]\nthreshold = 0.5\nlimit = 1", "has 'limit'"),
    ("format = 2\n[category.any]\nthreshold = 0.5", "format must be 1"), ("format = 1", "names no category"),
    ("format = 1\nx = 3\n[category.any]\nthreshold = 0.5", "'x' is no part of a policy"), ("format = ", "is not TOML"),
    ("format = 1\ncategory = 3", "names no category"),
])  # fmt: skip
def test_a_policy_that_cannot_be_used_is_named(folder: Path, tmp_path: Path, text: str, said: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / policy.NAME).write_text(text)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert said in str(error.value)


def test_any_label_is_a_name_in_the_policy(tmp_path: Path) -> None:
    path = tmp_path / policy.NAME
    names = ("🤬", "𝐡𝐚𝐭𝐞 speech", 'a "b"\\c', "x\x7fy", "\x01\t\r", "a.b]", "Ünïcode", "\u2028")
    some = tuple(policy.Category(name, 0.5) for name in names)
    path.write_text(policy.text(some, {"😡\x7f\n": "1 texts, 20 are needed"}), encoding="utf-8")
    assert policy.read(path, names, "x").categories == some
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert policy.read(path, names, "x").categories == some, "an editor's byte order mark"


@pytest.mark.parametrize("text", [
    '[category."\\ud83e\\udd2c"]\nthreshold = 0.5', "x = " + "[" * 100_000, "format = 1\n[category.any]\nthreshold = 0.5\x00"
])  # fmt: skip
def test_a_policy_that_is_no_toml_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / policy.NAME).write_text(text)
    with pytest.raises(InputError, match="is not TOML") as error:
        policy.read(tmp_path / policy.NAME, ("any",), "x")
    assert "\n" not in str(error.value)


def test_a_folder_that_is_broken_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no policy\.toml"):
        load(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "weights.safetensors").write_bytes(b"PK not safetensors")
    with pytest.raises(InputError, match=r"weights\.safetensors cannot be read"):
        load(tmp_path)
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "weights.safetensors")
    for bias in (np.full_like(weights["bias"], np.nan), weights["bias"].astype(np.float64)):
        save_file(weights | {"bias": bias}, tmp_path / "weights.safetensors")
        with pytest.raises(InputError, match="must hold finite numbers in float32"):
            load(tmp_path)
    about = json.loads((tmp_path / "filter.json").read_text())
    (tmp_path / "filter.json").write_text(json.dumps(about | {"format": 9}))
    with pytest.raises(InputError, match="of another version"):
        load(tmp_path)
    (tmp_path / "filter.json").write_text(json.dumps(about | {"categories": [1, 2, 3]}))
    with pytest.raises(InputError, match=r"filter\.json cannot be read"):
        load(tmp_path)
    (tmp_path / "filter.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"filter\.json cannot be read"):
        load(tmp_path)
    (tmp_path / "filter.json").write_text("{}")
    with pytest.raises(InputError, match=r"filter\.json cannot be read"):
        load(tmp_path)
    assert {file.suffix for file in folder.iterdir()} == {".json", ".toml", ".safetensors"}, "never a pickle"


def test_a_word_list_needs_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "words.txt"
    words.write_text("grobble\nplim bus  # two\n\n# none\n")
    assert main(["data", "filter", "--words", str(words), "--out", str(tmp_path / "f")]) == 0
    found = load(tmp_path / "f")
    for text in ("you Gr0bble", "plim  bus", "g.r.o.b.b.l.e"):
        verdict = found.judge(text)
        assert verdict is not None, text
        assert verdict.category == "listed"
    assert found.judge("grobbles in the grobbl") is None
    (tmp_path / "f" / "words.txt").rename(tmp_path / "kept.txt")
    with pytest.raises(InputError, match=r"--filter .*f: words\.txt cannot be read"):
        load(tmp_path / "f")
    (tmp_path / "kept.txt").rename(tmp_path / "f" / "words.txt")
    words.write_text("# nothing\n")
    assert main(["data", "filter", "--words", str(words), "--out", str(tmp_path / "g")]) == 2
    assert "holds no word" in capsys.readouterr().err
    words.write_text("***\n!!!\n")
    assert main(["data", "filter", "--words", str(words), "--out", str(tmp_path / "g")]) == 2
    assert "no word to look for: all 2 are left out" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()
    words.write_bytes(b"\xef\xbb\xbf# a list\ngrobble\n***\n")
    assert main(["data", "filter", "--words", str(words), "--out", str(tmp_path / "g")]) == 0
    assert "1 words; 1 left out" in capsys.readouterr().out
    assert load(tmp_path / "g").judge("\u200b. ...\n - ") is None
    pytest.importorskip("better_profanity")
    assert len(lists.read("auto")) > 500


def test_passages_hold_all_words_and_are_short() -> None:
    draw = random.Random()
    for _ in range(50):
        text = "".join(draw.choice(["word ", "end. ", "line\n", "x" * 300 + " ", "\n\n", "? "]) for _ in range(60))
        found = [m[0] for m in model.PASSAGE.finditer(text)]
        assert "".join(found).split() == "".join(found).split()
        assert " ".join(found).split() == text.split()
        assert all(len(p) <= model.LONG + 301 and "\n" not in p.strip() for p in found)
    assert [m[0] for m in model.PASSAGE.finditer("One. Two three")] == ["One. Two three"]
