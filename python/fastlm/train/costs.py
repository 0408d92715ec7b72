"""What a model and its training take, counted before anything is allocated: parameters, flops, bytes by part and by link.

All of it is of one rank of a mesh: `sizes` gives the mesh's dimensions (pp, dp, fsdp, tp), those left out being 1. Of ranks
that hold different amounts it is the one that holds most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastlm.compress.held import Held
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.loss import CHUNK_ELEMENTS
from fastlm.train import lora
from fastlm.train.config import Config
from fastlm.train.stages import ahead, stage_of

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
    def of(
        cls, model: GPTConfig, config: Config, device: str = "cpu", sizes: Mapping[str, int] | None = None,
        int8: Held | None = None,
    ) -> Costs:  # fmt: skip
        """``int8``: the int8 layers of LoRA's base. Raises InputError where tensor parallelism cannot cut the model."""
        c, m = model, config.model
        mesh = _Mesh(**(sizes or {}))
        stages = mesh.pp * config.run.pp_stages
        with torch.device("meta"):
            plain = GPT(c)
            parameters = sum(p.numel() for p in plain.parameters())
            if m.lora_rank:
                lora.apply(plain, m.lora_rank, m.lora_alpha, m.lora_targets)
        named = dict(plain.named_parameters())
        trained = sum(p.numel() for p in named.values() if p.requires_grad)
        matrices = sum(p.numel() for n, p in named.items() if p.ndim == 2 and n.startswith("blocks"))
        # 2 flops per weight and token forward, as much backward for the inputs and again for the weights where these
        # are trained; attention's two products, causal: half
        weights = matrices + c.vocab * c.width
        per_token = (4 if m.lora_rank else 6) * weights + 6 * c.layers * c.context * c.heads * c.size
        shapes = _shapes(plain, mesh.tp)
        scales = {} if int8 is None else {f"{path}.weight": s.nbytes for path, (_, s) in int8.layers.items()}
        for path, split in {} if int8 is None else int8.splits.items():
            scales[f"{path}.weight"] += sum(t.nbytes for t in split)
        ranks = []
        for at in range(mesh.pp):
            blocks = [i for i in range(c.layers) if stage_of(i, c.layers, stages) % mesh.pp == at]
            own = {n: p for n, p in named.items() if _on(n, at, mesh.pp, blocks)}
            ranks.append(_rank(replace(c, layers=len(blocks)), config, own, shapes, scales, mesh, at, device))
        parts, sent = max(ranks, key=lambda rank: sum(rank[0].values()))
        return cls(parameters, trained, per_token * c.context * _contexts(config), parts, sent)


def _contexts(config: Config) -> int:
    """Contexts of a sample; of preferences the chosen and the rejected answers."""
    return 2 if config.data.dpo else 1


@dataclass(frozen=True)
class _Mesh:
    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    tp: int = 1


def _on(name: str, at: int, ranks: int, blocks: list[int]) -> bool:
    """Whether a pipeline's rank with these blocks holds a parameter; the last one has a copy of a tied embedding."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) in blocks
    if name == "embed.weight" and at == ranks - 1:
        return True
    return at == (0 if name.startswith(("embed.", "place.")) else ranks - 1)


def _rank(
    c: GPTConfig,
    config: Config,
    named: Mapping[str, nn.Parameter],
    shapes: Mapping[str, torch.Size],
    scales: Mapping[str, int],
    mesh: _Mesh,
    at: int,
    device: str,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes held and bytes sent by the pipeline's rank `at`, whose stages have the blocks of `c` and the parameters `named`.
    `scales`: of those that are held in int8 the bytes of their scales."""
    o, fsdp, each = config.optim, mesh.fsdp, config.run.pp_stages if mesh.pp > 1 else 1
    local = {n: shapes[n].numel() for n in named}  # elements that tensor parallelism leaves on a rank,
    held = {n: _ceil(shapes[n][0], fsdp) * shapes[n][1:].numel() for n in named}  # and what FSDP leaves of them
    mine = sum(held[n] for n, p in named.items() if p.requires_grad)
    states_bytes = 4 * mine * {"adamw": 2, "lion": 1, "muon": 1}[o.optimizer]
    if o.optimizer == "muon":  # what is no matrix of a block has AdamW's two
        is_matrix = {n for n, p in named.items() if p.ndim == 2 and n.startswith("blocks")}
        states_bytes += 4 * sum(held[n] for n, p in named.items() if p.requires_grad and n not in is_matrix)
    size = 4 if config.run.dtype == "float32" else 2
    share = _ceil(o.batch, mesh.dp * fsdp)
    micro = min(o.micro or share, share)
    micros, tokens = _ceil(share, micro), micro * c.context * _contexts(config)
    last = at == mesh.pp - 1
    stage = replace(c, layers=_ceil(c.layers, each), shapes=())  # of layers that differ, the widest
    floats = sum(local[n] for n in named if n not in scales)
    kept, working = _activations(stage, config, tokens, mesh.tp, floats, size)
    parts = {
        "weights": sum(held[n] + scales[n] if n in scales else 4 * held[n] for n in named),
        "gradients": 4 * mine,
        "optimizer": states_bytes,
        "average of weights": 4 * mine if o.ema else 0,
        "weights that masks hide": 4
        * sum(held[n] for n in named if n.startswith("blocks") and len(shapes[n]) == 2)
        * o.chooses,
        "activations": kept * min(ahead(at, mesh.pp, each, micros) + 1, each * micros) + working,
        "logits of one chunk": min(tokens * _ceil(c.vocab, mesh.tp), max(CHUNK_ELEMENTS, 16 * c.vocab)) * 12 * last,
    }
    if fsdp > 1:  # gathered: what is in no block for the whole step, and two blocks (one comes, one works)
        block = sum(n for name, n in local.items() if name.startswith("blocks.")) // max(c.layers, 1)
        outside = sum(n for name, n in local.items() if not name.startswith("blocks."))
        parts["gathered weights"] = 2 * block * size + 4 * outside
        # gradients of accumulated micro-batches stay whole until the last; else those of one block and of the rest
        parts["gradients"] += 4 * (sum(local.values()) if micro < share else block + outside)
    if device == "cpu":
        parts["copies that a checkpoint is written from"] = 4 * mine * (2 if o.ema else 1) + states_bytes
        parts["process"] = PROCESS
    return parts, _sent(c, config, local, named, mesh, at, tokens, micros, size)


def _shapes(model: nn.Module, tp: int) -> dict[str, torch.Size]:
    """Shapes of the parameters on the first of `tp` ranks."""
    shapes = {n: p.shape for n, p in model.named_parameters()}
    if tp > 1:
        from fastlm.train.tensor_parallel import cuts

        shapes |= {name: torch.Size(cut.local(0)) for name, cut in cuts(model, tp).items()}
    return shapes


def _activations(c: GPTConfig, config: Config, tokens: int, tp: int, parameters: int, size: int) -> tuple[int, int]:
    """Bytes that the forward of one micro-batch through the blocks of `c` leaves for its backward; and in which backwards
    work, which go one at a time. `parameters` counts those of the rank that are float."""
    q, kv = c.heads * c.size, (c.kv_heads or c.heads) * c.size
    branch = (4 if c.mlp == "swiglu" else 2) * c.mlp_width
    block = (7 * c.width + q + 4 * (q + kv)) + branch
    working = _ceil(4 * (q + kv) + branch, tp) + (4 * c.width if tp > 1 else 0)  # gradients, and what is gathered
    if config.model.dropout and config.run.kernels == "torch":  # masks, and attention's whole matrix of weights
        block += 4 * c.width + 3 * c.heads * c.context
    whole_positions = 2 * c.width if tp > 1 else 0  # inputs of qkv and up, gathered
    block = _ceil(block - whole_positions, tp) + whole_positions
    again = {"none": 0, "half": _ceil(c.layers, 2), "full": c.layers}[config.run.recompute]
    whole = c.layers - again
    held = tokens * (whole * block + _ceil(again * c.width, tp) + 4 * c.width) * size
    work = tokens * working * size
    if config.run.dtype != "float32":  # the residual stream and the norms stay float32; weights are cast once
        held += tokens * whole * _ceil(2 * c.width, tp) * 4
        work += parameters * size
    if again:  # a block computed again is held whole then
        work += tokens * (block * size + (_ceil(2 * c.width, tp) * 4 if config.run.dtype != "float32" else 0))
    return held, work


def _sent(
    c: GPTConfig,
    config: Config,
    local: Mapping[str, int],
    named: Mapping[str, nn.Parameter],
    mesh: _Mesh,
    at: int,
    tokens: int,
    micros: int,
    size: int,
) -> dict[str, int]:
    """Bytes by purpose, for rings: a gather or a sum shared out sends (n - 1)/n of the whole, a sum for all twice that."""
    dp, fsdp, tp = mesh.dp, mesh.fsdp, mesh.tp
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
    if mesh.pp > 1:  # hidden states to the next stage, their gradients to the one before
        ways = 2 * config.run.pp_stages - (at == 0) - (at == mesh.pp - 1)
        out["pp: activations"] = micros * tokens * c.width * 4 * ways // tp
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
