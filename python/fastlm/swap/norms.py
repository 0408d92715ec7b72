"""Rule: norms over the last axis, through ``ops.norm``.

``nn.LayerNorm``, ``nn.RMSNorm``, and classes of models and libraries that compute one of the two (Llama's, Gemma's with
weight + 1, T5's, nanoGPT's ...). Those are known by what they compute, not by name: a copy with random weights is run on
inputs of several scales, since a wrong eps shows only at small ones, and a forward with further arguments (a gate) is
refused, since it may agree on plain input alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import warnings
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm._torch import untraced
from fastlm.ops._library import autocast_dtype
from fastlm.swap.rules import Facts, Reason, Rewrite, Rule
from fastlm.swap.seen import ran, stepped_back
from fastlm.swap.tensors import plain

_SCALES = (1.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 30.0)
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 0.0, float(torch.finfo(torch.float32).eps))


class Spec(NamedTuple):
    """Where a norm's class keeps what the op needs. ``eps``: an attribute's name, or "=" and the number."""

    kind: str
    weight: str
    bias: str
    eps: str
    weight_offset: str
    keeps: str  # "x": the output has x's dtype; "promoted": the dtype of x and weight together
    autocast: str = ""  # the same under autocast; "function": that of F.layer_norm or F.rms_norm; "": its own forward's


class NormForward(nn.Module):
    """``forward`` by ``ops.norm``, from the attributes that ``_fastlm_norm`` names, read at each call."""

    _fastlm_norm: Spec

    def forward(self, x: Tensor) -> Tensor:
        arguments = norm_arguments(self, x, x.dtype) if plain(x) else None
        if arguments is None:
            stepped_back(self, "runs its own norm: its input or dtypes do not fit")
            return super().forward(x)  # type: ignore[misc,no-any-return]
        ran(self)
        return ops.norm(x, arguments.weight, arguments.bias, **arguments.options())


class NormArguments(NamedTuple):
    """What the op gets of a norm."""

    norm: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    weight_offset: float
    y_dtype: torch.dtype

    def options(self) -> dict[str, Any]:
        return dict(norm=self.norm, eps=self.eps, weight_offset=self.weight_offset, y_dtype=self.y_dtype)


def norm_arguments(norm: NormForward, x: Tensor, dtype: torch.dtype) -> NormArguments | None:
    """What the op gets for ``x``, or for a sum of ``dtype`` with it; None: the original must serve."""
    spec = norm._fastlm_norm
    weight = getattr(norm, spec.weight) if spec.weight else None
    bias = getattr(norm, spec.bias) if spec.bias else None
    eps = float(spec.eps[1:]) if spec.eps[0] == "=" else getattr(norm, spec.eps)
    if eps is None:
        eps = default_eps(x.device.type, dtype)
    if not plain(x, weight, bias) or x.dim() == 0:
        return None
    y_dtype = output_dtype(spec, x.device, dtype, weight, bias)
    if y_dtype is None:
        return None
    return NormArguments(spec.kind, weight, bias, eps, float(spec.weight_offset), y_dtype)


def output_dtype(
    spec: Spec, device: torch.device, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None
) -> torch.dtype | None:
    """The dtype in which the original would return a norm of ``dtype``; None where that is unknown."""
    outside = autocast_dtype(device) is None
    keeps = spec.keeps if outside else spec.autocast
    if keeps == "x":
        return dtype
    if keeps == "promoted":
        vectors = [t.dtype for t in (weight, bias) if t is not None]
        if outside and any(kind != dtype for kind in vectors):
            return None  # classes differ in which way they promote
        return functools.reduce(torch.promote_types, vectors, dtype)
    if keeps != "function":
        return None
    like = weight.dtype if weight is not None else None
    return _of_function(spec.kind, device.type, dtype, like, torch.get_autocast_dtype(device.type))


@functools.cache
def _of_function(
    kind: str, device: str, dtype: torch.dtype, weight: torch.dtype | None, autocast: torch.dtype
) -> torch.dtype | None:
    """What PyTorch's own norm returns under autocast: which functions it casts differs by device and release.

    None: it takes no such dtypes together, and its error is its own to raise.
    """
    function = F.layer_norm if kind == "layer" else F.rms_norm
    with torch.no_grad(), torch.autocast(device, autocast), untraced(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that dtypes which differ are slow
        x = torch.ones(1, 8, dtype=dtype, device=device)
        w = None if weight is None else torch.ones(8, dtype=weight, device=device)
        try:
            return function(x, (8,), w).dtype
        except RuntimeError:
            return None


_of_function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def default_eps(device: str, dtype: torch.dtype) -> float:
    """The eps of PyTorch's RMSNorm where none is given: of the dtype that it computes in, which releases chose differently."""
    return _default_eps(device, dtype)


default_eps._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _default_eps(device: str, dtype: torch.dtype) -> float:
    own, wide = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if device == "meta" or own == wide:
        return wide
    with torch.no_grad(), torch.autocast(device, enabled=False), untraced():
        x = torch.full((1, 8), 0.01, dtype=dtype, device=device)
        y = float(F.rms_norm(x, (8,)).float().mean())
    exact = float(x.float()[0, 0])
    return min((own, wide), key=lambda eps: abs(y - exact / (exact**2 + eps) ** 0.5))


class NormRule(Rule):
    name = "norm"
    mixin = NormForward

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        found = find(module)
        return self.describe(module, found) if isinstance(found, Spec) else found

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        spec = Spec(*facts)
        weight = getattr(module, spec.weight) if spec.weight else None
        columns = weight.shape[-1] if weight is not None else 64
        what = f"norm({spec.kind})" if spec.weight_offset == "0" else f"norm({spec.kind}, weight + 1)"
        return Rewrite(self.name, tuple(facts), what, "dropout_add_norm", (1, columns))

    def namespace(self, facts: Facts) -> dict[str, Any]:
        return {"_fastlm_norm": Spec(*facts)}


def find(module: nn.Module) -> Spec | Reason | None:
    """How ``module`` is a norm of the last axis; why not, if it looks like one; None if it does not."""
    cls = type(module)
    for known, kind, bias in ((nn.LayerNorm, "layer", "bias"), (nn.RMSNorm, "rms", "")):
        if isinstance(module, known) and cls.forward is known.forward:
            if len(module.normalized_shape) != 1:
                return Reason(
                    f"normalises over {len(module.normalized_shape)} dimensions; the op does over the last one"
                )
            return Spec(kind, "weight", bias, "eps", "0", "x", "function")
    if foreign := _foreign(module):
        return foreign
    if cls.__module__.startswith("torch.nn.") or next(module.children(), None) is not None:
        return None
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    shapes = {tuple(p.shape) for p in parameters.values()}
    if not 1 <= len(parameters) <= 2 or len(shapes) != 1 or len(next(iter(shapes))) != 1:
        return None
    floats = tuple((k, v) for k, v in module.__dict__.items() if isinstance(v, float) and 0 <= v < 0.1)
    settings = tuple((k, v) for k, v in module.__dict__.items() if isinstance(v, (str, int)))  # an axis, say
    key = (tuple(parameters), next(iter(shapes)), floats, settings)
    cache = _found.setdefault(cls, {})
    if key not in cache:
        cache[key] = _probe(module, list(parameters), next(iter(shapes))[0], dict(floats))
    found = cache[key]
    return None if isinstance(found, Reason) and "norm" not in cls.__name__.lower() else found


_found: weakref.WeakKeyDictionary[type, dict[Any, Spec | Reason]] = weakref.WeakKeyDictionary()


def _probe(module: nn.Module, names: list[str], columns: int, floats: dict[str, float]) -> Spec | Reason:
    cls = type(module)
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    if len(parameters) != 1 or parameters[0].kind not in single:
        takes = ", ".join(str(p) for p in parameters)
        return Reason(f"its forward takes ({takes}), not one tensor alone: it may be more than a norm")
    if columns < 2:
        return Reason("one column is too few to tell which norm it computes")
    if module._buffers or any(isinstance(v, Tensor) for v in module.__dict__.values()):
        return Reason("it holds tensors besides its parameters")
    generator = torch.Generator().manual_seed(columns)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # A copy that shares no state: parameters may be sharded, on the meta device or on a GPU; hooks must not see it.
    copy = cls.__new__(cls)
    copy.__dict__.update(module.__dict__)
    values = {name: draw(columns) + 0.5 for name in names}
    copy.__dict__["_parameters"] = {
        name: nn.Parameter(values[name]) if name in values else None for name in module._parameters
    }
    inputs = [(draw(2, 5, columns) + 0.3) * scale for scale in _SCALES]

    def run(x: Tensor) -> Tensor:
        return cls.forward(copy, x)

    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            outputs = [run(x) for x in inputs]
            copy.training = not module.training
            again = [run(x) for x in inputs]
            flat = run(inputs[0][0])
            half = run(inputs[0].bfloat16())
        except Exception as error:  # noqa: BLE001  (whatever a foreign forward raises is the reason to leave it)
            return Reason(f"its forward failed on a probe: {type(error).__name__}: {error}")
        if not all(isinstance(y, Tensor) and y.shape == x.shape for x, y in zip(inputs, outputs)):
            return Reason("its forward does not return a tensor of the shape of its input")
        if not all(torch.equal(a, b) for a, b in zip(outputs, again)) or not torch.equal(flat, outputs[0][0]):
            return Reason("its output depends on more than the row: not a plain norm")
        candidates = {**floats, **{f"={v!r}": v for v in (*_literals(cls), *_USUAL_EPS)}}
        keeps = "x" if half.dtype == torch.bfloat16 else "promoted"
        pairs = [(names[0], "")] if len(names) == 1 else [(names[0], names[1]), (names[1], names[0])]
        for kind, (weight, bias), offset, (eps_name, eps) in itertools.product(
            ("rms", "layer"), pairs, ("0", "1"), candidates.items()
        ):
            spec = Spec(kind, weight, bias, eps_name, offset, keeps)
            if not all(_agrees(spec, eps, values, x, y) for x, y in zip(inputs, outputs)):
                continue
            if not eps_name.startswith("="):  # is it read from there, or does it only have that value?
                copy.__dict__[eps_name] = 0.37
                read = _agrees(spec, 0.37, values, inputs[0], run(inputs[0]))
                copy.__dict__[eps_name] = eps
                if not read:
                    continue
            return spec._replace(autocast=_under_autocast(cls, copy, spec, columns))
    return Reason("what it computes is neither LayerNorm nor RMSNorm of the last axis with an eps that it holds")


def _under_autocast(cls: type[nn.Module], copy: nn.Module, spec: Spec, columns: int) -> str:
    """Which rule the dtypes that ``copy`` returns under autocast follow; "" if none of those that ``output_dtype`` knows."""
    fits = {"x", "promoted", "function"}
    for x_dtype, w_dtype in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        vectors = {name: None if p is None else p.to(w_dtype) for name, p in copy._parameters.items()}
        copy.__dict__["_parameters"] = {k: None if v is None else nn.Parameter(v) for k, v in vectors.items()}
        x = torch.ones(1, columns, dtype=x_dtype)
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = cls.forward(copy, x).dtype
            except Exception:  # noqa: BLE001  (then nothing is known of it, and its own forward runs under autocast)
                return ""
            like = copy._parameters[spec.weight]
            fits = {r for r in fits if output_dtype(spec._replace(autocast=r), x.device, x_dtype, like, None) == found}
    return next((rule for rule in ("function", "promoted", "x") if rule in fits and _calls(cls, rule)), "")


def _calls(cls: type[nn.Module], rule: str) -> bool:
    """Whether a class may follow ``rule``: "function" needs a call of it, for on other devices it has other dtypes."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    called = code is not None and {"layer_norm", "rms_norm"} & set(code.co_names)
    return bool(called) == (rule == "function")


def _foreign(module: nn.Module) -> Reason | None:
    """Of norms that PyTorch made of others: quantised ones compute something else under a norm's name."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and type(module).__module__.startswith("torch.ao."):
        return Reason("it is quantised, and PyTorch's quantised kernel runs; swap before you convert")
    return None


def _agrees(spec: Spec, eps: float, values: dict[str, Tensor], x: Tensor, y: Tensor) -> bool:
    wide = x.double()
    if spec.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    expected = expected * (values[spec.weight].double() + float(spec.weight_offset))
    if spec.bias:
        expected = expected + values[spec.bias].double()
    return bool((expected - y.double()).abs().max() <= 1e-4 * expected.abs().max())


def _literals(cls: type[nn.Module]) -> list[float]:
    """Small floating constants in the source of ``cls.forward``, where a norm may keep its eps."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return []
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [value for value in constants if isinstance(value, float) and 0 <= value < 0.1]
