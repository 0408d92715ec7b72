"""``python -m fastlm.bench.short``: each op on each GPU backend, forward and backward, on a few shapes.

What ``make gpu`` gives to compute-sanitizer and ncu, which are too slow for the test suite. The calls are those of
``short(device, dtype, kind)`` in each op's bench file: small odd shapes ("odd"), or with ``--profile`` one call of a real
size ("profile"). ``--interpret`` runs the Triton kernels on the CPU under TRITON_INTERPRET=1 instead, on shapes that suit
it ("interpreted odd", "interpreted profile"): the rehearsal of that command.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from fastlm import backend
from fastlm.bench import sources
from fastlm.bench.suites import load_suite, suites


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
    known = suites(sources.checkout())
    for op in backend.ops():
        short = load_suite(known[op]).short
        for name in ("triton",) if args.interpret else ("triton", "cuda"):
            if args.op not in op or backend.module(op, name)[0] is None:
                continue
            # bfloat16 arithmetic is wrong in Triton's interpreter; a profile is of the dtype that models train in
            dtypes = [torch.float32] if args.interpret else [torch.bfloat16] + [torch.float32] * (not args.profile)
            for dtype in dtypes:
                with backend.use(name):
                    for call in short(device, dtype, kind):
                        loss = call()
                        if loss.requires_grad:  # generation has none
                            loss.backward()
            print(f"{op} {name}: ran", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
