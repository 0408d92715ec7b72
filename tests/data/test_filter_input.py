"""`fastlm data filter`: the rows that it reads, and bad input in one sentence."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from fastlm.cli.main import main
from fastlm.data.errors import InputError
from fastlm.data.filter import labelled, policy
from filter_rows import texts


def test_bad_input_is_one_sentence(
    rows: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        assert main(["data", "filter", *words]) == 2
        text = capsys.readouterr().err
        assert "\n" not in text.strip()
        return text

    def written(name: str, lines: list[str]) -> str:
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    out = ("--out", str(tmp_path / "out"))
    one = written("one.jsonl", ['{"text": "a", "label": "insult"}'] * 50)
    assert "all 50 texts are labelled 'insult'; a filter needs harmful and harmless ones" in said(one, *out)
    two = written("two.jsonl", ['{"text": "a", "label": "x"}', '{"text": "b", "label": "y"}'] * 30)
    assert "which of the labels x, y means that a text is harmless?" in said(two, *out)
    assert "--harmless z: no text has this label; there are x, y" in said(two, *out, "--harmless", "z")
    few = written("few.jsonl", ['{"text": "a", "label": "x"}'] * 30 + ['{"text": "b", "label": "none"}'])
    assert "30 harmful and 1 harmless texts; at least 20 of each" in said(few, *out)
    broken = written("broken.jsonl", ['{"text": "a", "label": "x"}', '{"text": '])
    assert "broken.jsonl, line 2 is not JSON" in said(broken, *out)
    bare = written("bare.csv", ["text,label", "a,x", "b"])
    assert "bare.csv, line 3 has no label in the field 'label'" in said(bare, *out)
    assert "has no text in the field 'body'" in said(str(rows), *out, "--field", "body")
    assert "labelled texts are rows of" in said(written("a.txt", ["x"]), *out)
    assert "cannot be read" in said(str(tmp_path / "none.jsonl"), *out)
    assert "--out FOLDER is needed" in said(str(rows))
    assert "a.txt is a file" in said(str(rows), "--out", str(tmp_path / "a.txt" / "filter"))
    assert "give labelled texts or --words" in said(*out)
    assert "--attack needs labelled texts" in said("--words", "auto", "--attack", *out)
    assert "--precision must be" in said(str(rows), *out, "--precision", "1.5")
    shutil.copytree(folder, tmp_path / "edited")
    path = tmp_path / "edited" / policy.NAME
    path.write_text(path.read_text().replace("share = 0.1", "share = 0.5"))
    assert "holds a filter whose policy was edited" in said(str(rows), "--out", str(path.parent))
    assert "share = 0.5" in path.read_text()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is not empty and holds no filter" in said(str(rows), "--out", str(tmp_path / "full"))
    assert "is a file" in said(str(rows), "--out", one)
    assert not (tmp_path / "out").exists()


def test_rows_may_be_csv_json_and_what_labels_writes(tmp_path: Path) -> None:
    some = texts(3, 90)
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f'"{r["text"]}",{int(r["label"] != "harmless")}\n' for r in some)
    )
    found = labelled.read((str(tmp_path / "a.csv"),))
    assert {c for row in found for c in row.categories} == {"toxic"}
    (tmp_path / "a.json").write_text(json.dumps([{"text": r["text"], "label": [r["label"], "threat"]} for r in some[1:60]]
                                                + [{"text": "a", "label": False}] * 30))  # fmt: skip
    found = labelled.read((str(tmp_path / "a.json"),), harmless=("False", "harmless"))
    assert sum(not row.categories for row in found) == 30
    crowd = tmp_path / "crowd.jsonl"
    crowd.write_text("".join(json.dumps({**r, "label": "insult|threat" if r["label"] != "harmless" else "neither", "group": "g",
                                         "confidence": 1.0}) + "\n" for r in some))  # fmt: skip
    found = labelled.read((str(crowd),))
    assert {row.categories for row in found} == {frozenset(), frozenset({"insult", "threat"})}
    assert len({row.mark for row in found}) == 1, "copies of a group stay together"
    assert math.isfinite(found[0].mark)


@pytest.mark.parametrize(("labels", "safe"), [
    ((0, 1), "0"), (("False", "True"), "False"), (("no", "YES"), "no"), ((0.0, 1.0), "0"), ((False, True), "False"),
    ((0, 1, 2), ""), (("0", "1", "2"), ""), (("no", "hate"), ""), ((0, "insult"), ""), ((0, 1, "neither"), ""),
    ((1, "none"), "none"),
])  # fmt: skip
def test_zero_is_harmless_beside_one_alone(tmp_path: Path, labels: tuple[object, ...], safe: str) -> None:
    """In the set of Davidson et al. 0 is hate, 1 offensive, 2 neither."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{at} {i}", "label": label}) + "\n" for i in range(30)
                            for at, label in enumerate(labels)))  # fmt: skip
    if safe:
        found = labelled.read((str(path),))
        assert found == labelled.read((str(path),), harmless=(safe,))
        assert {row.categories for row in found} == {frozenset(), frozenset({"toxic"})}
    else:
        with pytest.raises(InputError, match=r"which of the labels .* means that a text is harmless"):
            labelled.read((str(path),))
        assert len(labelled.read((str(path),), harmless=(str(labels[-1]),))) == 30 * len(labels)


def test_rows_of_other_programs_are_read(tmp_path: Path) -> None:
    """A byte order mark, numbers with a point, and what is nested too deep."""
    for name, head, row in (("a.csv", "text,label\n", "a{0},{1}\n"), ("a.tsv", "text\tlabel\n", "a{0}\t{1}\n"),
                            ("a.jsonl", "", '{{"text": "a{0}", "label": {1}.0}}\n')):  # fmt: skip
        text = head + "".join(row.format(i, i % 2) for i in range(60))
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        found = labelled.read((str(tmp_path / name),))
        assert sum(bool(r.categories) for r in found) == 30, name
    (tmp_path / "b.json").write_text(json.dumps([{"text": f"a{i}", "label": [float(i % 2)]} for i in range(60)]))
    assert sum(bool(r.categories) for r in labelled.read((str(tmp_path / "b.json"),))) == 30
    deep = "[" * 100_000
    for name, said in (("c.json", r"c\.json cannot be read"), ("c.jsonl", r"c\.jsonl, line 1 is not JSON")):
        (tmp_path / name).write_text(deep)
        with pytest.raises(InputError, match=said):
            labelled.read((str(tmp_path / name),))
    for label, said in (("NaN", "has no label"), ("0.5", "has no label"), ('"\\ud83e"', "half a surrogate pair")):
        (tmp_path / "d.jsonl").write_text(f'{{"text": "a", "label": {label}}}\n')
        with pytest.raises(InputError, match=said):
            labelled.read((str(tmp_path / "d.jsonl"),))
