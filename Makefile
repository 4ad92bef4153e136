# Every target makes the environment first: `make demo` and `make test` work as the first command on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

.DEFAULT_GOAL := help
.PHONY: help env demo test lint types bench protos up down

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 12

env: $(STAMP) ## make .venv with everything that demo, tests and training need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv, about two minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[edge,cloud,train,dev]'
	@touch $@

demo: env ## inspect solar cells over an emulated thin link, four ways side by side
	$(BIN)/python -m tests.bench.demo --json runs/demo.json --plot runs/demo.png

test: env ## run every test
	$(BIN)/python -m pytest -q

lint: env ## style and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=. $(BIN)/lint-imports

types: env ## mypy, strict
	$(BIN)/mypy

bench: env ## the entropy coder beside CompressAI's
	$(BIN)/python -m tests.bench.codec --json runs/codec.json

protos: env ## generate the stubs anew
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. \
	  --mypy_out=quiet:. --mypy_grpc_out=quiet:. protos/isthmus/v1/isthmus.proto

up: ## build and start cloud and Prometheus with compose
	$(COMPOSE) up --build --detach

down: ## stop them
	$(COMPOSE) --profile edge down --remove-orphans
