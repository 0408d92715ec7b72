"""What a model and its training take, counted before anything is allocated: parameters, flops, bytes by part and by link.

All of it is of one rank of a mesh: `sizes` gives the mesh's dimensions (dp, fsdp, tp), those left out being 1. Of ranks
that hold different amounts it is the one that holds most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.loss import CHUNK_ELEMENTS
from fastlm.train import lora
from fastlm.train.config import Config

PROCESS = 450 << 20  # PyTorch, its libraries, and the pages of the corpus that were read


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Costs:
    """Counts of one run on one rank. Parameters are exact, of the whole model; flops are the model's own (recomputation
    adds none)."""

    parameters: int
    trained: int
    flops_per_sample: float
    parts: dict[str, int]  # bytes, by what holds them
    sent: dict[str, int]  # bytes that the rank sends in a step, by what for

    @property
    def memory(self) -> int:
        return sum(self.parts.values())

    @classmethod
    def of(cls, model: GPTConfig, config: Config, device: str = "cpu", sizes: Mapping[str, int] | None = None) -> Costs:
        """Raises InputError where tensor parallelism cannot cut the model."""
        c, o, sizes = model, config.optim, sizes or {}
        dp, fsdp, tp = (sizes.get(name, 1) for name in ("dp", "fsdp", "tp"))
        with torch.device("meta"):
            plain = GPT(c)
            parameters = sum(p.numel() for p in plain.parameters())
            m = config.model
            if m.lora_rank:
                lora.apply(plain, m.lora_rank, m.lora_alpha, m.lora_targets)
        named = dict(plain.named_parameters())
        trained = sum(p.numel() for p in named.values() if p.requires_grad)
        matrices = sum(p.numel() for n, p in named.items() if p.ndim == 2 and n.startswith("blocks"))
        # 2 flops per weight and token forward, as much backward for the inputs and again for the weights where these
        # are trained; attention's two products, causal: half
        weights = matrices + c.vocab * c.width
        per_token = (4 if m.lora_rank else 6) * weights + 6 * c.layers * c.context * c.width

        shapes = _shapes(plain, tp)
        local = {n: shape.numel() for n, shape in shapes.items()}  # elements that tensor parallelism leaves on a rank,
        held = {n: _ceil(s[0], fsdp) * s[1:].numel() for n, s in shapes.items()}  # and what FSDP leaves of them
        mine = sum(held[n] for n, p in named.items() if p.requires_grad)
        states = {"adamw": 2, "lion": 1, "muon": 1}[o.optimizer]
        states_bytes = 4 * mine * states
        if o.optimizer == "muon":  # what is no matrix of a block has AdamW's two
            is_matrix = {n for n, p in named.items() if p.ndim == 2 and n.startswith("blocks")}
            states_bytes += 4 * sum(held[n] for n, p in named.items() if p.requires_grad and n not in is_matrix)
        size = 4 if config.run.dtype == "float32" else 2
        share = _ceil(o.batch, dp * fsdp)
        micro = min(o.micro or share, share)
        tokens = micro * c.context
        parts = {
            "weights": 4 * sum(held.values()),
            "gradients": 4 * mine,
            "optimizer": states_bytes,
            "average of weights": 4 * mine if o.ema else 0,
            "activations": _activations(c, config, tokens, tp, parameters, size),
            "logits of one chunk": min(tokens * _ceil(c.vocab, tp), max(CHUNK_ELEMENTS, 16 * c.vocab)) * 4 * 3,
        }
        if (
            fsdp > 1
        ):  # what is gathered: all that is in no block for the whole step, and two blocks (one comes, one works)
            block = sum(n for name, n in local.items() if name.startswith("blocks.0."))
            outside = sum(n for name, n in local.items() if not name.startswith("blocks."))
            parts["gathered weights"] = 2 * block * size + 4 * outside
            # gradients of accumulated micro-batches stay whole until the last; else those of one block and of the rest
            parts["gradients"] += 4 * (sum(local.values()) if micro < share else block + outside)
        if device == "cpu":
            parts["copies that a checkpoint is written from"] = 4 * mine * (2 if o.ema else 1) + states_bytes
            parts["process"] = PROCESS
        sent = _sent(c, config, local, named, (dp, fsdp, tp), tokens, _ceil(share, micro), size)
        return cls(parameters, trained, per_token * c.context, parts, sent)


def _shapes(model: nn.Module, tp: int) -> dict[str, torch.Size]:
    """Shapes of the parameters on the first of `tp` ranks."""
    shapes = {n: p.shape for n, p in model.named_parameters()}
    if tp > 1:
        from fastlm.train.tensor_parallel import cuts

        shapes |= {name: torch.Size(cut.local(0)) for name, cut in cuts(model, tp).items()}
    return shapes


def _activations(c: GPTConfig, config: Config, tokens: int, tp: int, parameters: int, size: int) -> int:
    """Bytes that the forward of one micro-batch leaves for its backward, and what the backward of a block works in."""
    kv = (c.kv_heads or c.heads) * (c.width // c.heads)
    branch = (4 if c.mlp == "swiglu" else 2) * c.mlp_width
    block = (8 * c.width + 4 * (c.width + kv)) + branch
    working = _ceil(4 * (c.width + kv) + branch, tp) + (4 * c.width if tp > 1 else 0)  # gradients, and what is gathered
    if config.model.dropout and config.run.kernels == "torch":  # masks, and attention's whole matrix of weights
        block += 4 * c.width + 3 * c.heads * c.context
    whole_positions = 2 * c.width if tp > 1 else 0  # inputs of qkv and up, gathered
    block = _ceil(block - whole_positions, tp) + whole_positions
    again = {"none": 0, "half": _ceil(c.layers, 2), "full": c.layers}[config.run.recompute]
    whole = c.layers - again + (1 if again else 0)  # blocks held whole at once: one of those computed again is
    held = tokens * (whole * block + _ceil(again * c.width, tp) + 4 * c.width + working) * size
    if config.run.dtype != "float32":  # the residual stream and the norms stay float32; weights are cast once
        held += tokens * whole * _ceil(2 * c.width, tp) * 4 + _ceil(parameters, tp) * size
    return held


def _sent(
    c: GPTConfig,
    config: Config,
    local: Mapping[str, int],
    named: Mapping[str, nn.Parameter],
    sizes: tuple[int, int, int],
    tokens: int,
    micros: int,
    size: int,
) -> dict[str, int]:
    """Bytes by purpose, for rings: a gather or a sum shared out sends (n - 1)/n of the whole, a sum for all twice that."""
    dp, fsdp, tp = sizes
    trained = sum(n for name, n in local.items() if named[name].requires_grad)
    out = {}
    if dp > 1:
        out["dp: gradients"] = 2 * (dp - 1) * 4 * _ceil(trained, fsdp) // dp
    if fsdp > 1:
        linear = sum(n for name, n in local.items() if name.startswith("blocks.") and named[name].ndim == 2)
        once = sum(n for name, n in local.items() if not name.startswith("blocks."))  # forward and backward share them
        rest = sum(local.values()) - linear - once
        out["fsdp: weights"] = micros * (fsdp - 1) * (2 * (linear * size + rest * 4) + once * 4) // fsdp
        out["fsdp: gradients"] = (fsdp - 1) * 4 * trained // fsdp
    if tp > 1:
        again = {"none": 0, "half": _ceil(c.layers, 2), "full": c.layers}[config.run.recompute]
        stream = tokens * c.width * (tp - 1) // tp
        # a block gathers twice and sums twice, and the backward does the reverse; recomputation repeats the forward
        blocks = (8 * c.layers + 4 * again) * stream * size
        ends = 2 * stream * (4 + size) + 2 * 4 * 4 * tokens * (tp - 1) // tp  # embedding; loss and its softmax
        out["tp: activations"] = micros * (blocks + ends)
    if config.optim.optimizer == "muon" and fsdp * tp > 1:
        matrices = sum(p.numel() for n, p in named.items() if p.ndim == 2 and n.startswith("blocks."))
        out["muon: whole matrices"] = 4 * matrices * (fsdp - 1) // (fsdp * tp) + 4 * matrices * (tp - 1) // tp
    return out
