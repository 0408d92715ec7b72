"""A sample of rows that are fine-tuned on, as text that shows which tokens are trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from fastlm.data.tokenizer import Tokenizer

STOP = "<stop>"  # the token that ends a document, which no text holds
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def show(n: int, batch: Sequence[np.ndarray], tokenizer: Tokenizer) -> None:
    """Print the sequences of one sample: inputs, targets (-100 where nothing is trained) and documents, each [1 or 2, context].

    Of two rows the first holds the chosen answers of pairs and the second the rejected.
    """
    inputs, targets, documents = batch[:3]
    found = [list(_sequences(*row)) for row in zip(inputs, targets, documents)]
    trained = sum(int((row >= 0).sum()) for row in targets)
    print(f"sample {n}: {inputs.size} tokens, {trained} trained, {sum(map(len, found))} sequence(s)")
    for number in range(len(found[0])):
        for row, what in zip(found, ("chosen", "rejected") if len(found) > 1 else ("",)):
            tokens, own = row[number]
            print("".join(_marked(tokens, own, tokenizer)))
            print(f"--- {what + ': ' if what else ''}{int(own.sum())} of {len(own)} tokens trained")


def _sequences(
    inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, whether each is trained) of each document of a row that holds any target."""
    for number in np.unique(documents):
        here = documents == number
        own = targets[here]
        if (own >= 0).any():
            tokens = np.append(
                inputs[here][1:], own[-1]
            )  # an input is the target before it; of the last only that is known
            yield (tokens, own >= 0) if own[-1] >= 0 else (tokens[:-1], own[:-1] >= 0)


def _marked(tokens: np.ndarray, own: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    styled = sys.stdout.isatty()
    borders = np.flatnonzero(np.diff(own)) + 1
    for part, trained in zip(np.split(tokens, borders), np.split(own, borders)):
        text = _text(part, tokenizer)
        if trained[0]:
            yield f"{BOLD}{text}{PLAIN}" if styled else f"[[{text}]]"
        else:
            yield f"{DIM}{text}{PLAIN}" if styled else text


def _text(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The tokens as text, with the stop token and special tokens spelled out."""
    names = {**getattr(tokenizer, "special_ids", {}), tokenizer.eot: STOP}
    out, held = list[str](), list[int]()
    for token in [*tokens.tolist(), None]:
        if token is not None and token not in names:
            held.append(token)
            continue
        out.append(tokenizer.decode(held).decode("utf-8", "replace"))
        held = []
        out.append("" if token is None else names[token])
    return "".join(out)
