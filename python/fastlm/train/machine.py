"""The machine a run finds: device, threads, allocator, peak speed, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator

import torch

from fastlm.data.errors import InputError
from fastlm.train.config import RunConfig

PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12}


def pick_device(name: str) -> torch.device:
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device must be auto, cpu, cuda or mps; it is {name}")
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not mps):
        raise InputError(f"--device {name}: this machine or this PyTorch has none (--device auto takes what is there)")
    return torch.device(name)


def apply(run: RunConfig) -> None:
    """--threads and --deterministic, which are settings of the whole process."""
    if run.threads:
        torch.set_num_threads(run.threads)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def autocast(device: torch.device, dtype: str) -> Iterator[None]:
    """What a forward runs under, in training and in evaluation, with --dtype.

    PyTorch keeps the weights' casts until the outermost autocast is left. Where the caller's own code has one open, or has
    left one open, each step would compute with the weights of the first: so the casts are made anew.
    """
    if dtype == "float32":
        yield
        return
    torch.clear_autocast_cache()
    with torch.autocast(device.type, dtype=getattr(torch, dtype)):
        yield


def spare_page_faults() -> bool:
    """Have glibc keep freed blocks instead of handing them back: each large tensor else faults in page by page anew."""
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    trimmed = mallopt(m_trim_threshold, 2**31 - 1)
    if not mallopt(m_mmap_threshold, 2**30):  # glibc caps it at 32 MiB: then no block goes to mmap at all
        mallopt(m_mmap_max, 0)
    return bool(trimmed)


def peak_flops(device: torch.device) -> float:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((v for k, v in PEAK_BF16.items() if k in name), 0.0)
    return 0.0


def memory_limit(device: torch.device) -> int:
    """Bytes that the device has in all, 0 where unknown. On a CPU the cgroup's limit counts, if there is one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            text = file.read().strip()
        return min(total, int(text)) if text.isdigit() else total
    except OSError:
        return total


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at once at most; on a GPU those of its tensors. 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where getrusage counts the process that started this one, before it was this one
        with open("/proc/self/status") as file:
            found = [line.split()[1] for line in file if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
