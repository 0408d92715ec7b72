"""``python -m fastlm.bench.short``: each op on each GPU backend once, forward and backward, on a few small shapes.

What ``make gpu`` gives to compute-sanitizer and ncu, which are too slow for the test suite. ``--interpret`` runs the
Triton kernels on the CPU under TRITON_INTERPRET=1 instead: the rehearsal of that command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

import fastlm
from fastlm import backend


def _dropout_add_norm(device: str, dtype: torch.dtype) -> Iterator[Callable[[], torch.Tensor]]:
    for rows, columns in ((37, 96), (16, 1000), (5, 4096)):
        x, residual, weight, bias = (
            torch.randn(*s, device=device).to(dtype).requires_grad_()
            for s in ((rows, columns), (rows, columns), (columns,), (columns,))
        )

        def call(x=x, residual=residual, weight=weight, bias=bias) -> torch.Tensor:  # type: ignore[no-untyped-def]
            out = fastlm.ops.dropout_add_norm(x, residual, weight, bias, p=0.1, seed=1)
            return out[0].float().square().sum() + out[1].float().sum()

        yield call


def _attention(device: str, dtype: torch.dtype) -> Iterator[Callable[[], torch.Tensor]]:
    for length, size in ((129, 64), (65, 128)):
        q, k, v = (torch.randn(2, 4, length, size, device=device).to(dtype).requires_grad_() for _ in range(3))

        def call(q=q, k=k, v=v) -> torch.Tensor:  # type: ignore[no-untyped-def]
            out = fastlm.ops.attention(q, k, v, causal=True, dropout_p=0.1, seed=1)
            assert isinstance(out, torch.Tensor)
            return out.float().square().sum()

        yield call


CALLS = {"dropout_add_norm": _dropout_add_norm, "attention": _attention}


def main() -> int:
    """Runs them. Returns 0 when every backend that is there ran every call."""
    parser = argparse.ArgumentParser("python -m fastlm.bench.short", description=__doc__)
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--op", default="")
    args = parser.parse_args()
    device = "cpu" if args.interpret else "cuda"
    for op in backend.ops():
        for name in ("triton",) if args.interpret else ("triton", "cuda"):
            if args.op not in op or backend.module(op, name)[0] is None:
                continue
            # bfloat16 arithmetic is wrong in Triton's interpreter
            dtypes = (torch.float32,) if args.interpret else (torch.float32, torch.bfloat16)
            for dtype in dtypes:
                with backend.use(name):
                    for call in CALLS[op](device, dtype):
                        call().backward()
            print(f"{op} {name}: ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
