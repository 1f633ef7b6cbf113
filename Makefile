# `make` lists the targets. Everything runs in .venv, which is made from the requirements on first use.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test bench lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

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

# The newest run of config.json; expanded only when a recipe runs.
RUN = $(shell ls -td saved/UNet_Shapes/*/*/*/ | head -n 1)

demo: $(VENV)/.installed ## train, test and segment on built-in data: a few minutes on a CPU
	$(BIN)/python train.py --config config.json
	@$(MAKE) --no-print-directory demo-show

.PHONY: demo-show
demo-show:
	$(BIN)/python test.py -r $(RUN)best_model.pth -p all
	$(BIN)/python -m dataloaders.shapes --out saved/demo --n 12 --size 128
	$(BIN)/python inference.py --model $(RUN)best_model.pth --images saved/demo/VOCdevkit/VOC2012/JPEGImages \
	  --output saved/demo/masks --mode single --overlay
	@echo
	@echo "masks and overlays : saved/demo/masks"
	@echo "comparison         : $(RUN)results.json, per_image.csv, report.html"
	@echo "TensorBoard        : $(BIN)/tensorboard --logdir saved"

# How many processes run the tests; auto: one per core, fewer if there is little memory.
WORKERS ?= auto

test: $(VENV)/.installed-tests ## run the whole test suite on all cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

$(VENV)/.installed-benchmarks: $(VENV)/.installed benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet -r benchmarks/requirements.txt
	@touch $@

bench: $(VENV)/.installed-benchmarks ## time every part and its peers, write docs/benchmarks.md: a few minutes
	$(BIN)/python -m benchmarks.page

lint: $(VENV)/.installed-tests ## check style, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-tests ## format the code
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove caches, but keep runs
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
