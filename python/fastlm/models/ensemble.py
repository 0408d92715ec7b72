"""Several models as one: the mean of their probabilities, one forward of each.

    p(token) = (p_1(token) + ... + p_n(token)) / n

Its loss is at most the mean of the members' losses (Jensen's inequality); how far below says how much they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastlm.models.gpt import GPT, Reader


class Ensemble(nn.Module):
    """Models of one tokenizer, which know at least its `vocab` tokens. Shapes and contexts may differ.

    `model(tokens, targets)` gives the summed loss in nats, a float64 scalar on the CPU, without holding logits;
    `documents` as for GPT. `losses` holds the members' own sums since the ensemble was made, float64 [members].
    """

    losses: Tensor

    def __init__(self, members: Sequence[GPT], vocab: int) -> None:
        super().__init__()
        if not members:
            raise ValueError("members must be one model at least; there is none")
        small = min(m.config.vocab for m in members)
        if not 1 <= vocab <= small:
            raise ValueError(f"vocab must be from 1 to {small}, the tokens that every member knows; it is {vocab}")
        self.members, self.vocab = nn.ModuleList(members), vocab
        self.contexts = tuple(m.config.context for m in members)
        self.context = min(self.contexts)
        self.losses = torch.zeros(len(members), dtype=torch.float64)

    def forward(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        found = torch.stack([m(tokens, targets, documents, each=True).cpu().double() for m in self.members])
        self.losses = self.losses + found.flatten(1).sum(1)
        mixed = math.log(len(found)) - torch.logsumexp(-found, 0)
        return mixed.masked_fill(targets.cpu() < 0, 0.0).sum()

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """As `GPT.generate`; `sample` gets the logarithm of the mean probability [B, `vocab`], float32."""
        readers = [Reader(m) for m in self.members]  # type: ignore[arg-type]
        for _ in range(count):
            each = [reader.next(tokens)[:, : self.vocab].float().log_softmax(-1) for reader in readers]
            mixed = torch.logsumexp(torch.stack(each), 0) - math.log(len(each))
            tokens = torch.cat((tokens, sample(mixed)[:, None]), dim=1)
        return tokens
