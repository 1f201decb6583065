# limpet: every target says what it does; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-crash check bench clean

VENV := .venv
BIN  := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml tools/bootstrap.sh
	@sh tools/bootstrap.sh $(VENV)
	@touch $@

demo: $(VENV)/.installed ## install what is missing, boot a real VM on a real repository, bring the change back
	@sh tools/demo.sh

test: $(VENV)/.installed check ## install what is missing and run all tests, real VMs included
	@sh tools/test.sh

test-unit: $(VENV)/.installed ## the tests that need no VM
	@$(BIN)/pytest -q -m "not vm"

test-crash: $(VENV)/.installed ## every crash point with every kind of fault: killed, failed, without its VM
	@LIMPET_TEST_CRASH=all sh tools/test.sh tests/crash

check: $(VENV)/.installed ## lint, types, layers, specification, generated code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python tools/check_specification.py
	@$(BIN)/python tools/unasync.py --check

bench: $(VENV)/.installed ## measure against floors taken in the same run; writes bench/results/*.json
	@$(BIN)/python -m bench

clean: ## remove what make made in this directory (not your sandboxes)
	rm -rf $(VENV) .make .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
