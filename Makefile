# `make demo` and `make test` need nothing but Python 3.11 or newer with pip: they set up .venv themselves, once.

PYTHON ?= python3
JOBS ?= 2
ARGS ?= -m "not slow"

BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.ready-docs
BENCH_BIN := .venv-bench/bin
BENCH_READY := .venv-bench/.ready
# Of `make compat`: one environment for each torch and Python, such as .venv-compat-2.14.1-py312.
PYTHON_TAG = $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
COMPAT = .venv-compat-$(TORCH)-$(PYTHON_TAG)

.DEFAULT_GOAL := help
.PHONY: help demo test check compat release-check bench bench-env bench-table docs clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## the whole story on real data, in about a minute
	@$(BIN)/backtrail demo

test: $(READY)  ## all tests and documentation examples but the slow ones (ARGS="-m slow" for those)
	@$(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

check: $(READY)  ## lint, formatting, types and the house rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_house.py

compat:  ## the tests on another torch and Python: make compat TORCH=2.14.1 PYTHON=python3.12
	@test -n "$(TORCH)" || { echo "make compat: say which torch, for example make compat TORCH=2.14.1"; exit 2; }
	@$(MAKE) --no-print-directory $(COMPAT)/.ready
	@$(COMPAT)/bin/python -c 'import sys, torch; print("torch", torch.__version__, "on Python", sys.version.split()[0])'
	@$(COMPAT)/bin/python -m pytest -q -n $(JOBS) $(ARGS)

release-check:  ## build sdist and wheel, install them clean, and use them from elsewhere
	@PYTHON=$(PYTHON) .ci/release-check

bench: $(READY)  ## measure exactness, cost, memory and fidelity, then the table (about an hour)
	@for part in exactness gate sweep embedding memory fidelity policies; do echo "== $$part"; $(BIN)/python -m bench.$$part || exit 1; done
	@$(MAKE) --no-print-directory bench-table

bench-env: $(BENCH_READY)  ## the libraries that the table compares with, in their own environment

# One table a training, of what is not measured yet: make bench-table ARGS="headline --fresh".
bench-table: $(READY)  ## backtrail beside its peers (ARGS="--help"); without bench-env their rows stay empty
	@test -e $(BENCH_READY) || echo "the other libraries are not installed: run 'make bench-env' first to compare with them"
	@python=$(BIN)/python; test -e $(BENCH_READY) && python=$(BENCH_BIN)/python; \
	PYTHONPATH=src:. $$python -m bench.table $(if $(filter command line,$(origin ARGS)),$(ARGS))

docs: $(DOCS_READY)  ## build the documentation into docs/_build/html
	@$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

clean:  ## remove everything built, but .venv
	@rm -rf build dist docs/_build docs/auto_examples .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, through constraints.txt: without them pip would fetch gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv (about a minute, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "backtrail needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# torch first and alone, as it was asked for; then everything else, with exactly that torch as a
# constraint, so that pip cannot change it. TORCH_ARGS are arguments of pip for torch alone, such as
# --index-url for a CPU-only build.
.venv-compat-%/.ready: pyproject.toml
	@echo "setting up .venv-compat-$* (a few minutes and, for a CUDA build of torch, 6 GB; once) ..."
	@$(PYTHON) -m venv .venv-compat-$*
	@.venv-compat-$*/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) torch==$(TORCH)
	@.venv-compat-$*/bin/python -m pip freeze | grep '^torch==' > .venv-compat-$*/constraints.txt
	@.venv-compat-$*/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-compat-$*/constraints.txt -e '.[dev]'
	@touch $@

# --no-deps: what the peers ask for would bring a torchvision that does not load beside the CPU torch.
$(BENCH_READY): bench/peers/requirements.txt constraints.txt
	@echo "setting up .venv-bench (a few minutes, once) ..."
	@$(PYTHON) -m venv .venv-bench
	@$(BENCH_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BENCH_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r bench/peers/requirements.txt
	@touch $@

$(DOCS_READY): $(READY)
	@echo "adding the documentation tools to .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@
