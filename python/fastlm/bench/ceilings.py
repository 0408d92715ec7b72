"""What this machine can do at most, measured in the run that uses it: copy bandwidth and matmul rate."""

from __future__ import annotations

import functools
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastlm import _native, _processor
from fastlm.bench.clock import DTYPES, Clock


def _median(function: Any, device: str, rounds: int) -> float:
    clock = Clock(device)
    for _ in range(2):
        function()
    return statistics.median(clock(function, 1) for _ in range(rounds))


@functools.cache
def copy_bandwidth(size: int, device: str, rounds: int = 11) -> float:
    """Bytes read plus written a second when ``size`` bytes are moved in all: the faster of ``copy_`` and our own copy.

    ``copy_`` is no ceiling on a CPU: it does not use non-temporal stores, which spare the read of what is overwritten.
    """
    count = max(size // 2, 4096) // 4 * 4
    source = torch.randint(0, 127, (count,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    best = _median(lambda: target.copy_(source), device, rounds)
    if device == "cpu" and _native._C is not None:
        threads = torch.get_num_threads()
        own = lambda: _native._C.copy_nontemporal(source.data_ptr(), target.data_ptr(), count, threads)
        best = min(best, _median(own, device, rounds))
    return 2 * count / best


@functools.cache
def matmul_rate(dtype: str, device: str, rounds: int = 5) -> float:
    """Floating-point operations a second of a square matmul: 2048 on a CPU, 8192 on a GPU.

    On a CPU without instructions for ``dtype`` it is float32's: converting first is then the faster way.
    """
    if device == "cpu" and _processor.slow(DTYPES[dtype]):
        return matmul_rate("float32", device)
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / _median(lambda: a @ b, device, rounds)


def for_case(nbytes: int, flops: int, dtype: str, device: str) -> dict[str, float]:
    """The ceilings that bound a case of so many bytes and flops."""
    out = {}
    if nbytes:
        out["copy"] = copy_bandwidth(nbytes, device)
    if flops:
        out["matmul"] = matmul_rate(dtype, device)
    return out


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on, with versions."""
    import fastlm

    core = _native._C
    out: dict[str, Any] = {
        "device": _processor_name() if device == "cpu" else torch.cuda.get_device_name(device),
        "kind": device,
        "threads": torch.get_num_threads(),
        "instruction_set": core.cpu_isa() if core is not None else None,
        "instruction_set_reason": core.cpu_isa_reason() if core is not None else None,
        "platform": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "versions": {"fastlm": fastlm.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }
    try:
        import triton

        out["versions"]["triton"] = triton.__version__
    except ImportError:
        out["versions"]["triton"] = None
    if device != "cpu":
        out["versions"]["cuda"] = torch.version.cuda
        out["cuda_archs"] = core.cuda_archs() if core is not None else None
        out["driver and clocks"] = _nvidia_smi("driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem")
    return out


def clocks(device: str) -> str | None:
    """The GPU's clocks, temperature and throttling now; None on a CPU. Recorded with each case."""
    if torch.device(device).type != "cuda":
        return None
    return _nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,clocks_throttle_reasons.active")


def _nvidia_smi(query: str) -> str:
    """What nvidia-smi says, or why it says nothing."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "nvidia-smi is not installed"
    return done.stdout.strip() or done.stderr.strip()
