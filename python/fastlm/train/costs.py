"""What a model and its training take, counted before anything is allocated: parameters, flops, bytes by part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.loss import CHUNK_ELEMENTS
from fastlm.train import lora
from fastlm.train.config import Config

PROCESS = 600 << 20  # PyTorch, its libraries, and the pages of the corpus that were read


@dataclass(frozen=True)
class Costs:
    """Counts of one run on one rank. Parameters are exact; flops are the model's own (recomputation adds none)."""

    parameters: int
    trained: int
    flops_per_sample: float
    parts: dict[str, int]  # bytes, by what holds them

    @property
    def memory(self) -> int:
        return sum(self.parts.values())

    @classmethod
    def of(cls, model: GPTConfig, config: Config, device: str = "cpu") -> Costs:
        c, o = model, config.optim
        with torch.device("meta"):
            plain: nn.Module = GPT(c)
            parameters = sum(p.numel() for p in plain.parameters())
            m = config.model
            if m.lora_rank:
                lora.apply(plain, m.lora_rank, m.lora_alpha, m.lora_targets)
        trained = sum(p.numel() for p in plain.parameters() if p.requires_grad)
        matrices = sum(p.numel() for n, p in plain.named_parameters() if p.ndim == 2 and n.startswith("blocks"))
        # 2 flops per weight and token forward, as much backward for the inputs and again for the weights where these
        # are trained; attention's two products, causal: half
        weights = matrices + c.vocab * c.width
        per_token = (4 if m.lora_rank else 6) * weights + 6 * c.layers * c.context * c.width
        states = {"adamw": 2, "lion": 1, "muon": 1}[o.optimizer]
        states_bytes = 4 * trained * states
        if o.optimizer == "muon":  # what is no matrix of a block has AdamW's two
            states_bytes += 4 * (trained - (trained if m.lora_rank else matrices))
        size = 4 if config.run.dtype == "float32" else 2
        tokens = (o.micro or o.batch) * c.context
        kv = (c.kv_heads or c.heads) * (c.width // c.heads)
        branch = (4 if c.mlp == "swiglu" else 2) * c.mlp_width
        block = (8 * c.width + 4 * (c.width + kv)) + branch
        if m.dropout and config.run.kernels == "torch":  # masks, and attention's whole matrix of weights
            block += 4 * c.width + 3 * c.heads * c.context
        again = {"none": 0, "half": -(-c.layers // 2), "full": c.layers}[config.run.recompute]
        whole = c.layers - again + (1 if again else 0)  # blocks held whole at once: one of those computed again is
        held = tokens * (whole * block + again * c.width + 4 * c.width) * size
        if config.run.dtype != "float32":  # the residual stream and the norms stay float32; weights are cast once
            held += tokens * whole * 2 * c.width * 4 + parameters * size
        logits = min(tokens * c.vocab, max(CHUNK_ELEMENTS, 16 * c.vocab)) * 4 * 3
        parts = {
            "weights": 4 * sum(p.numel() for p in plain.parameters()),
            "gradients": 4 * trained,
            "optimizer": states_bytes,
            "average of weights": 4 * trained if o.ema else 0,
            "activations": int(held),
            "logits of one chunk": logits,
        }
        if device == "cpu":
            parts["copies that a checkpoint is written from"] = 4 * trained * (2 if o.ema else 1) + states_bytes
            parts["process"] = PROCESS
        return cls(parameters, trained, per_token * c.context, parts)
