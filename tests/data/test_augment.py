"""`fastlm data augment`: copies of prose in other words, with what must stay as it was."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from fastlm.cli.main import main
from fastlm.data import InputError, groups
from fastlm.data.augment import Augment, run, thesaurus, translate
from fastlm.data.augment import job as jobs
from fastlm.data.augment import text as prose

pytest.importorskip("pysbd")
pytest.importorskip("lemminflect")
pytest.importorskip("sacrebleu")

DAT = """UTF-8
rapid|1
(adj)|quick|speedy|fast (generic term)
quick|1
(adj)|rapid|speedy|swift (similar term)
show|1
(verb)|demonstrate|exhibit|express (generic term)
stroll|1
(verb)|ramble|walk (generic term)
wander|1
(verb)|ramble|rove
house|1
(noun)|family|household|home
evaluate|1
(verb)|assess|measure
expression|1
(noun)|formula|look
"""
PROSE = """The parser evaluates an expression with os.path.join and 37 options. It demonstrates what Mary Shelley
wandered for. Nobody evaluates "the evaluated expression" twice. They wander in Rome.

    code = wander(evaluate)

A second paragraph evaluates the rest of the expression here. It is short. It wanders off. It ends.
"""


@pytest.fixture
def book(tmp_path: Path) -> thesaurus.Thesaurus:
    path = tmp_path / "th.dat"
    path.write_text(DAT)
    return thesaurus.Thesaurus(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"text": PROSE.replace("37", str(i))} for i in range(250)]
    rows[3]["group"] = "cluster-9"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "th.dat").write_text(DAT)
    return path


def options(corpus: Path, **more: object) -> Augment:
    return Augment(replace=0.3, thesaurus=str(corpus.parent / "th.dat"), shuffle=2, **more)  # type: ignore[arg-type]


def test_text_is_put_together_as_it_was() -> None:
    for text in (
        PROSE,
        PROSE.replace("\n\n", "\n \n"),
        "one line of four words",
        "* a list item of many words\n  goes on here\n",
    ):
        parts = list(prose.paragraphs(text))
        assert "".join(p if isinstance(p, str) else p.source for p in parts) == text
    first, *_ = (p for p in prose.paragraphs(PROSE) if not isinstance(p, str))
    assert first.sentences[1] == "It demonstrates what Mary Shelley wandered for."
    assert first.text().split() == first.source.split()
    assert not any("code" in p.source for p in prose.paragraphs(PROSE) if not isinstance(p, str))


def test_names_numbers_code_and_quotations_are_protected() -> None:
    found = prose.protected('We asked Ann about os.path, "a big one" and 3.5 of foo() in `x y`.')
    assert found == ["Ann", "os.path", "a", "big", "one", "3.5", "foo", "x", "y"]
    assert prose.names(["He saw Mary.", "Mary left."]) == {"Mary"}
    assert prose.protected("Mary left.", {"Mary"}) == ["Mary"]
    assert translate.lost("He met Ann and Ann.", "He met Ann.", set()) == ["Ann"]


def test_a_synonym_has_the_form_of_the_word(book: thesaurus.Thesaurus) -> None:
    assert book.candidates("evaluates", "it", "", False) == ["assesses", "measures"]
    assert book.candidates("wanders", "he", "off", False) == ["rambles", "roves"]
    assert book.candidates("houses", "the", "of", False) == ["families", "households", "homes"]
    assert book.candidates("expression", "an", "", False) == []  # "a formula" would need another article
    assert "walk" not in book.candidates("stroll", "to", "", True)  # a more general word is none


def test_replacement_leaves_what_is_protected(book: thesaurus.Thesaurus) -> None:
    for seed in range(20):
        source = 'He evaluates "it evaluates", evaluates_x and Evaluates.'
        text, count = thesaurus.replace(source, 1.0, book, random.Random(seed))
        assert count == 1
        assert re.fullmatch(r'He (assesses|measures) "it evaluates", evaluates_x and Evaluates\.', text), text


def test_a_score_chooses_the_synonym(book: thesaurus.Thesaurus) -> None:
    score = lambda texts: [float("measures" not in t) for t in texts]
    for seed in range(5):
        assert thesaurus.replace("It evaluates them.", 1.0, book, random.Random(seed), score)[0] == "It measures them."


def test_what_is_protected_is_never_replaced(book: thesaurus.Thesaurus) -> None:
    """One rule says what stays; what it names is in every replacement, whatever the marks around it."""
    quoted = ("`path' evaluates, `evaluates' is it.", "`a' b `evaluates` evaluates", "``evaluates`` evaluates x()",
              "evaluates: 'evaluates' evaluates(1)", "“It evaluates. He evaluates.” She evaluates.")  # fmt: skip
    for sentence in quoted:
        for seed in range(5):
            text, count = thesaurus.replace(sentence, 1.0, book, random.Random(seed))
            assert translate.lost(sentence, text, set()) == []
            assert len(text.split()) == len(sentence.split())
            assert count == len([w for w in sentence.split() if w.strip(".,:") == "evaluates"]) - ("“" in sentence)


def test_a_quotation_loses_neither_its_marks_nor_its_sentences() -> None:
    assert translate.lost("The `verbose` argument and the flag.", "The verbose argument and the flag.", set()) == [
        "`verbose`"
    ]
    assert translate.lost('He said "no" twice.', 'He said "no" two times.', set()) == []
    text = 'He said "One thing is that. Another is this." Then he went. So did she.'
    cut = prose.sentences(text)
    assert cut == ('He said "One thing is that. Another is this."', "Then he went.", "So did she.")
    apart = prose._whole_quotations(['He said "One.', 'Two." Then.', "So."])
    assert list(apart) == ['He said "One. Two." Then.', "So."]


@pytest.mark.parametrize("reach", [1, 3])
def test_a_sentence_moves_at_most_so_far(reach: int) -> None:
    orders = {tuple(jobs.shuffled(7, reach, random.Random(seed))) for seed in range(200)}
    assert len(orders) > 10
    assert all(sorted(o) == list(range(7)) and max(abs(i - j) for i, j in enumerate(o)) <= reach for o in orders)
    assert any(max(abs(i - j) for i, j in enumerate(o)) == reach for o in orders)


def test_every_copy_has_its_source_s_group_and_same_seed_same_bytes(corpus: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    report = run((str(corpus),), a, options(corpus, copies=2))
    run((str(corpus),), b, options(corpus, copies=2))
    assert a.read_bytes() == b.read_bytes()
    rows = [json.loads(line) for line in a.read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    own = {groups.group_of(t.encode()) for t in texts} | {"cluster-9"}
    assert {row["group"] for row in rows} <= own
    assert "cluster-9" in {row["group"] for row in rows}
    assert report.counts["rows"] == len(rows) > 300
    assert not {row["text"] for row in rows} & set(texts)
    for row in rows:
        for kept in ("os.path.join", "Mary Shelley", '"the evaluated expression"', "code = wander(evaluate)"):
            assert kept in " ".join(row["text"].split())
    run((str(corpus),), tmp_path / "c.jsonl", options(corpus, copies=2, seed=2))
    assert (tmp_path / "c.jsonl").read_bytes() != a.read_bytes()


@pytest.mark.parametrize("why", ["interrupt", "full disk"])
def test_what_was_done_is_kept_and_the_same_command_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    monkeypatch.setattr(jobs, "BATCH", 20_000)
    run((str(corpus),), whole, options(corpus))
    calls, rows = [0], jobs.Worker.rows

    def broken(self: jobs.Worker, *args: object) -> object:
        calls[0] += 1
        made = rows(self, *args)  # type: ignore[arg-type]
        yield next(made)
        if calls[0] == 3:
            raise KeyboardInterrupt if why == "interrupt" else OSError(errno.ENOSPC, "No space left on device")
        yield from made

    monkeypatch.setattr(jobs.Worker, "rows", broken)
    with pytest.raises((InputError, jobs.Interrupted), match=r"copies of \d+ texts are kept"):
        run((str(corpus),), out, options(corpus))
    kept = json.loads(out.with_name("out.jsonl.state").read_text())
    assert 0 < kept["texts"] < 250
    monkeypatch.setattr(jobs.Worker, "rows", rows)
    with pytest.raises(InputError, match="begun with other options"):
        run((str(corpus),), out, options(corpus, seed=5))
    report = run((str(corpus),), out, options(corpus))
    assert out.read_bytes() == whole.read_bytes()
    assert report.counts["texts"] == 250
    assert not out.with_name("out.jsonl.state").exists()
    with pytest.raises(InputError, match="it is written once"):
        run((str(corpus),), out, options(corpus))


def test_bad_input_is_one_sentence(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = ["--out", str(tmp_path / "out.jsonl")]

    def said(*words: str) -> str:
        assert main(["data", "augment", *words]) == 2
        text = capsys.readouterr().err
        assert "\n" not in text.strip()
        return text

    assert "nothing to do" in said(str(corpus), *out)
    assert "--replace must be at least 0 and at most 1; it is 2.0" in said(str(corpus), *out, "--replace", "2")
    assert "apertium:eng-cat" in said(str(corpus), *out, "--backtranslate", "google")
    monkeypatch.setattr(thesaurus, "FOLDERS", (str(tmp_path / "none"),))
    assert "apt-get install mythes-en-us" in said(str(corpus), *out, "--replace", "0.1")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "apt-get install apertium apertium-eng-cat" in said(str(corpus), *out, "--backtranslate", "apertium:eng-cat")
    (tmp_path / "bad.dat").write_text("UTF-8\nno bar here\n")
    assert "bad.dat is no MyThes thesaurus" in said(
        str(corpus), *out, "--replace", "0.1", "--thesaurus", str(tmp_path / "bad.dat")
    )
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:7], "{broken", *lines[8:]]))
    assert f"{corpus}, line 8" in said(str(corpus), *out, "--shuffle", "2")
    assert "no folder of a transformers model" in said(
        str(corpus), *out, "--backtranslate", f"hf:{tmp_path},{tmp_path}"
    )
    assert "would be read as a part" in said(str(tmp_path), *out, "--shuffle", "2")
    assert not (tmp_path / "out.jsonl").exists()


# ------------------------------------------------------------------------------------------------------ back-translation


@pytest.mark.skipif(not shutil.which("apertium"), reason="apertium is not installed")
def test_apertium_there_and_back() -> None:
    trip = translate.make("apertium:eng-cat")
    texts = [
        "The house was built on a hill.",
        "A quibblefoo sat there.",
        "Run a[1] now.",
        "The cat sleeps in the garden.",
    ] * 5
    made = trip(texts)
    assert made == trip(texts[:4]) * 5
    assert made[1] == ""  # unknown
    assert made[2] is None  # Apertium's own signs are not sent
    chrf = translate.scorer()
    assert {translate.judge(s, m, set(), chrf) for s, m in zip(texts, made)} <= {"", "the same", *translate.DROPS}
    assert any(m and m != s for s, m in zip(texts, made))
    with pytest.raises(InputError, match="apertium has no pair eng-xyz"):
        translate.make("apertium:eng-xyz")


def test_judge_drops_by_its_rules() -> None:
    chrf = translate.scorer()
    judge = lambda source, made: translate.judge(source, made, set(), chrf)
    source = "The quick house of Mary was built on a hill in 1999."
    assert judge(source, "The fast house of Mary was constructed on a hill in 1999.") == ""
    assert (
        judge(source, "The fast house of Anne was constructed on a hill in 1999.") == "a name, number or quotation lost"
    )
    assert judge(source, source) == "the same"
    assert judge(source, "Mary 1999") == "too far"
    assert judge(source, "") == "unknown"
    assert judge(source, None) == "not translated"
    assert judge(source, source.replace("quick", "ràpida")) == "unknown"


@pytest.mark.slow  # transformers takes seconds to import
def test_marian_folders_translate_each_sentence_and_leave_long_ones(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    import torch

    words = ["<pad>", "</s>", "<unk>", *"abcdefgh"]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(3)
    config = transformers.MarianConfig(
        vocab_size=len(words), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=12, eos_token_id=1,
        decoder_start_token_id=0, forced_eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    transformers.MarianMTModel(config).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    trip = translate.Seq2Seq(tmp_path, tmp_path, batch=2)
    made = trip(["a b c", "d e", "a b c d e f g h a b c d e f g h", "z a", "h"])
    assert made[2] is None  # longer than the model takes
    assert made[3] == ""  # a word that the vocabulary lacks
    assert all(isinstance(made[i], str) for i in (0, 1, 4))
    alone = translate.Seq2Seq(tmp_path, tmp_path, batch=1)(["d e"])
    assert alone == [made[1]]
