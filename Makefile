# Everything a newcomer needs:   make demo     the embedded curriculum, from nothing
#                                make test     all tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Idle OpenMP threads wait: spinning ones starve a shared machine (cropi_core/__init__.py has the figures).
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clean

demo: $(VENV)/.all  ## The curriculum on the embedded world; a second call finds everything done.
	$(BIN)/cropi run configs/demo.yaml

test: $(VENV)/.dev  ## Two processes, one thread each: faster than one with two threads, and the same results.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: $(VENV)/.dev  ## Linter, formatter, type checker, import contract.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:  ## Removes the environment and the demo's artifacts.
	rm -rf $(VENV) .cropi

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "Python 3.11 or 3.12 is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.all: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo "Installing pinned dependencies into $(VENV) (2 GB on disk, a few minutes)"
	$(PIP) --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo "Installing pinned dependencies and test tools into $(VENV) (2 GB on disk, a few minutes)"
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.all
