"""What a model reaches on text: the validation split of a run, or other text read as that run reads.

A text is prepared like a further validation set; --dtype, packed documents and references of pairs are the run's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from fastlm.data import InputError, Prepared, prepare
from fastlm.data.prepare import Note, silent
from fastlm.data.tokenizer import Tokenizer
from fastlm.train import job, reference
from fastlm.train.config import Config
from fastlm.train.folders import has_data
from fastlm.train.machine import autocast
from fastlm.train.ranks import SingleProcess


class Evaluation:
    """The text of a run, or another one, ready to measure models on; `kind` is "dpo" where they are pairs."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, context: int, place: torch.device, text: tuple[str, ...] = (),
        note: Note = silent,
    ) -> None:  # fmt: skip
        """`context`: tokens that a model is given at once. Raises InputError for a folder without data, and no text."""
        own = not has_data(folder)
        if own and not text:
            raise InputError(f"{folder} is a model without a run's data: name a TEXT to evaluate on")
        self.config, corpus = (Config(), ()) if own else job.read_config(folder)
        self.folder, self.context, self.place = folder, context, place
        if text:
            options = job.options_of(self.config.data, context)
            self.data = [prepare(text, options, tokenizer=tokenizer, whole=True, note=note)]
        else:
            self.data = job.read_data(corpus, self.config.data, context, note, tokenizer)
        self.kind = "dpo" if any(one.kind == "dpo" for one in self.data) else ""
        if self.kind:
            self._refer()

    def _refer(self) -> None:
        if not (self.folder / reference.FILE).is_file():
            raise InputError(
                f"{self.folder} holds no reference log-probabilities, which a loss of pairs is taken against"
            )
        known = reference.read(self.folder / reference.FILE)
        reference.attach(self.data, None, "", known, SingleProcess(), self.place, self.config.run.dtype)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """val_loss, val_bpb and val_tokens, of all of it; of pairs val_loss, val_accuracy and val_pairs."""
        return self._measure(model, self.data, True)

    def on_training(self, model: nn.Module, tokens: int) -> dict[str, float]:
        """The same of the training side: of about so many tokens, spread evenly over it."""
        return self._measure(model, [one.turned() for one in self.data], False, tokens)

    def _measure(self, model: nn.Module, data: list[Prepared], whole: bool, tokens: int = 0) -> dict[str, float]:
        config = dataclasses.replace(self.config, run=dataclasses.replace(self.config.run, eval_tokens=tokens))
        with torch.no_grad(), autocast(self.place, config.run.dtype):
            found: dict[str, float] = job.validation(data, config, self.context, self.place)(model, whole)
        return found

    @property
    def bytes(self) -> int:
        """Bytes of the text that a loss is taken on."""
        return sum(d.manifest["val"]["target_bytes" if d.kind else "bytes"] for d in self.data)
