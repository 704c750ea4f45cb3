# `make help` lists what there is to do. Everything runs in the virtual environment .venv, made from requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
# Stages are started as `python -m crt ...` by both engines: they must find the environment's python.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup run test check prove lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/installed ## install everything into .venv (nothing else is touched)

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): make setup PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

run: setup ## run the pipeline of params.yaml: by default real handwritten digits, some minutes on two cores
	snakemake --cores all all
	python -m crt results

test: setup ## run the tests
	python -m pytest -n 2 -m "not slow"

check: setup ## formatting, lints and types
	ruff format --check .
	ruff check .
	mypy
	snakefmt --check Snakefile

prove: setup ## the long proofs: kills at random moments, full-size rehearsals
	python -m pytest -m slow

lock: ## renew requirements.lock within the ranges of pyproject.toml (needs uv)
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --no-annotate --quiet -o requirements.lock
	sed -i '1i # Exact versions and hashes of everything that setup installs. Renew with `make lock`.' requirements.lock

clean: ## delete every result and all working state (asks nothing)
	rm -rf data/prepared data/prepared.log data/.work out .snakemake metrics.json
