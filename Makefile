# `make help` lists what there is. Everything runs in the virtual environment .venv, which is made once and made anew
# when pyproject.toml, setup.py or constraints.txt change. To choose its Python: `make PYTHON=python3.12 venv`.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
DATA = $(if $(ONET_DIR),--dataset onet_jobs --workdir runs/demo_onet,--workdir runs/demo)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv test check demo clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 8

define install
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv found: make PYTHON=/path/to/python venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(1)'
	@touch $(VENV)/.runtime $@
endef

$(VENV)/.runtime: pyproject.toml setup.py constraints.txt
	$(call install)

$(VENV)/.dev: pyproject.toml setup.py constraints.txt
	$(call install,[dev])

venv: $(VENV)/.dev ## install the tested set of packages into .venv

# A module's tests stay in one process and in their order. Most of the time is compilation, which one core does: to run tests again
# and again, set JAX_COMPILATION_CACHE_DIR to a folder and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS to 0.
test: $(VENV)/.dev ## run every test, as many at once as there are cores (eight at most); ARGS="-k name" is passed on to pytest
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

check: $(VENV)/.dev ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/.runtime ## train and show the whole funnel; with ONET_DIR=folder on real occupations
	$(BIN)/python benchmarks/funnel.py $(DATA) $(ARGS)

clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
