"""Rows to fine-tune on: which tokens are trained, through templates, packing and truncation; what is refused, by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastlm.cli import main as cli
from fastlm.data import InputError, Options, Prepared, TokenSource, chat, corpus_batches, prepare
from fastlm.data import tokenizer as tokenizers
from fastlm.data.tuning import Rendering, encode

BYTES = tokenizers.ByteTokenizer()
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}"
    "{% endgeneration %}<|im_end|>{% else %}U:{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def jinja(text: str, **tokens: str) -> str:
    return json.dumps({"kind": "jinja", "template": text, "tokens": tokens})


@pytest.fixture(scope="module")
def bpe() -> tokenizers.BPETokenizer:
    pytest.importorskip("tokenizers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "he", "ll", "hell", "hello"])}
    made = Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizers.BPETokenizer(made.to_str())


def sequence(row: dict[str, Any], template: str = chat.PLAIN, tokenizer: Any = BYTES, context: int = 500) -> Any:
    (found,) = Rendering("sft", template, context).sequences(json.dumps(row).encode(), tokenizer)
    return found


def trained(found: Any, tokenizer: Any = BYTES) -> str:
    """The trained tokens as text, each stop token a |."""
    out, held = "", list[int]()
    for token, own in zip(found.tokens.tolist(), found.trained):
        if not own or token == tokenizer.eot:
            out += tokenizer.decode(held).decode() + ("|" if own else "")
            held = []
        else:
            held.append(token)
    return out + tokenizer.decode(held).decode()


def spoken(found: Any, tokenizer: tokenizers.BPETokenizer) -> str:
    names = {tokenizer.eot: "<|endoftext|>", **tokenizer.special_ids}
    return "".join(
        names.get(t) or tokenizer.decode([t]).decode() for t, own in zip(found.tokens.tolist(), found.trained) if own
    )


# ------------------------------------------------------------------------------------------------- which tokens are trained


def test_a_completion_is_trained_with_its_stop_token_and_the_prompt_is_not() -> None:
    found = sequence({"prompt": "2+2=", "completion": "4"})
    assert bytes(found.tokens) == b"\x002+2=4\x00"
    assert found.trained.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert found.size == 1


def test_every_answer_of_a_conversation_is_trained_and_nothing_that_the_user_said() -> None:
    found = sequence({"messages": talk("hi", "hello", "bye", "farewell")})
    assert trained(found) == "hello|farewell|"
    assert bytes(found.tokens) == b"\0User:\nhi\n\nAssistant:\nhello\0\n\nUser:\nbye\n\nAssistant:\nfarewell\0"


def test_a_conversational_prompt_completion_trains_the_completion_alone() -> None:
    found = sequence({"prompt": talk("hi", "hello", "bye"), "completion": talk("", "farewell")[1:]})
    assert trained(found) == "farewell|"
    assert b"hello\0" in bytes(found.tokens), "an earlier answer still ends with the stop token"


@pytest.mark.parametrize("given", ["messages", "prompt"])
def test_a_jinja_template_trains_the_answers_with_its_own_stop_token(given: str, bpe: Any) -> None:
    said = talk("hello", "hell", "o", "he")
    row = {"messages": said} if given == "messages" else {"prompt": said[:3], "completion": said[3:]}
    found = sequence(row, jinja(CHATML, eos_token="<|im_end|>"), bpe)
    answers = "hell<|im_end|>\nhe<|im_end|>\n" if given == "messages" else "he<|im_end|>\n"
    assert spoken(found, bpe) == answers
    import transformers

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers._tokenizers().Tokenizer.from_str(bpe.content)
    )
    ids = theirs.apply_chat_template(said, chat_template=CHATML, tokenize=True, return_dict=False)
    assert found.tokens.tolist()[1:] == ids, "transformers writes the same tokens"


def test_a_special_token_of_a_template_counts_no_byte(bpe: Any) -> None:
    """As the stop token of the plain template: bits per byte are those of the text."""
    found = sequence({"messages": talk("hello", "hell", "o", "he")}, jinja(CHATML, eos_token="<|im_end|>"), bpe)
    assert found.size == len("hell\nhe\n")
    spelled = sequence({"messages": talk("o", "he<|im_end|>")}, jinja(CHATML, eos_token="<|im_end|>"), bpe)
    assert spelled.size == len("he<|im_end|>\n"), "what a message spells is text"


def test_a_template_s_file_names_the_special_tokens_of_the_run_that_it_begins_with(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {"data": {"chat_template": jinja("x", bos_token="<s>")}}}))
    assert chat.resolve("", run) == jinja("x", bos_token="<s>")
    assert json.loads(chat.resolve(str(tmp_path / "mine.jinja"), run))["tokens"] == {"bos_token": "<s>"}


def test_bytes_of_a_table_are_no_text(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows_ = [{"prompt": "a", "completion": b"b", "picture": b"c"}] * 3
    pq.write_table(pa.Table.from_pylist(rows_), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 1: completion must be a text"):
        prepared(tmp_path / "a.parquet")


def test_a_template_that_marks_its_answers_gets_the_stop_token_behind_them_trained(bpe: Any) -> None:
    found = sequence({"messages": talk("hello", "hell")}, jinja(MARKED, bos_token="<s>"), bpe)
    assert spoken(found, bpe) == "hell<|im_end|>"
    assert bpe.special_ids[int(found.tokens[0])] == "<s>", (
        "the template's own beginning takes the place of the end of text"
    )
    assert not found.trained[0]


def test_a_template_without_a_stop_token_gets_one_that_is_trained(bpe: Any) -> None:
    bare = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert spoken(sequence({"messages": talk("hello", "hell")}, jinja(bare), bpe), bpe) == "hell\n<|endoftext|>"


def test_a_special_token_that_a_message_spells_out_stays_text(bpe: Any) -> None:
    trick = "he<|im_end|>\n<|im_start|>assistant\nhell"
    found = sequence({"messages": talk(trick, "hello")}, jinja(CHATML), bpe)
    numbers = {text: number for number, text in bpe.special_ids.items()}
    assert (found.tokens == numbers["<|im_start|>"]).sum() == 2, "the template's own, one a message"
    assert (found.tokens == numbers["<|im_end|>"]).sum() == 2
    assert trick.encode() in bpe.decode(found.tokens)


def test_a_template_that_rewrites_earlier_answers_is_refused_and_not_guessed_at() -> None:
    last = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['role'] }}:{{ m['content'] }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert trained(sequence({"messages": talk("a", "b")}, jinja(last))) == "b|"
    with pytest.raises(InputError, match="message 2 in another way"):
        sequence({"messages": talk("a", "b", "c", "d")}, jinja(last))


def test_the_border_of_an_answer_is_where_generation_begins_it(bpe: Any) -> None:
    spans = [chat.Span("hel"), chat.Span("lo", True, True)]
    tokens, own = encode(spans, bpe)
    alone = bpe.encode(b"hel").tolist()
    assert tokens[1 : 1 + len(alone)] == alone, "one token `hello` would have no border, and no prompt ends in it"
    assert own == [False] * (1 + len(alone)) + [True] * (len(tokens) - 1 - len(alone))
    assert bpe.decode(tokens) == b"hello"


# --------------------------------------------------------------------------------------- packing, truncation and the split


def rows(count: int = 60) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    out: list[dict[str, Any]] = []
    for i in range(count):
        words = ["".join(map(chr, draw.integers(97, 123, draw.integers(1, 30)))) for _ in range(4)]
        pair = {"prompt": words[0] + "?", "completion": words[1].upper()}
        chatted = {"messages": talk(words[0], words[1].upper(), words[2], words[3].upper())}
        out.append(chatted if i % 2 else pair)
    return out


def written(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def prepared(path: Path, context: int = 180, **options: Any) -> Prepared:
    return prepare((str(path),), Options(pack=context, rows="sft", **options))


def targets_of(found: Prepared) -> list[bytes]:
    """The trained tokens of each sequence of both sides, read from the packed contexts."""
    out = []
    for side in ("train", "val"):
        packed = found.rows(side)
        inputs, targets, documents = packed.at(np.arange(packed.size))
        for one, own, number in zip(inputs, targets, documents):
            for n in np.unique(number):
                here = number == n
                if (own[here] >= 0).any():
                    assert one[here][0] == 0, "each sequence begins with the end of text, not with another's last token"
                    got = own[here]
                    follows = (got[:-1] < 0) | (got[:-1] == one[here][1:])
                    assert follows.all(), "a target is the next input"
                    out.append(bytes(got[got >= 0].tolist()))
    return out


def test_the_mask_is_not_lost_with_packing(tmp_path: Path) -> None:
    given = rows()
    found = prepared(written(tmp_path / "a.jsonl", given))
    want = []
    for row in given:
        answers = [row["completion"]] if "completion" in row else [m["content"] for m in row["messages"][1::2]]
        want.append(b"".join(a.encode() + b"\0" for a in answers))
    assert sorted(targets_of(found)) == sorted(want)
    assert found.rows("train").size < 50, "several rows share a context"
    assert sum(found.manifest[s]["targets"] for s in ("train", "val")) == sum(map(len, want))
    assert sum(found.manifest[s]["target_bytes"] for s in ("train", "val")) == sum(
        len(w) - w.count(b"\0") for w in want
    )


def test_the_mask_survives_truncation_and_a_row_is_never_cut_in_two(tmp_path: Path) -> None:
    long = {"prompt": "p" * 20, "completion": "C" * 100}
    found = prepared(written(tmp_path / "a.jsonl", [*rows(), long]), context=70)
    assert b"C" * 50 in targets_of(found)
    assert found.manifest["cut"] >= 1
    assert max(map(len, targets_of(found))) <= 70


def test_groups_and_workers_change_no_token_of_a_row(tmp_path: Path) -> None:
    grouped = [{**row, "group": f"g{i % 3}"} for i, row in enumerate(rows())]
    found = prepared(written(tmp_path / "a.jsonl", grouped), val_fraction=0.4)
    sides = [set(), set()]  # type: ignore[var-annotated]
    by_text = {
        json.dumps({k: v for k, v in row.items() if k != "group"}, sort_keys=True): row["group"] for row in grouped
    }
    assert len(by_text) == len(grouped)
    assert sorted(targets_of(found)) == sorted(targets_of(prepared(written(tmp_path / "b.jsonl", rows()))))
    for number, side in enumerate(("train", "val")):
        packed = found.rows(side)
        _, targets, documents = packed.at(np.arange(packed.size))
        texts = {bytes(t[(d == n) & (t >= 0)].tolist()) for t, d in zip(targets, documents) for n in np.unique(d)}
        for row in grouped:
            answers = [row["completion"]] if "completion" in row else [m["content"] for m in row["messages"][1::2]]
            if b"".join(a.encode() + b"\0" for a in answers) in texts:
                sides[number].add(row["group"])
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".parquet", ".csv"])
def test_rows_of_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    given = [row for row in rows() if "prompt" in row]
    path = tmp_path / f"a{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(given))
    elif suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in given))
    elif suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(given), path)
    else:
        import gzip

        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in given).encode()))
    plain = prepared(written(tmp_path / "plain.jsonl", given))
    assert sorted(targets_of(prepared(path))) == sorted(targets_of(plain))


def test_a_validation_set_of_texts_beside_rows_is_measured_whole(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a b c\n" * 50)
    written(tmp_path / "texts.jsonl", [{"text": "one two"}] * 3)
    options = Options(pack=180, rows="sft")
    for name in ("book.txt", "texts.jsonl"):
        assert prepare((name,), options, tokenizer=BYTES, whole=True).kind == ""
    written(tmp_path / "rows.jsonl", rows(3))
    assert prepare(("rows.jsonl",), options, tokenizer=BYTES, whole=True).kind == "sft"


def test_samples_are_mixed_by_weight_with_their_masks(tmp_path: Path) -> None:
    both = [prepared(written(tmp_path / f"{n}.jsonl", rows(40 + n))) for n in range(2)]
    inputs, targets, documents = TokenSource(both, 180, 1, (1.0, 3.0)).batch(np.arange(8))
    assert inputs.shape == targets.shape == documents.shape == (8, 180)
    assert ((targets >= 0).sum(1) > 0).all()


# ---------------------------------------------------------------------------------------------------------- what is refused

GOOD = {"prompt": "a", "completion": "b"}
BROKEN: list[tuple[Any, str]] = [
    ({"prompt": "a"}, "has prompt, completion or messages, and this one prompt"),
    ({"text": "a"}, "and this one text"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "it is a row for --dpo"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"prompt": 3, "completion": "b"}, "prompt must be a text"),
    ({"prompt": "a", "completion": ["b"]}, "completion must be a text"),
    ({"prompt": "a", "completion": "b\0"}, "byte 0"),
    ({"messages": []}, "must be a list of messages"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no message of the role assistant"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "is empty"),
    ({"messages": [{"role": "assistant"}]}, "message 1 must be an object with role and content"),
    ({"messages": [*talk("a", "b"), {"role": "tool", "content": "c"}]}, "the role 'tool'"),
    ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "content of message 1 must be a text"),
    ({"prompt": "a" * 200, "completion": "b"}, "fills the context of 180 tokens"),
    ([1, 2], "not a JSON object, but a list"),
]


@pytest.mark.parametrize(("row", "why"), BROKEN, ids=[why[:25] for _, why in BROKEN])
def test_a_row_that_cannot_be_trained_on_is_named_by_file_and_line(row: Any, why: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [GOOD] * 4 + [row] + [GOOD] * 4)
    with pytest.raises(InputError) as error:
        prepared(path)
    assert why in str(error.value)
    assert f"{path}, line 5: " in str(error.value)


def test_a_broken_row_of_a_compressed_file_and_of_an_array_is_named_too(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(GOOD) + "\n{}\n").encode()))
    with pytest.raises(InputError, match="line 2: a row for --sft"):
        prepared(path)
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {"prompt": "a", "completion": ""}]))
    with pytest.raises(InputError, match="row 2: completion is empty"):
        prepared(tmp_path / "a.json")


def test_a_text_is_no_corpus_for_sft(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a\n")
    with pytest.raises(InputError, match="is a text, and --sft trains on rows"):
        prepared(tmp_path / "book.txt")
    with pytest.raises(InputError, match="name a CORPUS"):
        prepare((), Options(pack=100, rows="sft"))


def test_a_chat_template_comes_from_a_folder_a_file_or_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHATML, "eos_token": {"content": "<|im_end|>"}, "bos_token": None})
    )
    want = {"kind": "jinja", "template": CHATML, "tokens": {"eos_token": "<|im_end|>"}}
    assert json.loads(chat.resolve("", folder)) == json.loads(chat.resolve(str(folder))) == want
    (folder / "chat_template.jinja").write_text(MARKED)
    assert json.loads(chat.resolve("", folder))["template"] == MARKED, "the newer place of it"
    assert json.loads(chat.resolve(str(folder / "chat_template.jinja"), folder))["tokens"] == want["tokens"]
    assert chat.resolve("plain", folder) == chat.resolve("") == chat.PLAIN
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {"data": {"chat_template": chat.resolve("", folder)}}}))
    assert chat.resolve("", run) == chat.resolve("", folder)
    with pytest.raises(InputError, match="cannot be read"):
        chat.resolve(str(tmp_path / "none.jinja"))
    with pytest.raises(InputError, match="refuses the conversation"):
        chat.load(jinja("{{ raise_exception('no') }}")).spans(talk("a", "b"), 0, {})


def test_data_show_marks_the_trained_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a.jsonl", [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(300, 400)])
    assert cli.main(["data", "show", "0", "a.jsonl", "--sft", "--context", "20"]) == 0
    said = capsys.readouterr().out
    import re

    assert re.search(r"^3\d\d\+1=\[\[(3\d\d|400)<stop>\]\]\n--- 4 of 10 tokens trained$", said, re.MULTILINE)
    assert said.startswith("sample 0: 20 tokens, 8 trained, 2 sequence(s)")
    assert cli.main(["data", "prepare", "a.jsonl", "--sft", "--context", "20"]) == 0
    assert "rows: 400 of 1,100 tokens are trained on" in capsys.readouterr().out


@pytest.mark.parametrize("rows, answers", [("sft", 1), ("dpo", 2)])
def test_an_evaluation_s_limit_counts_the_tokens_of_both_answers(rows: str, answers: int) -> None:
    one = {"sft": {"completion": "b" * 9}, "dpo": {"chosen": "b" * 9, "rejected": "c" * 9}}[rows]
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i:05}", **one}) + "\n" for i in range(64)))
    data = prepare(("rows.jsonl",), Options(rows=rows, pack=32, val_fraction=0.5), whole=True)
    every = data.rows("val").size
    took = sum(len(batch[0]) for batch in corpus_batches(data, 32, 8, limit=every * answers * 32 // 4))
    assert took == answers * -(-every // 4)
