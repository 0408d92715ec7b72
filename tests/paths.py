"""Where the tests lie. Processes that tests start import the tests' helper modules through ``python_path``."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# Helper modules and test files are imported by their bare names from any folder, so that no two have one name.
FOLDERS = [TESTS, *sorted(path for path in TESTS.iterdir() if any(path.glob("*.py")))]


def python_path() -> str:
    """A value of PYTHONPATH with which a process imports helper modules and test files by their bare names."""
    return os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
