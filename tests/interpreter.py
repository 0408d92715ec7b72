"""Runs tests marked ``interpreter`` in a process of their own, with TRITON_INTERPRET=1 set before triton is imported.

Triton decides at import whether kernels are compiled or interpreted, so one process cannot do both. Tests are written
as usual; conftest.py hands the marked ones to ``redirect``, and each then runs in a child that lives as long as its
parent: it imports torch once, and has one session of pytest. Under TRITON_INTERPRET=1 they run where they are.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_child: subprocess.Popen[str] | None = None


def redirect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Makes every item marked ``interpreter`` run in the child."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    flags = ["--slow"] if config.getoption("--slow") else []
    for item in items:
        if item.get_closest_marker("interpreter"):
            item.runtest = functools.partial(_run, item.nodeid, str(config.rootpath), flags)  # type: ignore[method-assign]


def _run(node: str, root: str, flags: list[str]) -> None:
    global _child
    if _child is None or _child.poll() is not None:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        for name in [name for name in environment if name.startswith("PYTEST_")]:  # an outer pytest's own affairs
            del environment[name]
        _child = subprocess.Popen(
            [sys.executable, __file__, *flags], cwd=root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
    assert _child.stdin is not None
    assert _child.stdout is not None
    try:
        _child.stdin.write(node + "\n")
        _child.stdin.flush()
        line = _child.stdout.readline()
    except BaseException:  # a timeout or Ctrl-C: what the child answers later belongs to no test
        _child.kill()
        _child.wait()
        raise
    if not line:
        pytest.fail(f"the interpreter's process ended with exit status {_child.wait()}", pytrace=False)
    outcome, text = json.loads(line)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(f"under TRITON_INTERPRET=1:\n{text}", pytrace=False)


class _Server:
    """The child's one pytest session: it collects a file when the first of its tests is asked for, and runs one at a time."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, pytest.Item]] = {}  # by file, then by node id
        self.outcome, self.text = "missing", "the test was not found"

    def pytest_collection(self, session: pytest.Session) -> bool:
        return True  # nothing yet

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        answers = os.fdopen(os.dup(1), "w")
        with open(os.devnull, "w") as null:  # what pytest prints is no answer
            os.dup2(null.fileno(), 1)
        for line in sys.stdin:
            print(json.dumps(self._run(session, line.strip())), file=answers, flush=True)
        return True

    def _run(self, session: pytest.Session, node: str) -> tuple[str, str]:
        self.outcome, self.text = "missing", "the test was not found"
        file = node.partition("::")[0]
        if file not in self.items:
            self.items[file] = {item.nodeid: item for item in session.perform_collect([file])}
        if node in self.items[file]:
            session.config.hook.pytest_runtest_protocol(item=self.items[file][node], nextitem=None)
        return self.outcome, self.text

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcome, self.text = "failed", report.longreprtext

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcome, self.text = report.outcome, report.longreprtext
            if report.skipped and isinstance(report.longrepr, tuple):
                self.text = report.longrepr[2]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    plugins = [f"-pno:{name}" for name in ("cacheprovider", "xdist", "benchmark")]
    pytest.main(["-q", "-s", *plugins, *sys.argv[1:]], [_Server()])
