# `make run` serves, `make test` runs every test; both set up first what is missing.
SHELL := /bin/bash
BIN := .venv/bin
# Suites whose tests stand alone run beside each other: they wait more than they compute.
ALONE := tests/unit tests/integration
# Suites that share one running stack.
SHARED := tests/e2e tests/chaos
TEST_WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup run test test-unit lint docs drawing bench soak load-test model clean

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: ## Install what uv.lock names into .venv
	@.ci/setup

run: setup ## Serve: prints the address, a key and a request to paste (stop with Ctrl-C)
	@$(BIN)/comp-ai up

model: setup
	@$(BIN)/comp-ai model fetch

lint: setup ## Check style, types and import borders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup ## Write what is made from the code: the references of errors and of settings
	$(BIN)/python -m serve_app.error_reference docs/errors.md
	$(BIN)/python -m serve_app.settings_reference docs/configuration.md

test: model lint ## Run every check and every test
	$(BIN)/pytest --numprocesses $(TEST_WORKERS) $(ALONE)
	$(BIN)/pytest $(SHARED)

test-unit: setup ## Run the unit tests
	$(BIN)/pytest tests/unit

drawing: setup ## Install what draws the pictures of the benchmarks
	@.tools/bin/uv sync --quiet --frozen --inexact --only-group bench

bench: model drawing ## Compare Comp AI with the bare engine, Ray Serve LLM and LiteLLM (an hour; leave the machine alone)
	$(BIN)/python -m load_tests.bench --engine fake
	$(BIN)/python -m load_tests.bench --engine real

soak: setup drawing ## Ask a stack for an hour and see that nothing grows
	$(BIN)/python -m load_tests.soak --minutes 60 --out load_tests/results

load-test: setup ## Ask the service that runs here, as 20 users do, for a minute
	@LOCUST_KEY=$$(cat "$${COMP_AI_HOME:-$$HOME/.comp-ai}/first-key") $(BIN)/locust \
	  -f load_tests/locustfile.py --host http://127.0.0.1:$${COMP_AI_HTTP_PORT:-8080} \
	  --headless --only-summary --users 20 --run-time 1m

clean: ## Remove what set-up and the checks made (no data of the service)
	rm -rf .venv .tools build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
