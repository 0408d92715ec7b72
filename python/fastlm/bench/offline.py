"""Checks of the Triton kernels that need no GPU: registers, spills, shared memory, tensor cores; and a model of speed.

    python -m fastlm.bench.offline             compile all, print the table, exit 1 on a spill or a missing tensor core
    python -m fastlm.bench.offline --sass      also count what the SASS is made of: loads and stores by width, IMADs, MMAs
    python -m fastlm.bench.offline --write F   also put the figures into F (bench/results/offline.json)

Every kernel file's ``offline_cases()`` says what to compile: its own launchers, recorded on meta tensors for sm_80 and
sm_90. Triton makes PTX, and ``ptxas -v`` on it gives the exact figures (cuobjdump calls some spills no local memory).

The static model: occupancy from registers, shared memory and the limits of an SM, and the least time of the call, which
is the larger of bytes / bandwidth and flops / the rate of the units that compute them: tensor cores where the call must use
them, float32 else. A plan to work from while no GPU is near, not a result.

Needs torch and triton alone, and neither a driver nor a GPU.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Per SM: registers, shared bytes, warps, programs; per GPU: SMs, bytes/s, float32 flop/s, and flop/s of the tensor cores in
# bfloat16 (dense). From NVIDIA's tuning guides and data sheets: A100 SXM 80 GB for sm_80, H200 SXM for sm_90, B200 for
# sm_100, GeForce RTX 5090 for sm_120. A program may hold 1 KiB less of the shared memory than the SM has.
MACHINE = {
    80: dict(registers=65536, shared=164 * 1024, warps=64, programs=32, sms=108, bandwidth=2.04e12, flops=19.5e12,
             tensor_flops=312e12),
    90: dict(registers=65536, shared=228 * 1024, warps=64, programs=32, sms=132, bandwidth=4.8e12, flops=67e12,
             tensor_flops=989e12),
    100: dict(registers=65536, shared=228 * 1024, warps=64, programs=32, sms=148, bandwidth=8e12, flops=75e12,
              tensor_flops=2250e12),
    120: dict(registers=65536, shared=100 * 1024, warps=48, programs=24, sms=170, bandwidth=1.79e12, flops=104.8e12,
              tensor_flops=209.5e12),
}  # fmt: skip
NEWER = (100, 120)  # no launcher is planned for them: they get the configurations of sm_90


@dataclass(frozen=True)
class Figures:
    """What ptxas and the PTX say of one kernel."""

    registers: int
    spill_bytes: int
    shared: int
    tensor_cores: str  # "", "mma", "wgmma" or "tcgen05"


@dataclass(frozen=True)
class Prediction:
    """What the static model says of one kernel within its call."""

    occupancy: float  # resident warps, as a fraction of the SM's
    waves: float  # programs / programs resident at once
    call_us: float  # least time of the whole call
    bound: str  # what that time is spent on: "bytes" or "flops"


def cases(newer: bool = False) -> Iterator[Any]:
    """Every OfflineCase of every kernel file; of several that compile to the same thing, the first.

    ``newer``: also what the chips in ``NEWER`` would run, as far as this ptxas knows them.
    """
    for case in _cases():
        yield case
        if newer and case.arch == 90:
            yield from (replace(case, arch=arch) for arch in NEWER if _ptxas_knows(arch))


@functools.cache
def _ptxas_knows(arch: int) -> bool:
    text = subprocess.run([_ptxas(arch), "--help"], check=True, capture_output=True, text=True).stdout
    return f"sm_{arch}a" in text


def _cases() -> Iterator[Any]:
    package = importlib.import_module("fastlm.kernels")
    seen: set[str] = set()
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        module = importlib.import_module(f"fastlm.kernels.{info.name}")
        for case in getattr(module, "offline_cases", list)():
            same = (
                f"{case.arch} {case.kernel.__name__} {case.signature} {case.constexprs} {case.divisible} {case.options}"
            )
            if same not in seen:
                seen.add(same)
                yield case


def key() -> str:
    """Versions that the figures depend on; a table is compared only with figures of the same key."""
    import triton

    text = subprocess.run([_ptxas(), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return f"triton {triton.__version__}, ptxas {found.group(1) if found else 'unknown'}"


def digest(case: Any) -> str:
    """A hash of what the machine code of a case comes from: the kernel's source and what it calls and reads, its types,
    constants and options. Code of the same digest and ``key()`` is the same."""
    read: dict[str, str] = {}
    _sources(case.kernel, read)
    said = (case.arch, read, case.signature, case.constexprs, sorted(case.divisible), case.options)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _sources(kernel: Any, read: dict[str, str]) -> None:
    """The source of a jitted function, of those that it calls, and the constants that it reads, by name."""
    name = f"{kernel.__module__}.{kernel.__name__}"
    if name in read:
        return
    read[name] = kernel.src
    names, scope = kernel.fn.__code__.co_names, kernel.fn.__globals__
    found = [(n, scope[n]) for n in names if n in scope]
    ours = [thing for _, thing in found if getattr(thing, "__name__", "").startswith("fastlm.kernels")]
    found += [(f"{module.__name__}.{n}", getattr(module, n)) for module in ours for n in names if hasattr(module, n)]
    for n, thing in found:
        if hasattr(thing, "src") and hasattr(thing, "fn"):
            _sources(thing, read)
        elif isinstance(getattr(thing, "value", thing), bool | int | float | str):
            read[f"{name} {n}"] = repr(getattr(thing, "value", thing))


def _ptxas(arch: int = 0) -> str:
    """The assembler that Triton itself uses for an architecture: Blackwell has one of its own."""
    from triton import knobs

    blackwell = getattr(knobs.nvidia, "ptxas_blackwell", None)
    return str((blackwell if arch >= 100 and blackwell is not None else knobs.nvidia.ptxas).path)


def compile_case(case: Any) -> tuple[Figures, str]:
    """Figures and PTX of one case. Raises what Triton or ptxas raise if it does not compile."""
    compiled = _compile(case)
    ptx = compiled.asm["ptx"]
    return _figures(ptx, compiled.metadata.shared, case.arch), ptx


def _compile(case: Any) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, case.signature, case.constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=dict(case.options))


def sass(case: Any) -> dict[str, int]:
    """What the machine code of one case is made of: instructions, and of them those that say how it will run.

    A load or store of 128 bits a thread is a whole vector; narrower ones of the streams show a lost alignment. IMAD.WIDE
    and IMAD.HI are the multiplications of the random numbers. Static counts: a loop's body counts once.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(_compile(case).asm["cubin"])
        done = subprocess.run([str(knobs.nvidia.nvdisasm.path), "-c", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed: {done.stderr.strip()}")
    codes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", done.stdout, re.MULTILINE)
    codes = codes[: len(codes) - next((i for i, c in enumerate(reversed(codes)) if c != "NOP"), 0)]
    counts = {"instructions": len(codes)}
    for name, pattern in SASS.items():
        counts[name] = sum(bool(re.match(pattern, code)) for code in codes)
    return counts


SASS = {
    "load 128": r"LDG.*\.128", "load 64": r"LDG.*\.64", "load less": r"LDG(?!.*\.(128|64))",
    "store 128": r"STG.*\.128", "store 64": r"STG.*\.64", "store less": r"STG(?!.*\.(128|64))",
    "wide IMAD": r"U?IMAD\.(WIDE|HI)", "FP32": r"F(FMA|ADD|MUL)", "shared": r"(LDS|STS)", "barrier": r"BAR",
    "MMA": r"(HMMA|HGMMA|GMMA)", "local": r"(LDL|STL)",
}  # fmt: skip


def _figures(ptx: str, shared: int, arch: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{hashlib.sha1(ptx.encode()).hexdigest()}.ptx"
        path.write_text(ptx)
        command = [_ptxas(arch), "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", str(path), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
    registers = int(_number(r"Used (\d+) registers", done.stderr))
    spills = int(_number(r"(\d+) bytes spill stores", done.stderr)) + int(
        _number(r"(\d+) bytes spill loads", done.stderr)
    )
    uses = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}
    cores = next((name for name, instruction in uses.items() if instruction in ptx), "")
    return Figures(registers, spills, shared, cores)


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas -v did not say {pattern!r}: {text.strip()}")
    return found.group(1)


def predict(case: Any, figures: Figures) -> Prediction:
    """The static model of one case on the GPU of its architecture (see MACHINE)."""
    machine = MACHINE[case.arch]
    warps = case.options["num_warps"]
    register_warp = -(-figures.registers * 32 // 256) * 256  # allocated to a warp in units of 256
    resident = min(
        machine["programs"],
        machine["warps"] // warps,
        machine["registers"] // (register_warp * warps),
        machine["shared"] // (figures.shared + 1024),  # the driver keeps 1 KiB of each program's
    )
    rate = machine["tensor_flops"] if case.call_on_tensor_cores else machine["flops"]
    bytes_s, flops_s = case.bytes_moved / machine["bandwidth"], case.flops / rate
    waves = case.programs / (resident * machine["sms"]) if resident else float("inf")
    return Prediction(
        resident * warps / machine["warps"],
        round(waves, 2),
        round(max(bytes_s, flops_s) * 1e6, 2),
        "bytes" if bytes_s >= flops_s else "flops",
    )


def faults(case: Any, figures: Figures) -> list[str]:
    """What no kernel may do."""
    found = []
    if figures.spill_bytes:
        found.append(f"{case.name} sm_{case.arch}: spills {figures.spill_bytes} bytes at {figures.registers} registers")
    if figures.shared > MACHINE[case.arch]["shared"] - 1024:
        found.append(
            f"{case.name} sm_{case.arch}: wants {figures.shared} bytes of shared memory, more than a program gets"
        )
    if case.tensor_cores and not figures.tensor_cores:
        found.append(f"{case.name} sm_{case.arch}: uses no tensor core")
    elif _promises_wgmma(case) and figures.tensor_cores != "wgmma":
        found.append(f"{case.name} sm_{case.arch}: uses {figures.tensor_cores}, not wgmma")
    return found


def _promises_wgmma(case: Any) -> bool:
    """Attention on Hopper up to head size 128; tiles of decoding and of larger heads have fewer rows than wgmma needs."""
    shape = case.constexprs
    return bool(case.tensor_cores) and case.arch >= 90 and shape.get("DIM", 256) <= 128 and not shape.get("PACK")


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences of two tables {name: {sm_NN: figures}}, for the cases that both or only one have."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        for arch in sorted(old.get(name, {}).keys() | new.get(name, {}).keys()):
            before, after = old.get(name, {}).get(arch), new.get(name, {}).get(arch)
            if before != after:
                lines.append(f"{name} {arch}: {before or 'new'} -> {after or 'gone'}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastlm.bench.offline", description="Triton kernels, checked offline"
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="put the figures into FILE under this triton and ptxas; with --only beside those that are there",
    )
    parser.add_argument(
        "--newer", action="store_true", help="also sm_100 and sm_120, where this ptxas knows them; never written"
    )
    parser.add_argument("--sass", action="store_true", help="also count what the machine code is made of")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only cases whose architecture and name, as printed, contain TEXT",
    )
    args = parser.parse_args(arguments)
    table: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    print(f"{key()}\n{'regs':>5} {'spill':>5} {'shared':>7} {'occup':>6} {'waves':>6} {'call µs':>8}  kernel")
    for case in cases(args.newer):
        if args.only not in f"sm_{case.arch} {case.name}":
            continue
        figures, _ = compile_case(case)
        model = predict(case, figures)
        wrong += faults(case, figures)
        if case.arch not in NEWER:
            table.setdefault(case.name, {})[f"sm_{case.arch}"] = asdict(figures) | {"of": digest(case)}
        print(
            f"{figures.registers:5} {figures.spill_bytes:5} {figures.shared:7} {model.occupancy:6.0%} "
            f"{model.waves:6.1f} {model.call_us:8.1f}  sm_{case.arch} {case.name} {figures.tensor_cores}",
            flush=True,
        )
        if args.sass:
            print(" " * 6 + ", ".join(f"{k} {v}" for k, v in sass(case).items() if v), flush=True)
    if args.write:
        stored = json.loads(args.write.read_text(encoding="utf-8")) if args.write.exists() else {}
        before = stored.get(key(), {})
        after = {**before, **table} if args.only else table
        for line in changes(before, after):
            print(line)
        stored[key()] = after
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
