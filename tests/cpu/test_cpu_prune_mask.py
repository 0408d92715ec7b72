"""prune_mask on the CPU: sizes at which it samples, thread counts, instruction sets, memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from fastlm import _native, backend, ops

pytestmark = pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")

LARGE = """
import hashlib, sys, torch
from fastlm import _native, ops
torch.manual_seed(7)
digest = hashlib.sha256()
x = torch.randn(500, 1003)
for threads in map(int, sys.argv[1].split(",")):
    torch.set_num_threads(threads)
    own = hashlib.sha256()
    for options in ({"sparsity": 0.5}, {"sparsity": 0.9}, {"sparsity": 0.5, "scope": "row"}, {"pattern": "2:4"},
                    {"pattern": "4:8"}, {"pattern": "row", "sparsity": 0.5}, {"pattern": "column", "sparsity": 0.5},
                    {"pattern": "block:8x8", "sparsity": 0.5}):
        for y in (x, x.bfloat16(), x.T):
            own.update(ops.prune_mask(y, magnitude=True, **options).numpy().tobytes())
    own.update(ops.prune_mask(x[:, :1000], pattern="2:4t").numpy().tobytes())
    weight = x.clone()
    ops.apply_mask_(weight, ops.prune_mask(x, sparsity=0.5))
    own.update(weight.numpy().tobytes())
    print(_native._C.cpu_isa(), own.hexdigest())
"""


def test_the_same_bits_for_every_thread_count_and_instruction_set():
    found = []
    for isa in ("portable", "avx2", "avx512"):
        env = os.environ | {"FASTLM_CPU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", LARGE, "1,2,8"], env=env, capture_output=True, text=True, check=True
        )
        found += [line.split() for line in done.stdout.splitlines()]
    assert len({digest for _, digest in found}) == 1, found
    assert found[0][0] == "portable"


def reference(x: torch.Tensor, **options) -> torch.Tensor:
    with backend.use("reference"):
        return ops.prune_mask(x, **options)


@pytest.mark.parametrize("kind", ["normal", "equal", "two", "sorted", "columns", "outliers"])
def test_sizes_at_which_it_samples(kind):
    x = torch.randn(400, 1000)
    x = {
        "normal": x, "equal": torch.full_like(x, -3.0), "two": (x > 0).float(), "sorted": x.flatten().sort().values.view_as(x),
        "columns": x.abs() * torch.exp(torch.arange(1000) % 7 * 5.0), "outliers": torch.where(x > 3, x * 1e30, 1 + x * 1e-7),
    }[kind]  # fmt: skip
    for sparsity in (0.0, 3e-6, 0.5, 0.97, 1.0):
        assert torch.equal(ops.prune_mask(x, sparsity=sparsity), reference(x, sparsity=sparsity)), sparsity
    many = [x[:100], x[100:150].half(), x[150:, :3]]
    for a, b in zip(
        ops.prune_mask(many, sparsity=0.4, scope="global"), reference(many, sparsity=0.4, scope="global"), strict=True
    ):
        assert torch.equal(a, b)
    long = x.view(4, -1)  # rows that all threads share
    assert torch.equal(ops.prune_mask(long, sparsity=0.3, scope="row"), reference(long, sparsity=0.3, scope="row"))


def test_a_denormal_is_no_zero_where_the_processor_flushes_them():
    x = torch.tensor([[1e-40, 0.0, 2e-40, -0.0, 3e-40, 1.0, 1e-41, 5.0]])
    want = ops.prune_mask(x, sparsity=0.5)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert torch.equal(ops.prune_mask(x, sparsity=0.5), want)
        assert torch.equal(ops.prune_mask(x, pattern="4:8"), want)
    finally:
        torch.set_flush_denormal(False)


def test_a_selection_takes_a_hundredth_of_the_tensor():
    code = (
        "import resource, torch\nfrom fastlm import ops\nx = torch.randn(4096, 4096)\nops.prune_mask(x[:64], sparsity=0.5)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\nmask = ops.prune_mask(x, sparsity=0.5)\nprint(peak() - before - mask.numel())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 4096 * 4096 * 4 * 0.01 + (1 << 19)  # half a MiB for what the system counts in pages
