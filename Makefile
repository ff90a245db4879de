# `make demo` and `make test` each work alone on a fresh clone: both set up what they need.

PYTHON ?= python3
# Another build of torch, for example a CPU-only wheel: make demo TORCH=/path/to/torch.whl
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo serve test lint format bench clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "setup: Python %d.%d, needed 3.10 to 3.12; try make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "setup: installing torch, diffusers and NVIDIA's tritonserver into $(VENV); this takes a minute"
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: setup
	$(BIN)/python -m demo.run

serve: setup
	$(BIN)/fullpipe serve

test: setup
	$(BIN)/python -m pytest

# Minutes, on a machine with nothing else to do; then bench/README.md with its plots.
bench: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m bench.perf_analyzer
	$(BIN)/python -m bench.report

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
