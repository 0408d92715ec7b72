"""Torch's private names, in this file alone: what each serves, and what happens where a torch does not have it.

The fast path of an op (``can_skip_dispatcher``) is then not taken, and calls go through the dispatcher. A test takes away one
name after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves as tree_leaves  # tensors of nested arguments

_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_graph_task = getattr(torch._C, "_current_graph_task_id", None)
_tracing_state = getattr(torch._C, "_get_tracing_state", None)
_set_tracing_state = getattr(torch._C, "_set_tracing_state", None)

# What a graph of torch.compile calls for ``torch.no_grad`` and ``torch.inference_mode``; without the name no node is one.
SET_GRAD_ENABLED: Any = getattr(torch._C, "_set_grad_enabled", object())
ENTER_INFERENCE: Any = getattr(torch.autograd.grad_mode, "_enter_inference_mode", object())
EXIT_INFERENCE: Any = getattr(torch.autograd.grad_mode, "_exit_inference_mode", object())

try:
    _keys, _thread_keys = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set
    _function_modes, _profiled = torch._C._len_torch_function_stack, torch._C._autograd._profiler_enabled
    # What a thread adds to the keys of every call when no mode, trace or transform is on, and in inference mode.
    _inference = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    _gradients = _inference | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    _ORDINARY = (_gradients.raw_repr(), _inference.raw_repr())
    _FAST = _tracing_state is not None
except AttributeError:
    _FAST = False

_plain: dict[int, bool] = {}  # by sets of dispatch keys


def can_skip_dispatcher(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do nothing with a call but make it.

    That is so where no mode, trace, transform or profiler looks on and every tensor is a plain one: no subclass, no fake, no
    pending negation.
    """
    if not _FAST or torch.compiler.is_compiling() or _function_modes() or _profiled() or _tracing_state():  # type: ignore[misc]
        return False
    if _thread_keys().raw_repr() not in _ORDINARY:
        return False
    for a in args:
        if type(a) is Tensor or type(a) is Parameter:
            keys = _keys(a).raw_repr()
            if not (_plain[keys] if keys in _plain else _is_plain(keys, a.device)):
                return False
        elif isinstance(a, Tensor):
            return False
    return True


def _is_plain(keys: int, device: torch.device) -> bool:
    """Whether these are the dispatch keys of a plain strided tensor on ``device``, or of one made in inference mode."""
    for inference in (False, True):
        with torch.inference_mode(inference):
            _plain[_keys(torch.empty(0, device=device)).raw_repr()] = device.type != "meta"
    return _plain.setdefault(keys, False)


# Around what an op's own autograd function calls. Without it ``no_grad`` keeps PyTorch from differentiating that, and an
# operator with an autograd kernel of its own must not be called again from there.
HAS_BELOW_AUTOGRAD = hasattr(torch._C, "_AutoDispatchBelowAutograd")
below_autograd: Callable[[], contextlib.AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", torch.no_grad
)


# Around what a TorchFunctionMode should not see; without it the mode sees that too.
unseen_by_modes: Callable[[], contextlib.AbstractContextManager[Any]] = getattr(
    torch._C, "DisableTorchFunction", contextlib.nullcontext
)


# A tensor that is not computed yet (swap/written.py); without the names its rule serves nothing.
_make_wrapper = getattr(Tensor, "_make_wrapper_subclass", None)
_unseen_by_subclasses = getattr(torch._C, "DisableTorchFunctionSubclass", None)
CAN_DEFER = None not in (_make_wrapper, _unseen_by_subclasses, _tracing_state)
unseen_by_subclasses: Callable[[], contextlib.AbstractContextManager[Any]] = (
    _unseen_by_subclasses or contextlib.nullcontext
)


def wrapper(cls: type[Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device, grad: bool) -> Any:
    """A tensor of class ``cls`` that holds no numbers."""
    return _make_wrapper(cls, shape, dtype=dtype, device=device, requires_grad=grad)  # type: ignore[misc]


def being_traced() -> bool:
    """Whether torch.jit.trace is making a graph of what runs."""
    return _tracing_state is not None and _tracing_state() is not None


def functorch_active() -> bool:
    """Whether a transform of torch.func is on. Where that cannot be told, torch itself refuses our autograd functions."""
    return _functorch_active is not None and _functorch_active()


def may_have_tangents() -> bool:
    """Whether forward-mode differentiation is on; True, which costs a look at each tensor, where that cannot be told."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def in_backward() -> bool:
    """Whether autograd is computing gradients: a forward within is a recomputation by activation checkpointing."""
    if _graph_task is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no torch._C._current_graph_task_id, by which fastlm.rng tells a recomputation; "
            f"train with another torch, or without fastlm.rng.set"
        )
    return _graph_task() != -1


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """What runs within is no part of a graph that torch.jit.trace is making."""
    if _tracing_state is None or _set_tracing_state is None:
        yield
        return
    state = _tracing_state()
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)


def assert_async(fits: Tensor, message: str) -> None:
    """Raise RuntimeError with ``message`` unless ``fits``, in a compiled graph too and without waiting for a device."""
    if hasattr(torch, "_assert_async"):
        torch._assert_async(fits, message)
    elif not fits:
        raise RuntimeError(message)


def multiply_all(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor in place, on a GPU in few launches."""
    if hasattr(torch, "_foreach_mul_"):
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def inductor(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any], **more: Any
) -> Any:
    """What ``torch.compile(mode=..., options=...)`` makes of a graph. RuntimeError where this torch's inductor is another."""
    try:
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx
    except ImportError as error:
        raise RuntimeError(f'backend="fastlm" needs another torch than {torch.__version__}: {error}') from error
    patches = {**(list_mode_options(mode) if mode is not None else {}), **options}
    if patches:
        more["config_patches"] = {name.replace("-", "_"): setting for name, setting in patches.items()}
    return compile_fx(gm, example_inputs, **more)  # type: ignore[arg-type]
