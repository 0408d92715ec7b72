"""Classes for swapped modules: made when asked for, importable by name, so that pickle and deepcopy work as ever.

A class is determined by the original class and the facts of the rules that rewrite it. Its ``__qualname__`` spells both,
and ``fastlm.swap.generated`` makes the class again from that name in any process that imports it. Its ``__name__`` stays
the original's, which libraries compare (``_no_split_modules``).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

from torch import nn

from fastlm import rng
from fastlm.swap import generated, instance, seen
from fastlm.swap.order import rule_named
from fastlm.swap.rules import Facts, Rule
from fastlm.swap.source import Methods, Unreadable

__all__ = ["Swapped", "Unreadable", "make", "original", "parts"]

Part = tuple[str, Facts]  # (name of the rule, facts)

# What an underscore says with the letter after it. ASCII alone: torch.save writes pickles of protocol 2.
_MEANS = {"_": "_", "d": ".", "P": "\0", "F": "\1"}  # \0 stands between parts, \1 between a rule and its facts
_SAYS = {meant: f"_{letter}" for letter, meant in _MEANS.items()}


class Swapped(nn.Module):
    """Base of every swapped class. ``_fastlm_draws`` counts the places at which its forward drops."""

    _fastlm_original: type[nn.Module]
    _fastlm_parts: tuple[Part, ...]
    _fastlm_draws = 0
    _fastlm_places = None
    _fastlm_helpers: ClassVar[dict[str, FunctionType]] = {}  # what stood at each call of a helper that was edited

    def _fastlm_helper(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """What a call of ``function`` runs: the edited copy ``name``, unless another function stands there by now."""
        if function is self._fastlm_helpers.get(name):
            return getattr(self, name)  # type: ignore[no-any-return]
        seen.stepped_back(self, f"calls another {name.split('_', 3)[3]} than swap has read, as it is")
        return function

    def _get_name(self) -> str:
        return f"fastlm.{self._fastlm_original.__name__}"

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks of each module first: TorchScript compiles source and knows no such op."""
        cls = type(self)
        before = original(cls)
        instance.rebind(self, cls, before)
        self.__class__ = before  # type: ignore[assignment]
        forget(self)
        logging.getLogger("fastlm").warning(
            "fastlm.swap: torch.jit.script cannot compile fastlm's ops, so a %s has its original class again; "
            "call fastlm.swap(model) afterwards to swap the model once more",
            before.__name__,
        )
        return self


def mark(module: nn.Module) -> None:
    """Lets torch.fx see a module of torch.nn as one still: it asks the module, not its class, where that comes from."""
    home = original(type(module)).__module__
    if home.startswith("torch.nn."):
        module.__dict__["__module__"] = home


PUT = ("__module__", seen.ATTRIBUTE, rng.ATTRIBUTE)  # what ``swap`` puts on a module beside its class


def forget(module: nn.Module) -> None:
    """Takes off ``module`` what ``swap`` put on it beside its class, and the wait for the first forward."""
    found = module.__dict__.get(seen.ATTRIBUTE)
    if found is not None:
        found.group.done()
    for name in PUT:
        module.__dict__.pop(name, None)


_unwrapped: weakref.WeakKeyDictionary[type, type[nn.Module]] = weakref.WeakKeyDictionary()
_made: dict[tuple[type, tuple[Part, ...]], type] = {}


def make(cls: type[nn.Module], found: tuple[Part, ...]) -> type[nn.Module]:
    """The class for modules of class ``cls`` rewritten by ``found``. Raises Unreadable if their source cannot be edited."""
    key = (cls, found)
    if key not in _made:
        _made[key] = _build(cls, found)
    return _made[key]


def original(cls: type) -> type[nn.Module]:
    """The class that modules of swapped class ``cls`` had, a wrapper put on since (FSDP2's) kept."""
    if "_fastlm_original" in cls.__dict__:
        return cls._fastlm_original  # type: ignore[attr-defined,no-any-return]
    if cls not in _unwrapped:
        bases = tuple(original(base) if issubclass(base, Swapped) else base for base in cls.__bases__)
        kept = {
            k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__") and not _of_swapped(v, cls)
        }
        _unwrapped[cls] = type(cls)(cls.__name__, bases, kept)
    return _unwrapped[cls]


def _of_swapped(value: Any, cls: type) -> bool:
    """Whether ``value`` is a method of a swapped class, with what ``__init_subclass__`` put around it when ``cls`` was made.

    It is made anew for the class that ``original`` builds.
    """
    inner = inspect.unwrap(value) if isinstance(value, FunctionType) else None
    made = [base for base in cls.__mro__ if "_fastlm_original" in base.__dict__]
    return inner is not None and any(inner is inspect.unwrap(f) for base in made for f in _functions(base))


def _functions(cls: type) -> list[FunctionType]:
    return [f for f in cls.__dict__.values() if isinstance(f, FunctionType)]


def parts(cls: type) -> list[tuple[Rule, Facts]]:
    """The rules and facts that made swapped class ``cls``."""
    return [(rule_named(name), facts) for name, facts in cls._fastlm_parts]  # type: ignore[attr-defined]


def _build(cls: type[nn.Module], found: tuple[Part, ...]) -> type[nn.Module]:
    methods = Methods(cls)
    rules = [(rule_named(name), facts) for name, facts in found]
    for rule, _ in rules:
        methods.draws += rule.draws
    extra: dict[str, Any] = {}
    for rule, facts in rules:
        rule.edit(methods, facts)
        extra.update(rule.namespace(facts))
    mixins = tuple(rule.mixin for rule, _ in rules if rule.mixin is not None)
    name = encode(cls, found)
    if name in vars(generated) and vars(generated)[name]._fastlm_original is not cls:
        name += f"_{id(cls):x}"  # two local classes of one name; like all local classes they cannot be pickled
    namespace: dict[str, Any] = {
        "__module__": generated.__name__,
        "__qualname__": name,
        "__doc__": cls.__doc__,
        "_fastlm_original": cls,
        "_fastlm_parts": found,
        "_fastlm_draws": methods.draws,
        "_fastlm_helpers": methods.helpers,
        **extra,
        **methods.compiled(),
    }
    made: type[nn.Module] = type(cls)(cls.__name__, (*dict.fromkeys(mixins), Swapped, cls), namespace)  # type: ignore[misc]
    methods.check(made)
    setattr(generated, name, made)
    return made


def encode(cls: type, found: tuple[Part, ...]) -> str:
    """The qualified name of the class for ``cls`` and ``found``: an identifier that says all there is to know."""
    texts = [cls.__module__, cls.__qualname__, *("\1".join((name, *facts)) for name, facts in found)]
    return re.sub(r"[^A-Za-z0-9]", lambda m: _SAYS.get(m[0], f"_x{ord(m[0]):x}_"), "\0".join(texts))


def decode(name: str) -> type[nn.Module]:
    """The class that ``encode`` named. Raises AttributeError if it is not such a name, or names a class that is gone."""
    text = re.sub(r"_(x([0-9a-f]+)_|.)", lambda m: chr(int(m[2], 16)) if m[2] else _MEANS.get(m[1], m[0]), name)
    texts = text.split("\0")
    if len(texts) < 3:
        raise AttributeError(f"module {generated.__name__!r} has no attribute {name!r}")
    module, qualname, *rest = texts
    found = tuple((rule, tuple(facts)) for rule, *facts in (text.split("\1") for text in rest))
    target: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in qualname.split("."):
        target = getattr(target, part)
    return make(target, found)


generated.decode = decode
assert rng.ATTRIBUTE == "_fastlm_places"
