# make repro   set up, run the pipeline of params.yaml, show the metrics and where the pictures are
# make test    set up, check the style, run the fast tests: minutes on two cores
# make test-all    every test there is, which takes most of an hour
# make study SWEEP="seed=0,1,2 coupling=partial_two_sided,row"    run a grid of settings, compare them over seeds
# make types   install pyright, check the types of drift/

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro study test test-all lint types setup git

repro: git setup
	dvc repro
	@python -m drift.evaluation.report

# DVC runs queued experiments in folders of their own, which it removes: work is kept here, to be gone on with.
# Ctrl-C leaves the queue running; `dvc queue stop --kill` ends it, and `drift study` compares what there is
study: export DRIFT_WORK_DIR ?= $(abspath .work)
study: git setup
	@test -n '$(SWEEP)' || { echo 'error: make study needs a grid, such as' \
		'SWEEP="seed=0,1,2 coupling=partial_two_sided,row"' >&2; exit 2; }
	dvc exp run --queue $(SWEEP:%=--set-param '%')
	dvc exp run --run-all
	@drift study

# One thread for each of two workers: with more they only stand in each other's way
PYTEST := OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal

test: lint
	$(PYTEST) -m "not slow and not large and not gpu"

# Large tests one after the other, as each may take most of the memory
test-all: lint
	$(PYTEST) -m "not large and not gpu"
	pytest -m "large or gpu"

lint: setup
	ruff check .
	ruff format --check .

types: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	pyright

setup: $(VENV)/installed

# The pinned versions are the tested ones; pyproject.toml has the ranges that should work
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

git:
	@said=$$(LC_ALL=C git rev-parse --is-inside-work-tree 2>&1) || { case "$$said" in \
		*"not a git repository"*) said="clone the project, or run: git init && git add -A && git commit -m start";; \
		*) said="git says: $$(echo $$said)";; esac; \
		echo "error: make repro needs a git repository, in which DVC keeps its records: $$said" >&2; exit 2; }
