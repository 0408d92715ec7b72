"""`fastlm data clean`: what each rule takes, copies, personal data, restarts, and bad input."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastlm.data import InputError, prepare
from fastlm.data.clean import CleanOptions, pii
from fastlm.data.clean.options import bands
from fastlm.data.rows import dumps

pytest.importorskip("datatrove")
from fastlm.cli.main import main
from fastlm.data.clean import executor, near, rules, run, words

VOCABULARY = ["the", "of", "and", "to", "have"] + [
    f"{a}{b}{c}o{d}" for a in "bdfgk" for b in "aeio" for c in "nrst" for d in "lmn"
]


def prose(seed: int, size: int = 120) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(VOCABULARY) for _ in range(size)) + ".\n"


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def rows(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.open()]


def clean(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    found = run.clean((str(path),), out, CleanOptions(workers=1, **options), note=lambda _: None)
    assert found is not None
    return found


def edited(text: str, seed: int) -> str:
    """Three words of a text changed."""
    draw, parts = random.Random(seed), text.split()
    for _ in range(3):
        parts[draw.randrange(len(parts))] = f"new{seed}"
    return " ".join(parts) + "\n"


def test_copies_are_dropped_and_the_first_stays_with_its_group(tmp_path: Path) -> None:
    base = [prose(n, 200) for n in range(40)]
    texts = base + base[:5] + [edited(base[n], n) for n in range(5, 12)] + ["short text\n"]
    table = clean(write(tmp_path / "in.jsonl", texts), tmp_path / "out")
    assert table["documents"] == 53
    assert {rule: n["documents"] for rule, n in table["dropped"].items()} == {
        "exact_copy": 5, "near_duplicate": 7, "gopher_short_doc": 1,
    }  # fmt: skip
    kept = rows(tmp_path / "out")
    assert [row["text"] for row in kept] == base
    assert len({row["group"] for row in kept}) == 40
    assert prepare((str(tmp_path / "out"),), cache=tmp_path / "cache").manifest["documents"] == 40


def test_near_duplicates_that_stay_share_a_group_and_rows_keep_theirs(tmp_path: Path) -> None:
    base = prose(1, 200)
    path = tmp_path / "in.jsonl"
    given: list[dict[str, str]] = [{"text": prose(2, 200), "group": "mine"}, {"text": base, "group": "a"}]
    given += [{"text": edited(base, 3), "group": "b"}, {"text": prose(4, 200), "group": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    clean(path, tmp_path / "out", copies="group")
    assert [row["group"] for row in rows(tmp_path / "out")] == ["mine", "a", "a", "a"]


def test_candidates_find_what_brute_force_finds() -> None:
    """Recall over pairs of all similarities from 0.7 on, against Jaccard of every pair."""
    count, height = bands(0.7)
    draw = random.Random(0)
    sets, marks = [], []
    for n in range(60):
        words_ = prose(n, 300).split()
        for _ in range(5):
            variant = [w if draw.random() > 0.015 else "x" for w in words_]
            sets.append(words.shingles(" ".join(variant)))
            marks.append(words.signature(sets[-1], count, height))
    close = [(a, b) for a in range(300) for b in range(a) if words.jaccard(sets[a], sets[b]) >= 0.7]
    assert len(close) > 200
    assert sum(bool((marks[a] == marks[b]).any()) for a, b in close) / len(close) >= 0.98


def test_the_rules_are_datatrove_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gopher's rules give the verdicts of datatrove's own filters, over the same words."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    own = rules.Quality(Path("unused"), Path("unused"), 50), rules.Repetition(Path("unused"), Path("unused"))
    language = rules.Sentences()
    theirs = GopherQualityFilter(language=language), GopherRepetitionFilter(language=language)
    monkeypatch.setattr(rules, "language", lambda _: "en")
    draw, verdicts = random.Random(0), set()
    for n in range(150):
        text = prose(n, draw.choice([20, 80, 200]))
        turn = n % 10
        if turn == 1:
            text = text[:300] * 3
        elif turn == 2:
            text = "\n".join(f"- {line}" for line in text.split(" ")[:90])
        elif turn == 3:
            text = text.replace(" ", " # ")
        elif turn == 4:
            text = " ".join(f"{w} 1 2" for w in text.split())
        elif turn == 5:
            text = text.replace(" the ", " ").replace(" of ", " ").replace(" to ", " ").replace(" and ", " ")
            text = text.replace("have", "")
        elif turn == 6:
            text = "\n".join([text[:60], text[60:100] + "..."] * 6)
        elif turn == 7:
            words_ = text.split()
            text = " ".join(words_ + words_[: len(words_) // draw.choice([2, 4, 8])])
        elif turn == 8:
            text = "".join(f"{w}{w}{w}{w} " for w in text.split())
        for mine, other in zip(own, theirs):
            found, said = mine.judge(Document(text, "1")), other.filter(Document(text, "1"))
            assert (True if found is None else (False, found[0])) == said, text
            verdicts.add(said)
    assert len(verdicts) > 8


def test_repair_is_ftfy_s() -> None:
    """Of each text that nothing suspect is in, and of every other one line by line."""
    ftfy = pytest.importorskip("ftfy")
    from datatrove.data import Document
    from ftfy.badness import MOJIBAKE_CATEGORIES

    repair, draw = rules.Repair(Path("unused"), Path("unused")), random.Random(0)
    ascii_ = [chr(c) for c in range(128)] + [*"aeiouAEIOUn  <&;\n\n"] + ["&amp;", "&#39;", "&eacute;", "<b>"]
    beyond = [chr(c) for c in [*range(0x80, 0x250), 0x2028, 0x206A, 0xFEFF, 0xFFFC, 0xD800, 0x301, 0x212B, 0x1100]]
    beyond += [*"".join(MOJIBAKE_CATEGORIES.values())]
    changed = 0
    for _ in range(4000):
        text = "".join(draw.choice(beyond if draw.random() < 0.2 else ascii_) for _ in range(draw.randint(1, 30)))
        if draw.random() < 0.3:
            text = text.encode("utf-8", "ignore").decode("latin-1")
        document = Document(text, "1")
        repair.judge(document)
        wanted = ftfy.fix_text(text, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False)
        assert document.text == wanted, repr(text)
        changed += wanted != text
    assert changed > 400
    plain = "“It’s naïve”, said Zoë — once…\n"  # nothing suspect: ftfy is not asked
    assert not rules.SUSPECT.search(plain)
    assert ftfy.fix_text(plain, uncurl_quotes=False) == plain


def test_words_are_python_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number, length, letters and marks are those of str.split's; equal words have one number, others another."""
    monkeypatch.setattr(words, "PIECE", 50)
    draw, seen = random.Random(0), dict[str, int]()
    signs = [chr(c) for c in [*range(128), *range(0x80, 0x180), 0x130, 0x2019, 0x2028, 0x3000, 0x4E2D, 0xD800, 0x1F600]]
    for turn in range(500):
        text = "".join(draw.choices(signs if turn % 2 else signs[:128], k=80)) + " the of"
        found, wanted = words.of(text), text.split()
        assert [found.word(i) for i in range(len(found))] == wanted
        assert found.lengths.tolist() == [*map(len, wanted)]
        lettered, marks = found.lettered_and_marks(rules.PUNCTUATION)
        assert lettered.tolist() == [any(map(str.isalpha, w)) for w in wanted]
        assert marks.tolist() == [rules.PUNCTUATION.issuperset(w) for w in wanted]
        assert found.holds(("the", "and", "of")) == 2
        low = words.LETTERS.findall(text.lower())
        for word, number in [
            *zip(wanted, found.numbers.tolist()),
            *zip(low, words.plain_numbers(text).tolist(), strict=True),
        ]:
            assert seen.setdefault(word, number) == number
    assert len(set(seen.values())) == len(seen) > 3000


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of several tasks, with copies across them."""
    monkeypatch.setattr(run, "TASK", 30_000)
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(5):
        texts = [prose(n * 50 + i, 200) for i in range(15)] + [prose(3, 200), edited(prose(n * 50, 200), n)]
        write(folder / f"{n}.jsonl", texts)
    return folder


def same(one: Path, other: Path) -> bool:
    files = [{p.name: p.read_bytes() for p in folder.glob("*.jsonl")} for folder in (one, other)]
    assert len(files[0]) > 3
    return files[0] == files[1]


def test_the_same_bytes_in_any_order_of_tasks_and_after_a_kill(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = clean(several, tmp_path / "one")
    assert found["dropped"]["near_duplicate"]["documents"] == 5
    options = CleanOptions(workers=1)
    plan = run.Plan(tmp_path / "backwards")
    count = plan.begin((str(several),), options)
    for stage, blocks in run.pipeline(plan, options).items():
        for rank in reversed(range(1 if stage == "link" else count)):
            data = None
            for block in blocks:
                data = block.run(data, rank, count)
            list(data)
    assert plan.finish(count) == found
    assert same(tmp_path / "one", tmp_path / "backwards")

    real = near.Write.run
    monkeypatch.setattr(near.Write, "run", lambda self, data, rank=0, world_size=1: _die(real, self, data, rank))
    with pytest.raises(KeyboardInterrupt):
        clean(several, tmp_path / "killed")
    monkeypatch.setattr(near.Write, "run", real)
    monkeypatch.setattr(near.Link, "run", lambda *_: pytest.fail("a finished stage ran again"))
    assert clean(several, tmp_path / "killed") == found
    assert same(tmp_path / "one", tmp_path / "killed")


@pytest.mark.slow  # processes take seconds to import
def test_the_same_bytes_for_any_number_of_workers(several: Path, tmp_path: Path) -> None:
    found = run.clean((str(several),), tmp_path / "two", CleanOptions(workers=2), note=lambda _: None)
    assert clean(several, tmp_path / "one") == found
    assert same(tmp_path / "one", tmp_path / "two")


def _die(real: Any, self: Any, data: Any, rank: int) -> Any:
    if rank == 2:
        raise KeyboardInterrupt
    return real(self, data, rank)


def test_memory_of_linking_is_bounded_by_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many passes over the keys give the clusters of one."""
    texts = [prose(n, 200) for n in range(24)] + [edited(prose(n, 200), n) for n in range(12)]
    path = write(tmp_path / "in.jsonl", texts)
    off: Any = {"quality": "off", "repetition": "off", "c4": "off", "pii": "off"}
    first = clean(path, tmp_path / "one", **off)
    monkeypatch.setattr(near, "PASS", 7)
    monkeypatch.setattr(near, "HELD", 3)
    assert clean(path, tmp_path / "many", **off) == first
    assert first["dropped"]["near_duplicate"]["documents"] == 12


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+x@mail.example.org, please", "write to [EMAIL], please"),
        ("at 8.8.8.8 and 192.168.1.1 here", "at [IP] and 192.168.1.1 here"),
        ("account GB82 WEST 1234 5698 7654 32 there", "account [IBAN] there"),
        ("card 4111 1111 1111 1111 ok", "card [CARD] ok"),
        ("call (202) 555-0143 or +44 20 7946 0958 now", "call [PHONE] or [PHONE] now"),
        ("pi = 3.14159265358979, 0.4111111111111111", None),
        ("oid 1.3.6.1.4.1.311.20.2 and version 8.8.8.8", None),
        ("x = 1234567890; id 4111111111111112; 2024-01-02 10:11:12", None),
    ],
)
def test_personal_data(text: str, masked: str | None) -> None:
    assert pii.mask(text, pii.find(text)) == (masked or text)


@pytest.mark.parametrize("kind", ["EMAIL", "PHONE", "CARD", "IP4"])
def test_finds_are_those_of_the_whole_pattern(kind: str) -> None:
    """A pattern is tried where it may begin, and finds what it finds when it is tried everywhere."""
    whole = getattr(pii, kind)
    finder = {"EMAIL": pii._email, "PHONE": pii._phone, "CARD": pii._card, "IP4": pii._ip}[kind]
    draw, met = random.Random(0), 0
    signs = "0123456789 .-+()@aB_%\n" + ":" * (kind != "IP4")  # with colons its finder finds those of version 6 too
    for _ in range(3000):
        text = "".join(draw.choices(signs, k=40))
        text += draw.choice(["", " a.b@c.de", " (212) 555-0142", " 4111 1111 1111 1111", " 8.8.8.8"])
        found = list(finder(text, [m.start() for m in pii.DIGITS.finditer(text)]))
        wanted = [m.span() for m in whole.finditer(text)]
        assert [span for span in wanted if span in found] == found, text
        met += len(found)
    assert met > 300


def test_steps_mend_and_drop(tmp_path: Path) -> None:
    page = "<!DOCTYPE html><html><body><nav>menu</nav><article><p>" + prose(1, 150) + "</p></article></body></html>"
    texts = [page, prose(2, 150) + " lâ€™été", "lorem ipsum " + prose(3, 150), prose(4, 150) + " a@b.example.com"]
    write(tmp_path / "in.jsonl", texts)
    table = clean(tmp_path / "in.jsonl", tmp_path / "out")
    kept = [row["text"] for row in rows(tmp_path / "out")]
    assert table["kept"] == 3
    assert "lorem_ipsum" in table["dropped"]
    assert "<" not in kept[0]
    assert "l’été" in kept[1]
    assert kept[2].rstrip().endswith("[EMAIL]")
    assert table["found"] == {"masked:email": 1}


def test_show_dropped_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in.jsonl", [prose(1), "too short\n"])
    command = ["data", "clean", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    assert "gopher_short_doc" in capsys.readouterr().out
    assert main(["data", "clean", "--out", str(tmp_path / "out"), "--show-dropped", "gopher_short_doc"]) == 0
    said = capsys.readouterr().out
    assert "2 words, at least 50 are wanted" in said
    assert "too short" in said
    assert main(["data", "clean", "--out", str(tmp_path / "out"), "--show-dropped", "nothing"]) == 2
    assert "rules that dropped some: gopher_short_doc" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", ["short\n"])
    with pytest.raises(InputError, match="nothing is left of 1 documents; most fell to gopher_short_doc"):
        clean(path, tmp_path / "out")
    with pytest.raises(InputError, match="the result of other files or options"):
        clean(path, tmp_path / "out", min_words=0)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match=r"broken.jsonl, line 2"):
        clean(broken, tmp_path / "out2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        clean(path, tmp_path / "full")
    with pytest.raises(InputError, match=r"has no policy\.toml"):
        clean(path, tmp_path / "out3", filter=str(tmp_path))
    (tmp_path / "policy.toml").write_text("")
    with pytest.raises(InputError, match=r"filter\.json cannot be read"):
        clean(path, tmp_path / "out3", filter=str(tmp_path))
    for wrong in ({"dedup": 2.0}, {"pii_kinds": ("name",)}, {"lang": ("English",)}, {"executor": "slurm"}):
        with pytest.raises(InputError, match="--"):
            clean(path, tmp_path / "out4", **wrong)
    assert not (tmp_path / "out4").exists()
    shutil.rmtree(tmp_path / "full")


def test_a_refused_call_leaves_nothing_and_a_broken_one_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", [])
    with pytest.raises(InputError, match="empty"):
        clean(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write(folder / "a.jsonl", [prose(n) for n in range(4)])
    for inside in (folder / "out", folder):  # the second call would read it
        with pytest.raises(InputError, match=r"would be read as a part|holds"):
            clean(folder, inside)
    with pytest.raises(InputError, match="would be read as a part"):
        run.clean((str(tmp_path / "*" / "*.jsonl"),), tmp_path / "out", CleanOptions(workers=1), note=lambda _: None)
    assert [p.name for p in folder.iterdir()] == ["a.jsonl"]
    # killed before there was a plan; its marks count for nothing
    marks = tmp_path / "out" / ".clean" / "logs" / "clean" / "completions"
    marks.mkdir(parents=True)
    (marks / "00000").touch()
    assert clean(folder, tmp_path / "out", min_words=0)["kept"] == 4
    rows_of_tasks = tmp_path / "out" / ".clean" / "rows"
    assert not rows_of_tasks.exists()
    rows_of_tasks.mkdir()  # killed between the table and their removal
    assert clean(folder, tmp_path / "out", min_words=0)["kept"] == 4
    assert not rows_of_tasks.exists()
    assert not list((tmp_path / "out" / ".clean").glob("*.draft"))


def test_groups_and_names_that_are_no_utf8_are_kept(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"name-\xff.jsonl")
    path.write_bytes(b"".join(b'{"text": "%s", "group": "a\\ud83d"}\n' % prose(n).strip().encode() for n in range(3)))
    assert clean(path, tmp_path / "out", min_words=0)["kept"] == 3
    found = rows(tmp_path / "out")
    assert {row["group"] for row in found} == {"a\ud83d"}
    assert all(path.name in row["source"] for row in found)
    assert dumps({"a": "ä\udcff"}) == '{"a": "\\u00e4\\udcff"}'
    assert dumps({"a": "ä"}) == '{"a": "ä"}'


def _watchers() -> list[str]:
    executor.begin_beneath()
    executor.begin_beneath()
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("how", [signal.SIG_IGN, signal.default_int_handler])
def test_a_task_watches_its_parent_whatever_sigint_is(how: Any) -> None:
    """nohup, and shells that start a command in the background, ignore SIGINT from the beginning."""
    import multiprocess

    before = signal.signal(signal.SIGINT, how)
    try:
        with multiprocess.get_context("fork").Pool(1) as pool:
            assert pool.apply(_watchers).count("leave with parent") == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert "leave with parent" not in _watchers()  # the process that began has no parent to watch


def test_jaccard_is_that_of_sets() -> None:
    a, b = np.array([1, 2, 3], np.uint64), np.array([2, 3, 4, 5], np.uint64)
    assert words.jaccard(a, b) == 2 / 5


def _fails(with_: BaseException) -> Any:
    def run_(*_: Any) -> Any:
        raise with_

    return run_


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path / "in.jsonl", [prose(n) for n in range(4)]), tmp_path / "out"
    command = ["data", "clean", str(path), "--out", str(out), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(near.Write, "run", _fails(OSError(errno.ENOSPC, "No space left on device")))
        assert main(command) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(
        "No space left on device; the tasks that are done are kept, make room and the same command goes on"
    )
    assert "\n" not in said
    monkeypatch.setattr(near.Keep, "run", _fails(AssertionError("a finished stage ran again")))
    assert main(command) == 0
    assert len(rows(out)) == 4


def test_ctrl_c_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in.jsonl", [prose(1)])
    monkeypatch.setattr(near.Write, "run", _fails(KeyboardInterrupt()))
    assert main(["data", "clean", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 130
    assert "interrupted; what is done is kept, and the same command goes on" in capsys.readouterr().err


def test_an_array_on_disk_takes_its_room_when_it_is_made(tmp_path: Path) -> None:
    """A sparse file that is mapped would end the process with SIGBUS on a full disk, page by page."""
    array = near.mapped(tmp_path / "x", np.int64, 100_000)
    assert array.shape == (100_000,)
    assert (tmp_path / "x").stat().st_blocks * 512 >= 800_000
    array[7] = 1
    array.flush()
    assert np.fromfile(tmp_path / "x", np.int64).sum() == 1
    with pytest.raises(OSError, match="No space left on device"):
        near.mapped(Path("/dev/full"), np.int64, 10)
