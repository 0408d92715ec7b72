"""Imports point downward only, and `import fastlm` needs torch and numpy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fastlm
import pytest

PACKAGE = Path(fastlm.__file__).parent
REPOSITORY = Path(__file__).parent.parent
# A module may import its own layer and those below. `models` is torch alone, `data` and `energy` stop at the lowest.
LAYERS = {
    **dict.fromkeys(("_C", "_native", "_processor", "backend", "console", "kernels", "reference", "cpu", "cuda"), 0),
    "ops": 1,
    **dict.fromkeys(("nn", "rng"), 2),
    "models": 3,
    **dict.fromkeys(("swap", "compress"), 4),
    "train": 5,
    **dict.fromkeys(("cli", "bench", "__main__"), 6),
    **dict.fromkeys(("data", "energy"), 0),
}
ALONE = {"models": {"models"}, "data": {"data", "backend"}, "energy": {"energy", "backend"}}


def imports(path: Path, name: str) -> list[tuple[str, int]]:
    """(fastlm's top-level part, line) of each import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(name.split(".")[: -node.level] + ([base] if base else []))
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(t.split(".")[1], node.lineno) for t in targets if t.startswith("fastlm.")]
    return found


def violations(part: str, path: Path, name: str) -> list[str]:
    allowed = ALONE.get(part)
    return [
        f"{name}:{line} ({part}) imports {target}"
        for target, line in imports(path, name)
        if not (target in allowed if allowed else target not in LAYERS or LAYERS[target] <= LAYERS[part])
        or (allowed is None and target == "models" and LAYERS[part] < 3)
    ]


def sources() -> list[tuple[str, Path, str]]:
    files = []
    for root, prefix in ((PACKAGE, "fastlm"), (REPOSITORY / "kernels", "fastlm.kernels")):
        for path in sorted(root.rglob("*.py")):
            name = ".".join([prefix, *path.relative_to(root).with_suffix("").parts])
            files.append((name.split(".")[1], path, name))
    return [f for f in files if f[0] != "__init__"]


def test_imports_point_downward():
    assert len(sources()) > 20
    unknown = sorted({part for part, _, _ in sources()} - set(LAYERS))
    assert not unknown, f"a folder or file without a layer: {unknown}"
    assert not [text for part, path, name in sources() for text in violations(part, path, name)]


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("ops", "from fastlm import swap"),
        ("ops", "from fastlm.rng import set"),
        ("models", "from fastlm import ops"),
        ("data", "from fastlm.ops import norm"),
        ("reference", "def f():\n    import fastlm.ops"),
        ("nn", "from ..train import loop"),
    ],
)
def test_an_upward_import_is_found(tmp_path, part, line):
    path = tmp_path / "x.py"
    path.write_text(line)
    assert violations(part, path, f"fastlm.{part}.x")


def test_importing_fastlm_needs_torch_and_numpy_alone():
    code = (
        "import sys, fastlm\n"
        "third = {'tyro', 'rich', 'safetensors', 'matplotlib', 'transformers', 'triton', 'tokenizers', 'pyarrow',"
        " 'tensorboard', 'pytest'} & set(sys.modules)\n"
        "assert not third, third\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
