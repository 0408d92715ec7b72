"""Rule: modules that fetch their attention as a function and hand it themselves, as those of transformers do.

    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    attn_output, attn_weights = attention_interface(self, query, key, value, attention_mask, dropout=..., scaling=...)

The call stays and goes through a method that looks at the function it was about to call: transformers' function over
``F.scaled_dot_product_attention``, or an "eager" one that was found, by running it on random inputs, to compute plain
attention. Those are served by ``ops.attention``; any other function, and arguments that the op has no meaning for, run as
they would have. Nothing is registered with transformers and no configuration changes, so masks are made as before.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.swap import purity
from fastlm.swap.attention import TORCHS, attend, reached, refusal
from fastlm.swap.rules import Facts, Reason, Rewrite, Rule
from fastlm.swap.seen import stepped_back
from fastlm.swap.source import Methods, Unreadable

_SETTING = "_attn_implementation"
_MEANT = frozenset(("dropout", "scaling", "is_causal", "softcap", "position_bias", "output_attentions"))
_SINKS = (
    "sinks"  # where modules keep them; transformers hands them down as s_aux too, which eager functions do not read
)


class Known(NamedTuple):
    """What an attention function computes."""

    sdpa: bool  # else eager: adds its mask, knows nothing of causality, returns weights
    grouped: bool  # takes fewer key heads than query heads
    softcap: bool
    position_bias: bool  # adds one to the scores
    sinks: bool  # adds its module's ``sinks`` to the softmax's denominator, as gpt-oss does
    reads: frozenset[str] | None  # the arguments that it reads: its parameters and keys of its **kwargs; None: any


class Interface:
    """What edited source calls in place of the function that the module fetched."""

    training: bool

    def _fastlm_interface(
        self,
        place: int,
        function: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *more: Any,
        **given: Any,
    ) -> Any:
        known = _known.get(function)
        if known is None:
            compiling = torch.compiler.is_compiling()
            known = "torch.compile met it before swap has seen it" if compiling else recognise(function)
        if not isinstance(known, str) and (changed := _patched(known)):
            known = changed
        why = known if isinstance(known, str) else _refusal(self, known, query, key, value, attention_mask, more, given)
        if isinstance(known, str) or why:
            name = getattr(function, "__name__", type(function).__name__)
            stepped_back(self, f"runs its own {name}: {why}")  # type: ignore[arg-type]
            return function(self, query, key, value, attention_mask, *more, **given)
        causal: bool | str = False
        p = given.get("dropout") or 0.0
        if known.sdpa:
            wanted = given.get("is_causal")
            wanted = getattr(self, "is_causal", True) if wanted is None else wanted
            causal = "upper_left" if query.shape[2] > 1 and attention_mask is None and wanted else False
        elif not self.training:
            p = 0.0
        bias = _bias(attention_mask, given.get("position_bias"))
        out = attend(
            self, place, query, key, value, causal=causal, bias=bias, scale=given.get("scaling"),  # type: ignore[arg-type]
            softcap=given.get("softcap") or 0.0, p=p, sinks=getattr(self, _SINKS) if known.sinks else None,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None


def _patched(known: Known) -> str:
    """Why the function is no longer what it was recognised as, or ""."""
    if known.sdpa and F.scaled_dot_product_attention is not TORCHS:
        return "torch.nn.functional.scaled_dot_product_attention was replaced"
    return ""


def _refusal(
    module: Any,
    known: Known,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    more: tuple[Any, ...],
    given: dict[str, Any],
) -> str:
    """Why the module's own function must serve this call, or ""."""
    if more:
        return "it got more positional arguments than query, key, value and mask"
    for name, argument in given.items():
        if argument is None or name in _MEANT or (known.reads is not None and name not in known.reads):
            continue  # modules hand down much that the function never reads
        return f"it got {name}, which it reads"
    if not known.sdpa and (given.get("output_attentions") or _weights_wanted()):
        return "attention weights were asked for, which the op does not give"
    if given.get("softcap") and not known.softcap:
        return "it got softcap"
    positions = given.get("position_bias")
    if positions is not None and not known.position_bias:
        return "it got position_bias"
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and not known.sdpa:
        return "its mask is boolean, where this function adds one"
    whole = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    for name, bias in (("mask", mask), ("position_bias", positions)):
        if bias is None:
            continue
        if not isinstance(bias, Tensor) or bias.dim() != 4:
            return f"its {name} is not a tensor [batch, heads, queries, keys]"
        if any(have not in (1, need) for have, need in zip(bias.shape, whole)):
            return f"its {name} has shape {list(bias.shape)} for scores {list(whole)}"
    if known.sinks and getattr(getattr(module, _SINKS, None), "shape", None) != query.shape[1:2]:
        return "its module has no sinks, one for each head"
    return refusal(query, key, value, mask, given.get("dropout") or 0.0, False, known.grouped)


def _bias(mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Both as one; as in transformers, a boolean mask beside a bias hides by the smallest number, not by infinity."""
    if mask is None or positions is None:
        return mask if positions is None else positions
    return (
        torch.where(mask, positions, torch.finfo(positions.dtype).min) if mask.dtype == torch.bool else positions + mask
    )


def _weights_wanted() -> bool:
    """Whether transformers is collecting attention weights through its hooks."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    collected = None if collector is None else collector.get()
    return collected is not None and any("attentions" in name for name in collected)


_known: dict[Any, Known | str] = {}


def recognise(function: Any) -> Known | str:
    """What ``function(module, query, key, value, mask, dropout=, scaling=, ...)`` computes, or why that is unknown."""
    if function not in _known:
        _known[function] = _recognise(function)
    return _known[function]


def _recognise(function: Any) -> Known | str:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        return f"its signature cannot be read ({error})"
    named = frozenset(parameters)
    if purity.is_own(function, "transformers.integrations.sdpa_attention", "sdpa_attention_forward"):
        return Known(True, True, False, True, False, purity.reads(function))
    if not {"dropout", "scaling"} <= named:
        return f"it takes ({', '.join(parameters)}), not dropout and scaling"
    if why := purity.impure(function):
        return f"it may do more than attend ({why}), so it is called every time"
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            return _probe(function, named)
    except _AsksMore as error:
        return f"it asks its module for {error}, and may do more than attend"
    except Exception as error:  # noqa: BLE001  (whatever a foreign function raises is the reason to leave it)
        return f"it failed on a probe: {type(error).__name__}: {error}"


def _probe(function: Any, named: frozenset[str]) -> Known | str:
    """Compares ``function`` with attention on random inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    q, k, v, mask = draw(2, 4, 5, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 8), draw(2, 1, 5, 7)
    sinks = 10 * draw(4) if _SINKS in inspect.unwrap(function).__code__.co_names else None
    agrees = functools.partial(_agrees, function, sinks=sinks)
    grouped = agrees(q, k, v, None, 2)
    if not grouped:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    groups = 2 if grouped else 1
    if not agrees(q, k, v, None, groups):
        return "what it computes is not plain attention"
    if not agrees(q, k, v, mask, groups):
        return "it does not add its mask to the scores"
    softcap = "softcap" in named and agrees(q, k, v, mask, groups, softcap=0.7)
    position_bias = "position_bias" in named and agrees(q, k, v, mask, groups, position_bias=draw(1, 4, 5, 7))
    return Known(False, grouped, softcap, position_bias, sinks is not None, purity.reads(function))


class _AsksMore(Exception):
    """An attention function that reads an attribute of its module which the probe does not have."""


class _Asked(nn.Module):
    """The module of a probe, which notes what it is asked for in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["asked"] = set()

    def __getattr__(self, name: str) -> Any:
        self.__dict__["asked"].add(name)
        return super().__getattr__(name)


def _agrees(
    function: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    groups: int,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> bool:
    module = _Asked().eval()
    if sinks is not None:
        setattr(module, _SINKS, sinks)
    module.num_key_value_groups, module.head_dim = groups, q.shape[-1]  # type: ignore[assignment]
    extra = {k: v for k, v in (("softcap", softcap), ("position_bias", position_bias)) if v is not None}
    try:
        # Dropout must be off outside of training, whatever p.
        out = function(module, q, k, v, mask, dropout=0.5, scaling=0.3, **extra)[0]
        if module.__dict__["asked"]:
            raise _AsksMore(sorted(module.__dict__["asked"])[0])
    except RuntimeError:
        if groups > 1:  # query and key heads do not fit: it takes no groups
            return False
        raise
    wide = [t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (q, k, v)]
    scores = wide[0] @ wide[1].mT * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for bias in (mask, position_bias):
        if bias is not None:
            scores = scores + bias.double()
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)), -1)
    expected = (scores.softmax(-1)[..., : k.shape[2]] @ wide[2]).transpose(1, 2)
    return out.shape == expected.shape and bool((out.double() - expected).abs().max() <= 1e-4 * expected.abs().max())


def _calls(methods: Methods) -> list[tuple[str, str, ast.Call]]:
    """Calls of a local name that was fetched by the setting, with self as the first argument."""
    found = []
    for name, own, call in reached(methods):
        function, first = call.func, call.args[0] if call.args else None
        if isinstance(function, ast.Name) and isinstance(first, ast.Name) and first.id == own and len(call.args) > 3:
            if any(_fetches(s, function.id) for s in ast.walk(methods.get(name))):
                found.append((name, own, call))
    return found


def _fetches(s: ast.AST, local: str) -> bool:
    """Whether ``s`` assigns something that was looked up by ``_attn_implementation`` to ``local``."""
    if not isinstance(s, (ast.Assign, ast.AnnAssign)) or s.value is None:
        return False
    targets = s.targets if isinstance(s, ast.Assign) else [s.target]
    if not any(isinstance(t, ast.Name) and t.id == local for t in targets):
        return False
    return any(isinstance(n, ast.Attribute) and n.attr == _SETTING for n in ast.walk(s.value))


def _defaults(methods: Methods, calls: list[tuple[str, str, ast.Call]]) -> list[Any]:
    """The functions named where the called one is fetched: its "eager" form."""
    found = []
    for name, _, call in calls:
        assert isinstance(call.func, ast.Name)
        for s in ast.walk(methods.get(name)):
            if isinstance(s, (ast.Assign, ast.AnnAssign)) and s.value is not None:
                targets = s.targets if isinstance(s, ast.Assign) else [s.target]
                if any(isinstance(t, ast.Name) and t.id == call.func.id for t in targets):
                    values = [methods.resolve(name, n) for n in ast.walk(s.value) if isinstance(n, ast.Name)]
                    found += [v for v in values if inspect.isfunction(v)]
    return found


def _recognise_all(methods: Methods, calls: list[tuple[str, str, ast.Call]]) -> list[Known | str]:
    """What the eager forms compute; and makes the function over SDPA known."""
    sdpa = getattr(sys.modules.get("transformers.integrations.sdpa_attention"), "sdpa_attention_forward", None)
    if sdpa is not None:
        recognise(sdpa)
    return [recognise(function) for function in _defaults(methods, calls)]


class InterfaceRule(Rule):
    name = "interface"
    mixin = Interface

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        cls = type(module)
        forward = getattr(cls, "forward", None)
        if cls.__module__.startswith("torch.") or forward is None or forward is nn.Module.forward:
            return None
        methods = Methods(cls)
        try:
            calls = _calls(methods)
        except Unreadable as error:
            code = getattr(inspect.unwrap(forward), "__code__", None)
            return Reason(f"its attention stays: {error}") if code is not None and _SETTING in code.co_names else None
        if not calls:
            return None
        setting = getattr(getattr(module, "config", None), _SETTING, None)
        eager = _recognise_all(methods, calls)
        if setting in (None, "eager"):
            for known in eager:
                if isinstance(known, str):
                    return Reason(f"its attention stays: of its eager function, {known}")
        elif setting != "sdpa":
            return Reason(f'its attention is {setting!r}; "sdpa" and "eager" are swapped (attn_implementation)')
        return self.describe(module, ())

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        return Rewrite(self.name, facts, "attention", "attention", (1, 1, 16, 64), 3)

    def edit(self, methods: Methods, facts: Facts) -> None:
        calls = _calls(methods)
        _recognise_all(methods, calls)  # in a process that unpickles a model nothing has been seen yet
        for name, own, call in calls:
            function = call.func
            call.func = ast.Attribute(ast.Name(own, ast.Load()), "_fastlm_interface", ast.Load())
            call.args[:1] = [ast.Constant(methods.place()), function]
            methods.change(name)
