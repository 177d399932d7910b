# make repro   set up, run the pipeline of params.yaml, show the metrics and where the pictures are
# make test    set up, run the tests

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro test setup git

repro: git setup
	dvc repro
	@python -m drift.evaluation.report

test: setup
	ruff check .
	ruff format --check .
	pytest

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
