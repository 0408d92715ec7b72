# Everything a newcomer, a developer and CI run. Works with GNU make 3.81.
#   make train | test | test-all | lint | bench | evidence | gpu | venv | clean
# PYTHON        the interpreter that makes .venv (or, for `make gpu`, the one that is used as it is)
# TORCH_INDEX   an index to take PyTorch from, for example that of its CPU wheels (see the README)
# ARGS          passed on: make train ARGS="my.txt --steps 100", make test ARGS="-k mask"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Two test processes on two cores wait for each other at OpenMP barriers unless waiting threads sleep.
TEST_ENV := OMP_WAIT_POLICY=passive
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: train test test-all lint format bench evidence gpu venv clean

train: venv
	$(BIN)/fastlm train $(ARGS)

test: venv
	$(PYTEST) $(ARGS)

test-all: venv
	$(PYTEST) --slow $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: venv
	$(BIN)/fastlm bench $(ARGS)

# docs/remedies.md from bench/results; ARGS="--run augment" runs bench/quality_augment.py first
evidence: venv
	$(BIN)/python -m fastlm.bench.remedies $(ARGS)

gpu:
	$(PYTHON) scripts/gpu.py $(ARGS)

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt scripts/venv.sh scripts/check_machine.py $(NATIVE)
	PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" sh scripts/venv.sh
	touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
