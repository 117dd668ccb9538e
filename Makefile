# Every target that needs Python makes .venv first, from the lock files.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p scripts/check_python.py >/dev/null 2>&1 && echo $$p && break; done)
ifeq ($(strip $(PYTHON)),)
PYTHON := python3
endif
VENV := .venv
PIP := $(VENV)/bin/pip install --disable-pip-version-check --progress-bar on
RUN := $(VENV)/bin/python
export ORT_DISABLE_TELEMETRY := 1
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-full lint load models tools clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

# What serving needs, about 250 MB to download.
$(VENV)/.serving: requirements.lock requirements-nodeps.lock scripts/check_python.py
	@$(PYTHON) scripts/check_python.py
	@echo "Installing what serving needs into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps -r requirements-nodeps.lock
	@touch $@

# What exporting and training models, tests and checks need on top; torch is by far the largest.
$(VENV)/.tools: $(VENV)/.serving requirements-dev.lock
	@echo "Installing what tests, checks and model making need into $(VENV) ..."
	@$(PIP) -r requirements.lock -r requirements-dev.lock
	@touch $@

# perf_analyzer, beside the environment: tritonclient 2.51 is the newest whose perf_analyzer runs with glibc 2.36.
$(VENV)/.perf_analyzer: $(VENV)/.serving requirements-perf.lock
	@echo "Installing perf_analyzer into $(VENV)/perf_analyzer ..."
	@$(PIP) --no-deps --upgrade --target $(VENV)/perf_analyzer -r requirements-perf.lock
	@touch $@

tools: $(VENV)/.tools $(VENV)/.perf_analyzer ## Install what exporting, training and measuring models needs

models: $(VENV)/.serving ## Build the models that are not in git (idempotent)
	@$(RUN) -m scripts.build_repository

demo: models ## Answer real prompts on a real server, measure, stop
	@$(RUN) -m scripts.demo

serve: models ## Serve model_repository on 127.0.0.1:8000 (HTTP), 8001 (gRPC), 8002 (metrics)
	@exec $(RUN) -m scripts.serve $(ARGS)

load: tools models ## Send a minute of mixed load to a server of its own, report in .build/load.html
	@$(RUN) -m perf.load $(ARGS)

test: tools models ## Run all tests, with a real server
	@$(RUN) -m pytest $(ARGS)

test-full: tools models ## Run the long forms of tests: losslessness over 104 prompts of 256 tokens
	@$(RUN) -m pytest -m full $(ARGS)

lint: $(VENV)/.tools ## Check format, style and types
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

clean: ## Remove everything that make made
	rm -rf $(VENV) .build .state .pytest_cache .mypy_cache .ruff_cache .hypothesis model_repository/embedder/1 model_repository/pair_model/1 model_repository/semantic_cache/1/tokenizer.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
