"""Linear + cross-entropy in chunks of tokens, so that no [tokens, vocabulary] logits are ever held whole.

loss = sum over tokens of  lse(h) - h[target],  h = x W^T;  with label smoothing s: (1-s) of that + s (lse(h) - mean(h));
with z-loss z: + z lse(h)^2 (Chowdhery et al. 2022). Its gradient (softmax(h) - onehot, and the terms of s and z) is
formed while a chunk's logits are at hand, so the backward only scales what the forward stored: dx and dW.
Targets of -100 count nothing. Sums and gradients of W are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in float32


def chunk_rows(vocab: int) -> int:
    return max(CHUNK_ELEMENTS // vocab, 16)


def token_losses(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """Loss of each token [N] from logits [N, V], in float32."""
    h = logits.float()
    loss = F.cross_entropy(h, targets, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(h, dim=-1).square() * (targets != IGNORE)
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, rows: int, smoothing: float, z_loss: float) -> Tensor:
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_w else None
        w = weight.to(x.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], rows):
            part, target = x[start : start + rows], targets[start : start + rows]
            with torch.enable_grad():
                logits = (part @ w.t()).detach().requires_grad_()
                loss = token_losses(logits, target, smoothing, z_loss).sum()
            total += loss.detach()
            if need_x or need_w:
                (g,) = torch.autograd.grad(loss, logits)
                if dx is not None:
                    torch.matmul(g, w, out=dx[start : start + rows])
                if dw is not None:
                    dw += g.t() @ part
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        dx, dw = ctx.saved_tensors
        gx = None if dx is None else dx * grad.to(dx.dtype)
        gw = None if dw is None else (dw * grad).to(ctx.weight_dtype)
        return gx, gw, None, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0, rows: int | None = None
) -> Tensor:
    """Summed loss (a float32 scalar) of hidden states x [..., C] under the output matrix [V, C] at targets [...]."""
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    rows = rows or chunk_rows(weight.shape[0])
    if x.shape[0] <= rows:
        return token_losses(F.linear(x, weight.to(x.dtype)), targets, smoothing, z_loss).sum()
    with torch.autocast(device, enabled=False):
        return _Chunked.apply(x, weight, targets, rows, smoothing, z_loss)


# ------------------------------------------------------------------------------------------------ the loss of each token


class _Each(torch.autograd.Function):
    """The loss of each token, in chunks. The backward makes a chunk's logits again: each token has a weight by then."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        w = weight.to(x.dtype)
        out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        lse = torch.empty_like(out)
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            h = (x[part] @ w.t()).float()
            lse[part] = torch.logsumexp(h, dim=-1)
            own = h.gather(1, targets[part].clamp(min=0)[:, None])[:, 0]
            out[part] = (lse[part] - own).masked_fill(targets[part] == IGNORE, 0.0)
        ctx.save_for_backward(x, weight, targets, lse)
        ctx.rows = rows
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return token_gradients(ctx, grad, lambda targets, columns: (targets.clamp(min=0)[:, None], 1.0))


def token_gradients(ctx: Any, grad: Tensor, own: Callable[[Tensor, int], tuple[Tensor, Tensor | float]]) -> Any:
    """Gradients of losses of tokens, chunk by chunk, of what ``ctx`` saved: x, weight, targets, log-sums; and ``rows``.

    ``own(targets, columns)`` gives the column [N, 1] of each target and 1, or 0 where another rank has that column.
    """
    x, weight, targets, lse = ctx.saved_tensors
    need_x, need_w = ctx.needs_input_grad[:2]
    w = weight.to(x.dtype)
    dx = torch.empty_like(x) if need_x else None
    dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_w else None
    scale = grad.masked_fill(targets == IGNORE, 0.0)
    for start in range(0, x.shape[0], ctx.rows):
        part = slice(start, start + ctx.rows)
        g = ((x[part] @ w.t()).float() - lse[part, None]).exp_() * scale[part, None]
        column, mine = own(targets[part], g.shape[1])
        g = g.scatter_add_(1, column, -(scale[part] * mine)[:, None]).to(x.dtype)
        if dx is not None:
            torch.matmul(g, w, out=dx[part])
        if dw is not None:
            dw += g.t() @ x[part]
    return dx, None if dw is None else dw.to(weight.dtype), None, None


def linear_token_losses(x: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """Loss in nats of each token, float32 of the shape of targets [...], 0 where it is -100; x [..., C], weight [V, C]."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        flat = _Each.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), rows or chunk_rows(weight.shape[0]))
    return flat.view(targets.shape)


def document_scores(losses: Tensor, targets: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability, number of targets) of document j of each row at [:, j], float32 [B, L]; 0 where there is none."""
    counted = (targets != IGNORE).to(losses.dtype)
    place, none = documents.long(), torch.zeros_like(losses)
    return none.scatter_add(1, place, -losses), none.scatter_add(1, place, counted)


def preference(
    scores: Tensor, counts: Tensor, reference: Tensor, beta: float, smoothing: float, normalized: bool
) -> tuple[Tensor, Tensor]:
    """(summed loss, number of pairs whose chosen answer gained more) by Direct Preference Optimization (Rafailov et al. 2023).

    Rows 2i and 2i + 1 of scores, counts and reference [2n, L] are the chosen and the rejected answers of pairs, by number. With
    z = beta ((c - c_ref) - (r - r_ref)):  loss = -(1 - s) log sigmoid(z) - s log sigmoid(-z),  s being the smoothing (Mitchell
    2023). `normalized` takes each difference per token of its answer.
    """
    gained = scores - reference
    if normalized:
        gained = gained / counts.clamp(min=1)
    margin = gained[::2] - gained[1::2]
    pairs = counts[::2] > 0
    z = beta * margin
    loss = -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    return loss.masked_fill(~pairs, 0.0).sum(), ((margin > 0) & pairs).sum()
