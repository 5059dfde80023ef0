# Everything a developer or a build machine runs. Needs make, and Python 3.11 or newer with pip and venv; `make` lists it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo test check format bench clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(STAMP) ## make .venv with everything installed (PYTHON=... chooses the interpreter)

# Runs again when a requirement or a pin changes. torch comes first and alone: it is the large download, and whoever
# wants another build of the same version installs that into .venv before, and keeps it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "env: Python 3.11 or newer is needed, and $(PYTHON) is not; say make env PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "env: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "env: installing torch (the large one)"
	@$(PIP) torch
	@echo "env: installing fedveil, what it needs and the development tools"
	@$(PIP) --editable '.[dev]'
	@touch $@
	@echo "env: ready in $(VENV)"

demo: $(STAMP) ## run the small example from end to end
	@$(BIN)/fedveil simulate examples/digits/run.toml --central --overwrite

test: $(STAMP) ## run the tests
	@$(BIN)/python -m pytest

check: $(STAMP) ## check format, lint and types; changes nothing
	@echo "check: format"
	@$(BIN)/ruff format --check --quiet . || { echo "check: the files above are not formatted; run make format"; exit 1; }
	@echo "check: lint"
	@$(BIN)/ruff check --quiet .
	@echo "check: types"
	@$(BIN)/mypy

format: $(STAMP) ## format the code and apply the safe fixes
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: $(STAMP) ## measure whole rounds beside the centralised limit, and the server's sum
	@$(BIN)/python -m benchmarks.compare
	@$(BIN)/python -m benchmarks.aggregate

clean: ## remove caches and builds; results in out/ and the environment stay
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
