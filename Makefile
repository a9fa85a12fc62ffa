# The commands of the project; `make` lists them.

VENV ?= .venv
PYTHON ?= python3
export VENV PYTHON

BIN := $(abspath $(VENV))/bin
# Tools that builds and launchers look up by name (ninja, deepspeed) come from the environment, activated or not.
export PATH := $(BIN):$(PATH)

# C++ ops live and die with the environment, as launch/ has it too.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

# Ranks of the demo: one for each GPU that torch sees; on the CPU two, or its one core.
RANKS ?= $(shell $(BIN)/python -c 'import os, torch; print(torch.cuda.device_count() or min(2, os.cpu_count() or 1))')

# Tests run beside each other, those of one file in one process.
WORKERS ?= $(shell $(BIN)/python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
BESIDE_EACH_OTHER = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-gpu test-pretended-gpu test-nightly lint ops clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make the virtual environment (VENV, PYTHON and TORCH_INDEX choose)
	@./setup.sh

demo: setup ## train on real signing, from nothing to printed scores; again: only what is missing
	@$(BIN)/python launch/doctor.py build-ops shm_comm
	@$(BIN)/python launch/prepare.py --recipe demo
	@$(BIN)/deepspeed --num_gpus $(RANKS) launch/train.py --recipe demo

test: setup lint ops ## lint, then the tests that need neither network nor GPU
	@$(BIN)/python -m pytest $(BESIDE_EACH_OTHER)

test-fast: setup ## the tests that start no process, in minutes: for work on one room
	@$(BIN)/python -m pytest --fast -q $(BESIDE_EACH_OTHER)

test-gpu: setup ops ## the tests that need a GPU, or two
	@TEST_GPUS=1 $(BIN)/python -m pytest -rs -m "gpu or gpu2"

# Another environment, for that of the project may have a build of torch for CPUs: tests/pretended_cuda/__init__.py.
test-pretended-gpu: ## the tests that need a GPU, on a pretended one (CUDA_PYTHON: Python of a CUDA build of torch)
	@$(if $(CUDA_PYTHON),,echo "error: CUDA_PYTHON is not given"; echo "hint: make test-pretended-gpu CUDA_PYTHON=PATH"; exit 2;) \
		TORCH_EXTENSIONS_DIR=$(abspath $(dir $(CUDA_PYTHON))..)/torch_extensions \
		TEST_GPUS=1 OMP_NUM_THREADS=1 $(CUDA_PYTHON) -m tests.pretended_cuda python -m pytest -rs -m "gpu or gpu2"

test-nightly: setup ops ## the tests that take long
	@$(BIN)/python -m pytest -m nightly
	@TOOLKIT_CPU_CODE=0 $(BIN)/python -m pytest -m "not gpu and not gpu2" tests/end_to_end/test_strategies.py

lint: setup ## ruff, mypy and the one-way rule between the rooms of the toolkit
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy toolkit launch
	@$(BIN)/lint-imports --no-logo

# Tests start ranks side by side; built beforehand, in one process, an op is there when two ask for it at once.
ops: setup
	@$(BIN)/python launch/doctor.py build-ops shm_comm cpu_adam async_io

clean: ## remove the environment, caches and build products; runs/ and corpora/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
