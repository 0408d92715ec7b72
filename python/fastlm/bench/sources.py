"""What an op's kernels are made of, as a hash of the text of their files, what those include or import, and build flags.

A result is kept with the hash of the sources that gave it; `fastlm bench --status` says where the sources have changed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import fastlm

# The suites that are no op, in the order in which they are run and shown.
COMPOSED = ("step", "drop_in", "train", "loading")


class NoCheckout(RuntimeError):
    """The sources and benchmarks are not installed with the package."""


def checkout() -> Path:
    """The root of the checkout that this fastlm runs from, or that FASTLM_CHECKOUT names (``make gpu`` does).

    Raises NoCheckout for an installed wheel.
    """
    root = Path(os.environ.get("FASTLM_CHECKOUT") or Path(fastlm.__file__).resolve().parents[2])
    if not ((root / "csrc").is_dir() and (root / "bench").is_dir()):
        raise NoCheckout(
            f"fastlm is installed at {Path(fastlm.__file__).parent}, without its sources and benchmarks. Clone the "
            "repository, run `make venv` there and use its `.venv/bin/fastlm bench`."
        )
    return root


_C_SUFFIXES = (".cpp", ".cu", ".h", ".cuh")


def _python_path(module: str, root: Path) -> Path | None:
    parts = module.split(".")
    if parts[0] != "fastlm":
        return None
    if parts == ["fastlm"]:
        return root / "python/fastlm/__init__.py"
    base = root / "kernels" if parts[1:2] == ["kernels"] else root / "python" / "fastlm"
    rest = parts[2:] if parts[1:2] == ["kernels"] else parts[1:]
    for path in (base.joinpath(*rest).with_suffix(".py"), base.joinpath(*rest, "__init__.py")):
        if rest and path.is_file():
            return path
    return None


def _imports(path: Path, root: Path, packages: bool = False) -> Iterable[Path]:
    """The files of fastlm that a file imports; ``packages``: also the __init__ of packages, which reach all of their ops."""
    for name in _imported(path.read_text(encoding="utf-8")):
        found = _python_path(name, root)
        if found is not None and (packages or found.name != "__init__.py"):
            yield found


@functools.cache
def _imported(text: str) -> tuple[str, ...]:
    """The names that may be modules of what a Python text imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return tuple(names)


def _includes(path: Path, root: Path) -> Iterable[Path]:
    # A header of csrc/cpu or csrc/cuda stands for what implements it (cpu/dispatch.h: which instruction set runs).
    if path.suffix == ".h" and path.with_suffix(".cpp").is_file():
        yield path.with_suffix(".cpp")
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        for base in (root / "csrc", path.parent):
            if (base / name).is_file():
                yield (base / name).resolve()
                break


def files(op: str, backend: str, root: Path | None = None) -> list[Path]:
    """All files that this backend of ``op`` is made of, sorted: those named after the op, and what they reach."""
    root = root or checkout()
    todo: list[Path] = [root / "python/fastlm/ops" / f"{op}.py"]
    if backend == "triton":
        todo += sorted((root / "kernels").glob(f"{op}*.py"))
        todo += [p for p in (root / "kernels/table.json",) if p.is_file()]
    else:
        todo.append(root / "python/fastlm" / backend / f"{op}.py")
    if backend in ("cpu", "cuda"):
        todo += sorted((root / "csrc" / backend).glob(f"{op}*")) + [root / "CMakeLists.txt", root / "csrc/bindings.cpp"]
        todo += sorted((root / "csrc" / backend).glob(f"entry_{op}*"))
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        if path.suffix == ".py":
            todo += _imports(path, root)
        elif path.suffix in _C_SUFFIXES:
            todo += _includes(path, root)
    return sorted(found)


def source_hash(op: str, backend: str, root: Path | None = None) -> str:
    """Sixteen hexadecimal digits that change when a file that this backend of ``op`` is made of changes."""
    root = root or checkout()
    return _digest(files(op, backend, root), root, build_settings(backend, root))


def suite_hash(suite: str, kind: str, root: Path) -> str:
    """The same for a suite that is no op: its bench file and all of fastlm that it reaches, and every op's sources."""
    from fastlm import backend

    found, todo, settings = set(), [root / "bench" / f"bench_{suite}.py"], ""
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imports(path, root, packages=True)
    for op in backend.ops():
        for name in ("cpu",) if kind == "cpu" else ("triton", "cuda"):
            found |= set(files(op, name, root))
            settings = settings or build_settings(name, root)
    return _digest(sorted(found), root, settings)


def build_settings(backend: str, root: Path) -> str:
    """What a backend's machine code depends on outside CMakeLists.txt: the build type, and for CUDA how `make gpu` builds."""
    if backend not in ("cpu", "cuda"):
        return ""
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    settings = re.findall(r"^cmake\.[a-z-]+ *= *[^#\n]*", project, re.MULTILINE)
    if backend == "cuda":
        script = (root / "scripts/gpu.py").read_text(encoding="utf-8")
        settings += [ast.get_source_segment(script, node) or "" for node in ast.parse(script).body
                     if isinstance(node, ast.FunctionDef) and node.name in ("build", "arch_of")]  # fmt: skip
    return "\n".join(line.strip() for line in settings)


def _digest(paths: Iterable[Path], root: Path, settings: str = "") -> str:
    digest = hashlib.sha256(settings.encode())
    for path in paths:
        digest.update(f"{path.relative_to(root)}\0{path.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()[:16]
