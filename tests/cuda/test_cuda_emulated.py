"""The CUDA kernels' logic on a machine without a GPU: csrc/cuda/*.cu compiled as C++, each CUDA thread a fiber.

See tests/cuda_emulation/. What a GPU alone can show (memory order, alignment in PTX, speed) is in
test_cuda_dropout_add_norm.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import fastlm
import pytest
import torch
from accuracy import assert_as_exact_as_torch
from dropout_add_norm_cases import BF16, F16, F32, FEATURES, MIXED, Case, draw, inputs, run
from fastlm import _native, backend
from fastlm.cuda import dropout_add_norm as glue
from fastlm.reference.dropout_add_norm import dropout_mask

ROOT = Path(__file__).parents[2]
op = fastlm.ops.dropout_add_norm


def compile_emulated(folder: Path, source: Path, name: str) -> Path:
    import pybind11

    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [source, ROOT / "tests/cuda_emulation", pybind11.get_include(), sysconfig.get_path("include")]
    command = [
        *("g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"),
        *("-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-Wno-unknown-pragmas", "-DFASTLM_EMULATION"),
        f"-DFASTLM_EMULATED={name}",
        *(f"-I{folder}" for folder in includes),
        *("-x", "c++", str(ROOT / "tests/cuda_emulation/module.cpp"), "-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def load(library: Path):
    # A name of its own for each: pybind11 hands out a module that it knows by name again.
    spec = importlib.util.spec_from_file_location(library.name.split(".")[0], library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    pytest.importorskip("pybind11")
    return load(compile_emulated(tmp_path_factory.mktemp("emulated"), ROOT / "csrc", "emulated"))


class _Native:
    """``fastlm._native`` with the emulated launchers as its compiled core."""

    def __init__(self, core) -> None:
        self._C = core

    def missing_cuda(self) -> str:
        return ""

    def __getattr__(self, name: str):
        return getattr(_native, name)


@pytest.fixture
def device(emulated, monkeypatch):
    """The cuda backend serves CPU tensors, under the name "cpu", on the emulated device."""
    emulated.configure(9, False, False)
    monkeypatch.setattr(glue, "_native", _Native(emulated))
    monkeypatch.setattr(glue, "_place", lambda t: (0, 0))
    monkeypatch.setattr(glue, "_capability", lambda device: (9, 0))
    real = backend.module
    monkeypatch.setattr(backend, "module", lambda op, name: (glue, "") if name == "cpu" else real(op, name))
    with backend.use("cpu"):
        yield emulated


def check(case: Case) -> None:
    assert_as_exact_as_torch(lambda generator: draw(case, generator))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_features(device, feature, dtype):
    check(replace(feature, shape=(5, 1368), dtype=dtype))


@pytest.mark.parametrize("case", [*MIXED, Case(dtype=F16, p=0.1), Case(dtype=F16, parameters=F32, norm="rms", p=0.2),
                                  Case(dtype=BF16, residual_dtype=F32, norm=None, p=0.1)], ids=str)  # fmt: skip
def test_mixed_dtypes_aligned_and_not(device, case):
    check(replace(case, shape=(3, 2048)))
    check(replace(case, shape=(3, 2047)))


RICH = Case(p=0.2, layerscale=True, rowscale=True)


@pytest.mark.parametrize("shape", [(24, 72), (70, 257), (2, 3, 600)], ids=str)
def test_narrow_rows_share_a_block(device, shape):
    check(replace(RICH, shape=shape))
    check(replace(RICH, shape=shape, dtype=BF16, norm="rms", bias=False))


@pytest.mark.grid(fast=2)
@pytest.mark.parametrize("columns,capability,clusters", [(8192, 9, 0), (8200, 9, 2), (20001, 9, 2), (65536, 9, 2),
                                                         (65544, 9, 0), (8200, 8, 0), (9001, 8, 0)])  # fmt: skip
def test_wide_rows_take_a_cluster_or_several_passes(device, columns, capability, clusters):
    device.configure(capability, False, False)
    case = replace(RICH, shape=(1 if columns > 60000 else 2, columns), dtype=BF16 if columns == 65536 else F32)
    check(case)
    assert device.launches() == (3, clusters)


@pytest.mark.parametrize("columns", [1, 8, 13, 264, 9000])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_mask_is_the_reference_mask(device, columns, dtype):
    seed, rows = torch.tensor(-1234567890123456789), 5
    for offset in (None, torch.tensor(2**32 - 2), torch.tensor([5, 2**40, 0, -1, 7])):
        z = op(torch.ones(rows, columns, dtype=dtype), norm=None, p=0.4, seed=seed, offset=offset)
        assert torch.equal(z != 0, dropout_mask(rows, columns, seed, offset, 0.4))


def test_order_of_threads_and_strides_change_no_bit(device):
    for case in (replace(RICH, shape=(2, 5, 1000)), replace(RICH, shape=(2, 1, 9000), dtype=BF16),
                 replace(RICH, shape=(3, 4, 96), dtype=BF16)):  # fmt: skip
        tensors = inputs(case, torch.Generator().manual_seed(1))
        device.configure(9, False, False)
        expected = run(case, tensors)
        device.configure(9, True, False)
        views = {
            "reversed threads": lambda t: t,
            "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            "columns first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
            "unaligned": lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].reshape(t.shape),
        }
        for name, view in views.items():
            strided = {k: view(v) if v.dim() == 3 else v for k, v in tensors.items()}
            got = run(case, strided)
            for key, value in expected.items():
                assert torch.equal(got[key], value), (str(case), name, key)


def test_y_is_the_norm_of_the_residual_it_returns(device):
    for dtype in (F32, BF16):
        x, residual = torch.randn(2, 5, 1032).to(dtype).unbind()
        weight, bias = torch.randn(2, 1032).unbind()
        y, z = op(x, residual, weight, bias, p=0.2, seed=3)
        assert torch.equal(y, fastlm.ops.norm(z, weight, bias))


def test_rows_in_blocks_of_a_fixed_size(device):
    """A row's gradients do not depend on the rows beside it, and sums over many rows use several parts."""
    parts = device.dropout_add_norm_parts_cuda
    assert [parts(n) for n in (0, 1, 4, 5, 1024, 8192, 32768, 10**6, 10**9)][:5] == [0, 1, 1, 2, 256]
    assert all(parts(n) <= 1024 for n in (1025, 8193, 32769, 10**6 + 1, 2**40))
    x, dy = torch.randn(2100, 8), torch.randint(-8, 8, (2100, 8)).float()
    bias = torch.zeros(8, requires_grad=True)
    op(x, None, None, bias, return_residual=False).backward(dy)
    assert torch.equal(bias.grad, dy.sum(0))


def test_only_what_is_asked_for(device):
    tensors = inputs(replace(RICH, shape=(6, 40)), torch.Generator().manual_seed(2))
    full = run(replace(RICH, shape=(6, 40)), tensors)
    for wanted in ("x", "residual", "weight", "bias", "layerscale"):
        t = {k: v.detach().clone() for k, v in tensors.items()}
        t[wanted].requires_grad_()
        y, z = op(t["x"], t["residual"], t["weight"], t["bias"], p=0.2, layerscale=t["layerscale"],
                  rowscale=t["rowscale"], seed=t["seed"])  # fmt: skip
        outputs = (y,) if wanted in ("weight", "bias") else (y, z)
        got = torch.autograd.grad(outputs, t[wanted], [t["dy"], t["dz"]][: len(outputs)])[0]
        assert torch.equal(got, full[f"d{wanted}"]), wanted
        if wanted == "residual":
            only_z = op(t["x"], t["residual"], t["weight"], p=0.2, seed=t["seed"])[1]
            assert torch.equal(torch.autograd.grad(only_z, t[wanted], t["dz"])[0], t["dz"])


def test_outputs_are_written_whole_and_nothing_beside_them(device, monkeypatch):
    """Every output stands in a larger tensor of 7s, which must stay as they are."""
    guards = []

    def guarded(self, size, dtype=None):
        shape = (size,) if isinstance(size, int) else tuple(size)
        count = torch.Size(shape).numel()
        whole = self.new_full((count + 64,), 7.0, dtype=dtype)
        whole[32 : 32 + count] = float("nan")
        guards.append((whole, count))
        return whole[32 : 32 + count].view(shape)

    for case in (
        replace(RICH, shape=(5, 33)),
        replace(RICH, shape=(5, 520), dtype=BF16),
        replace(RICH, shape=(2, 9001)),
    ):
        for capability in (8, 9):
            device.configure(capability, False, False)
            tensors = inputs(case, torch.Generator().manual_seed(3))
            with monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "new_empty", guarded)
                run(case, tensors)
    assert len(guards) > 30
    for whole, count in guards:
        assert (whole[:32] == 7).all()
        assert (whole[32 + count :] == 7).all()
        assert whole.isfinite().all()


def test_no_rows(device):
    case = replace(RICH, shape=(0, 24))
    got = run(case, inputs(case, torch.Generator().manual_seed(0)))
    assert got["y"].shape == (0, 24)
    assert all((got[f"d{name}"] == 0).all() for name in ("weight", "bias", "layerscale"))


def test_failures_are_sentences(device):
    device.configure(9, False, True)
    with pytest.raises(RuntimeError, match="fastlm: dropout_add_norm forward on cuda:0 failed: an emulated failure"):
        op(torch.randn(2, 8))
    absent = (0, 0, 0, 0, 0, 0)
    arguments = [absent] * 8 + [False, 0.0, 1e-5, 0.0, 0] + [absent] * 4 + [0, 0]
    with pytest.raises(ValueError, match="x has no memory"):
        device.dropout_add_norm_forward_cuda((1, 1, 4, 8), *arguments)
    with pytest.raises(ValueError, match="columns"):
        device.dropout_add_norm_forward_cuda((1, 1, 4, 2**31), *arguments)
    x = torch.zeros(4, 8, dtype=torch.float64)
    arguments[0] = arguments[13] = arguments[15] = arguments[16] = (x.data_ptr(), 0, 0, 0, 8, 1)
    arguments[0] = (x.data_ptr(), 5, 0, 0, 8, 1)
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        device.dropout_add_norm_forward_cuda((1, 1, 4, 8), *arguments)


def test_which_says_when_a_slower_path_serves(device):
    which = lambda x: backend.which("dropout_add_norm", x).reason
    assert which(torch.randn(4, 64)) == "forced"
    assert "stride 4" in which(torch.randn(64, 4).t())
    assert "multiples of 16 bytes" in which(torch.randn(4, 65)[:, :64])
    assert "63 columns are no multiple of 8" in which(torch.randn(4, 63))
    assert "holds 65536" in which(torch.randn(1, 70000))
    with pytest.raises(backend.BackendError, match="the cuda kernel takes float32, bfloat16 and float16; y is float64"):
        op(torch.randn(4, 8).double())


@pytest.mark.parametrize("dtype,encode", [(BF16, "to_bfloat16"), (F16, "to_float16")])
def test_rounding_is_to_nearest_even(emulated, dtype, encode):
    bits = torch.cat((torch.arange(0, 2**32, 1048573), torch.arange(0x33000000, 0x33900000, 4099),
                      torch.tensor([0x477FF000, 0x477FEFFF, 0x47800000, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000,
                                    0x33000000, 0x33000001, 0x38800000, 0x387FFFFF, 0x7F7FFFFF])))  # fmt: skip
    values = bits.to(torch.int64).to(torch.uint32).view(F32)
    expected = values.to(dtype)
    got = torch.tensor([getattr(emulated, encode)(v) for v in values.tolist()]).to(torch.uint16).view(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    keep = ~expected.isnan()
    assert torch.equal(got[keep].view(torch.int16), expected[keep].view(torch.int16))
    if dtype == F16:
        every = torch.arange(65536)
        back = torch.tensor([emulated.from_float16(i) for i in every.tolist()])
        assert torch.equal(back.nan_to_num(3.0), every.to(torch.uint16).view(F16).float().nan_to_num(3.0))


MUTANTS = {
    "a barrier less": ("if (me.lane == 0) mine[0] = m.count, mine[1] = m.mean, mine[2] = m.m2;\n    __syncthreads();",
                       "if (me.lane == 0) mine[0] = m.count, mine[1] = m.mean, mine[2] = m.m2;"),
    "a group forgotten": ("for (int g = 1; g < groups; ++g)", "for (int g = 2; g < groups; ++g)"),
    "a barrier in a branch": ("if (lane == 0) mine[0] = s.first, mine[1] = s.second;\n  __syncthreads();",
                              "if (lane == 0) {\n mine[0] = s.first, mine[1] = s.second;\n  __syncthreads();\n }"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_emulation_finds_a_wrong_kernel(device, monkeypatch, tmp_path, name):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    right, wrong = MUTANTS[name]
    texts = {path: path.read_text() for path in (tmp_path / "csrc/cuda").glob("dropout_add_norm*")}
    assert sum(text.count(right) for text in texts.values()) == 1
    for path, text in texts.items():
        path.write_text(text.replace(right, wrong))
    core = load(compile_emulated(tmp_path, tmp_path / "csrc", "emulated_" + name.replace(" ", "_")))
    monkeypatch.setattr(glue, "_native", _Native(core))
    with pytest.raises((AssertionError, RuntimeError)):
        check(replace(RICH, shape=(40, 1368)))
