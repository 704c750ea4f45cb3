# `make help` lists what there is to do. Everything runs in the virtual environment .venv, made from requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
# Stages are started as `python -m crt ...` by both engines: they must find the environment's python.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# As containers set it: each of the hundreds of processes of a run, or of the tests, would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup run study test check prove slurm-test lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# Scripts of a virtual environment hold its path: that of a folder that was moved or copied serves no more.
MOVED := $(shell [ -s .venv/installed ] && [ "$$(cat .venv/installed)" != "$(CURDIR)" ] && echo moved)

.PHONY: moved
moved:
	@echo "this folder was moved: .venv is made anew"
	rm -rf .venv

setup: .venv/installed ## install everything into .venv (nothing else is touched)

.venv/installed: requirements.lock pyproject.toml $(MOVED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): make setup PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" > $@

run: setup ## run the pipeline of params.yaml: by default real handwritten digits, some minutes on two cores
	snakemake --profile workflow/profiles/default all
	python -m crt results

study: setup ## the smallest comparison of CRT with the plain VQGAN, over seeds and sizes
	snakemake --profile workflow/profiles/default study_crt_vs_baseline

test: setup ## run the tests
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m "not slow and not slurm"

check: setup ## formatting, lints and types
	ruff format --check .
	ruff check .
	mypy
	snakefmt --check Snakefile

prove: setup ## the long proofs: kills at random moments, full-size rehearsals
	python -m pytest -m slow

slurm-test: setup ## the pipeline on a real Slurm that this machine starts (root; installs slurm-wlm and munge on Debian)
	@if [ "$$(id -u)" = 0 ] && ! command -v slurmctld >/dev/null && command -v apt-get >/dev/null; then \
		apt-get -o Acquire::Retries=3 update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 install -y -qq --no-install-recommends slurm-wlm munge; fi
	python -m pytest -m slurm -rs tests/slurm

lock: ## renew requirements.lock within the ranges of pyproject.toml (needs uv)
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --no-annotate --quiet -o requirements.lock
	sed -i '1i # Exact versions and hashes of everything that setup installs. Renew with `make lock`.' requirements.lock

clean: ## delete every result and all working state (asks nothing)
	rm -rf data/prepared data/prepared.log data/prepared.cost.json data/.work out .snakemake metrics.json
