"""Which linear layers of a model become int8, and their conversion in place: ``fastlm.swap(model, int8=...)``.

``plan`` walks the model and changes nothing; ``convert`` does what a plan says; ``restore`` gives float layers back. A layer
is left, with a sentence, where int8 would change more than rounding (its weight is shared, or read by another module), where
it is an embedding or the output head, and where int8 measured slower than float.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from fastlm.compress import timing
from fastlm.nn import Int8Linear, Int8TrainingLinear
from fastlm.nn import int8 as layers
from fastlm.nn.masked import MASK
from fastlm.ops.int8_matmul import K_MOST

MODES = (*layers.MODES, "training")
ROWS = {"dynamic": 512, "weight_only": 1, "training": 2048}  # of a typical call: a prompt, a token, a batch
HEADS = ("head", "lm_head", "embed_out", "output_projection")
Patterns = str | Sequence[str] | None


class Converted(NamedTuple):
    """A layer that is int8: its path, class before and now, and the seconds of a float and an int8 call where measured."""

    module: str
    was: str
    now: str
    float_s: float | None
    int8_s: float | None


@dataclass
class Plan:
    """What ``convert`` will do. ``left``: (path, class, reason) of the linear layers and embeddings that stay."""

    mode: str
    group: int | None
    rows: int
    converted: list[Converted] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list, repr=False)


def plan(
    model: nn.Module,
    mode: str,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    group: int | None = None,
    rows: int | None = None,
    only_faster: bool = True,
) -> Plan:
    """The layers of ``model`` that ``mode`` makes int8.

    Args:
        mode: "dynamic", "weight_only" or "training" (see ``fastlm.nn.Int8Linear`` and ``Int8TrainingLinear``).
        include, exclude: patterns of module paths: a glob ("blocks.*.mlp.*"), a path and all below it ("blocks.0"), or a last
            name ("qkv"). Without include: all but the output head. What include names it takes, the head too.
        group: None or 32, 64, 128: columns that share a scale.
        rows: of the call that is timed; None: 512 for "dynamic", 1 for "weight_only", 2048 for "training".
        only_faster: leave layers whose int8 call takes longer than the float one. False: convert, and time nothing.

    Raises:
        ValueError: an unknown mode or group; rows below 1; a pattern that no linear layer's path matches.
    """
    if mode not in MODES:
        raise ValueError(f"int8 is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
    if mode == "training" and group is not None:
        raise ValueError(f"group is {group!r}; with int8='training' scales are by row alone, and it must be None")
    layers.check_mode("dynamic" if mode == "training" else mode, group)
    made = Plan(mode, group, ROWS[mode] if rows is None else rows)
    if made.rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    named = dict(model.named_modules())
    linear = {path: m for path, m in named.items() if isinstance(m, (nn.Linear, Int8Linear)) or _conv1d(m)}
    wanted, unwanted = _matched(linear, include, "include"), _matched(linear, exclude, "exclude")
    owners = Counter(id(p) for m in named.values() for p in m._parameters.values() if p is not None)
    for path, module in named.items():
        name = type(module).__name__
        if isinstance(module, nn.Embedding):
            made.left.append((path, name, "an embedding stays in float"))
        if path not in linear:
            continue
        if path in unwanted:
            made.left.append((path, name, "excluded"))
        elif include is not None and path not in wanted:
            made.left.append((path, name, "not included"))
        elif why := _objection(model, named, path, module, mode, group, owners, include is not None):
            made.left.append((path, name, why))
        elif _same(module, mode, group):
            made.converted.append(Converted(path, "Linear", _label(mode, group), None, None))
        else:
            times = _times(module, made, only_faster)
            if times is not None and times[1] > times[0]:
                slower = f"int8 would be slower here: {1e3 * times[1]:.3g} ms against {1e3 * times[0]:.3g} ms in float"
                made.left.append((path, name, f"{slower} with {made.rows} rows"))
                continue
            made.converted.append(Converted(path, name, _label(mode, group), *(times or (None, None))))
            made.modules.append(module)
    return made


def convert(made: Plan) -> None:
    """Does what ``plan`` said, in place: the modules stay the same objects. An error on the way undoes nothing and is
    raised; a layer is either whole in float or whole in int8."""
    for module in made.modules:
        if made.mode == "training":
            module.__class__ = Int8TrainingLinear
            module.__dict__[layers.WAS] = None
        else:
            layers.convert_(module, made.mode, made.group)


def restorable(model: nn.Module, of: Callable[[type[nn.Module]], type[nn.Module]] = lambda cls: cls) -> list[nn.Module]:
    """The modules that ``restore`` makes float. ``of`` gives the class behind one that was made around it.

    Raises:
        TypeError: one of them, named, is a subclass of Int8Linear that has no float form (``Int8Linear.float_class``).
    """
    found = {path: m for path, m in model.named_modules() if layers.WAS in m.__dict__}
    for path, module in found.items():
        cls = of(type(module))
        if issubclass(cls, Int8Linear):
            try:
                layers.restored_class(cls)
            except TypeError as error:
                raise TypeError(f"{path or 'the model'} stays int8: {error}; nothing was changed") from None
    return list(found.values())


def restore(model: nn.Module) -> int:
    """Makes float layers of all that ``convert`` made int8, with the dequantised values; returns how many. Adapters stay.

    Raises TypeError, as ``restorable``, before anything is changed.
    """
    found = restorable(model)
    for module in found:
        if isinstance(module, Int8Linear):
            layers.restore_(module)
        else:
            del module.__dict__[layers.WAS]
            module.__class__ = nn.Linear
    return len(found)


def _label(mode: str, group: int | None) -> str:
    if mode == "training":
        return "Int8TrainingLinear"
    return f"Int8Linear {mode}" + (f", groups of {group}" if group else "")


def _same(module: nn.Module, mode: str, group: int | None) -> bool:
    if isinstance(module, Int8TrainingLinear):
        return mode == "training"
    return isinstance(module, Int8Linear) and (module.mode, module.group) == (mode, group)


def _conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, GPT-2's linear layer, whose weight is [K, N]."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and type(module) is home.Conv1D


def _objection(
    model: nn.Module,
    named: dict[str, nn.Module],
    path: str,
    module: nn.Module,
    mode: str,
    group: int | None,
    owners: Counter[int],
    explicit: bool,
) -> str | None:
    """Why a layer stays as it is, or None."""
    if isinstance(module, Int8Linear):
        kind = _label(module.mode, module.group).removeprefix("Int8Linear ")
        return (
            None if (mode, group) == (module.mode, module.group) else f"it is int8 already, {kind}; fastlm.unswap first"
        )
    if MASK in module._buffers:
        return "it is pruned: its mask is of a float weight; fastlm.compress.unprune first (the zeros stay)"
    if type(module) not in (nn.Linear, Int8TrainingLinear) and not _conv1d(module):
        return "a subclass of nn.Linear, whose forward or parameters may be its own"
    if why := _too_wide(module, mode):
        return why
    if mode == "training":
        if _conv1d(module):
            return "int8 training takes nn.Linear alone"
    elif owners[id(module._parameters["weight"])] > 1:
        return "its weight is shared with another module (tied), so it stays in float for both"
    elif type(module.weight.data).__name__ == "DTensor":
        return "its weight is sharded: convert the model before fully_shard"
    if reader := _reader(named, path):
        return f"{reader} reads its weight itself, so it stays in float"
    if not explicit and _head(model, named, path, module):
        return "the output head stays in float (name it in include to convert it)"
    return None


def _too_wide(module: nn.Module, mode: str) -> str | None:
    """Why the int8 sums of a layer may pass int32: over its inputs in the forward, over its outputs in the backward."""
    weight = module._parameters["weight"]
    assert weight is not None
    shape = weight.shape[::-1] if _conv1d(module) else weight.shape
    if mode == "weight_only" or max(shape) <= K_MOST:
        return None
    side, size = ("outputs", shape[0]) if shape[0] > K_MOST else ("inputs", shape[1])
    more = "; weight_only has no such limit" if mode == "dynamic" else ""
    return f"it has {size:,} {side}, and int32 is sure to hold sums of int8 products up to {K_MOST:,} alone{more}"


def _head(model: nn.Module, named: dict[str, nn.Module], path: str, module: nn.Module) -> bool:
    """Whether a layer gives the logits: by transformers' word, by its name, or by the shape of an embedding, which some layer
    of a repeated block may have by chance."""
    outputs = getattr(model, "get_output_embeddings", None)
    if callable(outputs) and outputs() is module:
        return True
    if path.rpartition(".")[2] in HEADS:
        return True
    weight = module._parameters["weight"]
    assert weight is not None
    if any(part.isdigit() for part in path.split(".")):
        return False
    return any(isinstance(m, nn.Embedding) and m.weight.shape == weight.shape for m in named.values())


def _reader(named: dict[str, nn.Module], path: str) -> str:
    """The method of the parent that reads ``self.<name>.weight``, as GPT's loss reads the head's, or ""."""
    parent, _, name = path.rpartition(".")
    if not name or parent not in named:
        return ""
    for cls in type(named[parent]).__mro__:
        if cls is nn.Module:
            break
        if name in (found := _weights_read(cls)):
            return f"{cls.__name__}.{found[name]}"
    return ""


@functools.cache
def _weights_read(cls: type) -> dict[str, str]:
    """Names of children whose weight the methods of a class read, each with the first that does.

    Methods that make or initialise a weight are left out.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, str] = {}
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        if function.name == "__init__" or "init" in function.name or "reset" in function.name or "tie" in function.name:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
                found.setdefault(node.value.attr, function.name)
    return found


def _matched(linear: dict[str, nn.Module], patterns: Patterns, name: str) -> set[str]:
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns or ():
        hits = {path for path in linear if matches(path, pattern)}
        if not hits:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linear})) or "none"
            raise ValueError(
                f"{name} holds {pattern!r}, which no linear layer's path matches; their last names: {known}"
            )
        found |= hits
    return found


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern of ``include`` or ``exclude`` names a module's path."""
    return fnmatch.fnmatchcase(path, pattern) or path.rpartition(".")[2] == pattern or path.startswith(f"{pattern}.")


def _times(module: Any, made: Plan, only_faster: bool) -> tuple[float, float] | None:
    weight = module._parameters.get("weight")
    if not only_faster or weight is None or weight.is_meta or not weight.numel():
        return None
    shape = tuple(weight.t().shape if _conv1d(module) else weight.shape)
    bias = module._parameters.get("bias") is not None
    return timing.seconds(shape, bias, weight.dtype, weight.device, made.mode, made.group, made.rows)
