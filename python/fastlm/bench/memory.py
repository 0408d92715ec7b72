"""Peak memory of a contender: the allocator's own count on a GPU, peak resident memory of a child process on a CPU.

``python -m fastlm.bench.memory SUITE CASE CONTENDER`` is that child: it makes the inputs, calls the contender once (thread
pools, compilation), resets the high-water mark, calls it again, and prints by how many bytes the mark rose above what was
resident before that second call; of a training step above what was resident before there was a model, so that gradients
and the optimizer's state count.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from fastlm.bench.harness import Case, Missing
from fastlm.bench.suites import load_suite


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def _resident() -> int:
    """Resident bytes, once glibc has handed back what is free: it would else be taken again, unseen."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def wanted(case: Case) -> bool:
    """Whether the peak of this case says something of training: an op alone with its backward, or a training step."""
    return case.op == "step" or (case.setting == "alone" and case.parameters.get("part") == "forward+backward")


def of_case(suite: Path, case: Case, device: str, ran: Collection[str]) -> dict[str, int | str]:
    """Bytes by name of those contenders that ``ran``, or why there is no number; fastlm's variants and ceilings apart."""
    out: dict[str, int | str] = {}
    children = {}  # side by side: memory, not time, is measured
    for contender in case.contenders:
        if contender.kind in ("ceiling", "self") or contender.name not in ran:
            continue
        if torch.device(device).type == "cuda":
            inputs = case.inputs(0)
            before = torch.cuda.memory_allocated()
            try:
                function = contender.prepare(inputs)
                function()
            except Exception as error:  # noqa: BLE001 - a contender that cannot run is a row with its reason
                out[contender.name] = f"{type(error).__name__}: {error}"[:120]
                continue
            torch.cuda.synchronize()
            before = before if case.setting == "step" else torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            torch.cuda.synchronize()
            out[contender.name] = torch.cuda.max_memory_allocated() - before
            continue
        command = [sys.executable, "-m", "fastlm.bench.memory", str(suite), case.name, contender.name]
        children[contender.name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for name, child in children.items():
        printed, said = (text.strip().splitlines() for text in child.communicate())
        last = (printed or said or [f"the child process ended with status {child.returncode}"])[-1]
        out[name] = int(last) if last.isdigit() and not child.returncode else last[:120]
    return out


def _child(suite: str, case_name: str, contender_name: str) -> int:
    case = next(c for c in load_suite(Path(suite)).cases("cpu") if c.name == case_name)
    contender = next(c for c in case.contenders if c.name == contender_name)
    inputs = case.inputs(0)
    try:
        function = contender.prepare(inputs)
        function()
        if case.setting == "step":  # once more, and from here on its parameters and the optimizer's state count
            del function
            gc.collect()
            before = _resident()
            function = contender.prepare(inputs)
            function()
        else:
            before = _resident()
        Path("/proc/self/clear_refs").write_text("5")
        result = function()
        print(max(0, _status("VmHWM") - before))
        del result
    except Missing as why:
        print(f"missing: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[1:4]))
