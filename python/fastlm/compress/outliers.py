"""Outlier columns: channels of a layer's input so much larger than the others that one scale a row leaves these no bits.

``Int8Linear`` computes them in float beside its int8 product (LLM.int8(), Dettmers et al. 2022). Their threshold there is a
number, 6, for models of billions; here it is a multiple of what the layer's channels typically reach, so that no scale of a
model's stream counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TIMES = 8.0  # of the median channel's largest magnitude
MOST = 16  # at most one column of so many: a layer with more has no outliers but a wide distribution


@torch.no_grad()
def outlier_columns(
    model: nn.Module, batches: Sequence[Any], layers: Iterable[str], times: float = TIMES
) -> dict[str, Tensor]:
    """By path of those ``layers`` that have some: the columns of the input, int64 [k], whose largest magnitude over ``batches``
    is above ``times`` the median column's.

    Of more than a sixteenth of the columns the largest are taken. The model runs in eval mode, as ``model(batch)``.
    Raises ValueError for times not above 1, no batch, or a path that is no ``nn.Linear``.
    """
    if not times > 1:
        raise ValueError(f"outlier_columns: times is {times}; it must be above 1")
    if not batches:
        raise ValueError("outlier_columns: batches is empty; at least one input is needed to see the activations")
    named, largest = dict(model.named_modules()), dict[str, Tensor]()
    wanted = {path: named.get(path) for path in layers}
    if wrong := [path for path, m in wanted.items() if not isinstance(m, nn.Linear)]:
        raise ValueError(f"outlier_columns: layers holds {wrong[0]!r}, which is no nn.Linear of the model")

    def measures(path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            most = args[0].abs().flatten(0, -2).amax(0).float()
            largest[path] = torch.maximum(largest[path], most) if path in largest else most

        return hook

    hooks = [m.register_forward_pre_hook(measures(path)) for path, m in wanted.items() if m is not None]
    was, _ = model.training, model.eval()
    try:
        for batch in batches:
            model(batch)
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    found = {}
    for path, most in largest.items():
        above = int((most > times * most.median()).sum())
        count = min(above, max(len(most) // MOST, 1))
        if count:
            found[path] = most.topk(count).indices.sort().values
    return found
