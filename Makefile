# make demo and make test do all the set-up on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/lora-rlhf: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

install: $(BIN)/lora-rlhf ## a virtual environment with the package and what its tests need

demo: $(BIN)/lora-rlhf ## the whole pipeline on the packaged tiny model, offline, about three minutes
	$(BIN)/lora-rlhf demo --out $(OUT)

test: $(BIN)/lora-rlhf ## the default tests: offline, no GPU
	PYTEST_ADDOPTS="$(PYTEST_ADDOPTS)" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(BIN)/lora-rlhf ## formatting, lint and types
	test -x $(BIN)/mypy || $(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: $(BIN)/lora-rlhf ## write the generated pages again
	$(BIN)/python docs/make_recipes.py
	$(BIN)/python docs/make_includes.py

site: $(BIN)/lora-rlhf ## the documentation as a site in build/site, built strictly and offline
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[docs]"
	$(BIN)/python -m mkdocs build --site-dir build/site

.PHONY: help install demo test check docs site
