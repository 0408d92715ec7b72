"""Where the seeds of a model's dropout come from, so that a run's masks depend on nothing but the run.

``set(model, run_seed, step, sample_ids)`` fills one int64 tensor on the model's device, in place:

    [ a seed per place that drops | number of samples | sample ids ... ]

A *place* is a line of a swapped module's forward that drops: (module path, number within the module). Its seed is a
hash of (run seed, step, place), and its n-th call since ``set`` mixes n in. The rows of sample s take the global
numbers ``sample_ids[s] * rows per sample + row``, so a batch cut in pieces, or spread over ranks, draws the masks of the whole.
Nothing of this is in the state_dict, nothing waits for the device, and a compiled graph or a CUDA graph reads the
tensor as it is at each replay. Without ``set``, modules draw from torch's default generator.

Modules ask with ``rows(self, place, x)`` or ``batch(self, place, size)``.

Activation checkpointing runs a forward again within the backward, and its masks must be those of the first time. One
call of a module between two ``set`` is recognised without help. A module called several times is only known through
``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=rng.checkpoint_context(model))``; without it
such a recomputation raises. The same context lets ``set`` be called again before the backward, as pipelines do.
"""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm._torch import in_backward

__all__ = ["batch", "checkpoint_context", "rows", "set", "unset"]

# The attribute through which a module finds its places; classes that draw define it as None: its absence is cheap.
ATTRIBUTE = "_fastlm_places"
# What a module that holds some of a whole's heads (tensor parallelism) says the first of them is.
FIRST_HEAD = "_fastlm_first_head"
# Components that wrappers put into a module's path: the seed must not depend on how the model is wrapped.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_GOLDEN = 0x9E3779B97F4A7C15


class Place:
    """One line that drops. ``seed`` is a view of the model's tensor; ``calls`` counts its calls since ``set``."""

    seed: Tensor

    def __init__(self, state: State) -> None:
        self.state = state
        self.calls = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state, "calls": self.calls}  # the view is made again from the tensor, which stays one


class State:
    """What ``set`` fills: one per model, shared by its places. Deepcopy and pickle carry it along with any module."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.hashes = np.array([_hash(name) for name in names], dtype=np.uint64)
        self.places = [Place(self) for _ in names]
        self.batch_dim = 0
        self.part = (0, 1)
        self.replays = 0  # checkpoint contexts entered: recomputations that know their calls
        self.frozen: Frozen | None = None
        self.ids = torch.empty(0, dtype=torch.int64)
        self.tensor = torch.empty(0, dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ids": len(self.ids), "frozen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.point(state["ids"])

    def point(self, samples: int) -> None:
        """Makes the views of ``tensor``: a seed per place, and the ids of ``samples`` samples."""
        for index, place in enumerate(self.places):
            place.seed = self.tensor[index]
        self.ids = self.tensor[len(self.places) + 1 :][:samples]

    def fill(self, run_seed: int, step: int, sample_ids: Tensor, device: torch.device) -> None:
        samples, head = sample_ids.numel(), len(self.places) + 1
        if self.tensor.device != device or self.tensor.numel() < head + samples:
            self.tensor = torch.empty(head + samples, dtype=torch.int64, device=device)
            self.point(samples)
        elif len(self.ids) != samples:
            self.point(samples)
        run = _mix(np.array([run_seed & (2**64 - 1)], dtype=np.uint64))
        seeds = _mix(_mix(run + np.uint64(step & (2**64 - 1))) ^ self.hashes)
        host = torch.empty(head, dtype=torch.int64, pin_memory=device.type == "cuda")
        host[:-1] = torch.from_numpy(seeds.view(np.int64))
        host[-1] = samples
        self.tensor[:head].copy_(host, non_blocking=True)
        if device.type == "cuda" and sample_ids.device.type == "cpu":
            sample_ids = sample_ids.pin_memory()
        self.ids.copy_(sample_ids, non_blocking=True)
        self.frozen = None
        for place in self.places:
            place.calls = 0

    def current(self) -> Frozen:
        """The values of this ``set``, apart from the tensor, which the next one overwrites before a late backward."""
        if self.frozen is None:
            self.frozen = Frozen(self)
        return self.frozen


class Frozen:
    """Seeds and row numbers of one ``set``, for eager calls: a backward keeps them after ``set`` was called again."""

    def __init__(self, state: State) -> None:
        with torch.inference_mode(False):
            copy = state.tensor.clone()
        self.seeds = dict(zip(map(id, state.places), copy[: len(state.places)].unbind()))
        self.ids = copy[len(state.places) + 1 :][: len(state.ids)]
        self.rows: dict[torch.Size, Tensor] = {}


_states: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) after one step of its counter."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _of_call(seed: Tensor, call: int) -> Tensor:
    # The counter of a compiled graph may be symbolic: arithmetic of int64 tensors wraps where Python's ints would grow.
    return seed if isinstance(call, int) and call == 0 else seed + torch.full_like(seed, _GOLDEN >> 1) * call


def _root(model: nn.Module) -> nn.Module:
    """The model without torch.compile and DistributedDataParallel around it."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def _drawing(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    for path, module in model.named_modules():
        count = getattr(type(module), "_fastlm_draws", 0)
        if count:
            yield ".".join(part for part in path.split(".") if part not in _WRAPPERS), module, count


def _state(model: nn.Module) -> State:
    drawing = list(_drawing(model))
    names = [f"{path}#{place}" for path, _, count in drawing for place in range(count)]
    state = _states.get(model)
    if state is None or state.names != tuple(names):
        state = _states[model] = State(names)
    index = 0
    for _, module, count in drawing:
        places = tuple(state.places[index : index + count])
        index += count
        if getattr(module, ATTRIBUTE, None) != places:
            setattr(module, ATTRIBUTE, places)
    return state


def _int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"rng.set: {name} is a {type(value).__name__}; it must be an int")
    return int(value)


def set(
    model: nn.Module,
    run_seed: int,
    step: int,
    sample_ids: Tensor | Sequence[int] | np.ndarray,
    *,
    batch_dim: int = 0,
    part: tuple[int, int] = (0, 1),
) -> int:
    """Fixes the dropout masks of the next forward of a swapped ``model``. Call it before each one, micro-batches too.

    Args:
        model: what ``fastlm.swap`` went over; DistributedDataParallel and torch.compile around it may stay.
        run_seed: an int, the same on every rank.
        step: the number of the optimizer's step.
        sample_ids: [B] integers, the number of each sample of this forward within the global batch.
        batch_dim: the dimension of activations that counts samples; 1 for models that put positions first.
        part: (i, n) where activations hold the i-th of n equal parts of each sample's positions (sequence parallelism);
            a tensor without samples, the same for all, holds that part too.

    Returns:
        How many places draw from it: 0 for a model without dropout, or not swapped.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    run_seed, step = _int(run_seed, "run_seed"), _int(step, "step")
    if batch_dim not in (0, 1):
        raise ValueError(f"rng.set: batch_dim is {batch_dim}; it must be 0 or 1")
    at, of = _int(part[0], "part"), _int(part[1], "part")
    if not 0 <= at < of:
        raise ValueError(f"rng.set: part is {part}; it must be (i, n) with 0 <= i < n")
    ids = sample_ids if isinstance(sample_ids, Tensor) else torch.as_tensor(np.asarray(sample_ids))
    if ids.is_floating_point() or ids.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"rng.set: sample_ids is {ids.dtype}; it must hold integers")
    if ids.dim() != 1 or ids.numel() == 0:
        raise ValueError(f"rng.set: sample_ids has shape {list(ids.shape)}; it must be [samples], at least one")
    model = _root(model)
    state = _state(model)
    if not state.places:
        return 0
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ValueError("rng.set: the model is on the meta device; give it memory first, for example model.to_empty()")
    state.batch_dim, state.part = batch_dim, (at, of)
    state.fill(run_seed, step, ids.detach(), device)
    _let_compile_count()
    return len(state.places)


def unset(model: nn.Module) -> None:
    """Undoes ``set``: modules draw from torch's default generator again."""
    model = _root(model)
    _states.pop(model, None)
    for module in model.modules():
        module.__dict__.pop(ATTRIBUTE, None)


def _let_compile_count() -> None:
    """Lets torch.compile trace the counters inside checkpointed regions.

    It refuses any change of a Python object there, unless told that the recomputation, which its graph contains, need
    not repeat it. Counting calls is such a change.
    """
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    config = sys.modules.get("torch._dynamo.config")
    if config is not None and getattr(config, name, True) is False:
        setattr(config, name, True)


def _draw(module: nn.Module, place: int) -> tuple[Tensor, Place] | None:
    places = getattr(module, ATTRIBUTE, None)
    if places is None:
        return None
    here: Place = places[place]
    if torch.compiler.is_compiling():
        call, seed = here.calls, here.seed
        here.calls = call + 1
        return _of_call(seed, call), here
    if in_backward() and not here.state.replays:  # within a backward: a recomputation
        if here.calls != 1:
            raise RuntimeError(
                f"fastlm.rng: {type(module).__name__} was called {here.calls} times since rng.set, and one of them "
                f"is recomputed by activation checkpointing, which does not tell which; pass "
                f"context_fn=fastlm.rng.checkpoint_context(model) to torch.utils.checkpoint.checkpoint"
            )
        call = 0
    else:
        call = here.calls
        here.calls = call + 1
    if here.seed.is_cuda and torch.cuda.is_current_stream_capturing():
        return _of_call(here.seed, call), here  # a replay must read the tensor itself, not a copy made now
    return _of_call(here.state.current().seeds[id(here)], call), here


def rows(module: nn.Module, place: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(seed, offset) for ``dropout_add_norm`` of ``x`` at place ``place`` of ``module``; (None, None) without ``set``.

    Raises ValueError where the rows of x cannot be told apart by sample.
    """
    drawn = _draw(module, place)
    if drawn is None:
        return None, None
    seed, here = drawn
    state = here.state
    if torch.compiler.is_compiling() or (seed.is_cuda and torch.cuda.is_current_stream_capturing()):
        offset = _row_numbers(state.ids, x, state.batch_dim, type(module).__name__, state.part)
    else:
        frozen = state.current()
        shape = x.shape[:-1]
        if shape not in frozen.rows:
            with torch.inference_mode(False):
                frozen.rows[shape] = _row_numbers(frozen.ids, x, state.batch_dim, type(module).__name__, state.part)
        offset = frozen.rows[shape]
    return _onto(seed, x.device), _onto(offset, x.device)


def _onto(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)


def _row_numbers(ids: Tensor, x: Tensor, batch_dim: int, who: str, part: tuple[int, int] = (0, 1)) -> Tensor:
    at, of = part
    samples, total, device = ids.shape[0], x.shape[:-1].numel(), ids.device
    if x.dim() > batch_dim + 1 and x.shape[batch_dim] == samples:
        per = total // samples
        first = (ids * (per * of) + per * at).unsqueeze(1 - batch_dim)
        return (first + torch.arange(per, device=device).unsqueeze(batch_dim)).reshape(-1)
    if x.dim() == 2 and batch_dim == 0 and total % samples == 0:  # [samples * positions, columns]
        per = total // samples
        return (ids.unsqueeze(1) * (per * of) + per * at + torch.arange(per, device=device)).reshape(-1)
    if x.dim() >= 2 and x.shape[0 if x.dim() == 2 else batch_dim] == 1:  # one row of positions for all samples
        return torch.arange(total * at, total * (at + 1), device=device)
    raise ValueError(
        f"fastlm.rng: {who} drops in a tensor of shape {list(x.shape)}, which does not show the {samples} samples that "
        f"rng.set was told of; give their ids to rng.set before each forward (batch_dim=1 for positions-first models)"
    )


def batch(module: nn.Module, place: int, size: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(seed, batch_ids) for ``attention`` over ``size`` samples. (None, None) without ``set``."""
    drawn = _draw(module, place)
    if drawn is None:
        return None, None
    seed, here = drawn
    state = here.state
    live = torch.compiler.is_compiling() or (seed.is_cuda and torch.cuda.is_current_stream_capturing())
    ids = state.ids if live else state.current().ids
    if ids.shape[0] != size:
        raise ValueError(
            f"fastlm.rng: {type(module).__name__} attends over {size} samples, and rng.set was told of {ids.shape[0]}; "
            f"give their ids to rng.set before each forward"
        )
    return _onto(seed, device), _onto(ids, device)


def checkpoint_context(model: nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """A ``context_fn`` for ``torch.utils.checkpoint.checkpoint``: what it recomputes draws the masks it drew first.

    Needed where a module is called several times per forward, or ``set`` is called again before the backward.
    """
    root = _root(model)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        state = _states.get(root)
        if state is None or torch.compiler.is_compiling():
            return nullcontext(), nullcontext()
        return nullcontext(), _Replay(state)

    return contexts


class _Replay:
    """Sets the seeds, ids and counters of the moment it was made, and on leaving those of the moment of entry."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.then = (state.current(), [place.calls for place in state.places])
        self.now: tuple[Frozen | None, list[int]] | None = None

    def __enter__(self) -> None:
        state = self.state
        self.now = (state.frozen, [place.calls for place in state.places])
        state.replays += 1
        self._put(*self.then)

    def __exit__(self, *_: object) -> None:
        assert self.now is not None
        self._put(*self.now)
        self.state.replays -= 1

    def _put(self, frozen: Frozen | None, calls: list[int]) -> None:
        self.state.frozen = frozen
        for place, count in zip(self.state.places, calls):
            place.calls = count
