# Needs Python 3.11 or newer and make. Everything else goes into .venv.
.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := /bin/bash

PYTHON := .venv/bin/python

# The first one that runs, is new enough and can make virtual environments.
CANDIDATES := python3.12 python3.13 python3.11 python3 python
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

.PHONY: help quickstart test lint format docs bench clean

help:
	@echo "make quickstart  teacher, student and distilled student on handwritten digits"
	@echo "make test        the tests"
	@echo "make lint        style, types, layers of imports"
	@echo "make format      put the code into the project's format"
	@echo "make docs        the site, in docs/_build/html"
	@echo "make bench       time of an import and of a step, in docs/results"
	@echo "make clean       remove what was built (not .venv)"

quickstart: .venv/.installed-examples
	$(PYTHON) examples/quickstart.py $(ARGS)

# Three processes for two cores, for some tests wait for others that they have started.
# In the order of the files: the last ones are short, so that no process waits long.
test: .venv/.installed-test
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.installed-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports

format: .venv/.installed-test
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs: .venv/.installed-docs
	$(PYTHON) docs/results.py
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: .venv/.installed-examples
	$(PYTHON) examples/benchmarks/import_time.py
	$(PYTHON) examples/benchmarks/step_time.py

clean:
	rm -rf build dist docs/_build docs/api runs *.egg-info

$(PYTHON):
	@for candidate in $(CANDIDATES); do \
	  if $$candidate -c '$(SUITABLE)' >/dev/null 2>&1; then \
	    echo "$$candidate -m venv .venv"; exec $$candidate -m venv .venv; \
	  fi; \
	done; \
	echo "No Python 3.11 or newer with the venv module found (tried: $(CANDIDATES))." >&2; \
	exit 1

# One mark per set of extras, made anew only when the requirements change.
.venv/.installed-%: pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
