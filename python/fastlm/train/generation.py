"""Text from a model: how a token is chosen from logits, and tokens made into text, whole or as they come."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastlm.data import tokenizer as tokenizers
from fastlm.models.gpt import GPT


def sampler(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 1,
    vocab: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """Logits [B, V] to tokens [B]. Temperature 0 takes the likeliest; the filters apply in the order of the arguments.
    Only the first `vocab` of the V are drawn from: rows that an embedding has beyond its vocabulary mean nothing."""
    generator = torch.Generator().manual_seed(seed)

    def sample(logits: Tensor) -> Tensor:
        h = logits[:, :vocab].float().cpu()
        if temperature == 0:
            return h.argmax(-1).to(logits.device)
        h = h / temperature
        if top_k:
            h = h.masked_fill(h < h.topk(min(top_k, h.shape[-1])).values[:, -1:], -math.inf)
        p = h.softmax(-1)
        if top_p < 1:
            ranked, order = p.sort(-1, descending=True)
            ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
            p = torch.zeros_like(p).scatter(-1, order, ranked)
        if min_p:
            p = p.masked_fill(p < min_p * p.max(-1, keepdim=True).values, 0.0)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)

    return sample


def generate(
    model: GPT, tokenizer: tokenizers.Tokenizer, prompt: str, count: int, sample: Callable[[Tensor], Tensor]
) -> str:
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt.encode()).astype("int64") if prompt else [tokenizer.eot]
    tokens = torch.as_tensor(ids, device=device)[None]
    training, _ = model.training, model.eval()
    try:
        out = model.generate(tokens, count, sample)[0].tolist()
    finally:
        model.train(training)
    return tokenizer.decode(out if prompt else out[1:]).decode("utf-8", "replace")


REACH = 16  # tokens that may decide how the next one is written


class TextStream:
    """Token numbers to text as they come, after the tokens `before`; what is not yet whole UTF-8 waits for the tokens that
    complete it.

    What a token is as text may depend on those before it: sentencepiece leaves out the space before the first word.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, before: Iterable[int] = ()) -> None:
        self.tokenizer, self.held = tokenizer, list[int]()
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self.whole = isinstance(tokenizer, tokenizers.BPETokenizer)  # decodes to text alone, not to bytes
        self.before = self._window([int(t) for t in before])

    def push(self, token: int) -> str:
        if not self.whole:
            return self.bytes.decode(self.tokenizer.decode([token]))
        self.held.append(token)
        text = self._new()
        if text.endswith("\ufffd") and len(self.held) < 8:  # an unfinished character: at most four bytes, one a token
            return ""
        self.before, self.held = self._window([*self.before, *self.held]), []
        return text

    def _window(self, tokens: list[int]) -> list[int]:
        """The last of ``tokens``, from the beginning of a character: bytes of a torn one spoil all bytes beside it."""
        tokens = tokens[-REACH:]
        starts = range(4 if self.whole else 1)
        whole = (
            tokens[i:] for i in starts if "\ufffd" not in self.tokenizer.decode(tokens[i:]).decode("utf-8", "replace")
        )
        return next(whole, tokens)

    def _new(self) -> str:
        shown = self.tokenizer.decode(self.before).decode()
        return self.tokenizer.decode([*self.before, *self.held]).decode()[len(shown) :]

    def end(self) -> str:
        text = self._new() if self.held else ""
        self.held.clear()
        return text + self.bytes.decode(b"", True)
