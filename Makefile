# `make` lists the targets. Everything runs in .venv, which is made from the requirements on first use.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

# Stamps, so that pip runs again only when the requirements change.
$(VENV)/.installed: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make virtual environments; install it (Debian: apt install python3-venv)" >&2; \
	  rm -rf $(VENV); exit 2; }
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	@touch $@

install: $(VENV)/.installed ## make .venv and install what the project needs

demo: $(VENV)/.installed ## train, test and segment on built-in data: a few minutes on a CPU
	$(BIN)/python -m benchmarks.demo

test: $(VENV)/.installed-tests ## run the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-tests ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(VENV)/.installed-tests ## format the code
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove caches, not runs
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
