"""The trainer: configuration, loop, optimizers, checkpoints, and the language-model job that puts them together."""

from fastlm.train.checkpoint import CheckpointError
from fastlm.train.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastlm.train.loop import Trainer

__all__ = ["CheckpointError", "Config", "DataConfig", "ModelConfig", "OptimConfig", "RunConfig", "Trainer"]
