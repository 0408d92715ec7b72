"""Shared fixtures. Two threads and no leftovers of the environment, so that a run depends on nothing outside it."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("FASTLM_BACKEND", None)
# Before torch is imported: with other processes on the cores, spinning threads make every parallel region ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import interpreter
import paths
import pytest
import torch

sys.path += [str(folder) for folder in paths.FOLDERS if str(folder) not in sys.path]

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow (make test-all)")
    parser.addoption(
        "--grid-part", type=float, default=1.0, help="the share of each grid that runs, drawn by --grid-seed"
    )
    parser.addoption("--grid-seed", type=int, default=None, help="default: a new one, printed at the end")
    parser.addoption("--gpu-report", default="", help="write the outcome of tests marked gpu(op, backend) as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--slow"):
        import accuracy

        accuracy.MAX_DRAWS = accuracy.POOL
    if config.option.grid_seed is None:  # workers inherit the environment, and must collect the same tests
        drawn = str(random.SystemRandom().randrange(2**32))
        config.option.grid_seed = int(os.environ.setdefault("FASTLM_GRID_SEED", drawn))
    if config.getoption("--gpu-report"):
        config.pluginmanager.register(GpuReport(Path(config.getoption("--gpu-report"))))


class GpuReport:
    """Writes, after each test marked ``gpu(op, backend)``, how many of that op and backend passed, failed, skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, dict[str, dict[str, int]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]):
        report = yield
        marker = item.get_closest_marker("gpu")
        if marker and len(marker.args) == 2 and (report.when == "call" or report.outcome != "passed"):
            op, backend = marker.args
            counts = self.counts.setdefault(op, {}).setdefault(backend, {"passed": 0, "failed": 0, "skipped": 0})
            counts[report.outcome] += 1
            self.path.write_text(json.dumps(self.counts))
        return report


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_few_fast(items)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow (make test-all)"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("--grid-part") < 1:
        leave_out(config, items)
    interpreter.redirect(config, items)


def leave_few_fast(items: list[pytest.Item]) -> None:
    """Of the tests marked ``grid(fast=N)`` N cases stay fast, the same in every run; the others are slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        marker = item.get_closest_marker("grid")
        if marker and "fast" in marker.kwargs and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, alike in cases.items():
        marker = alike[0].get_closest_marker("grid")
        assert marker is not None
        for item in random.Random(name).sample(alike, max(len(alike) - marker.kwargs["fast"], 0)):
            item.add_marker(pytest.mark.slow)


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked ``grid`` that the seed does not draw.

    Of those marked ``grid(of=share)`` that share of the part runs, to the test: each of them is long.
    """
    part, seed = config.getoption("--grid-part"), config.getoption("--grid-seed")
    left: list[pytest.Item] = []
    long: dict[str, list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("grid"):
            if "of" in marker.kwargs:
                long.setdefault(item.nodeid.split("[")[0], []).append(item)
            elif item.get_closest_marker("slow") and random.Random(f"{seed} {item.nodeid}").random() >= part:
                left.append(item)
    for name, cases in long.items():
        marker = cases[0].get_closest_marker("grid")
        assert marker is not None
        count = max(round(len(cases) * part * marker.kwargs["of"]), 1)
        left += random.Random(f"{seed} {name}").sample(cases, len(cases) - count)
    config.hook.pytest_deselected(items=left)
    gone = set(left)
    items[:] = [item for item in items if item not in gone]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    part = config.getoption("--grid-part")
    if part < 1:
        terminalreporter.write_line(f"{part:.0%} of the grids, drawn by --grid-seed {config.getoption('--grid-seed')}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test's own randomness is fixed; accuracy.assert_as_exact_as_torch draws fresh inputs and prints their seed."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_autocast_left_open() -> Iterator[None]:
    """An autocast that a test leaves open keeps the casts of later tests' weights, which then are not what they train."""
    yield
    open_ones = torch.autocast_increment_nesting() - 1
    while torch.autocast_decrement_nesting():
        pass
    torch.clear_autocast_cache()
    assert open_ones == 0, f"{open_ones} autocasts are left open"
