# Everything runs in .venv, which the first target that needs it makes from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV_VERSION := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)  ## fit, evaluate and report on the built-in products; ends with an HTML report
	$(BIN)/unispect demo -o out/demo

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest

lint: $(READY)  ## ruff: style and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

check: lint types test  ## everything CI checks

bench: $(READY)  ## measure again what benchmarks/results holds; REALDATA=../shared/realdata, GRID=NAME, JOBS=N at once, WORK=DIR to go on in
	$(BIN)/python benchmarks/run.py $(if $(REALDATA),--realdata $(REALDATA)) $(if $(GRID),--grid $(GRID)) $(if $(JOBS),--jobs $(JOBS)) $(if $(WORK),--work $(WORK))

lock: $(READY)  ## pin the newest versions that pyproject.toml allows
	$(BIN)/uv pip compile --quiet --all-extras --no-emit-index-url --no-emit-find-links --no-header --upgrade pyproject.toml -o requirements.lock

clean:  ## remove what make has made
	rm -rf $(VENV) out build
