# make demo and make test do all the set-up on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

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

test-lowest: ## the default tests on the lowest versions that pyproject.toml allows (TESTS=some of them)
	$(PYTHON) -m venv build/lowest && build/lowest/bin/python -m pip install -q uv
	build/lowest/bin/uv pip compile pyproject.toml --python build/lowest/bin/python --resolution lowest-direct --no-annotate -o build/lowest.txt
	build/lowest/bin/uv pip install -q --python build/lowest/bin/python -r build/lowest.txt
	build/lowest/bin/uv pip install -q --python build/lowest/bin/python -e ".[test]" -c build/lowest.txt
	build/lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

trl-newest: ## does the newest TRL still have the seams that are used here?
	$(PYTHON) -m venv build/newest && build/newest/bin/python -m pip install -q -e ".[test]"
	build/newest/bin/python -m pip install -q --upgrade --no-deps trl
	build/newest/bin/python -m pip list | grep -i "^trl "
	build/newest/bin/python -m pytest tests/contracts/test_trl_seams.py tests/algorithms \
	  --deselect tests/contracts/test_trl_seams.py::test_the_installed_trl_is_a_supported_one

wheel: $(BIN)/lora-rlhf ## the wheel in build/dist: checked, and resolved against Colab
	$(BIN)/python -m pip install -q build twine uv
	$(BIN)/python -m build --wheel --outdir build/dist && $(BIN)/python -m twine check --strict build/dist/*.whl
	$(BIN)/python -m pytest tests/contracts/test_packaging.py

check: $(BIN)/lora-rlhf ## formatting, lint and types
	test -x $(BIN)/mypy || $(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: $(BIN)/lora-rlhf ## write the generated pages again
	$(BIN)/python docs/make_recipes.py
	$(BIN)/python docs/make_includes.py
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[notebook]"
	$(BIN)/jupytext --quiet --to ipynb recipes/notebooks/quickstart.py
	$(BIN)/python docs/make_plans.py
	$(BIN)/python docs/make_scale.py

site: $(BIN)/lora-rlhf ## the documentation as a site in build/site, built strictly and offline
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[docs]"
	$(BIN)/python -m mkdocs build --site-dir build/site

.PHONY: help install demo test test-lowest trl-newest wheel check docs site
