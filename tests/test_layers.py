"""Imports point downward and in no circle, torch's private names stay in one file, and `import fastlm` needs little."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import fastlm
import pytest

PACKAGE = Path(fastlm.__file__).parent
REPOSITORY = Path(__file__).parent.parent
# A module may import its own layer and those below. `models` is torch alone, `data` and `energy` stop at the lowest.
LAYERS = {
    **dict.fromkeys(
        ("_C", "_native", "_torch", "_processor", "backend", "console", "kernels", "reference", "cpu", "cuda"), 0
    ),
    "ops": 1,
    **dict.fromkeys(("nn", "rng"), 2),
    "models": 3,
    **dict.fromkeys(("swap", "compress", "inspect"), 4),
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


def modules_imported(path: Path, name: str, known: set[str]) -> set[str]:
    """Those of the known modules that a file imports, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join(here[: len(here) - node.level + 1] + ([base] if base else []))
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names if names <= known else {base} | names
    return (found & known) - {name}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def private_names(path: Path) -> list[str]:
    """Torch's private names that a file uses, as `LINE NAME`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner == "torch" or owner.startswith("torch.") or owner == "forward_ad":
                found.append(f"{node.lineno} {owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [f"{node.lineno} {name}" for name in names if re.search(r"\._(?!_)", name)]
    return found


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


def test_no_modules_import_each_other_in_a_circle():
    files = {name.removesuffix(".__init__"): path for _, path, name in sources()}
    edges = {name: modules_imported(path, name, set(files)) for name, path in files.items()}
    assert "fastlm.train.guards" in edges["fastlm.train.loop"]
    assert not cycle(edges), " -> ".join(cycle(edges))


@pytest.mark.parametrize("line", [
    "import fastlm.b", "def f():\n    from fastlm.b import x", "if TYPE_CHECKING:\n    from fastlm import b", "from . import b",
])  # fmt: skip
def test_a_circle_of_imports_is_found(tmp_path, line):
    (tmp_path / "a.py").write_text(line)
    (tmp_path / "b.py").write_text("from fastlm import c")
    (tmp_path / "c.py").write_text("import fastlm.a as it")
    names = {f"fastlm.{n}" for n in "abc"}
    found = cycle({n: modules_imported(tmp_path / f"{n[-1]}.py", n, names) for n in names})
    assert found == ["fastlm.a", "fastlm.b", "fastlm.c", "fastlm.a"]
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_private_names_of_torch_are_used_in_one_file(tmp_path):
    found = {name: used for _, path, name in sources() if (used := private_names(path))}
    assert set(found) == {"fastlm._torch"}, found
    path = tmp_path / "x.py"
    path.write_text("torch._C._x()\nfrom torch._inductor import y\nforward_ad._level\ntorch.__version__\nself._x")
    assert sorted(line.split()[0] for line in private_names(path)) == ["1", "1", "2", "3"]


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
