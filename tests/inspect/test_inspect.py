"""`fastlm inspect`: what it shows is what the model itself computes, and its page is whole and harmless."""

from __future__ import annotations

import base64
import copy
import html
import json
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import fastlm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastlm import inspect
from fastlm.cli.main import main
from fastlm.data import InputError
from fastlm.data import tokenizer as tokenizers
from fastlm.inspect import look, page, pieces, theirs
from fastlm.inspect.anatomy import logits_of
from fastlm.models.gpt import GPT, named
from fastlm.train import export, state
from torch import nn

BYTES = {"kind": "bytes"}
NASTY = 'a </script><b onclick="x">&amp; é\u202e\n"\'\t'


def gpt(style: str, **changes: Any) -> GPT:
    torch.manual_seed(0)
    made = GPT(named("nano", style, **{"layers": 3, "width": 32, "context": 64, **changes})).eval()
    for p in made.parameters():  # as wild as a trained model, so that no two heads or layers are alike
        p.data += 0.15 * torch.randn_like(p)
    return made


def text(length: int = 20) -> torch.Tensor:
    return torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of fastlm's and one of transformers, of the same model."""
    place = tmp_path_factory.mktemp("models")
    made = gpt("gpt2")
    for to in ("safetensors", "hf"):
        export.export(export.Source(made.config, state.model_tensors(made), BYTES), to, place / to)
    return place


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Written(nn.Module):
    """Somebody's own model: attention that is written out, blocks in a Sequential that give tuples."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Any) -> Any:
            x = x[0] if isinstance(x, tuple) else x
            q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, 2))
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            weights = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
            return x + self.out((weights @ v).transpose(1, 2).flatten(2)), weights

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Embedding(256, 16),
            nn.Sequential(self.Block(), self.Block()),
            nn.Linear(16, 256),
        )

    def forward(self, tokens: torch.Tensor) -> Any:
        return {"logits": self.head(self.blocks(self.embed(tokens))[0])}["logits"], None


# ------------------------------------------------------------------------------------------------------------ the views


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_loss_lens_and_weights_are_the_model_s(style: str, swapped: bool) -> None:
    made, tokens = gpt(style, kv_heads=2), text()
    plain = copy.deepcopy(made)
    if swapped:
        assert "attention" in str(fastlm.swap(made))
    made(tokens)  # swap's own hook, which sees what ran, is there from then on
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in made.named_modules()}
    parts = inspect.find(made, tokens)
    with torch.no_grad():
        logits = made(tokens)[0]
        depths = list(inspect.lens(made, parts, tokens))
        assert len(depths) == 4
        assert torch.equal(depths[-1], logits)
        x = plain.embed(tokens)
        x = x + plain.place(torch.arange(20)) if plain.place is not None else x
        for block, found in zip([*plain.blocks, None], depths):
            torch.testing.assert_close(found, plain.head(plain.norm(x))[0], rtol=1e-4, atol=1e-4)
            x = x if block is None else block(x, plain.rope(torch.arange(20)))
    loss, rank = inspect.surprise(logits, tokens[0])
    torch.testing.assert_close(loss, F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none"))
    order = logits[:-1].argsort(1, descending=True)
    assert rank.tolist() == [order[i].tolist().index(int(t)) + 1 for i, t in enumerate(tokens[0, 1:])]
    weights = inspect.attention(made, parts, tokens)
    for one, own in zip(weights, by_hand(plain, tokens)):
        assert one is not None
        torch.testing.assert_close(one, own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.sum(2), torch.ones(4, 20))
        assert not one.triu(1).any()
    assert before == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in made.named_modules()}


@torch.no_grad()
def by_hand(model: GPT, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The weights of each block of the plain GPT, written out."""
    rope, x, found = model.rope(torch.arange(tokens.shape[1])), model.embed(tokens), []
    x = x + model.place(torch.arange(tokens.shape[1])) if model.place is not None else x
    for block in model.blocks:
        a = block.attn  # type: ignore[union-attr]
        qkv = a.qkv(block.norm1(x)).unflatten(2, (-1, a.size)).transpose(1, 2)[0]  # type: ignore[union-attr,operator]
        q, k = qkv[: a.heads], qkv[a.heads : a.heads + a.kv_heads]
        if rope is not None:
            from fastlm.models.gpt import rotate

            q, k = rotate(q, *rope), rotate(k, *rope)
        s = q @ k.repeat_interleave(a.heads // a.kv_heads, 0).transpose(1, 2) / a.size**0.5
        found.append(s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf")).softmax(2))
        x = block(x, rope)
    return found


def test_attention_is_as_exact_as_transformers_own(folders: Path) -> None:
    """Against the weights that the same model gives in float64, by accuracy's rule beside transformers' in float32."""
    transformers = pytest.importorskip("transformers")
    made, tokens = theirs.load(folders / "hf", torch.device("cpu")), text()
    eager = transformers.AutoModelForCausalLM.from_pretrained(folders / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        single = eager(tokens, output_attentions=True).attentions
        double = eager.double()(tokens, output_attentions=True).attentions
        logits = logits_of(made, tokens)[0]
    for swapped in (False, True):
        if swapped:
            fastlm.swap(made)
            logits = logits_of(made, tokens)[0].detach()
        parts = inspect.find(made, tokens)
        assert torch.equal(list(inspect.lens(made, parts, tokens))[-1], logits)
        for own, one, two in zip(inspect.attention(made, parts, tokens), single, double):
            assert own is not None
            error, theirs_error = ((x.double() - two[0]).abs() for x in (own, one[0]))
            assert error.max() <= 2 * theirs_error.max() + torch.finfo(torch.float32).eps
            assert error.mean() <= 1.5 * theirs_error.mean() + torch.finfo(torch.float32).eps


def test_somebody_s_own_model_is_looked_into() -> None:
    torch.manual_seed(1)
    made, tokens = Written().eval(), text()
    parts = inspect.find(made, tokens)
    assert parts.blocks == tuple(made.blocks)
    assert torch.equal(list(inspect.lens(made, parts, tokens))[-1], made(tokens)[0][0])
    x, seen = made.embed(tokens), inspect.attention(made, parts, tokens)
    for block, own in zip(made.blocks, seen):
        x, weights = block(x)
        assert own is not None
        torch.testing.assert_close(own, weights[0].detach())


def test_saliency_is_captum_s_and_adds_up() -> None:
    captum = pytest.importorskip("captum.attr")
    made, tokens = gpt("gpt2", tied=False), text(12)
    parts, goals = inspect.find(made, tokens), inspect.goals_of(tokens)
    made.embed.weight.data[0] = made.embed(tokens)[0].mean(0)  # captum's baseline is a token
    found, gain = inspect.saliency(made, parts, tokens, [goals, [goals[4]]], steps=64)
    torch.testing.assert_close(found.sum(1), gain, rtol=1e-3, atol=1e-3)
    assert not found[1, 5:].any()  # what comes later cannot matter
    target = lambda ids: made(ids).log_softmax(2)[:, [g[0] for g in goals], [g[1] for g in goals]].sum(1)
    theirs_found = captum.LayerIntegratedGradients(target, made.embed).attribute(tokens, n_steps=64)
    theirs_found = theirs_found.sum(2).detach()
    torch.testing.assert_close(found[0], theirs_found[0].float(), rtol=1e-3, atol=1e-4)


def test_saliency_adds_up_where_a_norm_follows_the_embedding() -> None:
    made, tokens = gpt("llama"), text(12)
    found, gain = inspect.saliency(made, inspect.find(made, tokens), tokens, [inspect.goals_of(tokens)], steps=32)
    assert abs(float(found.sum() - gain[0])) < 0.05 * abs(float(gain[0]))


# ------------------------------------------------------------------------------------------------------------- the page


def read(path: Path) -> dict[str, Any]:
    """The data of a page, read as a browser reads it: to the first end of a script element."""
    found = re.search(r'<script type="application/json" id="look">(.*?)</script', path.read_text(), re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_what_the_model_gave_and_refers_to_nothing(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["inspect", str(folders / "safetensors"), "--prompt", NASTY, "--page", "a.html", "--device", "cpu"]) == 0
    )
    assert "a.html" in capsys.readouterr().out
    raw, found = Path("a.html").read_text(), read(Path("a.html"))
    assert not re.search(r"https?:|url\(|@import|<link|<img|<iframe|\bsrc=|import\(|fetch\(", raw)
    assert raw.count("</script") == 2
    assert "<b onclick" not in raw
    tokens = torch.tensor([list(NASTY.encode())])
    assert found["tokens"] == tokens[0].tolist()
    made = gpt("gpt2")
    with torch.no_grad():
        loss, rank = inspect.surprise(made(tokens)[0], tokens[0])
    np.testing.assert_allclose(found["loss"][1:], loss, rtol=1e-3)
    assert found["rank"][1:] == rank.tolist()
    packed = np.frombuffer(zlib.decompress(base64.b64decode(found["attention"]["held"]["2"][3])), np.uint8)
    weights = inspect.attention(made, inspect.find(made, tokens), tokens)[2]
    assert weights is not None
    shown = np.zeros((len(NASTY.encode()),) * 2)
    shown[np.tril_indices(len(shown))] = (packed / 255) ** 2
    assert np.abs(shown - weights[3].numpy()).max() < 0.004
    assert len(found["lens"]["ids"]) == 4
    rows = np.frombuffer(zlib.decompress(base64.b64decode(found["saliency"]["rows"])), np.int8)
    assert rows.size == found["saliency"]["count"] * len(shown) == (len(shown) + 1) * len(shown)
    assert len(raw) < 200_000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_it_and_keys_move_it(folders: Path, tmp_path: Path) -> None:
    words = ["inspect", str(folders / "safetensors"), "--prompt", NASTY, "--page", "a.html", "--device", "cpu"]
    assert main(words) == 0
    press = """<script>setTimeout(() => {
      go(1); const key = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
      Object.defineProperty(KeyboardEvent.prototype, "target", {value: document.body});
      key("ArrowRight"); key("j"); key("k"); document.querySelectorAll(".thumb")[5].click();
      setTimeout(() => document.title = [step, layer, head, document.querySelectorAll("#loss button").length].join(" "), 500);
    }, 1000)</script></body>"""
    Path("b.html").write_text(Path("a.html").read_text().replace("</body>", press))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=9000",
        "--enable-logging=stderr",
    ]
    command = ["chromium", *options, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/b.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert title[1] == f"2 1 1 {len(NASTY.encode()) + 1}", title[1]


def test_tokens_are_shown_as_they_are() -> None:
    shown = lambda tokenizer, data: [pieces.reader(tokenizer)(int(t)).text for t in tokenizer.encode(data)]
    assert shown(tokenizers.ByteTokenizer(), "é\n a\x01".encode()) == ["\\xc3", "\\xa9", "↵", " ", "a", "␁"]
    assert pieces.reader(tokenizers.ByteTokenizer())(0).special
    assert shown(tokenizers.CharTokenizer("é\u202e\u0301"), "é\u202e\u0301x".encode()) == [
        "é",
        "\\u202e",
        "◌\u0301",
        "unknown",
    ]
    bpe = tokenizers.BPETokenizer.train(iter([b"the cat the cat \xe2\x82\xac"] * 3), 265)
    tokens = bpe.encode("the cat €".encode())
    assert "".join(pieces.reader(bpe)(int(t)).text for t in tokens).replace("\\xe2\\x82\\xac", "€") == "the cat €"
    assert pieces.reader(bpe)(bpe.eot) == pieces.Piece("<|endoftext|>", special=True)
    assert pieces.reader(bpe)(9999).text == "#9999"
    metaspace = {"model": {"vocab": [["<unk>", 0], ["▁the", 0], ["<0xE2>", 0]]},
                 "added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
                 "decoder": {"type": "Metaspace"}}  # fmt: skip
    read_one = pieces._bpe(metaspace)
    assert [read_one(i).text for i in range(3)] == ["<unk>", " the", "\\xe2"]


def test_a_large_page_holds_the_layers_beside_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tokens, said = gpt("gpt2"), text(60), list[str]()
    monkeypatch.setattr(look, "HELD", 12_000)
    found = look.look(
        made, tokenizers.ByteTokenizer(), tokens, look.Wanted(layer=2, head=1, saliency="text"), said.append
    )
    assert list(found["attention"]["held"]) == [2]
    assert "--layer" in found["attention"]["left"]
    assert "layers 2 to 2" in " ".join(said)
    assert found["saliency"]["count"] == 1
    assert page.page(found, "x", "y").count("<html") == 1


# -------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_looked_into_is_one_sentence(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, hf = str(folders / "safetensors"), str(folders / "hf")
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"model": {"layers": 1}, "tokenizer": BYTES}))
    Path("mine.html").write_text("mine")
    for words, said in (
        ([own], "--prompt must have two tokens or more, since the first has no loss; it has 0"),
        ([own, "--prompt", "a"], "--prompt must have two tokens or more"),
        ([own, "--prompt", "a" * 65], "--prompt has 65 tokens, and the model's context is 64"),
        ([own, "--prompt", "ab", "--layer", "3"], "--layer must be 0 to 2; it is 3"),
        ([own, "--prompt", "ab", "--head", "4"], "--head must be 0 to 3 in layer 1; it is 4"),
        ([own, "--prompt", "ab", "--page", "none/a.html"], "there is no folder none"),
        ([own, "--prompt", "ab", "--page", "mine.html"], "it is not overwritten"),
        ([own, "--prompt", "ab", "--page", "."], "is a folder"),
        ([str(bert), "--prompt", "ab"], "does not predict each next token" if theirs.installed() else "bert model"),
        ([str(empty), "--prompt", "ab"], "holds no model.safetensors"),
        (["nowhere", "--prompt", "ab"], "there is no run nowhere"),
    ):
        assert main(["inspect", *words, "--device", "cpu"]) == 2, words
        err = capsys.readouterr().err
        assert said in err, (words, err)
        assert len(err.strip().splitlines()) == 1, err
    assert Path("mine.html").read_text() == "mine"
    assert not Path(own, "inspect.html").exists()
    assert not Path(hf, "inspect.html").exists()


def test_bytes_that_are_no_utf_8_are_looked_at_where_tokens_are_bytes(folders: Path) -> None:
    words = [
        "inspect",
        str(folders / "safetensors"),
        "--prompt",
        os.fsdecode(b"caf\xe9!"),
        "--page",
        "a.html",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    found = read(Path("a.html"))
    assert [found["pieces"][str(t)][0] for t in found["tokens"]] == ["c", "a", "f", "\\xe9", "!"]
    assert main(words) == 0  # a page takes the place of a page


def test_models_that_do_not_predict_the_next_token_are_refused() -> None:
    class Encoder(Written):
        def forward(self, tokens: torch.Tensor) -> Any:
            x = self.blocks(self.embed(tokens))[0]
            return self.head(x + x.mean(1, keepdim=True))

    with pytest.raises(InputError, match="looks ahead, as an encoder does"):
        inspect.find(Encoder().eval(), text())
    with pytest.raises(InputError, match="in training mode"):
        inspect.find(Written(), text())
    with pytest.raises(InputError, match="no list of blocks"):
        inspect.find(nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256)).eval(), text())


def test_a_folder_of_transformers_is_looked_into(folders: Path) -> None:
    words = [
        "inspect",
        str(folders / "hf"),
        "--prompt",
        "hello",
        "--saliency",
        "text",
        "--kernels",
        "fused",
        "--page",
        "a.html",
    ]
    assert main([*words, "--device", "cpu"]) == 0
    tokens = torch.tensor([list(b"hello")])
    with torch.no_grad():
        loss, _ = inspect.surprise(gpt("gpt2")(tokens)[0], tokens[0])
    np.testing.assert_allclose(read(Path("a.html"))["loss"][1:], loss, rtol=1e-2, atol=1e-3)
    if theirs.installed():
        assert "GPT2LMHeadModel" in html.unescape(Path("a.html").read_text())
