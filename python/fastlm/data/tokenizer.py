"""Tokenisers: bytes (default, no file), characters, and byte-pair encoding by the package `tokenizers`.

Each has `vocab`, `eot` (the token that ends a document), `encode(bytes) -> array`, `decode(tokens) -> bytes`, `spec()`
(plain JSON from which `load` makes it again) and `hash`, which names it in shards and checkpoints.

Text is text: what a document holds never becomes a special token, and decodes to what was written. Special tokens come from
the trainer, and decoding leaves those out. `special_tokens="read"` reads them in text, on purpose.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.cutting import cut
from fastlm.data.errors import InputError

SMALLEST_BPE = 257


class Tokenizer:
    vocab: int
    eot: int

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of a text, in the tokeniser's dtype. Bytes that are not UTF-8 are kept by ByteTokenizer alone."""
        raise NotImplementedError

    def decode(self, tokens: Iterable[int]) -> bytes:
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        raise NotImplementedError

    def __reduce__(self) -> Any:
        return load, (self.spec(),)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.vocab <= 256 else np.uint16 if self.vocab <= 65536 else np.uint32)

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.spec(), sort_keys=True).encode()).hexdigest()[:16]


class ByteTokenizer(Tokenizer):
    """A byte is a token. Documents end with byte 0, which text does not contain."""

    vocab, eot = 256, 0

    def encode(self, text: bytes) -> np.ndarray:
        if b"\0" in text:
            raise InputError(
                "a text holds the byte 0, by which --tokenizer bytes ends documents: remove it, or use chars or bpe"
            )
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(int(t) for t in tokens)

    def spec(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class CharTokenizer(Tokenizer):
    """Each character of the training text is a token; 0 ends a document, 1 stands for a character never seen."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab, self.eot = len(characters) + 2, 0
        self._table = np.full(0x110000, 1, dtype=np.uint32)
        codes = np.array([ord(c) for c in characters], dtype=np.int64)
        self._table[codes] = np.arange(2, self.vocab)

    @classmethod
    def train(cls, texts: Iterator[bytes]) -> CharTokenizer:
        seen: set[str] = set()
        for text in texts:
            seen.update(text.decode("utf-8", "replace"))
        return cls("".join(sorted(seen)))

    def encode(self, text: bytes) -> np.ndarray:
        codes = np.frombuffer(text.decode("utf-8", "replace").encode("utf-32-le"), dtype=np.uint32)
        return self._table[codes].astype(self.dtype)

    def decode(self, tokens: Iterable[int]) -> bytes:
        known = ("", "\ufffd")
        return "".join(known[t] if t < 2 else self.characters[t - 2] for t in map(int, tokens)).encode()

    def spec(self) -> dict[str, Any]:
        return {"kind": "chars", "characters": self.characters}


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError("byte-pair encoding needs the package tokenizers: pip install tokenizers") from None
    return tokenizers


def without_specials(content: str) -> tuple[str, dict[str, str]]:
    """A tokenizer.json whose special tokens have names that no text holds, and these names; every token keeps its number.

    `encode_special_tokens` of the package would not do. A model's own vocabulary may hold the token as well, and Unigram and
    WordLevel find it there; and the setting is lost when the tokenizer is saved or sent to another process.
    """
    body = json.loads(content)
    model = body["model"]
    pieces, byte = model["vocab"], re.compile(r"<0x[0-9A-F]{2}>")
    listed = isinstance(pieces, list)  # Unigram: pairs of piece and score
    known = {piece for piece, _ in pieces} if listed else pieces.keys()
    names: dict[str, str] = {}
    added = []
    for number, token in enumerate(body.get("added_tokens", [])):
        name = token["content"]
        if token["special"] and name in known and (len(name) == 1 or byte.fullmatch(name)):
            continue  # text has no other way to say this: the model's own vocabulary goes on to
        if token["special"]:
            names[name] = f"\0{number}\0"
            token |= {"content": names[name], "normalized": False}
        added.append(token)
    if listed:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in pieces]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in pieces.items()}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        split = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
        model["merges"] = [
            merge for merge, pair in zip(model["merges"], split) if not {*pair, "".join(pair)} & names.keys()
        ]
    return json.dumps({**body, "added_tokens": added, "post_processor": None}, ensure_ascii=False), names


# Merges are counted within words, and a word's cost grows with the square of its length: one of 200,000 letters took 16 s.
_WORD = 256
_LONG = re.compile(rf"[^\W\d_]{{{_WORD + 1},}}|\d{{{_WORD + 1},}}|(?:[^\w\s]|_){{{_WORD + 1},}}|\s{{{_WORD + 1},}}")


def _bounded(text: str) -> Iterator[str]:
    """``text`` in parts, so that no word (letters, digits, marks or blanks in a row) is longer than ``_WORD``.

    Text without so long a word, as nearly all is, stays whole.
    """
    begin = 0
    for found in _LONG.finditer(text):
        for cut_at in range(found.start() + _WORD, found.end(), _WORD):
            yield text[begin:cut_at]
            begin = cut_at
    yield text[begin:]


class BPETokenizer(Tokenizer):
    """Byte-level BPE, or any `tokenizer.json`, whose end-of-text token ends documents. What it can spell round-trips.

    `special_tokens` is `text` or `read`: what of a text looks like a special token stays text, or becomes it. Decoding leaves
    special tokens out; with `read`, where they may come from the text, only the one that ends documents.
    """

    def __init__(self, content: str, special_tokens: str = "text") -> None:
        self.content, self.special_tokens = content, special_tokens
        self.specials: dict[str, str] = {}  # by what a chat template writes: the name that stands for it in a text
        lib = _tokenizers()
        try:
            self._bpe = lib.Tokenizer.from_str(content)
            names = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
            ids = [i for i in map(self._bpe.token_to_id, names) if i is not None]
            self.vocab = max(self._bpe.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            if special_tokens == "text":
                plain, self.specials = without_specials(content)
                self._bpe = lib.Tokenizer.from_str(plain)
        except Exception as error:  # the package raises Exception itself
            raise InputError(f"the tokenizer.json cannot be read: {error}") from error
        self.special_ids = {i: text for text, n in self.specials.items() if (i := self._bpe.token_to_id(n)) is not None}
        self._bpe.no_truncation()
        self._bpe.no_padding()
        if not ids:
            raise InputError(f"the tokenizer has none of the end-of-text tokens {' '.join(names)}")
        self.eot = ids[0]
        # written as bytes by mistake: the package takes their letters for those that stand for bytes
        added = {i: token.content for i, token in self._bpe.get_added_tokens_decoder().items()}
        self._letters = (
            {i: text for i, text in added.items() if not text.isascii()}
            if "ByteLevel" in repr(self._bpe.decoder)
            else {}
        )

    @classmethod
    def train(cls, texts: Iterator[bytes], vocab: int, special_tokens: str = "text") -> BPETokenizer:
        lib = _tokenizers()
        if vocab < SMALLEST_BPE:
            raise InputError(
                f"--vocab must be at least {SMALLEST_BPE}, the bytes and the end of text, for bpe; it is {vocab}"
            )
        bpe = lib.Tokenizer(lib.models.BPE())
        bpe.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = lib.decoders.ByteLevel()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator((part for t in texts for part in _bounded(t.decode("utf-8", "replace"))), trainer)
        return cls(bpe.to_str(), special_tokens)

    def encode(self, text: bytes) -> np.ndarray:
        parts = [text] if len(text) <= 1 << 20 else cut(text)  # what encodes a text holds 100 bytes a token
        found = self._bpe.encode_batch_fast([t.decode("utf-8", "replace") for t in parts], add_special_tokens=False)
        return np.concatenate([np.array(e.ids, dtype=self.dtype) for e in found])

    def decode(self, tokens: Iterable[int]) -> bytes:
        ids = [int(t) for t in tokens]
        if self.special_tokens == "read":
            ids = [i for i in ids if i != self.eot]
        if not self._letters.keys() & set(ids):
            return self._decode(ids)
        out, start = [], 0
        for at, i in enumerate(ids):
            if i in self._letters:
                out += [self._decode(ids[start:at]), self._letters[i].encode()]
                start = at + 1
        return b"".join([*out, self._decode(ids[start:])])

    def _decode(self, ids: list[int]) -> bytes:
        return self._bpe.decode(ids, skip_special_tokens=self.special_tokens == "text").encode()

    def spec(self) -> dict[str, Any]:
        read = {} if self.special_tokens == "text" else {"special_tokens": self.special_tokens}
        return {"kind": "bpe", "content": self.content, **read}


def load(spec: dict[str, Any], special_tokens: str = "") -> Tokenizer:
    """The tokenizer of a specification; `special_tokens` (text or read) takes the place of what that says."""
    if spec["kind"] == "bytes":
        return ByteTokenizer()
    if spec["kind"] == "chars":
        return CharTokenizer(spec["characters"])
    return BPETokenizer(spec["content"], special_tokens or spec.get("special_tokens", "text"))


def known(name: str) -> None:
    """InputError, before any text is read, unless `make` can make this tokenizer."""
    if name == "bpe":
        _tokenizers()
    elif name not in ("bytes", "chars"):
        _read(name)


def _read(name: str, special_tokens: str = "text") -> BPETokenizer:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"the tokenizer {name} is not bytes, chars, bpe or the path of a tokenizer.json")
    try:
        return BPETokenizer(path.read_text(encoding="utf-8"), special_tokens)
    except UnicodeDecodeError as error:
        raise InputError(f"the tokenizer {name} is no tokenizer.json: it is not UTF-8 ({error.reason})") from None


def make(name: str, vocab: int, texts: Callable[[], Iterator[bytes]], special_tokens: str = "text") -> Tokenizer:
    """`name` is bytes, chars, bpe (trained on `texts` to `vocab` tokens), or the path of a tokenizer.json."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "chars":
        return CharTokenizer.train(texts())
    if name == "bpe":
        return BPETokenizer.train(texts(), vocab, special_tokens)
    return _read(name, special_tokens)
