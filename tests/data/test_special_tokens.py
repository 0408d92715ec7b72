"""Text is text: what looks like a special token stays text and decodes to what was written, unless it is read on purpose."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastlm.cli import main as cli
from fastlm.data import InputError, Options, prepare
from fastlm.data import tokenizer as tokenizers
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.train import export, job
from fastlm.train.generation import TextStream

lib = pytest.importorskip("tokenizers")

LETTERS = "▁abcdefghijklmnopqrstuvwxyz.<>/|[]_"
USUAL = "to be or not to be, that is the question; déjà vu\n\n  two  spaces " * 20


def learnt() -> Any:
    """fastlm's own; its special token is in the model's vocabulary too."""
    return lib.Tokenizer.from_str(tokenizers.BPETokenizer.train(iter([USUAL.encode()]), 300).content)


def chat() -> Any:
    """As models for chats have them: special tokens beyond the vocabulary, one that takes the space before it, one that may
    not touch a letter; tokens of text (not special) among them, one of which is written in letters that stand for bytes."""
    made = learnt()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_special_tokens(
        [lib.AddedToken("<mask>", lstrip=True, rstrip=True), lib.AddedToken("<x>", single_word=True)]
    )
    made.add_special_tokens([lib.AddedToken("<<Norm>>", normalized=True)])
    made.add_tokens(["<think>", "   ", "é§"])
    return made


def llama() -> Any:
    """Sentencepiece's BPE as transformers converts it, with merges that make </s> of text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *LETTERS]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("/", "s"), ("<", "/s"), ("</s", ">"), ("b", "e"), ("▁", "be")]
    pieces += [a + b for a, b in merges if a + b not in pieces]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = lib.Tokenizer(
        lib.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    prepend, space = lib.normalizers.Prepend("▁"), lib.normalizers.Replace(" ", "▁")
    made.normalizer = lib.normalizers.Sequence([prepend, space])
    decoders = lib.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def unigram() -> Any:
    """Sentencepiece's Unigram: its special tokens are pieces of the model, of the best scores."""
    scores = [("<unk>", 0.0), ("</s>", 0.0), ("<extra_id_0>", 0.0), ("▁the", -3.0), ("▁be", -4.0)]
    scores += [(letter, -6.0 - i / 100) for i, letter in enumerate(LETTERS + "0123456789,;éàû")]
    made = lib.Tokenizer(lib.models.Unigram(scores, 0, False))
    made.pre_tokenizer, made.decoder = lib.pre_tokenizers.Metaspace(), lib.decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>", "<extra_id_0>"])
    return made


MADE = {"own": learnt, "chat": chat, "llama": llama, "unigram": unigram}


@pytest.fixture(params=MADE)
def given(request: pytest.FixtureRequest) -> Any:
    return MADE[request.param]()


def specials(given: Any) -> dict[int, str]:
    return {i: token.content for i, token in given.get_added_tokens_decoder().items() if token.special}


def test_text_that_looks_like_a_special_token_stays_text(given: Any) -> None:
    made = tokenizers.BPETokenizer(given.to_str())
    again: tokenizers.Tokenizer = pickle.loads(pickle.dumps(made))  # as workers get it
    names = specials(given)
    for name in names.values():
        for text in (name, f"the {name} be", f"a{name}{name}b  {name}", f"{name} </s><|endoftext|>", name[:-1]):
            for one in (made, again):
                ids = one.encode(text.encode()).tolist()
                assert not {i for i in ids if i in names}, (text, ids)
                assert one.decode(ids).decode() == text
                assert one.decode([*ids, one.eot]).decode() == text  # the trainer's own is not shown


def test_usual_text_has_the_numbers_that_the_tokenizer_itself_gives(given: Any) -> None:
    made = tokenizers.BPETokenizer(given.to_str())
    text = "the be to the   <think> é§ be" if "<think>" in given.get_vocab() else "the be to the be. be"
    for one in (text, *([USUAL] if "\n" in given.decode(given.encode("\n").ids) else [])):
        ids = made.encode(one.encode()).tolist()
        assert ids == given.encode(one, add_special_tokens=False).ids
        assert made.decode(ids).decode() == one
    assert made.vocab == max(given.get_vocab().values()) + 1
    assert made.eot in specials(given)


def test_special_tokens_are_read_on_purpose(given: Any) -> None:
    made = tokenizers.BPETokenizer(given.to_str(), "read")
    text = tokenizers.BPETokenizer(given.to_str())
    assert tokenizers.load(made.spec()).spec() == made.spec() != text.spec()
    assert made.hash != text.hash  # neither's shards serve the other
    assert tokenizers.load(made.spec(), "text").spec() == text.spec()
    for number, name in specials(given).items():
        assert number in made.encode(name.encode()).tolist()
        shown = made.decode([number]).decode()
        assert shown == ("" if number == made.eot else name)


def test_a_letter_or_byte_that_is_special_is_still_written() -> None:
    made = llama()
    made.add_special_tokens(["<0x0A>", "b"])
    own = tokenizers.BPETokenizer(made.to_str())
    assert own.decode(own.encode(b"the b\nbe")).decode() == "the b\nbe"


def test_an_unknown_character_is_still_the_token_for_it() -> None:
    made = tokenizers.BPETokenizer(unigram().to_str())
    assert (
        made.encode("漢".encode()).tolist() == unigram().encode("漢").ids == [made.encode("字".encode()).tolist()[0], 0]
    )


# ------------------------------------------------------------------------------------------------------- through all doors

WRITTEN = [
    "a document that ends <|endoftext|> and goes on",
    "<|endoftext|>",
    "another </s> with <|endoftext|><|endoftext|>",
]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WRITTEN))
    (tmp_path / "book.txt").write_text("\n===\n".join(WRITTEN))
    (tmp_path / "tokenizer.json").write_text(learnt().to_str())
    return {"rows": "rows.jsonl", "raw": "book.txt"}


@pytest.mark.parametrize("kind", ["bpe", "tokenizer.json", "bytes", "chars"])
@pytest.mark.parametrize("way", ["rows", "raw"])
def test_documents_end_where_the_trainer_ends_them(corpus: dict[str, str], way: str, kind: str) -> None:
    options = Options(kind, 300, separator=r"\n===\n" if way == "raw" else "")
    own = tokenizers.make(kind, 300, lambda: iter(text.encode() for text in WRITTEN))
    data = prepare((corpus[way],), options, tokenizer=own, whole=True)
    tokens = np.concatenate([np.asarray(shard) for shard in data.val])
    ends = np.flatnonzero(tokens == own.eot)
    assert len(ends) == len(WRITTEN)
    found = [own.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
    trail = b"\0" if kind == "bytes" else b""  # which decodes its own end too
    assert found == [text.encode() + trail for text in WRITTEN]


def test_the_option_is_part_of_the_caches_key(corpus: dict[str, str]) -> None:
    (Path("many.txt")).write_text("one text <|endoftext|> that is long enough\n" * 400)
    made = [
        prepare(("many.txt",), Options("tokenizer.json", special_tokens=how))
        for how in ("text", "read", "text", "read")
    ]
    ends = [sum(int((np.asarray(s) == one.tokenizer.eot).sum()) for s in (*one.train, *one.val)) for one in made]
    assert ends[0] == ends[2] < 100
    assert ends[1] == ends[3] == ends[0] + 400
    assert made[0].folder == made[2].folder != made[1].folder == made[3].folder


@pytest.fixture
def run(corpus: dict[str, str], tmp_path: Path) -> Path:
    shape = GPTConfig(layers=1, heads=2, width=16, context=64, vocab=300)
    spec = tokenizers.BPETokenizer(learnt().to_str()).spec()
    export.export(export.Source(shape, GPT(shape).state_dict(), spec), "hf", tmp_path / "hf")
    return tmp_path / "hf"


def test_prompts_are_text(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(GPT, "generate", lambda self, tokens, *rest: seen.append(tokens[0].tolist()))
    prompt = "say <|endoftext|> now"
    for flags in ([], ["--special-tokens", "text"], ["--special-tokens", "read"]):
        assert cli.main(["generate", str(run), "--prompt", prompt, "--device", "cpu", *flags]) == 0
        assert capsys.readouterr().out == prompt + "\n"
    tokenizer = job.load(run, "cpu")[1]
    assert seen[0] == seen[1] == tokenizer.encode(prompt.encode()).tolist()
    assert [ids.count(tokenizer.eot) for ids in seen] == [0, 0, 1]


def test_texts_of_eval_are_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for flags in ([], ["--special-tokens", "read"]):
        assert cli.main(["eval", str(run), "book.txt", "--json", "--device", "cpu", *flags]) == 0
        counts.append(json.loads(capsys.readouterr().out)["tokens"])
    size = len(tokenizers.BPETokenizer(learnt().to_str()).encode(b"<|endoftext|>"))
    assert counts[0] - counts[1] == "".join(WRITTEN).count("<|endoftext|>") * (size - 1)


def test_how_a_run_read_text_goes_with_its_model(run: Path, tmp_path: Path) -> None:
    found = export.read_model(run)
    read = tokenizers.BPETokenizer(learnt().to_str(), "read").spec()
    for to in ("hf", "fastlm"):
        export.export(dataclasses.replace(found, tokenizer=read), to, tmp_path / to / "read")
        assert job.load(tmp_path / to / "read", "cpu")[1].spec() == read
        assert job.load(tmp_path / to / "read", "cpu", "text")[1].spec() == found.tokenizer


@pytest.mark.parametrize("kind", MADE)
def test_text_streams_as_it_decodes(kind: str) -> None:
    made = tokenizers.BPETokenizer(MADE[kind]().to_str())
    start, rest = "the be</s>", " the be é the</s> be" if kind != "unigram" else " the be the</s> be"
    before, ids = made.encode(start.encode()).tolist(), made.encode((start + rest).encode()).tolist()
    assert ids[: len(before)] == before
    stream = TextStream(made, before)
    assert "".join(stream.push(i) for i in ids[len(before) :]) + stream.end() == rest
    stream = TextStream(made)
    assert "".join(stream.push(i) for i in ids) + stream.end() == start + rest


def test_what_is_no_tokenizer_is_refused() -> None:
    for content in ("{}", "[]", "no json", json.dumps({**json.loads(learnt().to_str()), "added_tokens": [{"id": 1}]})):
        with pytest.raises(InputError, match="cannot be read"):
            tokenizers.BPETokenizer(content)


@pytest.mark.parametrize("text", ["漢字" * 8, "the " + "漢字" * 6 + " be", "é" * 20, "🙂 the " + "🙂" * 7])
def test_characters_of_several_bytes_stream_whole(text: str) -> None:
    made = tokenizers.BPETokenizer(llama().to_str())
    stream = TextStream(made)
    assert "".join(stream.push(i) for i in made.encode(text.encode()).tolist()) + stream.end() == text
