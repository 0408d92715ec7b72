"""What every op shares: the torch.library namespace, the wiring of an op's parts, and its argument checks.

An op ``fastlm::<name>`` is three operators: ``<name>`` with autograd on its Autograd key, and ``<name>_forward`` and
``<name>_backward``, which ``fastlm.backend.run`` sends to a backend. Forward and backward being operators of their own
keeps them visible to torch.compile, activation checkpointing and the profiler; an ``autograd.Function`` on the Autograd
key costs a third of what ``register_autograd`` does per call. Where none of these looks on, ``Op`` leaves the dispatcher
out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastlm import backend
from fastlm._torch import HAS_BELOW_AUTOGRAD, below_autograd, can_skip_dispatcher, functorch_active, may_have_tangents

LIBRARY = torch.library.Library("fastlm", "DEF")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Op:
    """``fastlm::<name>``, ``<name>_forward`` (same schema) and ``<name>_backward``, defined, and how they are called.

    ``function.apply`` takes the forward schema's arguments and returns its outputs. An op without a gradient has neither
    it nor a backward: its outputs are constants to autograd. The device of a call is that of its first tensor.
    ``prepare(direction, args)``, where given, sees the real tensors of a call (never fake ones) and returns what a
    backend gets: the place for checks of values and for views that must not show in a graph. ``runs``: the op and the
    function of its backends that the forward is, where it is not ``forward`` of this name.

    The methods call the operators through PyTorch's dispatcher. Where nothing could tell (``can_skip_dispatcher``), they call
    what it would call: a dispatch into Python is slow, more so after a large op has filled the cache, and a forward with its
    backward has four.
    """

    def __init__(
        self,
        name: str,
        forward_schema: str,
        backward_schema: str | None,
        fake_forward: Callable[..., Any],
        fake_backward: Callable[..., Any] | None,
        function: type[torch.autograd.Function] | None,
        prepare: Callable[[str, tuple[Any, ...]], tuple[Any, ...]] | None = None,
        runs: tuple[str, str] | None = None,
    ) -> None:
        self.name, self._prepare = name, prepare
        self._runs = runs or (name, "forward")
        self._apply: Callable[..., Any] | None = None if function is None else function.apply
        kernels: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any], str, Callable[..., Any]]] = {
            "": (self._with_autograd, self._run_forward, forward_schema, fake_forward),
            "_forward": (None, self._run_forward, forward_schema, fake_forward),
        }
        if backward_schema is not None and fake_backward is not None:
            kernels["_backward"] = (self._first_backward, self._run_backward, backward_schema, fake_backward)
        for suffix, (with_autograd, run, schema, fake) in kernels.items():
            LIBRARY.define(name + suffix + schema)
            LIBRARY.impl(name + suffix, run, "CompositeExplicitAutograd")
            if with_autograd is not None:
                LIBRARY.impl(name + suffix, with_autograd, "Autograd")
            torch.library.register_fake(f"fastlm::{name}{suffix}", fake, lib=LIBRARY)
        self._whole = getattr(torch.ops.fastlm, name)
        self._below = {
            d: getattr(torch.ops.fastlm, f"{name}_{d}") for d in ("forward", "backward") if f"_{d}" in kernels
        }

    def __call__(self, *args: Any) -> Any:
        """The op with autograd. RuntimeError under forward-mode differentiation and torch.func's transforms but vmap."""
        return self._with_autograd(*args) if can_skip_dispatcher(args) else self._whole(*args)

    def forward(self, *args: Any) -> Any:
        """The op below autograd."""
        with below_autograd():
            return self._run_forward(*args) if can_skip_dispatcher(args) else self._below["forward"](*args)

    def backward(self, *args: Any) -> Any:
        """The op's gradients; RuntimeError where these were to have gradients themselves."""
        if not can_skip_dispatcher(args):
            return self._below["backward"](*args)
        self._refuse_tangents(args)
        self._refuse_second(args)
        with below_autograd():
            return self._run_backward(*args)

    def _with_autograd(self, *args: Any) -> Any:
        self._refuse_tangents(args)
        if self._apply is None or not _differentiable(args):
            return self.forward(*args)
        if functorch_active():
            raise RuntimeError(
                f"fastlm.{self.name} is not differentiated by torch.func (grad, vjp, jacrev, hessian, ...): use "
                f"torch.autograd.grad, or PyTorch's own ops, for example after fastlm.unswap(model)"
            )
        return self._apply(*args)

    def _first_backward(self, *args: Any) -> Any:
        self._refuse_tangents(args)
        self._refuse_second(args)
        with below_autograd():
            return self._below["backward"](*args) if HAS_BELOW_AUTOGRAD else self._run_backward(*args)

    def _refuse_tangents(self, args: tuple[Any, ...]) -> None:
        if not may_have_tangents():
            return
        if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
            raise RuntimeError(
                f"fastlm.{self.name} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, hessian, "
                f"torch.autograd.forward_ad): use PyTorch's own ops there, for example after fastlm.unswap(model)"
            )

    def _refuse_second(self, args: tuple[Any, ...]) -> None:
        if _differentiable(args):
            raise RuntimeError(
                f"fastlm.{self.name} has no double backward: its gradient was asked for with create_graph=True "
                f"(where second derivatives are needed use PyTorch's own ops, for example after fastlm.unswap(model))"
            )

    def _run_forward(self, *args: Any) -> Any:
        return self._run(self._runs, "forward", args)

    def _run_backward(self, *args: Any) -> Any:
        return self._run((self.name, "backward"), "backward", args)

    def _run(self, runs: tuple[str, str], direction: str, args: tuple[Any, ...]) -> Any:
        if self._prepare is not None:
            args = self._prepare(direction, args)
        device = next(a.device for a in args if isinstance(a, Tensor))
        return backend.run(*runs, device, args)


def _differentiable(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


_ORDINARY_TYPES = (Tensor, Parameter, type(None))


def sharded(*tensors: Any) -> bool:
    """Whether one of them is a DTensor; there is none before torch.distributed.tensor is imported, and it is not here."""
    for tensor in tensors:
        if type(tensor) not in _ORDINARY_TYPES:
            module = sys.modules.get("torch.distributed.tensor")
            if module is not None and isinstance(tensor, module.DTensor):
                return True
    return False


def seed_tensor(seed: int | Tensor | None, device: torch.device, op: str) -> Tensor:
    """``seed`` as an int64 scalar tensor on ``device``: drawn from torch's default generator there if None.

    Raises TypeError for another type and ValueError for a tensor of another dtype, size or device.
    """
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"{op}: seed is a {seed.dtype} tensor of shape {list(seed.shape)} on {seed.device}; "
                f"it must be one int64 element on {device}"
            )
        return seed.reshape(())
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"{op}: seed is a {type(seed).__name__}; it must be None, an int or an int64 tensor")
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}; it must fit into 64 bits, -2**63 to 2**63 - 1")
    return torch.full((), seed, dtype=torch.int64, device=device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on ``device`` where that is on; None where it is off, or there is none as on "meta"."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def check_p(p: float, op: str, name: str = "p") -> None:
    """Raises TypeError or ValueError, calling the argument ``name``, unless 0 <= p < 1."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{op}: {name} is a {type(p).__name__}; it must be a float")
    if not 0 <= p < 1:
        raise ValueError(f"{op}: {name} is {p}; it must be at least 0 and below 1")


def check_tensor(
    tensor: Tensor | None,
    name: str,
    op: str,
    *,
    shape: tuple[int, ...] | torch.Size | None = None,
    device: torch.device | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    required: bool = False,
) -> None:
    """Raises TypeError or ValueError, naming the argument, what it was and what it must be, unless it fits.

    None passes unless ``required``.
    """
    if tensor is None and not required:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it must be one of {allowed}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on {device} like the first argument")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must be {list(shape)}")
