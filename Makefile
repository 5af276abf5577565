# make demo   the main job on a small real model, from nothing to a report
# make test   the tests
# Both set up .venv first; a second call finds it ready. PYTHON=/path/to/python chooses the interpreter.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs
JOBS ?= 2
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off
SUITABLE := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c '$(SUITABLE)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: help setup demo test test-triton lint types format bench clean

help:
	@echo 'make demo    set up, then run the main job on SmolLM2-135M-Instruct (about 10 minutes) and write a report'
	@echo 'make test    set up, then run the tests (at most 10 minutes)'
	@echo 'make test-triton    the GPU kernels through the interpreter of Triton, which is installed for it (290 MB)'
	@echo 'make lint    ruff: style and formatting        make format  let ruff mend both'
	@echo 'make types   pyright on src                    make bench   the benchmarks, as ratios'
	@echo 'make setup   only set up .venv                 make clean   remove .venv and caches; runs/ is kept'

# Two stamps, so that the demo does not wait for the developer's tools. Torch comes first and by its exact version:
# where a package index offers a build for this machine (CPU only, say), that one is taken and then kept.
$(VENV)/.ready: pyproject.toml constraints.txt
	@if [ -z '$(PYTHON)' ] || ! '$(PYTHON)' -c '$(SUITABLE)' 2>/dev/null; then \
		echo 'Unweave needs Python 3.11 or newer, and $(if $(PYTHON),"$(PYTHON)" is not one,none was found).' >&2; \
		echo 'Install one, or name it: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11' >&2; exit 1; fi
	@echo "Setting up $(VENV) with $$('$(PYTHON)' --version) (once; torch is a download of a few hundred MB) ..."
	@'$(PYTHON)' -m venv $(VENV) || { \
		echo 'Python could not make a virtual environment. On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@$(PIP) -q "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -q -c constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo 'Adding the tools for tests and checks (once) ...'
	@$(PIP) -q -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready-dev

demo: $(VENV)/.ready
	@$(BIN)/unweave demo --runs $(RUNS)

# One thread per worker: on few cores more threads only fight one another.
test: $(VENV)/.ready-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

# The interpreter runs on CPUs; it must be asked for before Triton is first imported.
test-triton: $(VENV)/.ready-dev
	@$(PIP) -q -c constraints.txt -e '.[gpu]'
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/sae/interpreted_triton.py

lint: $(VENV)/.ready-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.ready-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.ready-dev
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.ready-dev
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
