"""The bench files of the checkout: their names, and how one is imported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from fastlm.bench import sources


def suites(root: Path) -> dict[str, Path]:
    """The bench files by the name that the command line knows them by: the ops, then what is built of them."""
    found = {p.stem.removeprefix("bench_"): p for p in sorted((root / "bench").glob("bench_*.py"))}
    last = [n for n in sources.COMPOSED if n in found]
    return {n: p for n, p in found.items() if n not in last} | {n: found[n] for n in last}


def load_suite(path: Path) -> ModuleType:
    """Imports a bench file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
