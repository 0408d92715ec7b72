"""What the CPU kernels promise beyond the op: the same bits on every instruction set and at any thread count."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import fastlm
import pytest
import torch
from dropout_add_norm_cases import BF16, F16, F32, Case, inputs, run
from fastlm import _native
from paths import python_path

pytestmark = pytest.mark.skipif(bool(_native.missing()), reason="no compiled core")

CASES = [
    Case((33, 200), dtype, norm, p, layerscale=scaled, rowscale=scaled, bias=norm == "layer")
    for dtype in (F32, BF16, F16)
    for norm, p, scaled in (("layer", 0.1, False), ("rms", 0.0, True), (None, 0.5, True))
]
CASES += [
    Case((5, columns), p=0.3, layerscale=True, dtype=BF16, residual_dtype=F32) for columns in (1, 15, 128, 129, 3001)
]
CASES += [Case((700, 24), p=0.2), Case((4, 65), dtype=F16, parameters=F32, residual_dtype=F32, p=0.1)]


def digest() -> str:
    """A hash of all results of all cases on this process's instruction set."""
    total = hashlib.sha256()
    with fastlm.backend.use("cpu"):
        for number, case in enumerate(CASES):
            given = inputs(case, torch.Generator().manual_seed(number))
            results = run(case, given)
            if case.norm:
                norm = {"norm": case.norm, "p": case.p, "seed": given["seed"], "quantize": "int8"}
                *_, results["q"], results["scale"] = fastlm.ops.dropout_add_norm(given["x"], given["residual"], **norm)
            for name in sorted(results):
                total.update(results[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def test_same_bits_on_every_instruction_set():
    found = {}
    for isa in ("portable", "avx2", "avx512"):
        environment = os.environ | {"FASTLM_CPU_ISA": isa, "PYTHONPATH": python_path()}
        code = "import test_cpu_kernels as t; from fastlm import _native; print(_native._C.cpu_isa(), t.digest())"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used, value = done.stdout.split()
        found[used] = value
    assert "portable" in found
    assert len(set(found.values())) == 1, found


def test_a_cap_of_amx_caps_nothing_and_says_that_there_is_none_yet():
    code = "from fastlm import _native; print(_native._C.cpu_isa()); print(_native._C.cpu_isa_reason())"
    said = {}
    for cap in ("", "amx"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"FASTLM_CPU_ISA": cap}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[cap] = done.stdout.splitlines()
    assert said["amx"][0] == said[""][0]
    assert said["amx"][1].endswith("this build has no AMX kernels yet")
    assert "AMX" not in said[""][1]


def test_unknown_instruction_set_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "from fastlm import _native; _native._C.cpu_isa()"],
        env=os.environ | {"FASTLM_CPU_ISA": "sse9"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "FASTLM_CPU_ISA is 'sse9'; it must be portable, avx2, avx512 or amx" in done.stderr


@pytest.mark.parametrize("shape", [(4096, 8), (130, 768), (3, 65536)])
def test_many_rows_or_columns_same_bits_at_any_thread_count(shape):
    case = Case(shape, p=0.1, layerscale=True)
    tensors = inputs(case, torch.Generator().manual_seed(3))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with fastlm.backend.use("cpu"):
                results.append(run(case, tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other[k], v) for other in results[1:] for k, v in results[0].items())


def test_subnormals_and_nan_round_as_torch_rounds():
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-39, 9.1e-41, 1.1754942e-38, 3.4e38, float("inf"), float("nan")] * 7)
    for dtype in (BF16, F16):
        with fastlm.backend.use("cpu"):
            got = fastlm.ops.dropout_add_norm(values, norm=None, residual_dtype=dtype)
        expected = values.to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(5).view(torch.int16), expected.nan_to_num(5).view(torch.int16))


def test_outputs_past_the_cache_are_the_same_bits():
    rows = torch.randn(6000, 1024)  # 24 MB an output: written past most caches
    weight = torch.randn(1024)
    with fastlm.backend.use("cpu"):
        y, z = fastlm.ops.dropout_add_norm(rows, rows, weight, p=0.1, seed=2)
        part_y, part_z = fastlm.ops.dropout_add_norm(rows[:100], rows[:100], weight, p=0.1, seed=2)
    assert torch.equal(y[:100], part_y)
    assert torch.equal(z[:100], part_z)
