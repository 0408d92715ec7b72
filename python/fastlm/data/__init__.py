"""Corpora, tokenisers, shards and loading. Stands alone: imports nothing of fastlm above `backend`."""

from fastlm.data.errors import InputError
from fastlm.data.loader import DatasetSource, Prefetch, TokenSource, corpus_batches, validation_batches
from fastlm.data.prepare import Options, Prepared, prepare

__all__ = [
    "DatasetSource",
    "InputError",
    "Options",
    "Prefetch",
    "Prepared",
    "TokenSource",
    "corpus_batches",
    "prepare",
    "validation_batches",
]
