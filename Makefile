# The same verbs for people and for CI. `make help` lists them.
PYTHON ?= python3.11
PORT ?= 8000
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test check format bench

help: ## list the verbs
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(INSTALLED) ## set up .venv from constraints.txt (the other verbs do it when needed)

serve: $(INSTALLED) ## serve serve_config.yaml on 127.0.0.1, port 8000 or PORT=
	@exec $(BIN)/heliograph serve --config serve_config.yaml --port $(PORT)

test: check ## everything that CI runs
	$(BIN)/python -m tests

check: $(INSTALLED) ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(INSTALLED) ## write the format and the lint fixes that are safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## the benchmark against diffusers and @serve.batch, in one run
	$(BIN)/python -m bench

$(INSTALLED): pyproject.toml constraints.txt
	@echo "setting up .venv: some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
