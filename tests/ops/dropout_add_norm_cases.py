"""Cases of dropout_add_norm for every backend's tests: random inputs, the float64 truth, and PyTorch's own result.

The truth rounds nothing. PyTorch's own result is the composition with float32 intermediates in which every tensor that
the op returns or saves lies at its dtype: z is stored, the norm reads it (F.layer_norm where that is what is computed).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import fastlm
import torch
import torch.nn.functional as F
from accuracy import Result
from fastlm.reference.dropout_add_norm import dropout_mask
from fastlm.reference.philox import keep_scale
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Which arguments a call has. ``parameters`` is the dtype of weight, bias and layerscale; None: x's."""

    shape: tuple[int, ...] = (64, 96)
    dtype: torch.dtype = torch.float32
    norm: str | None = "layer"
    p: float = 0.0
    residual: bool = True
    weight: bool = True
    bias: bool = True
    layerscale: bool = False
    rowscale: bool = False
    weight_offset: float = 0.0
    parameters: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    return_residual: bool = True
    eps: float = 1e-5

    def __str__(self) -> str:
        plain = Case()
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        for name in ("norm", "p", "residual", "weight", "bias", "layerscale", "rowscale", "weight_offset",
                     "parameters", "residual_dtype", "return_residual", "eps"):  # fmt: skip
            if getattr(self, name) != getattr(plain, name):
                parts.append(f"{name}={str(getattr(self, name)).removeprefix('torch.')}")
        return "-".join(parts)


def inputs(case: Case, generator: torch.Generator, device: str = "cpu") -> dict[str, Tensor]:
    """Fresh random inputs, with the gradients of both outputs ("dy", "dz") and a seed."""
    columns = case.shape[-1:]

    def normal(shape, dtype, shift=0.0):
        return (torch.randn(shape, generator=generator) + shift).to(dtype).to(device)

    parameters = case.parameters or case.dtype
    out = {"x": normal(case.shape, case.dtype, 0.3)}
    if case.residual:
        out["residual"] = normal(case.shape, case.residual_dtype or case.dtype)
    if case.weight and case.norm:
        out["weight"] = normal(columns, parameters)
    if case.bias and case.norm:
        out["bias"] = normal(columns, parameters)
    if case.layerscale:
        out["layerscale"] = normal(columns, parameters)
    if case.rowscale:
        out["rowscale"] = (torch.rand(case.shape[:-1], generator=generator) < 0.8).float().to(device) / 0.8
    out["dy"] = normal(case.shape, case.dtype)
    out["dz"] = normal(case.shape, case.residual_dtype or case.dtype)
    out["seed"] = torch.randint(-(2**62), 2**62, (), generator=generator).to(device)
    return out


LEAVES = ("x", "residual", "weight", "bias", "layerscale")


def _leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {
        name: tensors[name].detach().to(dtype or tensors[name].dtype).clone().requires_grad_()
        for name in LEAVES
        if name in tensors
    }


def _with_gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor], tensors: dict[str, Tensor]):
    wanted = {"y": "dy", "z": "dz"}
    grads = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        [tensors[wanted[name]].to(value.dtype) for name, value in outputs.items()],
    )
    results = {name: value.detach() for name, value in outputs.items()}
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def run(case: Case, tensors: dict[str, Tensor], offset: Tensor | None = None) -> dict[str, Tensor]:
    """The op itself, forward and backward, on whatever backend serves or is forced."""
    leaves = _leaves(tensors)
    out = fastlm.ops.dropout_add_norm(
        leaves["x"], leaves.get("residual"), leaves.get("weight"), leaves.get("bias"), norm=case.norm, p=case.p,
        eps=case.eps, weight_offset=case.weight_offset, layerscale=leaves.get("layerscale"),
        rowscale=tensors.get("rowscale"), residual_dtype=case.residual_dtype, return_residual=case.return_residual,
        seed=tensors["seed"], offset=offset,
    )  # fmt: skip
    return _with_gradients(_named(case, out), leaves, tensors)


def _named(case: Case, out: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    if case.norm is None:
        return {"z": out}
    return {"y": out[0], "z": out[1]} if case.return_residual else {"y": out}


def _compose(case: Case, tensors: dict[str, Tensor], wide: torch.dtype, stored: bool) -> dict[str, Tensor]:
    """The composition in ``wide``; with ``stored`` each tensor that the op returns or saves is rounded to its dtype."""
    leaves = _leaves(tensors, None if stored else torch.float64)
    t = {name: value.to(wide) for name, value in leaves.items()}
    rows, columns = tensors["x"].shape[:-1].numel(), case.shape[-1]
    branch = t["x"]
    if case.p > 0:
        mask = dropout_mask(rows, columns, tensors["seed"], None, case.p).reshape(case.shape)
        branch = branch * (mask.to(wide) * keep_scale(case.p))
    if "rowscale" in tensors:
        branch = branch * tensors["rowscale"].to(wide).unsqueeze(-1)
    if "layerscale" in t:
        branch = branch * t["layerscale"]
    z = branch + t["residual"] if "residual" in t else branch
    if stored:
        z = z.to(case.residual_dtype or case.dtype)
    outputs = {"z": z}
    if case.norm:
        weight = t["weight"] + case.weight_offset if "weight" in t else None
        if case.norm == "layer":
            y = F.layer_norm(z.to(wide), (columns,), weight, t.get("bias"), case.eps)
        else:
            y = z.to(wide) * torch.rsqrt(z.to(wide).square().mean(-1, keepdim=True) + case.eps)
            y = y * weight if weight is not None else y
            y = y + t["bias"] if "bias" in t else y
        outputs = {"y": y.to(case.dtype) if stored else y}
        if case.return_residual:
            outputs["z"] = z
    return _with_gradients(outputs, leaves, tensors)


def draw(case: Case, generator: torch.Generator, device: str = "cpu") -> dict[str, Result]:
    """One draw of ``case`` for ``accuracy.assert_as_exact_as_torch``."""
    tensors = inputs(case, generator, device)
    ours = run(case, tensors)
    theirs = _compose(case, tensors, torch.float32, stored=True)
    truth = _compose(case, {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()},
                     torch.float64, stored=False)  # fmt: skip
    assert ours.keys() == theirs.keys() == truth.keys()
    return {name: Result(ours[name], theirs[name], truth[name]) for name in ours}


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FEATURES = (
    Case(p=0.1),
    Case(norm="rms", p=0.5, bias=False),
    Case(norm="rms", weight_offset=1.0, bias=False, return_residual=False),
    Case(norm=None, p=0.9, layerscale=True, rowscale=True),
    Case(norm=None, residual=False, p=0.3),
    Case(p=0.2, layerscale=True, rowscale=True),
    Case(residual=False, return_residual=False),
    Case(residual=False, weight=False, bias=False, p=0.1, return_residual=False),
    Case(p=0.1, weight=False),
    Case(norm="rms", p=0.1, bias=True, layerscale=True, eps=1e-2),
)
SHAPES = ((1, 1), (17, 1), (3, 7), (5, 2, 65), (1000, 1), (1, 4099), (33, 768), (2, 3, 5, 129), (6, 20000), (2, 65536))
MIXED = (
    Case(dtype=BF16, parameters=F32, p=0.1, layerscale=True),
    Case(dtype=BF16, parameters=F32, residual_dtype=F32, p=0.1),
    Case(dtype=F16, parameters=F32, residual_dtype=F32, norm="rms", bias=False, p=0.1),
    Case(dtype=F32, parameters=BF16, p=0.1),
)


def grid() -> list[Case]:
    """Every feature in every dtype at one odd shape, every shape with the richest features, and mixed dtypes."""
    cases = [replace(f, shape=(37, 91), dtype=d) for f in FEATURES for d in (F32, BF16, F16)]
    rich = Case(p=0.2, layerscale=True, rowscale=True)
    cases += [replace(rich, shape=s, dtype=d) for s in SHAPES for d in (F32, BF16)]
    # One column's rms is its own magnitude: with a tiny eps the error of y has no bound, on either side.
    cases += [replace(rich, shape=s, norm="rms", bias=False, eps=0.1 if s[-1] < 8 else 1e-5) for s in SHAPES]
    cases += [replace(m, shape=s) for m in MIXED for s in ((64, 96), (9, 1031))]
    return cases
