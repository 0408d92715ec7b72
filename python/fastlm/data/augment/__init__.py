"""Copies of texts in other words: back-translation, words replaced by synonyms, sentences in another order."""

from fastlm.data.augment.job import Augment, run

__all__ = ["Augment", "run"]
