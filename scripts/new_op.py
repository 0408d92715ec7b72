"""Writes the skeleton of a new op: python scripts/new_op.py NAME.

Five files of one op appear, and two lines in files that exist: the function in ops/__init__.py and the op's table in
docs/benchmarks.md. Everything runs at once. Its tests fail, saying what to write, until the maths is there.
CONTRIBUTING.md, "Add an op", goes on from here.
"""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from pathlib import Path

REFERENCE = '''"""NAME in plain PyTorch: the definition that every backend is held to.

Write the formulas here, with their source: y = f(x, scale), and the gradient of x.
"""

from __future__ import annotations

from torch import Tensor

from fastlm.backend import YES, Support


def serves_forward(x: Tensor, scale: float) -> Support:
    """Everything."""
    return YES


def serves_backward(dout: Tensor, x: Tensor, scale: float) -> Support:
    """Everything."""
    return YES


def forward(x: Tensor, scale: float) -> Tensor:
    """y; computed in float32 at least, rounded once to x's dtype."""
    raise NotImplementedError("NAME: write the forward's maths in reference/NAME.py")


def backward(dout: Tensor, x: Tensor, scale: float) -> Tensor:
    """The gradient of x."""
    raise NotImplementedError("NAME: write the backward's maths in reference/NAME.py")
'''

OPS = '''"""NAME: the public function, the schema, the fake kernels and autograd. The maths is in ``fastlm.reference.NAME``.

The order of the schema's arguments is the contract: every backend's ``forward`` and ``backward`` takes them in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.ops._library import Op, check_tensor

OP = "NAME"


def _fake(x, *options):
    """What forward and backward return, without values: shape, dtype and strides of their first argument."""
    return torch.empty_like(x)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return _operators.forward(x, scale)

    @staticmethod
    def backward(ctx: Any, dout):
        return _operators.backward(dout, *ctx.saved_tensors, ctx.scale), None


_operators = Op(
    OP,
    "(Tensor x, float scale) -> Tensor",
    "(Tensor dout, Tensor x, float scale) -> Tensor",
    _fake,
    _fake,
    _Function,
)


def _arguments(x: Tensor, *, scale: float = 1.0) -> tuple[torch.device, tuple[Any, ...]]:
    """Checks a public call and turns it into the schema's arguments."""
    check_tensor(x, "x", OP, required=True)
    return x.device, (x, float(scale))


def NAME(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """Says what it computes, and after whom.

    Args:
        x: any shape; float32, bfloat16 or float16 (float64 on the reference backend).
        scale: what it does.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError: naming the argument, what it was and must be.
        fastlm.backend.BackendError: a forced backend that cannot serve.
    """
    _, args = _arguments(x, scale=scale)
    out: Tensor = _operators(*args)
    return out


def _example(device: str) -> dict[str, Any]:
    return {"x": torch.empty(8, 64, device=device)}


backend.register(OP, _arguments, _example)
'''

CASES = '''"""Cases of NAME for every backend's tests: random inputs, PyTorch's own result, and the float64 truth."""

from __future__ import annotations

from dataclasses import dataclass

import fastlm
import torch
from accuracy import Result
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (37, 91)
    dtype: torch.dtype = F32
    scale: float = 0.5


def compose(x: Tensor, scale: float) -> Tensor:
    """What users of PyTorch write for it: the oracle, independent of reference/NAME.py."""
    raise NotImplementedError("NAME: write PyTorch's own composition in tests/ops/NAME_cases.py")


def draw(case: Case, generator: torch.Generator) -> dict[str, Result]:
    """One draw of ``case`` for ``accuracy.assert_as_exact_as_torch``."""
    x = torch.randn(case.shape, generator=generator).to(case.dtype)
    dout = torch.randn(case.shape, generator=generator).to(case.dtype)
    found = []
    for function, dtype in (
        (lambda x: fastlm.ops.NAME(x, scale=case.scale), case.dtype),
        (lambda x: compose(x, case.scale), case.dtype),
        (lambda x: compose(x, case.scale), torch.float64),
    ):
        leaf = x.to(dtype).requires_grad_()
        y = function(leaf)
        found.append({"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dout.to(dtype))[0]})
    ours, theirs, truth = found
    return {name: Result(ours[name], theirs[name], truth[name]) for name in ours}
'''

TEST = '''"""NAME on the backends that run here: values, gradients, tracing, bad input."""

from __future__ import annotations

import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch, violation
from NAME_cases import BF16, F16, F32, Case, compose, draw
from torch.library import opcheck

BACKENDS = ["reference"]  # add each backend with its kernel


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.backend.use(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 91), (2, 3, 129)], ids=str)
def test_as_exact_as_torch(backend, shape, dtype):
    assert_as_exact_as_torch(lambda generator: draw(Case(shape, dtype), generator))


def test_the_rule_catches_a_wrong_kernel():
    x = torch.randn(64, 64)
    right, truth = compose(x, 0.5), compose(x.double(), 0.5)
    assert violation([Result(right, right, truth)]) is None
    assert violation([Result(right * 1.001, right, truth)])


def test_opcheck(backend):
    opcheck(torch.ops.fastlm.NAME.default, (torch.randn(5, 7, requires_grad=True), 0.5))


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="x"):
        fastlm.ops.NAME(None)
'''

BENCH = '''"""NAME beside what users of PyTorch write for it.

Bytes: x read and y written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import fastlm
import torch
from fastlm.bench.harness import DTYPES, Case, Contender, pytest_cases, ratio_error
from torch import Tensor


def compose(x: Tensor) -> Tensor:
    """What users of PyTorch write for it."""
    raise NotImplementedError("NAME: write PyTorch's own composition in bench/bench_NAME.py")


def _case(rows: int, columns: int, dtype: str, device: str, smoke: bool) -> Case:
    def inputs(seed: int) -> Tensor:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        return x.to(device, DTYPES[dtype])

    contenders = (
        Contender("fastlm", lambda x: lambda: fastlm.ops.NAME(x), "ours"),
        Contender("eager", lambda x: lambda: compose(x)),
    )
    return Case(
        "NAME", f"{rows}x{columns} {dtype} forward", inputs, contenders, dtype=dtype, device=device,
        bytes=2 * rows * columns * DTYPES[dtype].itemsize, parameters={"rows": rows, "columns": columns},
        error=lambda result, x: ratio_error(result, compose(x.double())),
        tolerance=1e-5 if dtype == "float32" else 2e-2, smoke=smoke, timed=not smoke,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """A small case for the smoke pass, and those that are timed."""
    yield _case(17, 65, "float32", device, smoke=True)
    for dtype in ("float32", "bfloat16"):
        yield _case(4096, 1024, dtype, device, smoke=False)


SHORT = {"odd": (17, 65), "profile": (4096, 1024), "interpreted odd": (5, 65), "interpreted profile": (8, 128)}


def short(device: str, dtype: torch.dtype, kind: str) -> Iterator[Callable[[], Tensor]]:
    """Calls, each returning a loss, for the sanitizer and the profiler (fastlm.bench.short)."""
    x = torch.randn(SHORT[kind], device=device).to(dtype).requires_grad_()
    yield lambda: fastlm.ops.NAME(x).float().square().sum()


test_bench = pytest_cases(cases)
'''

FILES = {
    "python/fastlm/reference/NAME.py": REFERENCE,
    "python/fastlm/ops/NAME.py": OPS,
    "tests/ops/NAME_cases.py": CASES,
    "tests/ops/test_NAME.py": TEST,
    "bench/bench_NAME.py": BENCH,
}


def write(name: str, root: Path) -> list[Path]:
    """Writes the files of op ``name`` under ``root``. Raises ValueError, writing nothing, if it cannot be or is there."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"NAME is {name!r}; it must be a Python name of small letters, digits and _")
    paths = {root / path.replace("NAME", name): text.replace("NAME", name) for path, text in FILES.items()}
    for path in paths:
        if path.exists():
            raise ValueError(f"NAME is {name!r}; {path} exists already")
    for path, text in paths.items():
        path.write_text(text, encoding="utf-8")
    init = root / "python/fastlm/ops/__init__.py"
    text = init.read_text(encoding="utf-8")
    text = text.replace("\n__all__", f"from fastlm.ops.{name} import {name}\n\n__all__", 1)
    init.write_text(re.sub(r"__all__ = \[", f'__all__ = ["{name}", ', text), encoding="utf-8")
    page = root / "docs/benchmarks.md"
    mark = f"## {name}\n\n<!-- cpu-{name} -->\nNot measured.\n<!-- /cpu-{name} -->\n\n## The training step\n"
    page.write_text(page.read_text(encoding="utf-8").replace("## The training step\n", mark, 1), encoding="utf-8")
    return [*paths, init, page]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    name = parser.parse_args().name
    try:
        paths = write(name, Path(__file__).resolve().parents[1])
    except ValueError as error:
        print(f"new_op: {error}", file=sys.stderr)
        return 2
    print("wrote " + ", ".join(str(path) for path in paths))
    print(f"now: make format; make test ARGS=tests/ops/test_{name}.py says what is to be written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
