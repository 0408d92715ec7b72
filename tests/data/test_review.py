"""`fastlm review`: what people say is kept once, whoever writes at the same time and whatever ends in between."""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastlm.cli.main import main
from fastlm.data import InputError, annotate
from fastlm.data.review import Conflict, Item, Judgement, Store, items, results, store

LABELS = ("harmless", "harmful")


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Store]:
    own = Store.make(tmp_path / "reviews.db", "tasks.json", LABELS, 0)
    own.add(Item({"text": f"text {i}"}, unsure=float(i)) for i in range(10))
    yield own
    own.close()


def texts(found: list[dict[str, Any]]) -> list[str]:
    return [one["text"] for one in found]


# ------------------------------------------------------------------------------------------------------------ the queue


def test_the_least_sure_come_first_and_nobody_gets_one_twice(made: Store) -> None:
    seen = []
    while found := made.next("ann", "w", count=1):
        seen += texts(found)
        made.judge("ann", f"r{len(seen)}", found[0]["id"], Judgement("harmless"))
    assert seen == [f"text {i}" for i in reversed(range(10))]
    assert texts(made.next("bob", "w", count=3)) == ["text 9", "text 8", "text 7"]  # of another person all


def test_two_windows_of_one_person_do_not_hold_the_same(made: Store) -> None:
    one, two = made.next("ann", "a", count=4), made.next("ann", "b", count=20)
    assert len(two) == 6
    assert not {*texts(one)} & {*texts(two)}
    assert texts(made.next("ann", "a", count=20)) == texts(one)  # a page that is loaded again gets its own
    assert made.next("ann", "a", have=[i["id"] for i in one], count=20) == []


def test_an_item_goes_to_as_many_people_as_are_asked_for(tmp_path: Path) -> None:
    own = Store.make(tmp_path / "reviews.db", "t", LABELS, 2)
    own.add(Item({"text": f"{i}"}) for i in range(50))
    rng, said = random.Random(3), Counter[int]()
    people, number = [f"p{i}" for i in range(5)], itertools.count()
    while people:
        who = rng.choice(people)
        if not (found := own.next(who, "w", count=1)):
            people.remove(who)
            continue
        own.judge(who, f"r{next(number)}", found[0]["id"], Judgement("harmful"))
        said[found[0]["id"]] += 1
    assert set(said.values()) == {2}
    assert len(said) == 50


def test_who_goes_offline_gives_back_what_was_lent_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, now = Store.make(tmp_path / "reviews.db", "t", LABELS, 1), [1000.0]
    monkeypatch.setattr(store.time, "time", lambda: now[0])
    own.add([Item({"text": "a"})])
    (item,) = own.next("ann", "w")
    assert own.next("bob", "w") == []
    now[0] += store.LENT + 1
    assert own.next("bob", "w") == [item]
    own.judge("bob", "1", item["id"], Judgement("harmless"))
    own.judge("ann", "2", item["id"], Judgement("harmful"))  # back again: it counts as well
    assert own.progress()["judgements"] == 2


def test_many_threads_at_once_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    own = Store.make(tmp_path / "reviews.db", "t", LABELS, 1)
    own.add(Item({"text": f"{i}"}) for i in range(120))
    given: list[tuple[str, int, str]] = []

    def work(who: str) -> None:
        rng = random.Random(who)
        while found := own.next(who, "w", count=2):
            for one in found:
                label = rng.choice(LABELS)
                for _ in range(2):  # each request comes twice
                    own.judge(who, f"{who} {one['id']}", one["id"], Judgement(label))
                given.append((who, one["id"], label))

    threads = [threading.Thread(target=work, args=(f"p{i}",)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    rows = sqlite3.connect(own.path).execute("SELECT reviewer, item, label FROM judgements").fetchall()
    assert sorted(rows) == sorted(given)
    assert len({item for _, item, _ in rows}) == len(rows) == 120


# ---------------------------------------------------------------------------------------------- judgements and the audit


def test_undo_takes_back_and_the_audit_keeps_both(made: Store) -> None:
    (one,) = made.next("ann", "w")
    made.judge("ann", "1", one["id"], Judgement("harmless", 1, "better"))
    assert made.undo("bob", "w", "2") is None
    back = made.undo("ann", "w", "3")
    assert back == one | {"said": {"label": "harmless", "thumb": 1, "better": "better"}}
    assert made.undo("ann", "w", "3") is None  # the same request again
    assert made.next("ann", "w") == [one]
    made.judge("ann", "4", one["id"], Judgement("harmful"))
    assert [row[3] for row in made.audit()] == ["made", "added", "judged", "undone", "judged"]
    assert [data["text"] for data, said in made.judged() if said] == [one["text"]]
    undone = made.undo("ann", "w", "5", one["id"])
    assert undone is not None
    assert undone["said"]["label"] == "harmful"


def test_the_audit_table_only_grows(made: Store) -> None:
    other = sqlite3.connect(made.path)
    for sql in ("DELETE FROM audit", "UPDATE audit SET said = ''"):
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            other.execute(sql)


def test_a_second_judgement_of_one_person_is_refused_and_kept_in_the_audit(made: Store) -> None:
    (one,) = made.next("ann", "a")
    made.judge("ann", "1", one["id"], Judgement("harmless"))
    with pytest.raises(Conflict, match="already"):
        made.judge("ann", "2", one["id"], Judgement("harmful"))
    made.judge("ann", "2", one["id"], Judgement("harmful"))  # that request again is known
    assert [said for _, said in made.judged() if said] == [[("ann", Judgement("harmless"))]]
    assert json.loads(made.audit()[-1][5])["label"] == "harmful"


@pytest.mark.parametrize("said, why", [
    (Judgement("rude"), "none of the labels"), (Judgement(thumb=2), "thumb"), (Judgement(better=" \n"), "empty"),
    (Judgement(better="text 9 "), "prefer nothing"), (Judgement(better="x" * 100_001), "at most 100,000"),
])  # fmt: skip
def test_what_cannot_be_said_is_one_sentence_and_leaves_no_trace(made: Store, said: Judgement, why: str) -> None:
    (one,) = made.next("ann", "w")
    before = made.audit()
    with pytest.raises(InputError, match=why):
        made.judge("ann", "1", one["id"], said)
    with pytest.raises(InputError, match="no item 99"):
        made.judge("ann", "2", 99, Judgement("harmless"))
    assert made.audit() == before


def test_the_file_is_its_owner_s_and_opens_again_as_it_was(made: Store) -> None:
    assert made.path.stat().st_mode & 0o077 == 0
    assert made._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    (one,) = made.next("ann", "w")
    made.judge("ann", "1", one["id"], Judgement("harmless"))
    again = Store.make(made.path, "tasks.json", ("other",), 3)
    assert (again.meta("token"), again.labels) == (made.meta("token"), [*LABELS])
    assert again.add(Item({"text": f"text {i}"}, 5.0) for i in range(12)) == 2  # those that are there stay
    assert again.progress()["judgements"] == 1
    with pytest.raises(InputError, match="leaves out 'harmless'"):
        again.settle(("harmful",), None)
    again.settle(("harmless", "rude"), 1)
    assert made.labels == ["harmless", "rude"]
    again.close()


def test_a_kill_while_it_is_made_leaves_what_the_next_call_makes_whole(tmp_path: Path) -> None:
    path = tmp_path / "reviews.db"
    path.touch()
    Store.make(path, "t", LABELS, 0).close()
    path.unlink()
    sqlite3.connect(path).execute("PRAGMA journal_mode = WAL")
    own = Store.make(path, "t", LABELS, 0)
    assert own.add([Item({"text": "a"})]) == 1


# -------------------------------------------------------------------------------------------------------------- bad input


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    return err


def tasks(path: Path, count: int = 4) -> Path:
    path.write_text(json.dumps([{"id": i, "data": {"text": f"text {i}"}} for i in range(count)]))
    return path


def test_bad_input_is_one_sentence_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flask")
    own, path = tasks(tmp_path / "tasks.json"), tmp_path / "reviews.db"
    Store.make(path, "tasks.json", LABELS, 0).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    before = path.read_bytes()
    for words in (["review", str(own)], ["review", str(path)], ["data", "pairs", str(path), "--out", "no"]):
        assert "of another version: its format is 7, and this one reads 1" in refused(words, capsys)
    assert path.read_bytes() == before
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE a (b)").connection.commit()
    assert "is no database of fastlm review" in refused(["review", str(tmp_path / "other.db")], capsys)
    path.unlink()
    Store.make(path, "those.json", LABELS, 0).close()
    assert "holds a review of those.json, not of tasks.json: name another" in refused(["review", str(own)], capsys)
    path.unlink()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be had" in refused(["review", str(own), "--port", port], capsys)
    assert "no run, file of tasks or database nothing" in refused(["review", "nothing"], capsys)
    assert "--labels" in refused(["review", str(own), "--labels", *"abcdefghij"], capsys)
    for text, why in (("{", "cannot be read"), ("[]", "no task"), ('[{"data": {}}]', "task 1"),
                      ('[{"data": {"text": "a"}, "predictions": [{"score": "x"}]}]', "predictions")):  # fmt: skip
        own.write_text(text)
        assert why in refused(["review", str(own), "--db", str(tmp_path / "new.db")], capsys)
    assert not (tmp_path / "new.db").exists()


def test_items_come_by_predictions_or_by_the_filter_given(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([
        {"data": {"text": name}, "predictions": [{"score": score}]} for name, score in (("a", 0.9), ("b", 0.2), ("c", 0.5))
    ]))  # fmt: skip
    assert [one.text for one in items.ordered(items.read(path))] == ["b", "c", "a"]
    words = tmp_path / "words.txt"
    words.write_text("darn\n")
    assert main(["data", "filter", "--words", str(words), "--out", str(tmp_path / "f")]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n{"prompt": "p", "completion": "well"}\n')
    found = items.read(rows, str(tmp_path / "f"))
    assert [(one.text, one.prompt, one.unsure) for one in found] == [("fine", None, -0.5), ("well", "p", -0.5)]


# ------------------------------------------------------------------------------------------------------ what comes of it


def test_labels_take_the_database_and_its_export_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tasks(tmp_path / "tasks.json")
    made = Store.make(tmp_path / "reviews.db", "tasks.json", LABELS, 0)
    made.add(items.read(own))
    for number, (who, label) in enumerate((("ann", "harmful"), ("bob", "harmful"), ("cy", "harmless"))):
        for one in made.next(who, "w", count=3):
            made.judge(who, f"{number} {one['id']}", one["id"], Judgement(label))
    (last,) = made.next("ann", "w")
    made.judge("ann", "skip", last["id"], Judgement())
    made.close()
    assert main(["review", str(own), "--export", str(tmp_path / "export.json")]) == 0
    assert "4 items, 10 judgements" in capsys.readouterr().out
    by_file, by_base = annotate.read([tmp_path / "export.json"]), annotate.read([tmp_path / "reviews.db"])
    assert by_file == by_base
    assert Counter(who for _, who, _ in by_base[0]) == {"ann": 3, "bob": 3, "cy": 3}
    assert {data["text"] for data in by_base[1].values()} == {f"text {i}" for i in range(4)}
    pytest.importorskip("crowdkit")
    assert main(["data", "labels", str(tmp_path / "reviews.db"), "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["harmful"] * 3


CHAT = [{"role": "user", "content": "2+2?"}]


def test_pairs_of_better_answers_and_of_thumbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "reviews.db", tmp_path / "pairs.jsonl"
    made = Store.make(path, "run", (), 0)
    rows = [("p", "good"), ("p", "bad"), ("p", "so so"), ("q", "alone"), (CHAT, "5"), ("r", ""), ("s", "x"), ("s", "y")]
    made.add(Item({"prompt": prompt, "text": text}) for prompt, text in rows)
    number = {one["text"]: one["id"] for one in made.next("ann", "w", count=20)}
    say = lambda who, text, **said: made.judge(who, f"{who} {text}", number[text], Judgement(**said))
    assert "holds no pair" in refused(["data", "pairs", str(path), "--out", str(out)], capsys)
    say("ann", "good", thumb=1)
    say("bob", "good", thumb=1)
    say("cy", "good", thumb=-1)
    say("ann", "bad", thumb=-1)
    say("ann", "so so", thumb=1)
    say("bob", "so so", thumb=-1)  # undecided
    say("ann", "alone", thumb=1)
    say("ann", "5", better="4", thumb=-1)
    say("ann", "", better="something")
    say("ann", "x", better="y")
    say("ann", "y", better="x")
    assert main(["data", "pairs", str(path), "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    answer = lambda text: [{"role": "assistant", "content": text}]
    assert [(row["prompt"], row["chosen"], row["rejected"], row["from"]) for row in found] == [
        (CHAT, answer("4"), answer("5"), "better answer"),
        ("p", "good", "bad", "thumbs"),
    ]
    assert "2 left out: another judgement says the opposite" in capsys.readouterr().out
    from fastlm.data import tokenizer as tokenizers
    from fastlm.data.tuning import Rendering

    for line in out.read_bytes().splitlines():  # they are rows of --dpo
        assert len(Rendering("dpo", "", 100).sequences(line, tokenizers.ByteTokenizer())) == 2


def test_answers_without_a_prompt_make_pairs_of_better_answers_alone(tmp_path: Path) -> None:
    made = Store.make(tmp_path / "reviews.db", "t", LABELS, 0)
    made.add([Item({"text": "a"}), Item({"text": "b"})])
    for one, said in zip(made.next("ann", "w", count=2), (Judgement(thumb=1, better="c"), Judgement(thumb=-1))):
        made.judge("ann", one["text"], one["id"], said)
    rows, left = results.pairs(made)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [("", "c", "a")]
    assert not left


# ------------------------------------------------------------------------------------------------------------ who may ask


@pytest.fixture
def client(made: Store) -> Any:
    pytest.importorskip("flask")
    from fastlm.data.review import app

    return app.app(made).test_client()


OURS = {"Origin": "http://127.0.0.1:8642", "Host": "127.0.0.1:8642"}
ASK = {"reviewer": "ann", "window": "w", "count": 1, "have": []}


def test_the_page_is_served_with_a_policy_and_without_the_token(client: Any, made: Store) -> None:
    for path in ("/", "/page.css", "/page.js"):
        found = client.get(path, headers={"Host": "localhost:8642"})
        assert found.status_code == 200
        assert "default-src 'none'" in found.headers["Content-Security-Policy"]
        assert made.meta("token") not in found.text
        assert "http" not in found.text.replace("http://www.w3.org", "")  # it refers to nothing outside


@pytest.mark.parametrize("changed", [
    {"X-Fastlm-Token": "wrong"}, {"X-Fastlm-Token": None}, {"X-Fastlm-Token": "\xe9"}, {"Origin": "http://127.0.0.1:3000"},
    {"Origin": None}, {"Origin": "null"}, {"Host": "evil.example:8642", "Origin": "http://evil.example:8642"},
    {"Origin": "https://127.0.0.1:8642"},
])  # fmt: skip
def test_no_other_page_and_nobody_without_the_token_may_ask(
    client: Any, made: Store, changed: dict[str, str | None]
) -> None:
    whole = OURS | {"X-Fastlm-Token": made.meta("token")}
    for path, body in (("next", ASK), ("judge", ASK | {"request": "1", "item": 1, "label": "harmless"}),
                       ("undo", ASK | {"request": "2"})):  # fmt: skip
        headers = {name: value for name, value in (whole | changed).items() if value is not None}
        found = client.post(f"/api/{path}", json=body, headers=headers)
        assert found.status_code == 403, path
        assert "text" not in found.text.replace("context", "")
    assert made.progress()["judgements"] == 0
    assert client.post("/api/next", json=ASK, headers=whole).status_code == 200


@pytest.mark.parametrize("path, body, status", [
    ("next", [], 400), ("next", ASK | {"reviewer": " "}, 400), ("next", ASK | {"reviewer": "x" * 61}, 400),
    ("next", ASK | {"have": ["1"]}, 400), ("next", ASK | {"count": 10**30}, 400), ("next", ASK | {"window": 1}, 400),
    ("judge", ASK | {"request": "1", "item": 1, "label": "rude"}, 400), ("judge", ASK | {"item": 1}, 400),
    ("judge", ASK | {"request": "1", "item": 10**9, "label": "harmless"}, 400),
    ("judge", ASK | {"request": "1", "item": True, "label": "harmless"}, 400),
    ("judge", ASK | {"request": "\ud800", "item": 1, "label": "harmless"}, 400),
    ("judge", ASK | {"request": "1", "item": 1, "better": "x" * 900_000}, 413),
])  # fmt: skip
def test_requests_that_cannot_be_are_refused_in_words(
    client: Any, made: Store, path: str, body: Any, status: int
) -> None:
    headers = OURS | {"X-Fastlm-Token": made.meta("token"), "Content-Type": "application/json"}
    found = client.post(f"/api/{path}", data=json.dumps(body), headers=headers)
    assert found.status_code == status, found.text
    assert status == 413 or found.json["error"]
    assert made.progress()["judgements"] == 0


def test_a_full_disk_is_said_and_the_judgement_can_come_again(client: Any, made: Store) -> None:
    made._db.execute(f"PRAGMA max_page_count = {made._db.execute('PRAGMA page_count').fetchone()[0]}")
    headers = OURS | {"X-Fastlm-Token": made.meta("token")}
    body = ASK | {"request": "1", "item": 1, "label": "harmless", "better": "x" * 50_000}
    found = client.post("/api/judge", json=body, headers=headers)
    assert (found.status_code, "full" in found.json["error"]) == (507, True)
    assert made.progress()["judgements"] == 0
    made._db.execute("PRAGMA max_page_count = 100000")
    assert client.post("/api/judge", json=body, headers=headers).json["progress"]["mine"] == 1


def test_a_database_that_nobody_may_write_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flask")
    own = tasks(tmp_path / "tasks.json")
    assert "cannot write" in refused(["review", str(own), "--db", str(tmp_path / "none" / "reviews.db")], capsys)
    if os.geteuid():
        (tmp_path / "kept").mkdir(mode=0o500)
        assert "cannot write" in refused(["review", str(own), "--db", str(tmp_path / "kept" / "reviews.db")], capsys)
