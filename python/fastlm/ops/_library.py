"""What every op shares: the torch.library namespace, the wiring of an op's parts, and its argument checks.

An op ``fastlm::<name>`` is three operators: ``<name>`` with autograd on its Autograd key, and ``<name>_forward`` and
``<name>_backward``, which ``fastlm.backend.run`` sends to a backend. Forward and backward being operators of their own
keeps them visible to torch.compile, activation checkpointing and the profiler; an ``autograd.Function`` on the Autograd
key costs a third of what ``register_autograd`` does per call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm import backend

LIBRARY = torch.library.Library("fastlm", "DEF")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def define(
    name: str,
    forward_schema: str,
    backward_schema: str,
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    function: type[torch.autograd.Function],
    prepare: Callable[[str, tuple[Any, ...]], tuple[Any, ...]] | None = None,
) -> None:
    """Defines ``fastlm::<name>``, ``<name>_forward`` (same schema) and ``<name>_backward``.

    ``function.apply`` takes the forward schema's arguments and returns its outputs. The device of a call is that of its
    first tensor. ``prepare(direction, args)``, where given, sees the real tensors of a call (never fake ones) and
    returns what a backend gets: the place for checks of values and for views that must not show in a graph.
    """
    for suffix, schema, fake in (
        ("_forward", forward_schema, fake_forward),
        ("_backward", backward_schema, fake_backward),
    ):
        LIBRARY.define(name + suffix + schema)
        LIBRARY.impl(name + suffix, _runner(name, suffix[1:], prepare), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastlm::{name}{suffix}", fake, lib=LIBRARY)
    LIBRARY.define(name + forward_schema)
    LIBRARY.impl(name, _runner(name, "forward", prepare), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake_forward, lib=LIBRARY)

    def with_autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fastlm, f"{name}_forward")(*args)

    def no_double_backward(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"fastlm.{name} has no double backward: its gradient was asked for with create_graph=True "
                f"(where second derivatives are needed use PyTorch's own ops, for example after fastlm.unswap(model))"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fastlm, f"{name}_backward")(*args)

    LIBRARY.impl(name, with_autograd, "Autograd")
    LIBRARY.impl(f"{name}_backward", no_double_backward, "Autograd")


def _runner(
    name: str, direction: str, prepare: Callable[[str, tuple[Any, ...]], tuple[Any, ...]] | None
) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if prepare is not None:
            args = prepare(direction, args)
        device = next(a.device for a in args if isinstance(a, Tensor))
        return backend.run(name, direction, device, args)

    return run


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def sharded(*tensors: Any) -> bool:
    """Whether one of them is a DTensor; there is none before torch.distributed.tensor is imported, and it is not here."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
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
