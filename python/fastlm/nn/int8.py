"""Linear layers over ``ops.quantize_int8`` and ``ops.int8_matmul``: ``y = x W^T + bias`` with W held, or multiplied, in int8.

    Int8Linear          holds W as int8 and float32 scales. "dynamic" quantises the rows of x as they come (W8A8),
                        "weight_only" leaves x as it is (W8A16). Only its bias can train; x gets its gradient.
    Int8TrainingLinear  holds W in float and trains it: forward and input gradient in int8 (SwitchBack, Wortsman et al.
                        2023, with row scales on both sides), weight gradient in x's dtype.

N output features, K input features, M rows: all dimensions of x but the last together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import ops
from fastlm.ops._library import autocast_dtype
from fastlm.ops.int8_matmul import K_MOST

MODES = ("dynamic", "weight_only")
GROUPS = (32, 64, 128)


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


Int8Rows = tuple[Tensor, Tensor]  # int8 [..., K] and float32 scales [...]: what quantize_int8 gives of rows [..., K]


def _given(rows: Int8Rows | None, x: Tensor, name: str) -> tuple[Tensor | None, Tensor | None]:
    """``rows`` of x [..., K] as [M, K] and [M]. TypeError or ValueError of the layer ``name`` where they cannot be x's."""
    if rows is None:
        return None, None
    q, scale = rows
    for what, t, shape, dtype in (("values", q, x.shape, torch.int8), ("scales", scale, x.shape[:-1], torch.float32)):
        if t.dtype != dtype:
            raise TypeError(
                f"{name}: the {what} of rows are {t.dtype}; they must be {dtype}, as quantize_int8 gives them"
            )
        if t.shape != shape:
            raise ValueError(
                f"{name}: the {what} of rows have shape {list(t.shape)}; for x of shape {list(x.shape)} they must have "
                f"{list(shape)}"
            )
    return _rows(q), scale.reshape(-1)


def _dynamic(
    x_MK: Tensor, q: Tensor | None, q_scale: Tensor | None, weight_NK: Tensor, scale_N: Tensor, bias: Tensor | None
) -> Tensor:
    """``x W^T + bias`` [M, N] in x's dtype, x quantised by rows unless it is given as such."""
    if q is None:
        q, q_scale = ops.quantize_int8(x_MK)
    return ops.int8_matmul(q, weight_NK.t(), q_scale, scale_N, bias=bias, out_dtype=x_MK.dtype)


class _Frozen(torch.autograd.Function):
    """``_dynamic`` of a W that does not train, with the input gradient in int8 too."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, q: Tensor | None, q_scale: Tensor | None, weight_NK: Tensor, scale_N: Tensor,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight_NK, scale_N)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _dynamic(x_MK, q, q_scale, weight_NK, scale_N, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight_NK, scale_N = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            # the scales of W's rows go into dy, so that the product runs over W's int8 as they lie
            q, q_scale = ops.quantize_int8(dy_MN.float() * scale_N)
            dx = ops.int8_matmul(q, weight_NK, q_scale, out_dtype=dy_MN.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
            dbias = dy_MN.float().sum(0).to(ctx.bias_dtype)
        return dx, None, None, None, None, dbias


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """int8 [N, K] times its scales [N] or [N, groups], multiplied in float32 and given in ``dtype``."""
    if scale.dim() == 2:
        group = next(g for g in GROUPS if math.ceil(weight.shape[1] / g) == scale.shape[1])
        each = scale.repeat_interleave(group, 1)[:, : weight.shape[1]]
    else:
        each = scale.unsqueeze(1)
    return (weight.float() * each).to(dtype)


Split = tuple[Tensor, Tensor]  # outlier columns int64 [k], and W's columns there, float [N, k]


def split_of(module: nn.Module) -> Split | None:
    """The outlier columns of a layer, and its weight there; None where it has none."""
    if (columns := module._buffers.get("outliers")) is None:
        return None
    weight = module._buffers["outlier_weight"]
    assert weight is not None
    return columns, weight


def joined(weight: Tensor, split: Split | None) -> Tensor:
    """Float W [N, K] with its outlier columns in their places."""
    return weight if split is None else weight.index_copy(1, split[0], split[1].to(weight.dtype))


class Int8Linear(nn.Module):
    """``x W^T + bias`` with W held in int8: a quarter of float32's memory.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``.
        mode: "dynamic": x is quantised by rows in each forward and both factors are int8, and so is its gradient in the
            backward; "weight_only": x stays float.
        group: None: one scale for each row of W; 32, 64 or 128: one for so many columns of a row (the last group may be
            shorter), in mode "weight_only" alone.
        device, dtype: where it lies, and the dtype of the bias and of ``float_weight()``.

    The state_dict holds ``weight`` int8 [N, K], ``weight_scale`` float32 [N] or [N, groups], and ``bias``. ``.to(dtype)``,
    ``.half()`` and the like change the bias alone. Input [..., K] of any floating dtype gives [..., N] of the same dtype,
    or of autocast's where that is on. ``from_linear`` makes one of a trained layer.

    A layer that ``convert_`` made with outlier columns holds two buffers more: ``outliers`` int64 [k], those columns of x, and
    ``outlier_weight`` [N, k], W's in float. They are 0 in the int8 weight, are left out of x before it is quantised, and make a
    float product of their own (LLM.int8(), Dettmers et al. 2022).

    In mode "dynamic" ``forward(x, rows)`` takes x already quantised beside it, ``rows`` being what
    ``ops.quantize_int8(x)`` gives: ``ops.dropout_add_norm(quantize="int8")`` makes them in its own pass, and several layers
    read the same ones. x then lends its shape and dtype and gets the gradient.

    Raises:
        ValueError: an unknown mode or group; "dynamic" with more than 131,071 inputs or outputs; ``rows`` of another shape
            than x, in mode "weight_only", or of a layer with outlier columns.
        TypeError: ``rows`` of other dtypes than int8 and float32.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    mode: str
    group: int | None
    float_dtype: torch.dtype
    float_class: ClassVar[type[nn.Linear]] = nn.Linear  # what `restore_` makes of it: a subclass names its own

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: str = "dynamic",
        group: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode, group)
        _check_width(in_features, out_features, mode)  # before memory is asked for
        # values as nn.Linear draws them, so that a new module is of use before anything is loaded
        _hold(self, nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), mode, group)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, mode: str = "dynamic", group: int | None = None) -> Int8Linear:
        """A new module with the quantised values of ``linear``, which stays as it is; the bias is shared."""
        check_mode(mode, group)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        _hold(made, linear, mode, group)
        return made.train(linear.training)

    def forward(self, x: Tensor, rows: Int8Rows | None = None) -> Tensor:
        dtype = autocast_dtype(x.device) or x.dtype
        x_MK, scale, columns = _rows(x).to(dtype), self.weight_scale, self._buffers.get("outliers")
        if columns is not None:
            if rows is not None:
                raise ValueError(
                    "Int8Linear: rows were given to a layer with outlier columns, which it leaves out before it quantises; "
                    "leave them out"
                )
            beside = F.linear(x_MK[:, columns], self._buffers["outlier_weight"].to(dtype))  # type: ignore[union-attr]
            x_MK = x_MK.index_fill(1, columns, 0.0)
        if self.mode == "dynamic":
            y = _Frozen.apply(x_MK, *_given(rows, x, "Int8Linear"), self.weight, scale, self.bias)
        else:
            if rows is not None:
                raise ValueError(
                    "Int8Linear: rows were given in mode 'weight_only', which reads x itself; leave them out"
                )
            by_column = scale.t() if scale.dim() == 2 else scale
            y = ops.int8_matmul(x_MK, self.weight.t(), None, by_column, bias=self.bias, out_dtype=dtype)
        if columns is not None:
            y = y + beside
        return y.view(*x.shape[:-1], self.out_features)

    def float_weight(self) -> Tensor:
        """W [N, K] as the module multiplies by it, in ``float_dtype``."""
        return joined(dequantize(self.weight, self.weight_scale, self.float_dtype), split_of(self))

    def to_linear(self) -> nn.Linear:
        """A float layer with the dequantised values, which are those of the layer before it was quantised only to 8 bits.

        Raises TypeError for a subclass that adds something, as adapters, which a plain layer would lose."""
        if restored_class(type(self)) is not nn.Linear:
            raise TypeError(f"to_linear: a plain Linear would lose what {type(self).__name__} adds; use fastlm.unswap")
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.float_weight())
        made.bias = self.bias  # type: ignore[assignment]
        return made.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Scales go where everything goes, as 32 bits that no change of dtype touches: a scale in 16 bits underflows."""
        if fn(torch.empty(0, dtype=torch.int8, device=self.weight.device)).dtype != torch.int8:
            raise TypeError(
                "Int8Linear: its int8 weight has no other type; restore a float layer first (fastlm.unswap)"
            )
        scale = self._buffers.pop("weight_scale")
        assert scale is not None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["weight_scale"] = scale
        self._buffers["weight_scale"] = fn(scale.view(torch.int32)).view(torch.float32)
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype, device=scale.device)).dtype
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: Any, extra: Any, errors: Any
    ) -> None:  # fmt: skip
        """Refuses a float weight, which copying into int8 would cut to zeros and ones without a word."""
        for name, dtype in (("weight", torch.int8), ("weight_scale", torch.float32)):
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != dtype:
                errors.append(
                    f"{prefix}{name} is {given.dtype}; an Int8Linear holds {dtype}: load the float weights into the "
                    f"float model and convert it (fastlm.swap(model, int8=...))"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, extra, errors)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, mode={self.mode!r}" + (f", group={self.group}" if self.group else "")


def check_mode(mode: str, group: int | None) -> None:
    """Raises ValueError, naming it, for a mode or a group that there is not."""
    if mode not in MODES:
        raise ValueError(f"Int8Linear: mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
    if group is not None and (not isinstance(group, int) or group not in GROUPS):
        raise ValueError(f"Int8Linear: group is {group!r}; it must be None or one of {', '.join(map(str, GROUPS))}")
    if group is not None and mode == "dynamic":
        raise ValueError(f"Int8Linear: group is {group} in mode 'dynamic'; it must be None there (use 'weight_only')")


def _check_width(in_features: int, out_features: int, mode: str) -> None:
    """Raises ValueError for a "dynamic" layer whose sums, over inputs or in the backward over outputs, could pass int32."""
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if mode == "dynamic" and size > K_MOST:
            raise ValueError(
                f"Int8Linear: {name} is {size} in mode 'dynamic'; it must be at most {K_MOST} there (use 'weight_only')"
            )


def _hold(
    module: Any,
    linear: Any,
    mode: str,
    group: int | None,
    transposed: bool = False,
    values: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Gives ``module`` the attributes of an Int8Linear with the values of ``linear`` (which may be ``module`` itself)."""
    weight = linear.weight.detach()
    weight = weight.t() if transposed else weight
    _check_width(weight.shape[1], weight.shape[0], mode)
    q, scale = quantize_weight(weight, group) if values is None else values
    bias = linear.bias
    for name in ("weight", "bias"):
        module._parameters.pop(name, None)
    module.register_buffer("weight", q)
    module.register_buffer("weight_scale", scale)
    module.register_parameter("bias", bias)
    module.out_features, module.in_features = weight.shape
    module.mode, module.group, module.float_dtype = mode, group, weight.dtype


def quantize_weight(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """W [N, K] as int8 [N, K] and float32 scales [N] or [N, groups], contiguous; of a meta tensor meta tensors."""
    if weight.is_meta:
        shape = weight.shape[:1] if group is None else (weight.shape[0], math.ceil(weight.shape[1] / group))
        return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(shape, dtype=torch.float32)
    q, scale = ops.quantize_int8(weight.contiguous(), group=group)
    return q.contiguous(), scale.contiguous()


class _Trained(torch.autograd.Function):
    """``x W^T + bias`` with both factors quantised by rows, and both gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, q: Tensor | None, q_scale: Tensor | None, weight_NK: Tensor, bias: Tensor | None,
        narrow: bool,
    ) -> Tensor:  # fmt: skip
        needs_dw = ctx.needs_input_grad[3]
        ctx.save_for_backward(x_MK if needs_dw else None, weight_NK)
        ctx.narrow, ctx.bias_dtype = narrow, None if bias is None else bias.dtype
        return _dynamic(x_MK, q, q_scale, *ops.quantize_int8(weight_NK), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_MK, weight_NK = ctx.saved_tensors
        dx = dw = dbias = None
        if ctx.needs_input_grad[0]:
            q, q_scale = ops.quantize_int8(dy_MN)
            by_column, scale = ops.quantize_int8(weight_NK, dim=0)
            dx = ops.int8_matmul(q, by_column, q_scale, scale, out_dtype=dy_MN.dtype)
        if ctx.needs_input_grad[3]:
            dtype = torch.bfloat16 if ctx.narrow else dy_MN.dtype
            dw = (dy_MN.to(dtype).t() @ x_MK.to(dtype)).to(weight_NK.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
            dbias = dy_MN.float().sum(0).to(ctx.bias_dtype)
        return dx, None, None, dw, dbias, None


class Int8TrainingLinear(nn.Linear):
    """An ``nn.Linear`` that trains with its forward and its input gradient in int8.

    Parameters, state_dict and optimizers are those of ``nn.Linear``; sharded parameters (FSDP2) are quantised after they
    are gathered. In eval mode it computes as in training. The weight gradient is a product in x's dtype, or with
    ``bfloat16_weight_grad`` in bfloat16, which pays for float32 where the processor multiplies bfloat16 faster.
    ``forward(x, rows)`` takes x already quantised beside it, as ``Int8Linear``'s.
    """

    bfloat16_weight_grad = False

    def __init__(self, *args: Any, bfloat16_weight_grad: bool = False, **named: Any) -> None:
        super().__init__(*args, **named)
        self.bfloat16_weight_grad = bfloat16_weight_grad

    def forward(self, x: Tensor, rows: Int8Rows | None = None) -> Tensor:
        dtype = autocast_dtype(x.device) or x.dtype
        given = _given(rows, x, "Int8TrainingLinear")
        y = _Trained.apply(_rows(x).to(dtype), *given, self.weight, self.bias, self.bfloat16_weight_grad)
        return y.view(*x.shape[:-1], self.out_features)


# What a module was before it became an Int8Linear in place, so that it can become that again.
WAS = "_fastlm_was"


def convert_(
    linear: Any,
    mode: str,
    group: int | None = None,
    values: tuple[Tensor, Tensor] | None = None,
    split: Split | Tensor | None = None,
) -> None:
    """Makes an ``nn.Linear`` (or transformers' Conv1D, whose weight is [K, N]) an Int8Linear in place.

    The module stays the same object, with its hooks, name and bias; its weight is quantised once, here, or is what
    ``values`` gives: int8 [N, K] and its scales. ``split``: outlier columns int64 [k], and with ``values`` the weight there.
    """
    check_mode(mode, group)
    cls = type(linear)
    transposed = not isinstance(linear, nn.Linear)
    if isinstance(split, Tensor):
        weight = linear.weight.detach().t() if transposed else linear.weight.detach()
        values = quantize_weight(weight.index_fill(1, split, 0.0), group)
        split = split, weight[:, split].contiguous()
    _hold(linear, linear, mode, group, transposed, values)
    if split is not None:
        for name, t in zip(("outliers", "outlier_weight"), split, strict=True):
            linear.register_buffer(name, t)
    linear.__class__ = Int8Linear
    linear.__dict__[WAS] = (cls.__module__, cls.__qualname__) if transposed else None


def restored_class(cls: type[Int8Linear]) -> type[nn.Linear]:
    """What a layer of the class ``cls`` is in float. TypeError for a subclass with a forward of its own and no word on it."""
    owner = next(c for c in cls.__mro__ if "float_class" in vars(c))
    if cls.forward is not owner.forward:  # type: ignore[attr-defined]
        raise TypeError(
            f"{cls.__name__} is a subclass of {owner.__name__} with a forward of its own, and a float layer would lose what "
            f"that adds: give it a float_class of the same forward, or take it off first"
        )
    return owner.float_class  # type: ignore[attr-defined,no-any-return]


def restore_(module: Any) -> None:
    """Makes an Int8Linear a float layer of the class it was in place, with the dequantised values. What else the module
    holds, as adapters, stays, and a weight under adapters stays frozen. Raises TypeError as ``restored_class``."""
    import importlib

    cls: type[nn.Module] = restored_class(type(module))
    was = module.__dict__.pop(WAS, None)
    weight, bias = module.float_weight(), module.bias
    for name in ("weight", "weight_scale", "outliers", "outlier_weight"):
        module._buffers.pop(name, None)
    del module._parameters["bias"]
    if was is not None:
        cls = getattr(importlib.import_module(was[0]), was[1])
        weight = weight.t().contiguous()
        module.nf, module.nx = module.out_features, module.in_features
    frozen = cls is not nn.Linear and was is None
    module._parameters = {"weight": nn.Parameter(weight, requires_grad=not frozen), "bias": bias, **module._parameters}
    for name in ("mode", "group", "float_dtype"):
        del module.__dict__[name]
    module.__class__ = cls
