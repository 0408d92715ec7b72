"""``fastlm doctor``: what is installed here, what runs on what, and why. Needs torch and numpy alone."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastlm
from fastlm import _native, _processor, backend


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _bfloat16() -> str:
    advice = ": train in float32" if _processor.slow(torch.bfloat16) else ""
    return _processor.sentence(torch.bfloat16) + advice


def report() -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (name, value) rows."""
    packages = ["torch", "triton", "numpy", "tyro", "rich", "safetensors", "tokenizers", "pyarrow", "matplotlib"]
    sections = [
        ("versions", [("fastlm", fastlm.__version__), ("python", platform.python_version())]
         + [(p, _version(p)) for p in packages]),
        ("machine", [("platform", platform.platform()), ("processor threads", f"{os.cpu_count()}, torch uses "
          f"{torch.get_num_threads()}"), ("bfloat16", _bfloat16())]),
    ]  # fmt: skip
    core = _native._C
    if core is None:
        sections.append(("compiled core", [("state", _native.missing())]))
    else:
        why = core.cpu_isa_reason()
        rows = [("instruction set", core.cpu_isa() + (f" ({why})" if why else ""))]
        if core.__version__ != fastlm.__version__:
            rows.append(("stale", f"the core is {core.__version__}, the package {fastlm.__version__}: install again"))
        rows.append(("CUDA kernels", _native.missing_cuda() or f"built for {core.cuda_archs()}"))
        sections.append(("compiled core", rows))
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        rows = [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
        rows.append(("verified", "`fastlm bench --status` says which kernels have passed their tests on a GPU"))
        sections.append(("GPUs", rows))
    else:
        why = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        sections.append(("GPUs", [("none", why)]))
    if backend.forced():
        sections.append(("forced", [("FASTLM_BACKEND", str(backend.forced()))]))
    for op in backend.ops():
        rows = []
        for device in devices:
            call = backend.example(op, device)
            try:
                choice = backend.which(op, **call)
            except backend.BackendError as error:
                rows.append((device, str(error)))
                continue
            rows.append((device, f"{choice.backend} ({choice.reason})"))
            others = dict(choice.rejected)
            for name in backend.BACKENDS:
                if name != choice.backend:
                    rows.append((f"  not {name}", others.get(name) or backend.why_not(op, name, **call)))
        sections.append((f"fastlm.ops.{op}", rows))
    return sections


def main(argv: list[str]) -> int:
    """Prints the report. Returns 0, or 1 where the compiled core does not belong to this package."""
    argparse.ArgumentParser("fastlm doctor", description=__doc__).parse_args(argv)
    stale = False
    for title, rows in report():
        print(title)
        for name, value in rows:
            print(f"  {name:<18} {value}")
            stale = stale or name == "stale"
    return int(stale)
