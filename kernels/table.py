"""Launch configurations of all Triton kernels: looked up in the committed ``table.json``, never timed at run time.

``table.json`` maps a kernel's name to a list of rules. The first rule that fits a call gives its configuration, so that
special rules stand above general ones and the last one fits everything. A rule is an object:

    arch      least compute capability, major*10 + minor (80, 90); absent: any
    dtype     list of names from "f32", "bf16", "f16": that of the op's main input; absent: any
    size      largest width (dropout_add_norm: columns) or head size (attention) it serves; absent: any
    features  list of names that the call must have, as the op's launcher gives them ("dropout", "bias", ...); absent: any
    exact     true: the call must have no other features, as in every measured rule, which knows of no other call
    config    what the launcher reads, with ``num_warps`` and ``num_stages`` beside the kernel's own entries
    measured  null as long as the choice is planned from the static model only; else what it was measured on

``config("attention_forward", arch=90, dtype="bf16", size=128, features=frozenset({"causal"}))`` returns the dictionary
under ``config``. ``fastlm bench --tune`` puts what it measured above the rules that stand. A kernel file's
``offline_cases()`` must make calls that reach each rule, so that the offline checks compile it; ``unreached()`` tells.
Its ``candidates()`` returns the ``Trial``s that ``--tune`` times: a look-up, the configurations to try, and a call.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPE_NAME = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_PATH = Path(__file__).with_name("table.json")


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads(_PATH.read_text(encoding="utf-8"))
    return table


@dataclass(frozen=True)
class Trial:
    """A look-up whose configuration ``fastlm bench --tune`` chooses by timing.

    ``arguments(device)`` makes those of the op's ``direction`` ("forward" or "backward") as its schema has them, of a call
    whose look-up of ``kernel`` asks for this dtype, size and these features; ``bytes_moved`` and ``flops`` are that call's.
    ``compared``: how many of the outputs, from the first on, must equal the reference's; None: all.
    """

    op: str
    direction: str
    kernel: str
    dtype: str
    size: int
    features: frozenset[str]
    configs: tuple[dict[str, Any], ...]
    arguments: Callable[[str], tuple[Any, ...]]
    bytes_moved: int = 0
    flops: int = 0
    compared: int | None = None

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.dtype} size {self.size} {'+'.join(sorted(self.features))}"


def forget() -> None:
    """Reads the table anew at the next look-up: ``--tune`` has rewritten it."""
    _table.cache_clear()
    _lookup.cache_clear()
    _reached.clear()


def rules(kernel: str) -> list[dict[str, Any]]:
    """All rules of ``kernel``, in the order in which they are tried."""
    return _table()[kernel]


def config(kernel: str, *, arch: int, dtype: str, size: int, features: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The configuration of the first rule of ``kernel`` that fits. Raises LookupError if none does."""
    for rule, only in reversed(_pinned):
        if only in (None, kernel):
            pinned_config: dict[str, Any] = rule["config"]
            return pinned_config
    return _lookup(kernel, arch, dtype, size, features)


_pinned: list[tuple[dict[str, Any], str | None]] = []
_reached: set[int] = set()


def unreached() -> list[str]:
    """The rules that no look-up of this process came to: after the offline cases, rules that nothing checks."""
    return [f"{kernel}: {rule}" for kernel in _table() for rule in rules(kernel) if id(rule) not in _reached]


@contextmanager
def pinned(rule: dict[str, Any], kernel: str | None = None) -> Iterator[None]:
    """Inside, every look-up (of ``kernel``, if one is named) gives ``rule``: for tests and for tuning."""
    _pinned.append((rule, kernel))
    try:
        yield
    finally:
        _pinned.pop()


@functools.lru_cache(maxsize=4096)
def _lookup(kernel: str, arch: int, dtype: str, size: int, features: frozenset[str]) -> dict[str, Any]:
    for rule in rules(kernel):
        if (
            arch >= rule.get("arch", 0)
            and dtype in rule.get("dtype", (dtype,))
            and size <= rule.get("size", size)
            and features.issuperset(rule.get("features", ()))
            and (not rule.get("exact") or features == set(rule["features"]))
        ):
            _reached.add(id(rule))
            found: dict[str, Any] = rule["config"]
            return found
    raise LookupError(f"{_PATH.name} has no rule of {kernel} for sm_{arch}, {dtype}, size {size}, {sorted(features)}")
