# Every target that needs Python makes .venv first, from the lock files.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p scripts/check_python.py >/dev/null 2>&1 && echo $$p && break; done)
ifeq ($(strip $(PYTHON)),)
PYTHON := python3
endif
VENV := .venv
RUN := ORT_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo serve test lint models clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

$(VENV)/.installed: requirements.lock requirements-nodeps.lock scripts/check_python.py
	@$(PYTHON) scripts/check_python.py
	@echo "Installing the pinned dependencies into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --disable-pip-version-check --progress-bar on -r requirements.lock
	@$(VENV)/bin/pip install --disable-pip-version-check --no-deps -r requirements-nodeps.lock
	@touch $@

models: $(VENV)/.installed ## Build the models that are not in git (idempotent)
	@$(RUN) -m scripts.build_repository

demo: models ## Answer real prompts on a real server, measure, stop
	@$(RUN) -m scripts.demo

serve: models ## Serve model_repository on 127.0.0.1:8000 (HTTP), 8001 (gRPC), 8002 (metrics)
	@exec $(RUN) -m scripts.serve $(ARGS)

test: models ## Run all tests, with a real server
	@$(RUN) -m pytest $(ARGS)

lint: $(VENV)/.installed ## Check format, style and types
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

clean: ## Remove everything that make made
	rm -rf $(VENV) .build .state .pytest_cache .mypy_cache .ruff_cache .hypothesis model_repository/embedder/1 model_repository/semantic_cache/1/tokenizer.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
