"""`fastlm data tasks` and `labels`: out to annotators and back without loss, and merged better than by majority."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import pytest
from fastlm.cli.main import main

pytest.importorskip("crowdkit")
pytest.importorskip("krippendorff")


def test_out_and_back_without_loss_and_spammers_do_not_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"text {i} with an ä"} for i in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["data", "tasks", str(tmp_path / "in.jsonl"), "--n", "50", "--out", str(tmp_path / "t.json")]) == 0
    tasks = json.loads((tmp_path / "t.json").read_text())
    assert len({t["data"]["text"] for t in tasks}) == 50
    rng, exports = random.Random(1), []
    for who in range(5):  # three are right nine times in ten, two say the same always
        for t in tasks:
            truth = "yes" if t["id"] % 2 else "no"
            other = "no" if truth == "yes" else "yes"
            label = "yes" if who > 2 else truth if rng.random() < 0.9 else other
            result = [{"type": "choices", "value": {"choices": [label]}}]
            t["annotations"] = [{"completed_by": {"email": f"a{who}@x"}, "result": result}]
        exports.append(str(tmp_path / f"e{who}.json"))
        Path(exports[-1]).write_text(json.dumps(tasks))
    out, again = tmp_path / "out.jsonl", tmp_path / "again.json"
    assert main(["data", "labels", *exports, "--out", str(out), "--disputed", str(again), "--below", "1.01"]) == 0
    said = capsys.readouterr().out
    assert "250 labels" in said
    assert "a4@x: agrees" in said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    right = sum(r["label"] == ("yes" if t["id"] % 2 else "no") for r, t in zip(found, tasks))
    assert right >= 44
    for r, t in zip(found, tasks):
        assert {k: r[k] for k in t["data"]} == t["data"]
        assert len(r["annotations"]) == 5
    key = lambda d: d["text"]
    back = sorted((t["data"] for t in json.loads(again.read_text())), key=key)
    assert back == sorted((t["data"] for t in tasks), key=key)


def test_bad_exports_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json"
    for text, why in (
        ("{", "is no export"),
        ('[{"data": 1, "annotations": [{}]}]', "task 1"),
        ("[]", "hold no annotation"),
    ):
        bad.write_text(text)
        assert main(["data", "labels", str(bad), "--out", str(tmp_path / "o")]) == 2
        assert why in capsys.readouterr().err


def export(path: Path, by: object, labels: list[str], text: str = "text") -> str:
    items = [
        {"data": {"text": f"{text} {n}"}, "annotations": [
            {"completed_by": by, "result": [{"type": "choices", "value": {"choices": [label]}}]}]}
        for n, label in enumerate(labels)
    ]  # fmt: skip
    path.write_text(json.dumps(items))
    return str(path)


def test_one_number_in_two_exports_is_two_annotators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (export(tmp_path / f"{name}.json", 1, ["yes", "no"], "a \udcff") for name in ("one", "two"))
    out = tmp_path / "out.jsonl"
    assert main(["data", "labels", one, two, "--out", str(out)]) == 0
    assert "4 labels" in capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["annotations"] for row in found] == [{"one:1": "yes", "two:1": "yes"}, {"one:1": "no", "two:1": "no"}]
    assert found[0]["text"] == "a \udcff 0"  # bytes that were no UTF-8 come back as they were


@pytest.mark.parametrize("words", [["tasks", "--n", "0"], ["labels", "--below", "nan"], ["labels", "--below", "80"]])
def test_a_number_out_of_range_is_one_sentence(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = export(tmp_path / "one.json", 1, ["yes", "no"])
    assert main(["data", words[0], one, *words[1:], "--out", str(tmp_path / "out")]) == 2
    assert f"{words[1]} must be at least" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    assert main(["data", "tasks", str(path), "--out", str(tmp_path / "t.json")]) == 2
    assert f"{path}, line 2" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = export(tmp_path / "one.json", 1, ["yes", "no"]), tmp_path / "out.jsonl"
    out.write_text("before\n")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["data", "labels", one, "--out", str(out)]) == 2
    assert f"cannot write {out}: No space left on device" in capsys.readouterr().err
    assert out.read_text() == "before\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "out.jsonl"]
