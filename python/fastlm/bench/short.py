"""``python -m fastlm.bench.short``: each op on each GPU backend, forward and backward, on a few shapes.

What ``make gpu`` gives to compute-sanitizer and ncu, which are too slow for the test suite: small odd shapes for the one,
with ``--profile`` a single call of a real size for the other. ``--interpret`` runs the Triton kernels on the CPU under
TRITON_INTERPRET=1 instead, on shapes that suit it: the rehearsal of that command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastlm
from fastlm import backend

Call = Callable[[], None]


def _dropout_add_norm(device: str, dtype: torch.dtype, shapes: list[tuple[int, ...]], every: bool) -> Iterator[Call]:
    for rows, columns in shapes:
        x, residual, weight, bias = (
            torch.randn(*s, device=device).to(dtype).requires_grad_()
            for s in ((rows, columns), (rows, columns), (columns,), (columns,))
        )

        def call(x=x, residual=residual, weight=weight, bias=bias) -> None:  # type: ignore[no-untyped-def]
            out = fastlm.ops.dropout_add_norm(x, residual, weight, bias, p=0.1, seed=1)
            (out[0].float().square().sum() + out[1].float().sum()).backward()

        yield call


def _attention(device: str, dtype: torch.dtype, shapes: list[tuple[int, ...]], every: bool) -> Iterator[Call]:
    """Training and generation; with ``every`` also a bias and its gradient, summed over both axes, and packed sequences."""
    for batch, heads, length, size in shapes:
        q, k, v = (torch.randn(batch, heads, length, size, device=device).to(dtype).requires_grad_() for _ in range(3))
        valid = torch.full((batch,), length, dtype=torch.int32, device=device)
        ends = torch.tensor([0, length // 3, length // 3, length], dtype=torch.int32, device=device)
        options: list[dict[str, Any]] = [dict(causal=True, dropout_p=0.1, seed=1)]
        for shape in ((length, length), (length, 1), (1, length)) if every else ():
            bias = torch.randn(1, heads, *shape, device=device).to(dtype).requires_grad_()
            options.append(dict(bias=bias, window=(50, 20), softcap=5.0))

        def train(q=q, k=k, v=v, options=options) -> None:  # type: ignore[no-untyped-def]
            for own in options:
                _squares(fastlm.ops.attention(q, k, v, **own)).backward()

        biases = [None, torch.randn(1, heads, 1, length, device=device).to(dtype)][: 1 + every]

        def generate(q=q, k=k, v=v, valid=valid, biases=biases) -> None:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                for bias in biases:
                    fastlm.ops.attention(q[:, :, :1], k, v, causal=True, seqlens_k=valid, bias=bias)

        def pack(q=q, k=k, v=v, ends=ends) -> None:  # type: ignore[no-untyped-def]
            tokens = (t[0].transpose(0, 1) for t in (q, k, v))
            _squares(fastlm.ops.attention(*tokens, causal=True, cu_seqlens_q=ends, dropout_p=0.1, seed=1)).backward()

        yield from (train, generate, pack) if every else (train, generate)


def _squares(out: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    assert isinstance(out, torch.Tensor)
    return out.float().square().sum()


def _rotary(device: str, dtype: torch.dtype, shapes: list[tuple[int, ...]], every: bool) -> Iterator[Call]:
    for batch, heads, length, size in shapes:
        x = torch.randn(batch, heads, length, size, device=device).to(dtype).requires_grad_()
        tables = torch.randn(2, length, size // 2, device=device).unbind()

        def call(x=x, tables=tables) -> None:  # type: ignore[no-untyped-def]
            fastlm.ops.rotary(x, *tables).float().square().sum().backward()

        yield call


CALLS = {"dropout_add_norm": _dropout_add_norm, "attention": _attention, "rotary": _rotary}
# By op: the odd shapes for the sanitizer, the real one for the profiler, the same for the interpreter.
SHAPES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "dropout_add_norm": {
        "odd": [(37, 96), (16, 1000), (5, 4096)], "profile": [(16384, 4096)],
        "interpreted odd": [(37, 96), (5, 1000)], "interpreted profile": [(16, 4096)],
    },
    "attention": {
        "odd": [(2, 4, 129, 64), (2, 4, 65, 128)], "profile": [(4, 16, 4096, 128)],
        "interpreted odd": [(1, 2, 65, 64)], "interpreted profile": [(1, 1, 128, 128)],
    },
    "rotary": {
        "odd": [(2, 3, 65, 64), (1, 1, 17, 40)], "profile": [(8, 16, 4096, 128)],
        "interpreted odd": [(2, 3, 65, 64)], "interpreted profile": [(1, 2, 128, 128)],
    },
}  # fmt: skip


def main() -> int:
    """Runs them. Returns 0 when every backend that is there ran every call."""
    parser = argparse.ArgumentParser("python -m fastlm.bench.short", description=__doc__)
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--op", default="")
    args = parser.parse_args()
    if args.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--interpret needs TRITON_INTERPRET=1 in the environment, before Triton is imported")
    device = "cpu" if args.interpret else "cuda"
    kind = ("interpreted " if args.interpret else "") + ("profile" if args.profile else "odd")
    for op in backend.ops():
        for name in ("triton",) if args.interpret else ("triton", "cuda"):
            if args.op not in op or backend.module(op, name)[0] is None:
                continue
            # bfloat16 arithmetic is wrong in Triton's interpreter; a profile is of the dtype that models train in
            dtypes = [torch.float32] if args.interpret else [torch.bfloat16] + [torch.float32] * (not args.profile)
            for dtype in dtypes:
                with backend.use(name):
                    for call in CALLS[op](device, dtype, SHAPES[op][kind], not args.profile):
                        call()
            print(f"{op} {name}: ran", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
