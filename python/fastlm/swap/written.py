"""Rule: attention that a module writes out (matmul, scale, mask, softmax, dropout, matmul) becomes the op.

The first product of queries and keys gives no numbers but ``Scores``: a tensor that remembers how it would be made. What
follows is remembered too, as long as it has a meaning for the op. Multiplied with the values it is one call of
``ops.attention``. Anything else that reads it (a softcap, weights that are returned and used) gets the numbers that the
module's own steps give, computed then. So nothing about the module's source is assumed but that it multiplies.
"""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import _torch
from fastlm.ops._library import autocast_dtype, seed_tensor
from fastlm.swap import silent
from fastlm.swap.attention import attend, draw, reached, refusal
from fastlm.swap.rules import Facts, Reason, Rewrite, Rule
from fastlm.swap.seen import stepped_back
from fastlm.swap.source import Methods, Unreadable
from fastlm.swap.tensors import plain

T = torch.Tensor
_PRODUCTS: tuple[Any, ...] = (torch.matmul, torch.bmm, T.matmul, T.bmm, T.__matmul__)
_TIMES = (torch.mul, torch.multiply, T.mul, T.mul_, T.__mul__, T.__rmul__, T.__imul__)
_OVER = (torch.div, torch.true_divide, T.div, T.div_, T.__truediv__, T.__itruediv__)
_PLUS = (torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__)
_FILL = (torch.masked_fill, T.masked_fill, T.masked_fill_)
_SOFTMAX = (torch.softmax, T.softmax, F.softmax)
_DROPOUT = (torch.dropout, F.dropout)
_CAST = (T.to, T.type_as, T.float, T.half, T.bfloat16, T.type)
_IN_PLACE = (T.mul_, T.__imul__, T.div_, T.__itruediv__, T.add_, T.__iadd__, T.masked_fill_)
_ASKS = {T.size, T.dim, T.numel, T.shape.__get__, T.dtype.__get__, T.device.__get__, T.ndim.__get__}  # type: ignore[attr-defined]
_HIDES = -1e8  # what is filled in below this has no weight beside any score


class Surrounding(NamedTuple):
    """What decides how PyTorch would compute a step."""

    grad: bool
    autocast: torch.dtype | None

    @contextlib.contextmanager
    def restored(self, device: str) -> Iterator[None]:
        enabled = self.autocast is not None
        if device == "meta":
            yield
            return
        with torch.set_grad_enabled(self.grad), torch.autocast(device, self.autocast, enabled=enabled):
            yield


def _surrounding(device: torch.device) -> Surrounding:
    return Surrounding(torch.is_grad_enabled(), autocast_dtype(device))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Recipe(NamedTuple):
    """What the op needs of the steps so far."""

    scale: float = 1.0
    bias: Tensor | None = None  # added, after the scale
    allowed: Tensor | None = None  # True: attend
    filled: Tensor | None = None  # True: the score was replaced by a finite number, which lets no gradient through
    weights: bool = False  # after the softmax
    p: float = 0.0


class Scores(Tensor):
    """Scores, or weights, of attention that are not computed yet. ``steps`` make them of the product of q and k."""

    module: nn.Module
    place: int
    q: Tensor
    k_transposed: Tensor
    product: Callable[[Tensor, Tensor], Tensor]
    recipe: Recipe
    steps: tuple[Callable[[Tensor], Tensor], ...]
    versions: dict[Tensor, int]
    surrounding: Surrounding  # when the product was asked for
    drawn: list[tuple[Any, Any]]  # the seed and offset of its dropout, once the op has drawn
    computed: Tensor | None

    @staticmethod
    def of(module: nn.Module, place: int, product: Callable[..., Tensor], q: Tensor, k_transposed: Tensor) -> Scores:
        grad = torch.is_grad_enabled() and (q.requires_grad or k_transposed.requires_grad)
        made = _wrapper((*q.shape[:-1], k_transposed.shape[-1]), _product_dtype(q), q.device, grad)
        made.__dict__.update(
            module=module, place=place, product=product, q=q, k_transposed=k_transposed, recipe=Recipe(), steps=(),
            versions={t: _version(t) for t in (q, k_transposed)}, surrounding=_surrounding(q.device), drawn=[],
            computed=None,
        )  # fmt: skip
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"fastlm.swap: {func} met scores that are not computed yet; call fastlm.unswap on the model")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with _torch.unseen_by_subclasses():
            if func in _ASKS or func is T.__repr__:
                return func(*args, **kwargs) if func in _ASKS else f"Scores{list(args[0].shape)}"
            scores, other = _roles(args)
            if scores is not None and _surrounding(scores.q.device) != scores.surrounding:
                scores.numbers("gradients or autocast are switched between its products")
            if scores is None or scores.computed is not None or "out" in kwargs:
                return func(*_computed(args, func), **_computed(kwargs, func))
            if func in _PRODUCTS and scores is args[0] and len(args) == 2 and not kwargs:
                return _served(scores, func, args[1])
            recipe = None if isinstance(other, Scores) else _next(scores, func, args, other, kwargs)
            if recipe is None:
                return func(*_computed(args, func), **_computed(kwargs, func))
            if func in _CAST and _dtype_after(func, scores, args, kwargs) == scores.dtype:
                return scores  # as PyTorch gives the tensor itself
            at = next(i for i, a in enumerate(args) if a is scores)
            return scores._after(recipe, func, at, args, kwargs)

    def _after(self, recipe: Recipe, func: Any, at: int, args: Any, kwargs: Any) -> Scores:
        def step(x: Tensor) -> Tensor:
            return func(*args[:at], x, *args[at + 1 :], **kwargs)  # type: ignore[no-any-return]

        read = {t: _version(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t is not self}
        grad = self.requires_grad or (torch.is_grad_enabled() and any(t.requires_grad for t in read))
        after = self
        if func not in _IN_PLACE:
            dtype = _dtype_after(func, self, args, kwargs)
            after = _wrapper(self.shape, dtype, self.q.device, grad)
        after.__dict__.update(self.__dict__)
        after.__dict__.update(recipe=recipe, steps=(*self.steps, step), versions=read | self.versions)
        if recipe.p != self.recipe.p:
            after.__dict__["drawn"] = []
        return after

    def numbers(self, why: str) -> Tensor:
        """The tensor itself, by the module's own steps. ``why`` the op does not serve."""
        if self.computed is None:
            name = type(self.module).__name__
            if any(_version(tensor) != version for tensor, version in self.versions.items()):
                raise RuntimeError(
                    f"fastlm.swap: {name} changes a tensor in place between the product of its queries and keys and the "
                    f"use of its scores; call fastlm.unswap on it"
                )
            if self.drawn:
                raise RuntimeError(
                    f"fastlm.swap: {name} reads weights whose dropout was drawn by the op; call fastlm.unswap on it"
                )
            with _torch.unseen_by_subclasses():
                if self.grad_fn is not None:  # autograd was handed the scores, as a reentrant checkpoint does
                    _lost(self)
            stepped_back(self.module, f"keeps its own attention, as it is written out: {why}")
            with self.surrounding.restored(self.q.device.type):
                x = self.product(self.q, self.k_transposed)
                for step in self.steps:
                    x = step(x)
            self.computed = x
        return self.computed


def _wrapper(shape: Any, dtype: torch.dtype, device: torch.device, grad: bool) -> Scores:
    made: Scores = _torch.wrapper(Scores, shape, dtype, device, grad)
    if grad:  # what autograd itself is handed (a torch.autograd.Function of the model) would lose the gradient
        with _torch.unseen_by_subclasses():
            made.register_hook(_lost)
    return made


def _lost(grad: Tensor) -> None:
    raise RuntimeError(
        "fastlm.swap: scores of written-out attention went into a torch.autograd.Function, which swap cannot follow; "
        "call fastlm.unswap on the model"
    )


def _product_dtype(q: Tensor) -> torch.dtype:
    return autocast_dtype(q.device) or q.dtype


def _roles(args: Any) -> tuple[Scores | None, Any]:
    """The first Scores among the positional arguments, and the argument after or before it."""
    at = next((i for i, a in enumerate(args) if isinstance(a, Scores)), None)
    if at is None:
        return None, None
    other = args[1 - at] if at < 2 and len(args) > 1 else None
    return args[at], other


def _computed(value: Any, func: Any) -> Any:
    name = getattr(func, "__name__", "something")
    if isinstance(value, Scores):
        return value.numbers(f"{name} reads its scores or weights")
    if isinstance(value, (tuple, list)):
        return type(value)(_computed(v, func) for v in value)
    return {k: _computed(v, func) for k, v in value.items()} if isinstance(value, dict) else value


def _dtype_after(func: Any, scores: Scores, args: Any, kwargs: Any) -> torch.dtype:
    """The dtype that a step gives, found on a tensor without elements."""
    empty = torch.empty(0, *scores.shape[1:], dtype=scores.dtype, device=scores.q.device)
    if func in _FILL or func in _DROPOUT:
        return scores.dtype
    small = [empty if a is scores else a[:0] if isinstance(a, Tensor) and a.dim() == scores.dim() else a for a in args]
    return func(*small, **kwargs).dtype  # type: ignore[no-any-return]


def _next(scores: Scores, func: Any, args: Any, other: Any, kwargs: Any) -> Recipe | None:
    """The recipe after ``func``, or None if that has no meaning for the op."""
    recipe = scores.recipe
    if func in _CAST:
        floating = not kwargs.get("copy") and _dtype_after(func, scores, args, kwargs).is_floating_point
        return recipe if floating else None
    if recipe.weights:
        return _dropped(recipe, args, kwargs) if func in _DROPOUT else None
    if func in _SOFTMAX:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return recipe._replace(weights=True) if dim in (-1, scores.dim() - 1) else None
    if kwargs:
        return None
    if func in _TIMES or func in _OVER:
        return _scaled(recipe, other, func in _OVER, args[0] is scores)
    if func in _PLUS:
        return _biased(scores, other)
    if func in _FILL and len(args) == 3:
        return _filled(scores, other, args[2])
    if func is torch.where and len(args) == 3 and args[1] is scores:
        return _filled(scores, ~args[0], args[2]) if args[0].dtype == torch.bool else None
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad:
        return float(value)
    return None


def _scaled(recipe: Recipe, factor: Any, divided: bool, first: bool) -> Recipe | None:
    number = _number(factor)
    if number is None or number == 0 or (divided and not first):
        return None
    if recipe.allowed is not None or recipe.filled is not None:
        return None
    number = 1 / number if divided else number
    bias = None if recipe.bias is None else recipe.bias * number
    return recipe._replace(scale=recipe.scale * number, bias=bias)


def _biased(scores: Scores, bias: Any) -> Recipe | None:
    if not isinstance(bias, Tensor) or not plain(bias) or bias.dim() == 0 or not _fits(scores, bias):
        return None
    before = scores.recipe.bias
    return scores.recipe._replace(bias=bias if before is None else before + bias)


def _filled(scores: Scores, hidden: Any, value: Any) -> Recipe | None:
    number = _number(value)
    if not isinstance(hidden, Tensor) or hidden.dtype != torch.bool or number is None or not _fits(scores, hidden):
        return None
    recipe = scores.recipe
    if number == float("-inf"):
        allowed = ~hidden
        return recipe._replace(allowed=allowed if recipe.allowed is None else recipe.allowed & allowed)
    if number > _HIDES and number != torch.finfo(scores.dtype).min:
        return None
    # A row of nothing else is even, as it is with the lowest number, which swallows every score.
    lowest = torch.finfo(torch.float32).min
    bias = torch.zeros(hidden.shape, device=hidden.device) if recipe.bias is None else recipe.bias.float()
    return recipe._replace(
        bias=bias.masked_fill(hidden, lowest),
        allowed=None if recipe.allowed is None else recipe.allowed | hidden,
        filled=hidden if recipe.filled is None else recipe.filled | hidden,
    )


def _fits(scores: Scores, x: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(x.shape, scores.shape) == scores.shape
    except RuntimeError:
        return False


def _dropped(recipe: Recipe, args: Any, kwargs: Any) -> Recipe | None:
    given = dict(zip(("input", "p", "training", "inplace"), args)) | kwargs
    p = given.get("p", 0.5) if given.get("training", given.get("train", True)) else 0.0
    if given.get("inplace") or recipe.p or not 0 <= p < 1:
        return None
    return recipe._replace(p=p)


def _served(scores: Scores, product: Any, values: Any) -> Any:
    """Attention of ``values`` by the op, or by the module's own steps."""
    why = "its product has no softmax" if not scores.recipe.weights else _why_not(scores, values)
    if why:
        return product(scores.numbers(why), _computed(values, product))
    recipe, v = scores.recipe, values
    q, k = scores.q, scores.k_transposed.transpose(-1, -2)
    if recipe.filled is not None:
        hidden = recipe.filled if recipe.allowed is None else recipe.filled | ~recipe.allowed
        q = q.masked_fill(hidden.all(-1, keepdim=True).expand(*q.shape[:-1], 1), 0)
    bias, flat = _mask(recipe), q.dim() == 3
    if flat:
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        bias = None if bias is None else bias.expand(scores.shape).unsqueeze(1)
    if recipe.p and not scores.drawn:
        seed, offset = draw(scores.module, scores.place, q)
        scores.drawn.append((seed_tensor(seed, q.device, "attention"), offset))
    drawn = scores.drawn[0] if recipe.p else None
    out = attend(scores.module, scores.place, q, k, v, bias=bias, scale=recipe.scale, p=recipe.p, drawn=drawn)
    return out.squeeze(1) if flat else out


def _mask(recipe: Recipe) -> Tensor | None:
    if recipe.bias is None or recipe.allowed is None:
        return recipe.allowed if recipe.bias is None else recipe.bias
    return torch.where(recipe.allowed, recipe.bias, float("-inf"))


def _why_not(scores: Scores, v: Tensor) -> str:
    q, k, recipe = scores.q, scores.k_transposed.transpose(-1, -2), scores.recipe
    if not isinstance(v, Tensor) or isinstance(v, Scores) or v.dim() != q.dim():
        return "its values do not fit"
    if v.dtype != scores.dtype and scores.surrounding.autocast is None:
        return f"its weights are {scores.dtype} and its values {v.dtype}"
    if any(_version(tensor) != version for tensor, version in scores.versions.items()):
        return "a tensor was changed in place"
    mask = _mask(recipe)
    if q.dim() == 3:
        if recipe.p:
            return "it drops weights of heads that lie along the batch"
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        mask = None if mask is None else mask.expand(scores.shape).unsqueeze(1)
    return refusal(q, k, v, mask, recipe.p, False, False)


class Written:
    """What edited source calls in place of its products."""

    def _fastlm_product(self, place: int, function: Any, a: Any, b: Any) -> Any:
        """``function(a, b)``; a string is "@" or the name of a method of ``a``."""
        method = (
            {"@": T.__matmul__, "matmul": T.matmul, "bmm": T.bmm}.get(function) if isinstance(function, str) else None
        )
        if (method or function) in _PRODUCTS and _may_be_scores(a, b) and not _hooked(self):  # type: ignore[arg-type]
            return Scores.of(self, place, method or function, a, b)  # type: ignore[arg-type]
        if method is None:
            return function(a, b)
        return a @ b if function == "@" else getattr(a, function)(b)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody wants gradients of what a softmax or dropout of ``module`` gives."""
    return any(child._backward_hooks or child._backward_pre_hooks for child in module.children())


def _may_be_scores(a: Tensor, b: Tensor) -> bool:
    """Whether ``a @ b`` may be the product of queries and keys: batches of equal shape, keys that are seen transposed."""
    if torch.compiler.is_compiling() or not _torch.CAN_DEFER or _torch.being_traced():
        return False  # backend="fastlm" finds it in the graph
    if type(a) not in (Tensor, nn.Parameter) or type(b) not in (Tensor, nn.Parameter):
        return False
    if a.dim() not in (3, 4) or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2] or a.dtype != b.dtype:
        return False
    return plain(a, b) and (b.stride(-2) == 1 or b.shape[-2] == 1) and a.numel() > 0 and b.numel() > 0


def _products(methods: Methods) -> list[tuple[str, str, ast.expr]]:
    """(method, its name for the module, node) of every product in what ``forward`` reaches."""
    found: list[tuple[str, str, ast.expr]] = []
    for name, own in {site.method: site.own for site in reached(methods)}.items():
        for node in ast.walk(methods.get(name)):
            if _product_of(methods, name, node) is not None:
                assert isinstance(node, ast.expr)
                found.append((name, own, node))
    return found


def _product_of(methods: Methods, name: str, node: ast.AST) -> tuple[ast.expr, ast.expr, ast.expr] | None:
    """(function, left, right) of a product."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return ast.Constant("@"), node.left, node.right
    if not isinstance(node, ast.Call) or node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
        return None
    if len(node.args) == 2 and methods.resolve(name, node.func) in (torch.matmul, torch.bmm):
        return node.func, node.args[0], node.args[1]
    if len(node.args) == 1 and isinstance(node.func, ast.Attribute) and node.func.attr in ("matmul", "bmm"):
        return ast.Constant(node.func.attr), node.func.value, node.args[0]
    return None


class _Replace(ast.NodeTransformer):
    def __init__(self, methods: Methods, name: str, own: str) -> None:
        self.methods, self.name, self.own = methods, name, own

    def visit(self, node: ast.AST) -> Any:
        product = _product_of(self.methods, self.name, node)
        node = self.generic_visit(node)
        if product is None:
            return node
        product = _product_of(self.methods, self.name, node)
        assert product is not None
        method = ast.Attribute(ast.Name(self.own, ast.Load()), "_fastlm_product", ast.Load())
        return ast.Call(method, [ast.Constant(self.methods.place()), *copy.copy(product)], [])


class WrittenAttentionRule(Rule):
    name = "written_attention"
    mixin = Written

    def match(self, module: nn.Module, path: str) -> Rewrite | Reason | None:
        if not silent.written_out(module):
            return None
        try:
            return self.describe(module, ()) if _products(Methods(type(module))) else None
        except Unreadable as error:
            return Reason(f"its attention, written out, stays: {error}")

    def describe(self, module: nn.Module, facts: Facts) -> Rewrite:
        return Rewrite(self.name, facts, "attention (written out)", "attention", (1, 1, 16, 64), 3)

    def edit(self, methods: Methods, facts: Facts) -> None:
        for name, own in dict.fromkeys((name, own) for name, own, _ in _products(methods)):
            _Replace(methods, name, own).visit(methods.get(name))
            methods.change(name)
