"""torch's 2:4 kernels (torch.sparse, cuSPARSELt or CUTLASS below it) for pruned layers, where they measured faster on this GPU.

For inference: such a weight takes no gradient, and ``dense_24`` gives the ordinary one back before a model is saved or trained.
Never run on a GPU yet. There is no 2:4 product of fastlm's own: at one row a dense one over int8 weights reads less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlm.compress import timing
from fastlm.compress.semi_structured import check_24
from fastlm.nn.masked import MaskedLinear

DTYPES = (torch.float16, torch.bfloat16)
SPARSE = "_fastlm_sparse_24"  # marks a module whose weight is torch's sparse tensor


@dataclass
class Sparse24:
    """A pruned layer: seconds of a call with the dense and with the sparse weight, where measured; ``why`` it stays dense."""

    module: str
    dense_s: float | None = None
    sparse_s: float | None = None
    why: str = ""


def sparse_24(model: nn.Module, rows: int = 512) -> list[Sparse24]:
    """Gives the 2:4 ``MaskedLinear`` layers of a model torch's semi-structured weight, each where a call of ``rows`` rows
    measured faster with it.

    Returns a row for each such layer, those that stay dense with the reason. Raises ValueError for rows below 1, or a model
    without pruned layers.
    """
    if rows < 1:
        raise ValueError(f"sparse_24: rows is {rows}; it must be at least 1")
    layers = {path: m for path, m in model.named_modules() if isinstance(m, MaskedLinear) and SPARSE not in m.__dict__}
    if not layers:
        raise ValueError(
            "sparse_24: the model has no pruned layer with a dense weight; prune it first (compress.prune)"
        )
    return [_one(path, module, rows) for path, module in layers.items()]


def dense_24(model: nn.Module) -> list[str]:
    """Undoes ``sparse_24``: weights are dense parameters again, with the same values. Returns the paths."""
    found = {path: m for path, m in model.named_modules() if SPARSE in m.__dict__}
    for module in found.values():
        trained = module.__dict__.pop(SPARSE)
        module.weight = nn.Parameter(_dense(module.weight.detach()), requires_grad=trained)  # type: ignore[arg-type]
    return list(found)


@torch.no_grad()
def _one(path: str, module: MaskedLinear, rows: int) -> Sparse24:
    weight = module.weight.detach()
    if why := _unfit(weight):
        return Sparse24(path, why=why)
    try:
        sparse = _sparse(weight.contiguous())
    except RuntimeError as error:  # torch's own word on shapes and devices
        return Sparse24(path, why=" ".join(str(error).split()))
    x = torch.ones(rows, module.in_features, dtype=weight.dtype, device=weight.device)
    linear = torch.nn.functional.linear
    dense_s, sparse_s = timing.alternate(
        lambda: linear(x, weight, module.bias), lambda: linear(x, sparse, module.bias), weight.device
    )
    if sparse_s >= dense_s:
        slower = f"2:4 would be slower: {1e3 * sparse_s:.3g} ms against {1e3 * dense_s:.3g} ms dense, with {rows} rows"
        return Sparse24(path, dense_s, sparse_s, slower)
    module.__dict__[SPARSE] = module.weight.requires_grad
    module.weight = nn.Parameter(sparse, requires_grad=False)
    return Sparse24(path, dense_s, sparse_s)


def _unfit(weight: Tensor) -> str:
    """Why torch's kernels do not take a weight, or ""."""
    if why := _no_gpu(weight.device):
        return why
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; the kernels are for float16 and bfloat16"
    if bad := check_24(weight):
        return f"it is not 2:4: {bad} groups of four hold more than two values"
    return ""


def _no_gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return f"it lies on {device.type}; the kernels are a GPU's"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"this GPU is sm_{major}{minor}; the kernels need sm_80 or newer"


def _sparse(weight: Tensor) -> Tensor:
    from torch.sparse import to_sparse_semi_structured

    made: Tensor = to_sparse_semi_structured(weight)
    return made


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense()
