"""Every Triton kernel in every configuration, compiled without a GPU: no spills, tensor cores where they are promised.

The default tests compile what is new: a kernel whose source and options are those of committed figures
(bench/results/offline.json) is taken for them, and the slow tests compile all. Differences from the committed figures are
shown as warnings for the same triton and ptxas;
``python -m fastlm.bench.offline --write bench/results/offline.json`` takes them over.
"""

from __future__ import annotations

import importlib
import json
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
from fastlm.bench import offline
from fastlm.kernels import table

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "offline.json"
PARTS = 8  # so that two test workers share the compiling


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, dict]]:
    """The committed figures of this triton and ptxas, by case and architecture."""
    return json.loads(RESULTS.read_text(encoding="utf-8")).get(offline.key(), {}) if RESULTS.exists() else {}


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(request, stored, arch, part):
    slow = request.config.getoption("--slow")
    cases = [case for case in offline.cases() if case.arch == arch and (slow or not case.thorough)][part::PARTS]
    faults = []
    for case in cases:
        old = dict(stored.get(case.name, {}).get(f"sm_{arch}", {}))
        known = old.pop("of", None) == offline.digest(case)
        figures = offline.Figures(**old) if known and not slow else offline.compile_case(case)[0]
        faults += offline.faults(case, figures)
        if asdict(figures) != old:
            warnings.warn(f"offline figures changed: {case.name} sm_{arch}: {old or 'new'} -> {figures}", stacklevel=1)
    assert not faults, "\n".join(faults)


def test_a_digest_is_that_of_what_a_kernel_is_made_of(monkeypatch):
    case = next(case for case in offline.cases() if case.kernel.__name__ == "forward_kernel")
    assert offline.digest(case) == offline.digest(replace(case, programs=1, bytes_moved=1))
    for other in (
        replace(case, arch=80 if case.arch == 90 else 90),
        replace(case, constexprs={**case.constexprs, "ROWS": 3}),
        replace(case, options={**case.options, "num_warps": 32}),
        replace(case, signature={**case.signature, "x_ptr": "*fp64"}),
    ):
        assert offline.digest(other) != offline.digest(case)
    read = {}
    offline._sources(case.kernel, read)
    called = [name for name in read if name.startswith("fastlm.kernels._common.")]
    assert called, "it calls what lies in another file"
    before = offline.digest(case)
    helper = getattr(importlib.import_module("fastlm.kernels._common"), called[0].split()[0].rpartition(".")[2])
    monkeypatch.setattr(helper, "_src", "changed")
    assert offline.digest(case) != before


def test_kernels_that_are_gone_from_the_committed_table_are_shown(stored):
    for name in gone(stored, {case.name for case in offline.cases()}):
        warnings.warn(f"offline figures of {name} are committed, and no such kernel is compiled now", stacklevel=1)


def gone(stored, names):
    return sorted(stored.keys() - names)


def test_a_kernel_that_is_gone_is_noticed():
    names = {case.name for case in offline.cases()}
    assert gone(dict.fromkeys([*names, "an old one"]), names) == ["an old one"]


@pytest.mark.parametrize("arch", [80, 90])
def test_the_default_tests_compile_each_kernel_in_one_call_at_least(arch):
    cases = [case for case in offline.cases() if case.arch == arch]
    kernels = {(case.kernel.__module__, case.kernel.__name__) for case in cases}
    light = {(case.kernel.__module__, case.kernel.__name__) for case in cases if not case.thorough}
    assert kernels == light
    assert {name for _, name in kernels} >= {"_forward_kernel", "_bias_kernel", "_sum_kernel", "_rotary_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_compile_for_newer_chips(part):
    """Configurations are not planned for them: what spills or wants too much shared memory there is shown."""
    cases = [case for case in offline.cases(newer=True) if case.arch in offline.NEWER and not case.thorough]
    for case in cases[part::PARTS]:
        figures, _ = offline.compile_case(case)
        for fault in offline.faults(case, figures):
            warnings.warn(fault, stacklevel=1)


def test_every_rule_of_the_table_is_compiled():
    assert list(offline.cases())
    assert table.unreached() == []


def test_a_spill_and_a_missing_tensor_core_are_faults():
    case = next(case for case in offline.cases() if not case.tensor_cores)
    good = offline.Figures(registers=64, spill_bytes=0, shared=0, tensor_cores="")
    assert offline.faults(case, good) == []
    assert "spills 8 bytes" in offline.faults(case, replace(good, spill_bytes=8))[0]
    assert "no tensor core" in offline.faults(replace(case, tensor_cores=True), good)[0]
    most = offline.MACHINE[case.arch]["shared"] - 1024
    assert offline.faults(case, replace(good, shared=most)) == []
    assert f"wants {most + 1} bytes of shared memory" in offline.faults(case, replace(good, shared=most + 1))[0]
    before = {"k": {"sm_90": asdict(good)}}
    assert offline.changes(before, before) == []
    assert "-> gone" in offline.changes(before, {})[0]


def test_the_compiler_does_report_spills():
    """A check that cannot see a spill would pass everything: 8,192 live values do not fit into one warp."""
    wide = next(case for case in offline.cases() if "8192" in case.name and case.options["num_warps"] == 16)
    figures, _ = offline.compile_case(replace(wide, options={**wide.options, "num_warps": 1}))
    assert figures.spill_bytes > 0


def test_the_static_model_counts_programs_by_what_they_hold():
    case = replace(next(iter(offline.cases())), arch=90, options={"num_warps": 4, "num_stages": 1}, programs=1320,
                   bytes_moved=48 * 10**6, flops=10**6)  # fmt: skip
    light = offline.predict(case, offline.Figures(32, 0, 0, ""))
    assert (light.occupancy, light.bound, light.call_us) == (1.0, "bytes", 10.0)
    assert offline.predict(case, offline.Figures(128, 0, 0, "")).occupancy == 0.25
    assert offline.predict(case, offline.Figures(32, 0, 100 * 1024, "")).occupancy == 0.125


def test_the_static_model_takes_the_rate_of_the_units_that_compute():
    case = replace(next(iter(offline.cases())), arch=90, options={"num_warps": 4, "num_stages": 1}, programs=1320,
                   bytes_moved=1, flops=989 * 10**9)  # fmt: skip
    figures = offline.Figures(32, 0, 0, "wgmma")
    assert offline.predict(replace(case, call_on_tensor_cores=True), figures).call_us == 1000.0
    assert offline.predict(replace(case, call_on_tensor_cores=False), figures).call_us == round(989e9 / 67e12 * 1e6, 2)


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_philox_runs_once_for_eight_elements(kernel):
    """A call is 14 multiplications to 64 bits, less what the first rounds share; once an element it would be 112."""
    name = f"layer 16384x4096 bf16: {kernel}"
    case = next(case for case in offline.cases() if case.name.endswith(name) and case.arch == 90)
    _, ptx = offline.compile_case(case)
    elements = case.constexprs["ROWS"] * case.constexprs["COLUMNS"] // (32 * case.options["num_warps"])
    multiplications = len(re.findall(r"mul\.lo\.s32 .*-(?:766435501|845247145);", ptx))
    assert elements // 8 * 7 <= multiplications <= elements // 8 * 14


def test_the_machine_code_moves_whole_vectors_and_draws_eight_elements_a_call():
    case = next(
        c for c in offline.cases() if c.arch == 90 and c.name.endswith("forward layer 16384x4096 bf16: forward_kernel")
    )
    counts = offline.sass(case)
    elements = case.constexprs["ROWS"] * case.constexprs["COLUMNS"] // (32 * case.options["num_warps"])
    vectors = elements * 2 // 16  # of 128 bits a tensor
    assert counts["load 128"] >= 4 * vectors  # x, residual, weight, bias
    assert counts["store 128"] == 2 * vectors  # y, z
    assert counts["load less"] == counts["local"] == 0
    assert elements // 8 * 14 <= counts["wide IMAD"] <= elements // 8 * 14 + 16  # and some addresses
