"""fastlm doctor and the checks before installation: what they print for machines that lack something."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import fastlm
import pytest
import torch
from fastlm import _native, backend
from fastlm.bench.sources import checkout
from fastlm.cli import doctor


def test_report_names_every_op_and_why_each_backend_does_not_run(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for op in backend.ops():
        section = text[text.index(f"fastlm.ops.{op}") :].split("\nfastlm.ops.")[0]
        for name in backend.BACKENDS:
            assert name in section
    assert f"fastlm             {fastlm.__version__}" in text
    if not _native.missing():
        assert _native._C.cpu_isa() in text


def test_a_capped_instruction_set_is_told():
    if _native.missing():
        pytest.skip("no compiled core")
    code = "from fastlm.cli import doctor; doctor.main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"FASTLM_CPU_ISA": "portable"})  # fmt: skip
    assert "portable" in done.stdout
    if _native._C.cpu_isa() != "portable":
        assert "capped by FASTLM_CPU_ISA=portable" in done.stdout
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env=os.environ | {"FASTLM_CPU_ISA": "sse9"})  # fmt: skip
    assert done.returncode != 0
    assert "FASTLM_CPU_ISA is 'sse9'; it must be portable, avx2, avx512 or amx" in done.stderr


def _check(env, *args):
    script = checkout() / "scripts/check_machine.py"
    return subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, check=False, env=env)


def test_check_machine_gives_the_remedy(tmp_path):
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "FASTLM_NATIVE")}
    clean["TORCH_INDEX"] = "an index"  # no word about the size of CUDA builds
    empty = clean | {"PATH": str(tmp_path)}
    done = _check(empty, str(tmp_path / ".venv"))
    assert done.returncode == 0
    assert "note: no C++ compiler was found" in done.stderr
    done = _check(empty | {"FASTLM_NATIVE": "ON"}, str(tmp_path / ".venv"))
    assert done.returncode == 1
    assert "apt-get install g++" in done.stderr
    assert _check(clean | {"FASTLM_NATIVE": "OFF", "PATH": str(tmp_path)}, str(tmp_path / ".venv")).stderr == ""


def test_a_gpu_runs_triton_first_and_the_report_says_where_its_proof_is(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_support", lambda op, name, direction, device, args: backend.YES)
    assert all(backend.choose(op, "forward", torch.device("cuda"), ()).backend == "triton" for op in backend.ops())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "X100")
    monkeypatch.setattr(backend, "ops", lambda: ())
    assert ("verified", "`fastlm bench --status` says which kernels have passed their tests on a GPU") in dict(
        doctor.report()
    )["GPUs"]


def test_check_machine_tells_what_a_small_disk_holds(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("check_machine", checkout() / "scripts/check_machine.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    monkeypatch.setattr(check.sys, "platform", "linux")
    monkeypatch.delenv("TORCH_INDEX", raising=False)

    def told(gigabytes):
        usage = type("Usage", (), {"free": gigabytes * 1e9})
        monkeypatch.setattr(check.shutil, "disk_usage", lambda folder: usage)
        return [(fatal, text) for text, fatal in check.problems(str(tmp_path / ".venv")) if "GB free" in text]

    ((fatal, text),) = told(2)
    assert fatal
    assert "needs 3 GB" in text
    ((fatal, text),) = told(5)
    assert not fatal
    assert "TORCH_INDEX" in text
    assert not told(20)
    monkeypatch.setenv("TORCH_INDEX", "an index")
    assert not told(5)
