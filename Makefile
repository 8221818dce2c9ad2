# Everything runs from a fresh clone: Python 3.10 or newer, make, and a package registry.
# Another interpreter: make PYTHON=python3.12 test
# Measurements on more than one thread: make THREADS=2 bench

PYTHON  ?= python3
THREADS ?= 1
VENV    := .venv
BIN     := $(VENV)/bin

# One stamp per set of extras, so that the demo does not install the development tools.
EXAMPLES := $(VENV)/.examples
DEV      := $(VENV)/.dev
INSTALL   = $(BIN)/python -m pip install --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help demo lic-report test check lint types doctest docs dist check-dist support worth worth-full bench clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-11s %s\n", $$1, $$2}'

demo: $(EXAMPLES)  ## fine-tune small image codecs, standard and balanced, and compare (about five minutes)
	$(BIN)/python -m examples.lic

lic-report: $(EXAMPLES)  ## run the image codec's experiments and write docs/lic_report.md (hours; resumes)
	$(BIN)/python -m benchmarks.lic --workers 2 --docs docs

test: $(DEV)  ## run the test suite, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

check: lint types docs doctest dist test  ## all checks that must pass before a commit; CI runs the same

lint: $(DEV)  ## rules and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(DEV)  ## strict type check of the package, and of a program that uses it
	$(BIN)/python -m mypy
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/python -m tests.packaging.check_types

doctest: $(DEV)  ## run every docstring example
	$(BIN)/python -m pytest --doctest-modules moo_balance

docs: $(DEV)  ## build the site into docs/_build/html; a warning or an undocumented public name fails
	$(BIN)/python -m sphinx --quiet --fresh-env --nitpicky --fail-on-warning --keep-going docs docs/_build/html

dist: $(DEV)  ## build wheel and sdist into dist/, and check their metadata and contents
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/python -m tests.packaging.check_contents dist

check-dist: dist  ## install wheel and sdist, each in an empty environment, and test them there (minutes)
	$(BIN)/python -m tests.packaging.check_dist dist

support: $(DEV)  ## test versions of Python and libraries that can be had here, and write docs/support.md (minutes)
	$(BIN)/python -m tests.packaging.support

worth: $(DEV)  ## measure on three problems what a balanced run saves of a weight search (minutes)
	$(BIN)/python -m benchmarks.worth --short

worth-full: $(DEV)  ## measure it on all problems and write docs/worth.md (up to three hours; resumes)
	$(BIN)/python -m benchmarks.worth --docs docs

bench: $(DEV)  ## measure what balancing costs, and write docs/benchmarks.md
	$(BIN)/python -m benchmarks.speed --threads $(THREADS)

clean:  ## remove caches and outputs (the environment in .venv stays)
	rm -rf docs/_build runs build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "moo_balance needs Python 3.10 or newer, and '$(PYTHON)' is not. Name another: make PYTHON=python3.12 ..."; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(EXAMPLES): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing PyTorch and the examples' libraries into $(VENV), once ..."
	$(INSTALL) '.[examples]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing PyTorch and the development tools into $(VENV), once ..."
	$(INSTALL) '.[dev]'
	@touch $@ $(EXAMPLES)
