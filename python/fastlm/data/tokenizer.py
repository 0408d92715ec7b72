"""Tokenisers: bytes (default, no file), characters, and byte-pair encoding by the package `tokenizers`.

Each has `vocab`, `eot` (the token that ends a document), `encode(bytes) -> array`, `decode(tokens) -> bytes`, `spec()`
(plain JSON from which `load` makes it again) and `hash`, which names it in shards and checkpoints.
"""

from __future__ import annotations

import hashlib
import json
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


class BPETokenizer(Tokenizer):
    """Byte-level BPE; any text round-trips. From a `tokenizer.json`, its end-of-text token ends documents."""

    def __init__(self, content: str) -> None:
        self.content = content
        try:
            self._bpe = _tokenizers().Tokenizer.from_str(content)
        except InputError:
            raise
        except Exception as error:  # the package raises Exception itself
            raise InputError(f"the tokenizer.json cannot be read: {error}") from error
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self.vocab = max(self._bpe.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        names = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
        ids = [i for i in map(self._bpe.token_to_id, names) if i is not None]
        if not ids:
            raise InputError(f"the tokenizer has none of the end-of-text tokens {' '.join(names)}")
        self.eot = ids[0]

    @classmethod
    def train(cls, texts: Iterator[bytes], vocab: int) -> BPETokenizer:
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
        bpe.train_from_iterator((t.decode("utf-8", "replace") for t in texts), trainer)
        return cls(bpe.to_str())

    def encode(self, text: bytes) -> np.ndarray:
        parts = [text] if len(text) <= 1 << 20 else cut(text)  # what encodes a text holds 100 bytes a token
        found = self._bpe.encode_batch_fast([t.decode("utf-8", "replace") for t in parts], add_special_tokens=False)
        return np.concatenate([np.array(e.ids, dtype=self.dtype) for e in found])

    def decode(self, tokens: Iterable[int]) -> bytes:
        return self._bpe.decode([int(t) for t in tokens], skip_special_tokens=True).encode()

    def spec(self) -> dict[str, Any]:
        return {"kind": "bpe", "content": self.content}


def load(spec: dict[str, Any]) -> Tokenizer:
    if spec["kind"] == "bytes":
        return ByteTokenizer()
    if spec["kind"] == "chars":
        return CharTokenizer(spec["characters"])
    return BPETokenizer(spec["content"])


def known(name: str) -> None:
    """InputError, before any text is read, unless `make` can make this tokenizer."""
    if name == "bpe":
        _tokenizers()
    elif name not in ("bytes", "chars"):
        _read(name)


def _read(name: str) -> BPETokenizer:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"the tokenizer {name} is not bytes, chars, bpe or the path of a tokenizer.json")
    try:
        return BPETokenizer(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"the tokenizer {name} is no tokenizer.json: it is not UTF-8 ({error.reason})") from None


def make(name: str, vocab: int, texts: Callable[[], Iterator[bytes]]) -> Tokenizer:
    """`name` is bytes, chars, bpe (trained on `texts` to `vocab` tokens), or the path of a tokenizer.json."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "chars":
        return CharTokenizer.train(texts())
    if name == "bpe":
        return BPETokenizer.train(texts(), vocab)
    return _read(name)
