# `make demo` and `make test` need nothing but Python 3.11 or newer with pip: they set up .venv themselves, once.

PYTHON ?= python3
JOBS ?= 2
ARGS ?= -m "not slow"

BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.ready-docs

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## the whole story on real data, in about a minute
	@$(BIN)/whence demo

test: $(READY)  ## all tests and documentation examples but the slow ones (ARGS="-m slow" for those)
	@$(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

check: $(READY)  ## lint, formatting, types and the house rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_house.py

bench: $(READY)  ## measure exactness, cost, memory and fidelity (about half an hour)
	@for part in exactness gate sweep memory fidelity policies; do echo "== $$part"; $(BIN)/python -m bench.$$part || exit 1; done

docs: $(DOCS_READY)  ## build the documentation into docs/_build/html
	@$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

clean:  ## remove everything built, but .venv
	@rm -rf build dist docs/_build docs/auto_examples .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, through constraints.txt: without them pip would fetch gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv (about a minute, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "whence needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS_READY): $(READY)
	@echo "adding the documentation tools to .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@
