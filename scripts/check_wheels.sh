#!/usr/bin/env bash
# Builds what users install and installs each into an empty folder: an isolated wheel from the sdist (with CUDA where nvcc
# is), the pure-Python wheel, and an installation on a machine without a compiler. Imports each and runs a kernel.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${VENV:=.venv} in /*) ;; *) VENV=$PWD/$VENV ;; esac
python=$VENV/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1

check() {  # check FOLDER EXPRESSION: fastlm installed in FOLDER must satisfy it
  (cd "$work" && PYTHONPATH=$1 "$python" -c "
import sys
# the environment's own fastlm is editable and would come first
sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__]
import torch, fastlm
from fastlm import _native
assert fastlm.__file__.startswith('$1'), fastlm.__file__
x = torch.randn(8, 32)
y = fastlm.ops.norm(x)
assert torch.allclose(y, torch.nn.functional.layer_norm(x, (32,)), atol=1e-5)
assert $2, (_native.missing(), _native._C and _native._C.cuda_archs())
print('ok:', fastlm.backend.which('dropout_add_norm', x))")
}

echo "--- sdist"
"$python" -m pip install -q build
"$python" -m build --sdist --no-isolation -o "$work/sdist" . >/dev/null
cuda=OFF
if command -v nvcc >/dev/null; then cuda=ON; fi
echo "--- wheel from the sdist, isolated, FASTLM_CUDA=$cuda"
FASTLM_CUDA=$cuda FASTLM_NATIVE=ON "$python" -m pip wheel -q --no-deps -w "$work/native" "$work"/sdist/*.tar.gz
"$python" -m pip install -q --no-deps --target "$work/a" "$work"/native/*.whl
if [ "$cuda" = ON ]; then
  # counting devices asks the driver: on a machine without one that must say 0, not fail
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  check "$work/a" "not _native.missing() and _native._C.cuda_archs() and _native._C.cuda_device_count() == $gpus"
else
  check "$work/a" "not _native.missing() and not _native._C.cuda_archs()"
fi
echo "--- pure Python: FASTLM_NATIVE=OFF"
FASTLM_NATIVE=OFF "$python" -m pip wheel -q --no-deps -w "$work/pure" .
ls "$work/pure"/*-py3-none-any.whl
"$python" -m pip install -q --no-deps --target "$work/b" "$work"/pure/*.whl
check "$work/b" "'compiled core' in _native.missing()"
echo "--- no compiler on the machine"
CXX=/nonexistent/c++ "$python" -m pip wheel -q --no-deps -w "$work/none" .
"$python" -m pip install -q --no-deps --target "$work/c" "$work"/none/*.whl
check "$work/c" "'compiled core' in _native.missing()"
if CXX=/nonexistent/c++ FASTLM_NATIVE=ON "$python" -m pip wheel -q --no-deps -w "$work/no" . 2>/dev/null; then
  echo "FASTLM_NATIVE=ON must fail without a compiler"; exit 1
fi
if [ "$cuda" = ON ]; then
  echo "wheels are good, with CUDA kernels, without native code and without a compiler"
else
  echo "wheels are good, without native code and without a compiler; NOT with CUDA kernels: there is no nvcc here"
fi
