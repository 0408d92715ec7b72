#!/bin/sh
# Makes $VENV with fastlm installed in editable form and every test tool, at the versions of constraints.txt.
# A .venv that was not finished is made again; one that was is brought up to date.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH_INDEX=${TORCH_INDEX:-}

"$PYTHON" scripts/check_machine.py "$VENV"
if [ -e "$VENV" ] && [ ! -e "$VENV/.complete" ]; then
  echo "$VENV was left half made: making it again"
  rm -rf "$VENV"
fi
if [ ! -e "$VENV" ]; then
  "$PYTHON" -m venv "$VENV"
fi
rm -f "$VENV/.complete"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
if [ -n "$TORCH_INDEX" ]; then
  pip install -q -c constraints.txt torch --index-url "$TORCH_INDEX"
else
  pip install -q -c constraints.txt torch
fi
pip install -q -c constraints.txt "scikit-build-core>=0.10" "pybind11>=2.13" ninja "cmake>=3.24"
# The compiler's own words are worth seeing when they are about a missing one; `fastlm doctor` repeats them.
PATH="$PWD/$VENV/bin:$PATH" pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
touch "$VENV/.complete"
"$VENV/bin/python" -c "
from fastlm import _native
why = _native.missing()
print('fastlm is installed in $VENV' + (': ' + why if why else ', with its compiled core'))"
