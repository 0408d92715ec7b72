"""Linear + cross-entropy in chunks of tokens, so that no [tokens, vocabulary] logits are ever held whole.

loss = sum over tokens of  lse(h) - h[target],  h = x W^T;  with label smoothing s: (1-s) of that + s (lse(h) - mean(h));
with z-loss z: + z lse(h)^2 (Chowdhery et al. 2022). Its gradient (softmax(h) - onehot, and the terms of s and z) is
formed while a chunk's logits are at hand, so the backward only scales what the forward stored: dx and dW.
Targets of -100 count nothing. Sums and gradients of W are float32.
"""

from __future__ import annotations

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
