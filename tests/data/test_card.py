"""`fastlm data card`: what is counted of a corpus, what a model expects of two people, and the two pages."""

from __future__ import annotations

import errno
import json
import math
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastlm.data import InputError
from fastlm.data.card import bias, facts, markdown, page, scan
from fastlm.data.card.bias import Pair
from fastlm.data.card.card import Card
from fastlm.data.card.facts import Facts
from fastlm.data.card.terms import GROUP_OF, GROUPS, MEN_TO_WOMEN, WOMEN_TO_MEN
from fastlm.data.clean import CleanOptions

pytest.importorskip("datatrove")
from fastlm.cli import card as command
from fastlm.cli.main import main
from fastlm.data.clean import run

NOUNS = "river house garden letter window market bridge forest kitchen morning harbour station".split()  # noqa: SIM905


def prose(seed: int, size: int = 12) -> str:
    draw = random.Random(seed)
    return " ".join(
        f"The old {draw.choice(NOUNS)} number {seed} stood beside a {draw.choice(NOUNS)} of this town."
        for _ in range(size)
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Rows whose every figure is known: 20 texts, 3 exact copies, 2 near-duplicates, 4 of German, and one with an address."""
    base = [prose(n) for n in range(20)]
    near = [base[n].replace("stood", "was", 1) for n in (5, 6)]
    german = [
        f"Der alte Garten Nummer {n} lag neben dem Haus am Fluss, und die Kinder spielten dort jeden Tag."
        for n in range(4)
    ]
    rows: list[dict[str, str]] = [{"text": t, "source": "books:17+3"} for t in base + base[:3] + near]
    rows += [{"text": t, "source": "zeitung"} for t in german]
    rows += [
        {
            "text": f"She is a nurse and she is kind to the man. {prose(99)} Write to jane.doe@mail.example.org or 8.8.8.8."
        }
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scanned(path: Path, work: Path, **named: Any) -> tuple[Facts, scan.Copies]:
    return scan.scan((str(path),), work, CleanOptions(dedup=0.7), **named)


def test_a_corpus_of_known_content_is_counted(corpus: Path, tmp_path: Path) -> None:
    found, copies = scanned(corpus, tmp_path / "work")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    words = [len(re.findall(r"[^\W\d_]+", t)) for t in texts]
    assert found.sums["documents"] == 30
    assert found.sums["bytes"] == sum(len(t.encode()) for t in texts)
    assert (found.sums["words"], found.longest, found.shortest) == (sum(words), max(words), min(words))
    assert found.languages == {"en": 26, "de": 4}
    assert found.sources == {"books": 25, "zeitung": 4, "in.jsonl": 1}
    assert found.personal == {"email": 1, "ip": 1}
    assert found.sums["personal"] == 1
    assert (copies.exact, copies.near) == (3, 2)
    assert all(similarity >= 0.7 for *_, similarity in copies.examples)
    assert found.mentions == {"she": 2, "man": 1}
    assert found.mentioning == {"women": 1, "men": 1}
    for share in (0.05, 0.5, 0.95):
        assert found.quantile(share) == pytest.approx(np.quantile(words, share, method="inverted_cdf"), rel=0.2)


@pytest.fixture
def parts(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpus in three files, each a task."""
    folder = tmp_path / "parts"
    folder.mkdir()
    lines = corpus.read_text().splitlines(keepends=True)
    for n in range(3):
        (folder / f"{n}.jsonl").write_text("".join(lines[n * 10 : n * 10 + 10]))
    monkeypatch.setattr(run, "TASK", 1)
    return folder


COUNTS = ("sums", "lengths", "languages", "personal", "mentions", "vocabulary", "near", "sentences", "longest")


def test_a_scan_that_was_broken_off_goes_on_to_the_same_figures(
    corpus: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = scan._task, list[int]()

    def broken(item: Any, *shared: Any) -> Facts:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(item[0])
        return real(item, *shared)

    monkeypatch.setattr(scan, "_task", broken)
    with pytest.raises(KeyboardInterrupt):
        scanned(parts, tmp_path / "work")
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.facts")}
    assert sorted(done) == ["00000.facts", "00001.facts"]
    monkeypatch.setattr(scan, "_task", real)
    again, whole = scanned(parts, tmp_path / "work"), scanned(corpus, tmp_path / "whole")
    assert all((tmp_path / "work" / name).stat().st_mtime_ns == time for name, time in done.items())
    assert again[1].exact == whole[1].exact
    assert [getattr(again[0], name) for name in COUNTS] == [getattr(whole[0], name) for name in COUNTS]


@pytest.mark.slow  # spawned processes take seconds to import
def test_figures_are_the_same_for_any_processes(parts: Path, tmp_path: Path) -> None:
    one, two = scanned(parts, tmp_path / "one"), scanned(parts, tmp_path / "two", count=2)
    assert one == two


def test_what_is_held_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("SOURCES", 5), ("VOCABULARY", 40), ("SENTENCES", 6)):
        monkeypatch.setattr(facts, name, most)
    every, parts = Facts(), list[Facts]()
    for n in range(60):
        text = f"He saw the thing{n} and word{n} of it. She is a person who likes the {'abcdefghij'[n % 10] * 4}. {n}"
        part = Facts()
        for one in (every, part):
            one.add(text, f"source{n:02d}", True)
        parts.append(part)
    assert len(every.sources) <= 6
    assert every.sources[facts.OTHERS] == 55
    assert len(every.vocabulary) <= 80
    assert all(len(c) <= 40 for c in every.near.values())
    merged = Facts()
    for part in parts:
        merged.merge(part)
    assert merged.sources == every.sources
    assert len(merged.vocabulary) <= 40
    assert merged.sentences == dict(sorted(every.sentences.items())[:6])
    assert merged.sums == every.sums


def test_neighbours_are_those_that_brute_force_finds() -> None:
    """Words planted around a group come first, and their ratio is the one that counting by hand gives."""
    found, draw = Facts(), random.Random(1)
    filler = [f"{a}{b}{c}en" for a in "bdfg" for b in "aeio" for c in "lmnr"]
    for n in range(200):
        text = " ".join(draw.choice(filler) for _ in range(40))
        found.add(f"{text} {'the nurse she helped' if n % 2 else 'the pilot flew'} {text}", "x", True)
    first = found.neighbours("women")[:2]
    assert {word for word, *_ in first} == {"nurse", "helped"}
    here, total = found.near["women"].total(), found.vocabulary.total()
    for word, count, times in first:
        assert count == 100
        assert times == pytest.approx(100 / (here * found.vocabulary[word] / total))
    assert found.neighbours("men") == []


def test_the_ratio_is_scipy_s_g_test() -> None:
    for both, word, here, total in ((30, 50, 200, 5000), (5, 400, 300, 9000), (7, 7, 100, 1000)):
        observed = np.array([[both, word - both], [here - both, total - word - here + both]], dtype=float)
        expected = observed.sum(1, keepdims=True) * observed.sum(0) / observed.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = 2 * np.nansum(observed * np.log(observed / expected))
        assert facts._ratio(both, word, here, total) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("sentence", "both"),
    [
        (
            "He is a baker, and the MAN sings.",
            ("He is a baker, and the MAN sings.", "She is a baker, and the WOMAN sings."),
        ),
        ("The women saw that she won.", ("The men saw that he won.", "The women saw that she won.")),
        ("He met the woman.", None),  # both are spoken of
        ("She lost her hat.", None),  # his, or him
        ("Nobody came.", None),
    ],
)
def test_a_sentence_is_swapped_only_where_one_form_is_right(sentence: str, both: tuple[str, str] | None) -> None:
    assert bias.swapped(sentence) == both
    if both:
        assert bias.swapped(both[0]) == bias.swapped(both[1]) == both


def test_tables_are_one_to_one_and_no_term_is_in_two_groups() -> None:
    assert len(WOMEN_TO_MEN) == len(MEN_TO_WOMEN)
    assert not set(MEN_TO_WOMEN) & set(WOMEN_TO_MEN)
    every = [term for groups in GROUPS.values() for own in groups.values() for term in own]
    assert [t for t, n in Counter(every).items() if n > 1] == []
    assert len(GROUP_OF) == len(every)
    pairs = list(bias.fixed())
    assert all(p.first != p.second for p in pairs)
    assert Counter(p.kind for p in pairs) == {bias.PRONOUNS: 84, bias.GIVEN: 60, bias.ORIGIN: 60}


def test_the_gap_is_that_of_the_losses_with_an_interval_that_holds_it() -> None:
    draw = np.random.RandomState(0)
    noise = {f"unit{u}": draw.normal(0.5, 0.2) for u in range(40)}
    pairs = [Pair(bias.PRONOUNS, unit, f"{unit} {n} he", f"{unit} {n} she") for unit in noise for n in range(3)]
    pairs.append(Pair(bias.PRONOUNS, "long", "long he", "long she"))

    def score(texts: list[str]) -> list[float]:
        return [math.nan if t.startswith("long") else 3.0 + noise[t.split()[0]] * t.endswith("she") for t in texts]

    (one,) = bias.measure(pairs, score)
    assert one.gap == pytest.approx(np.mean(list(noise.values())))
    assert (one.pairs, one.too_long, one.first_likelier) == (120, 1, np.mean([v > 0 for v in noise.values()]))
    half = 1.96 * np.std(list(noise.values())) / math.sqrt(40)  # of units, not of pairs
    assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.1)
    assert one.low < one.gap < one.high
    assert bias.measure(pairs, score) == [one]
    assert bias.measure(pairs[-1:], score) == []
    assert bias.interval([[1.0, 2.0]], 1) == (-math.inf, math.inf)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.RandomState(3)
    hits = 0
    for n in range(200):
        units = [[shift + draw.normal(0, 0.1) for _ in range(4)] for shift in draw.normal(1.0, 0.5, 30)]
        low, high = bias.interval(units, n)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


# ---------------------------------------------------------------------------------------------------------------- pages


class Strict(HTMLParser):
    """Every element that is opened is closed, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.links = list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "rect", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "circle"):
            assert self.open.pop() == tag


def made(corpus: Path, work: Path) -> Card:
    card = Card("A <corpus> | of\nmine", (str(corpus),), "2026-01-02", *scanned(corpus, work), model="a & run")
    card.bias = bias.measure(bias.fixed(), lambda texts: [float(len(t)) for t in texts])
    return card


def test_the_page_is_one_whole_file(corpus: Path, tmp_path: Path) -> None:
    text = page.page(made(corpus, tmp_path / "work"))
    strict = Strict()
    strict.feed(text)
    assert strict.open == []
    assert strict.links == []
    assert "<title>A &lt;corpus&gt; | of\nmine · fastlm</title>" in text
    assert text.count("<svg") >= 4
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text)
    for words in ("English (en)", "zeitung", "e-mail addresses", "a &amp; run", "84 pairs", "median"):
        assert words in text
    assert "jane.doe" not in text  # a card shows none of the personal data that it counts


def test_the_dataset_card_is_what_the_hub_reads(corpus: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    text = markdown.text(made(corpus, tmp_path / "work"))
    found = hub.DatasetCard(text).data.to_dict()
    assert found["language"] == ["en", "de"]
    assert found["multilinguality"] == ["multilingual"]
    assert found["size_categories"] == ["n<1K"]
    assert found["task_categories"] == ["text-generation"]
    assert found["pretty_name"] == "A <corpus> \\| of mine"
    assert "| near-duplicates | 2 (6.7%) |" in text
    assert "| jobs | he / she |" in text
    assert "jane.doe" not in text


@pytest.mark.parametrize(
    ("documents", "word"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**9, "1B<n<10B"), (10**12, "n>1T")],
)
def test_size_categories_are_the_hub_s(documents: int, word: str) -> None:
    assert markdown.size_category(documents) == word


def test_the_command_writes_both_and_spares_what_was_edited(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["data", "card", str(corpus), "--out", str(out)]
    assert main(words) == 0
    assert "copies: 3 exact, 2 near; personal data: 2 finds in 1 documents" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["card.html", "card.md"]
    assert main(words) == 0  # its own card is written anew
    (out / "card.md").write_text((out / "card.md").read_text().replace("## Dataset", "My licence.\n\n## Dataset", 1))
    capsys.readouterr()
    assert main(words) == 2
    assert "was written or edited by someone" in capsys.readouterr().err
    assert "My licence." in (out / "card.md").read_text()


def test_bad_input_is_one_sentence(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = ["--out", str(tmp_path / "out")]

    def said(*words: str) -> str:
        assert main(["data", "card", *words]) == 2
        text = capsys.readouterr().err
        assert "\n" not in text.strip()
        return text

    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "the corpus is empty" in said(str(empty), *out)
    assert "does not exist" in said(str(tmp_path / "nothing"), *out)
    assert "would be read as a part" in said(str(tmp_path), "--out", str(tmp_path))
    assert "has no policy.toml" in said(str(corpus), *out, "--filter", str(tmp_path))
    assert "--dedup must be" in said(str(corpus), *out, "--dedup", "7")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(corpus.read_text() + "{broken\n")
    assert f"{broken}, line 31" in said(str(broken), *out)

    monkeypatch.setattr(command.scan, "scan", fails(OSError(errno.ENOSPC, "No space left on device")))
    assert "No space left on device; what is counted is kept" in said(str(corpus), *out)
    monkeypatch.setattr(command.scan, "scan", fails(KeyboardInterrupt()))
    assert main(["data", "card", str(corpus), *out]) == 130
    assert "interrupted; what is counted is kept" in capsys.readouterr().err


def fails(with_: BaseException) -> Any:
    def scan_(*_: Any, **__: Any) -> None:
        raise with_

    return scan_


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="the corpus is empty"):
        scanned(tmp_path / "in.jsonl", tmp_path / "work")
