# The two commands: `make demo` and `make test`. Each needs Python 3.11 or later with venv, and
# make; everything else is installed into .venv at the versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Byte-compiling all of torch at install costs more than compiling what is imported, once.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet --no-compile
INSTALL := $(PIP) --no-build-isolation --constraint constraints.txt --editable

# Everything ships with the repository: nothing is fetched while the commands run.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo real test slow check fmt organism readme docs browser clients serving mutants clean

help: ## List the commands.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A change of the dependencies makes the environment anew, so that none outlives its removal.
$(VENV)/.made: pyproject.toml constraints.txt
	@echo "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --constraint constraints.txt hatchling
	@touch $@

$(VENV)/.runtime: $(VENV)/.made
	@echo "Installing safe-decode (the first time takes a minute or two)"
	@$(INSTALL) .
	@touch $@

$(VENV)/.tests: $(VENV)/.runtime
	@echo "Installing what the tests need"
	@$(INSTALL) '.[tests]'
	@touch $@

$(VENV)/.check: $(VENV)/.tests
	@echo "Installing the checkers"
	@$(INSTALL) '.[check]'
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	@echo "Installing what the documentation needs"
	@$(INSTALL) '.[docs]'
	@touch $@

demo: $(VENV)/.runtime ## Show the main job: a model led into harm, noticed, turned to a refusal.
	@$(BIN)/safe-decode demo

# The model is kept outside the repository, in ~/.cache/safe-decode.
real: $(VENV)/.runtime ## The same on a real chat model of 0.5 B parameters (491 MB, fetched once).
	@$(INSTALL) '.[gguf]'
	@HF_HUB_OFFLINE=0 $(BIN)/safe-decode fetch qwen2.5-coder-0.5b-instruct
	@$(BIN)/safe-decode demo --model qwen2.5-coder-0.5b-instruct

test: $(VENV)/.tests ## Run the default tests (ARGS=... are passed to pytest).
	@$(BIN)/python -m pytest -n 2 $(ARGS)

slow: $(VENV)/.tests ## Run the slow tests too.
	@$(BIN)/python -m pytest -m "not reference and not browser and not clients and not vllm" $(ARGS)

browser: $(VENV)/.tests ## Test the page in a real Chromium, which must be installed.
	@$(INSTALL) '.[browser,tests]'
	@$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

# LiteLLM's pins clash with ours: it gets an environment of its own and talks HTTP.
clients: $(VENV)/.tests ## Test the server through vendors' own clients.
	@$(INSTALL) '.[clients,tests]'
	@$(BIN)/python -m pytest -m clients tests/clients/test_clients.py $(ARGS)
	@test -x $(VENV)/litellm/bin/python || $(BIN)/python -m venv $(VENV)/litellm
	@$(VENV)/litellm/bin/python -m pip --disable-pip-version-check --no-input install --quiet litellm pytest
	@SAFE_DECODE_PYTHON=$(abspath $(BIN)/python) $(VENV)/litellm/bin/python -m pytest \
		--confcutdir=tests/clients -m clients tests/clients/test_litellm.py $(ARGS)

serving: $(VENV)/.runtime ## Measure the server (some forty minutes; one question: ARGS=crowd).
	@$(INSTALL) '.[serving,fuzz]'
	@$(BIN)/python -m benchmarks.serving $(ARGS)

mutants: $(VENV)/.tests ## Plant faults and count those that tests notice (an hour or two; one module: ARGS=monitor).
	@$(BIN)/python -m benchmarks.mutants $(ARGS)

check: $(VENV)/.check ## Check format, lint, types and layers.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

fmt: $(VENV)/.check ## Format the code and repair what can be repaired.
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

organism: $(VENV)/.runtime ## Retrain the embedded pair and its bundle.
	@$(BIN)/python -m probes.organism

readme: $(VENV)/.tests ## Fill the generated blocks of README and docs.
	@$(BIN)/python -m benchmarks.docs.readme

docs: $(VENV)/.docs ## Build the documentation site into build/site; any warning is an error.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove the environment and the caches.
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
