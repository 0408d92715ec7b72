"""Readers: each way into a corpus gives its texts, and what is cut off, damaged or no text is refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from fastlm.data import InputError
from fastlm.data.corpus import documents, expand
from test_corpus import ready, words

# ------------------------------------------------------------------------------------------------- formats and damage


ROWS = [
    'plain "quoted"',
    "two\nlines, one comma",
    "café \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
]


def packed(path: Path, data: bytes) -> Path:
    """`data` written as the suffix of the name compresses it."""
    import bz2
    import lzma

    pack: dict[str, Any] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    if path.suffix == ".zst":
        pack[".zst"] = pytest.importorskip("zstandard").compress
    path.write_bytes(pack.get(path.suffix, bytes)(data))
    return path


def as_table(texts: list[str], delimiter: str) -> bytes:
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "output"], *([i, t] for i, t in enumerate(texts))])
    return out.getvalue().encode()


FORMS = {
    ".json": lambda texts: json.dumps([{"id": i, "output": t} for i, t in enumerate(texts)], indent=1).encode(),
    ".jsonl": lambda texts: "".join(json.dumps({"id": 0, "output": t}) + "\n" for t in texts).encode(),
    ".csv": lambda texts: as_table(texts, ","),
    ".tsv": lambda texts: as_table(texts, "\t"),
}
FORMS[".ndjson"] = FORMS[".jsonl"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("kind", FORMS)
def test_rows_of_every_form_are_their_texts(kind: str, suffix: str, tmp_path: Path) -> None:
    path = packed(tmp_path / f"rows{kind}{suffix}", FORMS[kind](ROWS))
    assert [p.text.decode() for p in documents(path, "output")] == ROWS
    with pytest.raises(InputError, match=r"body.*output"):
        list(documents(path, "body"))
    bom = packed(tmp_path / f"bom{kind}{suffix}", b"\xef\xbb\xbf" + FORMS[kind](ROWS))
    assert [p.text.decode() for p in documents(bom, "output")] == ROWS
    in_folder = expand((str(tmp_path),))
    assert in_folder == sorted([path, bom])


def test_a_json_means_what_it_holds(tmp_path: Path) -> None:
    def read(text: str, field: str = "text") -> list[str]:
        (tmp_path / "a.json").write_text(text)
        return [p.text.decode() for p in documents(tmp_path / "a.json", field)]

    assert read('{"text": "a"}\n{"text": "b"}') == ["a", "b"]  # lines
    assert read('{"text": "a"}\n\n') == ["a"]
    assert read('{\n"name": "a package",\n "text": "the text"\n}') == ["the text"]
    for source in (
        '{\n"name": "a package"\n}',
        '["a", "b"]',
        "[1, 2]",
        "[]",
        "3",
        '{"text": 3}',
    ):  # no rows: as it stands
        assert read(source) == [source]
        with pytest.raises(InputError, match="no rows with 'body'"):
            read(source, "body")
    assert read(' [\n\n {"text": "a"}\n,{"text": "b" } ] \n') == ["a", "b"]
    for damaged in ('[{"text": "a"}, {"te', '[{"text": "a"} {"text": "b"}]', '[{"text": "a"}', '[{"text": "a"}] 3',
                    '[{"text": "a"}, 3]', '[{"text": "a"},]', '[{"text": 3}]'):  # fmt: skip
        with pytest.raises(InputError, match=r"a\.json"):
            read(damaged)


def test_a_long_json_array_is_read_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlm.data.cutting.JOB", 1000)
    texts = [words(i, 10 + 137 * i) for i in range(40)]  # many to a read, and one over several
    path = packed(tmp_path / "a.json", FORMS[".json"](texts))
    assert [p.text.decode() for p in documents(path, "output")] == texts


def test_a_damaged_table_is_refused_by_line(tmp_path: Path) -> None:
    for text, message in (
        ("text,id\none,1\ntwo\n", "line 3: the row has 1 columns"),
        ('text,id\n"one,1\n', "line 2"),
        ("text;id\none;1\n", "column 'text'"),
    ):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            list(documents(tmp_path / "a.csv"))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("kind", [".txt", *FORMS])
def test_what_was_cut_off_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    text = words(3, 60_000)
    whole = FORMS[kind]([text] * 3) if kind != ".txt" else text.encode()
    path = packed(tmp_path / f"a{kind}{suffix}", whole)
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 5, 0):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="a" + kind):
            list(documents(path, "output"))


def test_frames_and_members_follow_each_other(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst", ".xz", ".bz2"):
        one = packed(tmp_path / f"one{suffix}", words(4, 5000).encode()).read_bytes()
        (tmp_path / f"two.txt{suffix}").write_bytes(one + one)
        assert b"".join(p.text for p in documents(tmp_path / f"two.txt{suffix}")).decode() == 2 * words(4, 5000)


ZERO = b"good text\n" * 20_000 + b"a \0 zero\n" + b"good text\n" * 100


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("way", ["whole", "separator", "parts", ".jsonl", ".json", ".csv"])
def test_byte_0_is_refused_wherever_it_stands(
    way: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late in the file, compressed, behind a separator, in a part of a long file, raw within rows: always by name."""
    if way == "parts":
        monkeypatch.setattr("fastlm.data.cutting.WHOLE", 60_000)
        monkeypatch.setattr("fastlm.data.cutting.JOB", 50_000)
    rows = {
        ".jsonl": b'{"text": "' + b'x"}\n{"text": "' * 9000 + b'\0"}\n',
        ".json": b'[{"text": "x"},\n' * 1 + b'{"text": "x"},\n' * 9000 + b'{"text": "\0"}]',
        ".csv": b"text\n" + b"x\n" * 90_000 + b"\0\n",
    }
    path = packed(tmp_path / f"a{way if way in rows else '.txt'}{suffix}", rows.get(way, ZERO))
    with pytest.raises(InputError, match=r"a\..*byte \d+ is 0") as caught:
        list(documents(path, separator="\n\n" if way == "separator" else ""))
    assert f"byte {rows.get(way, ZERO).index(0)} " in str(caught.value)


def test_byte_0_in_the_values_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b\\u0000"}\n')
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b\\u0000"}]')
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b\0"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        with pytest.raises(InputError, match=rf"{name}, \w+ 2.*byte 0"):
            list(documents(tmp_path / name))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", *FORMS])
def test_bytes_that_are_not_utf8_are_kept_and_counted(kind: str, suffix: str, tmp_path: Path) -> None:
    """--tokenizer bytes keeps them, in rows too; bpe and chars read U+FFFD; how many texts had some is counted."""
    texts = [f"{i} caf\udce9 {words(i, 300)}" for i in range(250)]

    raw = lambda text: text.encode("utf-8", "surrogateescape")
    if kind == ".txt":
        whole = b"--".join(map(raw, texts))
    else:
        plain = FORMS[kind]([t.replace("\udce9", "XEX") for t in texts])
        whole = plain.replace(b"XEX", b"\xe9")
    path = packed(tmp_path / f"a{kind}{suffix}", whole)
    options: dict[str, object] = {"field": "output", "separator": "--" if kind == ".txt" else ""}
    data = ready(path, tmp_path, **options)
    assert data.manifest["undecodable"] == 250
    assert data.text("train").count(b"caf\xe9 ") + data.text("val").count(b"caf\xe9 ") == 250
    chars = ready(path, tmp_path, tokenizer="chars", **options)
    assert chars.manifest["undecodable"] == 250
    assert (chars.text("train") + chars.text("val")).decode().count("caf\ufffd ") == 250
