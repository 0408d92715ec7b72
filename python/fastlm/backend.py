"""Which backend serves which call of which op, and why.

A backend is a folder with one module per op: ``fastlm.reference.<op>`` (plain PyTorch), ``fastlm.cpu.<op>`` (C++),
``fastlm.kernels.<op>`` (Triton) and ``fastlm.cuda.<op>`` (CUDA C++). Such a module defines ``forward`` and ``backward``
with the arguments of the op's schema, and ``serves_forward`` and ``serves_backward`` which say, for the same arguments,
whether it can run them and why not; further functions of an op come with their ``serves_...`` too. Nothing else needs to
know of it.

The first backend of the device's order that serves a call runs it. A call that falls past the first one is logged, once
per reason. ``FASTLM_BACKEND`` or ``use(...)`` force one backend; if that cannot serve, the call raises.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
_FOLDER = {"reference": "fastlm.reference", "cpu": "fastlm.cpu", "triton": "fastlm.kernels", "cuda": "fastlm.cuda"}
# Tried in this order. On a CPU, Triton means its interpreter, thousands of times slower: only when forced.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_ELSEWHERE = ("triton", "reference")  # on other devices, where the reference serves alone: Triton's refusal says so

log = logging.getLogger("fastlm")


class Support(NamedTuple):
    """Whether a backend serves a call. ``why``: if not, the reason; if so, "" or why a slower path of it serves."""

    ok: bool
    why: str = ""


YES = Support(True)


class Choice(NamedTuple):
    """The backend that serves a call, the reason, and why each backend before it in the order does not."""

    op: str
    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        text = f"{self.op}: {self.backend} ({self.reason})"
        return text + "".join(f"; not {name}: {why}" for name, why in self.rejected)


class BackendError(RuntimeError):
    """A forced backend cannot serve a call, or no backend can."""


_lock = threading.Lock()
_watching: list[set[tuple[str, str]]] = []
_forced: list[str] = []  # a stack; process-wide, because autograd runs backwards in threads of its own
_logged: set[tuple[str, str, str]] = set()
Arguments = Callable[..., tuple[torch.device, tuple[Any, ...]]]
_arguments: dict[str, Arguments] = {}
_examples: dict[str, Callable[[str], dict[str, Any]]] = {}
_functions: dict[str, Callable[..., str]] = {}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; it must be one of {', '.join(BACKENDS)}")
    return name


def forced() -> str | None:
    """The backend that ``use`` or ``FASTLM_BACKEND`` forces now, or None."""
    if _forced:
        return _forced[-1]
    name = os.environ.get("FASTLM_BACKEND", "")
    return _checked(name, "FASTLM_BACKEND") if name else None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Forces backend ``name`` ("reference", "cpu", "triton" or "cuda") inside the ``with`` block, in every thread.

    A backward run inside the block is forced as well, one run outside it is not. Raises ValueError for another name;
    an op that the backend cannot serve raises BackendError.
    """
    with _lock:
        _forced.append(_checked(name, "backend.use(name)"))
    try:
        yield
    finally:
        with _lock:
            _forced.pop()


@contextmanager
def watched() -> Iterator[set[tuple[str, str]]]:
    """Inside, the set that it gives fills with the (op, backend) of every call that runs, in any thread."""
    seen: set[tuple[str, str]] = set()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching[:] = [one for one in _watching if one is not seen]


@functools.cache
def module(op: str, name: str) -> tuple[ModuleType | None, str]:
    """The module that holds backend ``name`` of ``op``, or None and why it is not there. Imported at first use."""
    path = f"{_FOLDER[_checked(name, 'backend')]}.{op}"
    try:
        return importlib.import_module(path), ""
    except ModuleNotFoundError as error:
        if error.name == path:
            return None, f"this release has no {name} kernel of {op}"
        if error.name == "triton":
            return None, "triton is not installed (pip install triton; PyTorch's CUDA builds bring it)"
        raise


def _support(op: str, name: str, direction: str, device: torch.device, args: tuple[Any, ...]) -> Support:
    found, why = module(op, name)
    if found is None:
        return Support(False, why)
    if name == "cpu" and device.type != "cpu":
        return Support(False, f"the cpu kernels serve CPU tensors; these are on {device}")
    if name == "cuda" and device.type != "cuda":
        return Support(False, f"the cuda kernels serve CUDA tensors; these are on {device}")
    if name == "triton" and device.type != "cuda":
        if device.type != "cpu":
            return Support(False, f"the triton kernels serve CUDA tensors; these are on {device}")
        if os.environ.get("TRITON_INTERPRET") != "1":
            return Support(False, "triton serves CPU tensors only under TRITON_INTERPRET=1, which is for tests")
    support: Support = getattr(found, f"serves_{direction}")(*args)
    return support


def choose(op: str, direction: str, device: torch.device, args: tuple[Any, ...]) -> Choice:
    """The backend that runs ``direction`` ("forward", "backward" or another function of it) of ``op`` for the schema's
    arguments ``args``.

    Raises BackendError if the forced backend cannot serve, or none can.
    """
    name = forced()
    if name is not None:
        support = _support(op, name, direction, device, args)
        if not support.ok:
            raise BackendError(f"fastlm.{op} {direction}: backend {name!r} is forced and cannot serve: {support.why}")
        return Choice(op, name, "forced" + (f"; {support.why}" if support.why else ""))
    rejected: list[tuple[str, str]] = []
    for name in _ORDER.get(device.type, _ELSEWHERE):
        support = _support(op, name, direction, device, args)
        if support.ok:
            reason = support.why or ("first choice" if not rejected else "next in order")
            return Choice(op, name, reason, tuple(rejected))
        rejected.append((name, support.why))
    raise BackendError(f"fastlm.{op} {direction}: no backend serves: " + "; ".join(f"{n}: {w}" for n, w in rejected))


def run(op: str, direction: str, device: torch.device, args: tuple[Any, ...]) -> Any:
    """Runs ``direction`` of ``op`` on what ``choose`` names, and logs a fall past the first choice once."""
    choice = choose(op, direction, device, args)
    for seen in _watching:
        seen.add((op, choice.backend))
    for name, why in choice.rejected:
        if (op, name, why) not in _logged:
            _logged.add((op, name, why))
            log.warning("fastlm.%s: %s serves, not %s: %s", op, choice.backend, name, why)
    found, _ = module(op, choice.backend)
    if choice.backend == "reference" and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):  # the ops layer has chosen the dtypes already
            return getattr(found, direction)(*args)
    return getattr(found, direction)(*args)


def register(
    op: str,
    arguments: Arguments,
    example: Callable[[str], dict[str, Any]],
    function: Callable[..., str] = lambda *args, **kwargs: "forward",
) -> None:
    """Makes ``which(op, ...)`` work: ``arguments`` maps the public call to its device and forward-schema arguments.

    ``example(device)`` gives the keyword arguments of a plain call, for which ``fastlm doctor`` asks. ``function`` maps the
    public call to the function of a backend that runs it.
    """
    _arguments[op] = arguments
    _examples[op] = example
    _functions[op] = function


def example(op: str, device: str) -> dict[str, Any]:
    """Keyword arguments of a plain call of ``op`` on ``device``."""
    return _examples[op](device)


def ops() -> tuple[str, ...]:
    """The names of all registered ops."""
    return tuple(sorted(_arguments))


def which(op: str, *args: Any, **kwargs: Any) -> Choice:
    """The backend that ``fastlm.ops.<op>(*args, **kwargs)`` would run on, and why. Runs nothing.

    Raises ValueError for an unknown op and BackendError if no backend, or not the forced one, serves.
    """
    if op not in _arguments:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(ops())}")
    device, schema_args = _arguments[op](*args, **kwargs)
    return choose(op, _functions[op](*args, **kwargs), device, schema_args)


def why_not(op: str, name: str, *args: Any, **kwargs: Any) -> str:
    """Why backend ``name`` does not run ``fastlm.ops.<op>(*args, **kwargs)`` when nothing is forced."""
    device, schema_args = _arguments[op](*args, **kwargs)
    support = _support(op, name, _functions[op](*args, **kwargs), device, schema_args)
    if not support.ok:
        return support.why
    return "it could; another is forced" if forced() else "it could; a backend before it in the order serves"
