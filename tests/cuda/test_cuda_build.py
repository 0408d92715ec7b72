"""The CUDA kernels compile for sm_80 and sm_90a without a spill, and take the registers that the committed table says.

python tests/cuda/test_cuda_build.py    rewrites bench/results/offline_cuda.json
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench/results/offline_cuda.json"
ARCHS = ("80", "90a")
SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu") if path.stem != "device")

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


def key() -> str:
    """The compiler that the figures belong to."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return f"nvcc {found.group(1) if found else 'unknown'}"


def figures(source: str, arch: str) -> dict[str, dict[str, int]]:
    """{kernel: registers, spill_bytes, stack_bytes} as ptxas tells them."""
    command = [
        *("nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", f"-I{ROOT / 'csrc'}", "-cubin"),
        *("-gencode", f"arch=compute_{arch},code=sm_{arch}", str(ROOT / f"csrc/cuda/{source}.cu"), "-o", "/dev/null"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels: dict[str, dict[str, int]] = {}
    name = ""
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = _readable(found.group(1))
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())
            kernels.setdefault(name, {}).update(stack_bytes=stack, spill_bytes=stores + loads)
        elif found := re.search(r"Used (\d+) registers", line):
            kernels.setdefault(name, {})["registers"] = int(found.group(1))
    return kernels


def _readable(symbol: str) -> str:
    """dropout_add_norm::forward_kernel<1,1,1> of a mangled name; c++filt is not on every machine."""
    names = re.findall(r"\d([a-z_]+_kernel)", symbol)
    arguments = [("-" if sign else "") + value for sign, value in re.findall(r"Li(n?)(\d+)E", symbol)]
    return (names[-1] if names else symbol) + (f"<{','.join(arguments)}>" if arguments else "")


@needs_nvcc
@pytest.mark.parametrize("arch", [ARCHS[0], pytest.param(ARCHS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_a_spill(source, arch):
    kernels = figures(source, arch)
    assert kernels
    for name, figure in kernels.items():
        assert figure["spill_bytes"] == 0, (name, figure)
        assert figure["stack_bytes"] == 0, (name, figure)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if key() not in table:
        pytest.skip(f"{TABLE.name} has no figures of {key()}")
    assert kernels == table[key()][source][f"sm_{arch}"], (
        f"run python tests/cuda/{Path(__file__).name} and look at the change"
    )


def test_default_architectures_carry_ptx_for_newer_chips():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(r'fastlm_option\(FASTLM_CUDA_ARCHS "([^"]*)"', text)
    assert found
    archs = found.group(1).split(";")
    assert {f"{arch}-real" for arch in ARCHS} <= set(archs)
    assert any(arch.endswith("-virtual") for arch in archs)


if __name__ == "__main__":
    stored = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    stored[key()] = {source: {f"sm_{arch}": figures(source, arch) for arch in ARCHS} for source in SOURCES}
    TABLE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.exit(any(f["spill_bytes"] for archs in stored[key()].values() for ks in archs.values() for f in ks.values()))
