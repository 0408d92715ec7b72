"""The trainer of our own BPE: text without blanks costs no more than other text, and usual text is not cut."""

from __future__ import annotations

import inspect
import random
import time

import pytest
from fastlm.data import tokenizer

pytest.importorskip("tokenizers")


@pytest.mark.parametrize("alphabet", ["abcdefghij", "0123456789", "{}();=+-", " \n\t", "中文字样本"])
def test_words_are_cut_and_nothing_is_lost(alphabet):
    draw = random.Random(0)
    text = "a b " + "".join(draw.choice(alphabet) for _ in range(1000)) + " c"
    parts = list(tokenizer._bounded(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= tokenizer._WORD + len("a b ")
    assert len(parts) == 4


def test_usual_text_stays_whole():
    text = inspect.getsource(random) + "_" * tokenizer._WORD
    assert list(tokenizer._bounded(text)) == [text]
    assert list(tokenizer._bounded("")) == [""]


def test_a_text_without_blanks_is_learned_quickly():
    draw = random.Random(0)
    text = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(300_000)).encode()
    begin = time.process_time()
    learned = tokenizer.BPETokenizer.train(iter([text]), 600)
    assert time.process_time() - begin < 8  # 24 s when it was one word of 300,000 letters
    assert learned.decode(learned.encode(text)) == text
