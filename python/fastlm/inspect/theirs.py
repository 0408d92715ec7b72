"""A folder of transformers as the model that transformers makes of it, from files on this machine alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from fastlm.data.errors import InputError

_PREDICTS = ("ForCausalLM", "LMHeadModel")


def installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def load(folder: Path, device: torch.device) -> nn.Module:
    """The model in float32 and eval mode. InputError for an encoder, or for what transformers cannot read.

    Weights come from safetensors, never by pickle, and no code of the folder runs.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise _unreadable(folder, error) from error
    kinds = config.architectures or [f"{config.model_type} without architectures"]
    if config.is_encoder_decoder or not kinds[0].endswith(_PREDICTS):
        raise InputError(
            f"{folder} is a {kinds[0]}, which does not predict each next token; inspect needs a model that does"
        )
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:
        raise _unreadable(folder, error) from error
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
    model.config.use_cache = False
    made: nn.Module = model
    return made.to(device).eval()


def _unreadable(folder: Path, error: Exception) -> InputError:
    said = " ".join(str(error).split())[:300]
    return InputError(f"transformers cannot read {folder} ({type(error).__name__}: {said})")
