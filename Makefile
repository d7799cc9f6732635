# Two commands do everything: `make demo` and `make test`. Each sets up what it needs first.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Which framework the demo trains with: auto, torch or mlx.
BACKEND ?= auto

# The demo's model is tiny: a second thread costs more than it brings, and on a busy machine very much more.
export OMP_NUM_THREADS ?= 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := true

.PHONY: setup demo test test-services lint bench ui clean

setup: $(VENV)/installed

# PyTorch comes first and pinned, so that no other package chooses its build.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cuda,mlx,dev]'
	touch $@

demo: setup
	$(BIN)/python demo/run.py --backend $(BACKEND)

test: setup lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# With real servers, and disks that are really full: some minutes more, and as root, which mounting needs.
test-services: setup
	$(BIN)/python -m pytest -m services tests/services

lint: setup
	$(BIN)/ruff check src flows demo tests benchmarks
	$(BIN)/ruff format --check src flows demo tests benchmarks
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

# What is claimed of cost and of retention, measured; fails where a bar is missed. Two hours and a half or so.
bench: setup
	$(BIN)/python benchmarks/tier_cost.py
	$(BIN)/python benchmarks/backends.py
	$(BIN)/python benchmarks/kill.py --kills 100 --backend torch
	$(BIN)/python benchmarks/kill.py --kills 100 --backend mlx
	$(BIN)/python benchmarks/retention.py

# The pages, on this machine only: MLflow at port 5000 (MLFLOW_PORT), Prefect at port 4200 (PREFECT_SERVER_API_PORT).
ui: setup
	$(BIN)/nestune ui

clean:
	rm -rf $(VENV) runs
