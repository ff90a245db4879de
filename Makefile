# `make demo` and `make test` each work alone on a fresh clone: both set up what they need.

PYTHON ?= python3
# Another build of torch, for example a CPU-only wheel: make demo TORCH=/path/to/torch.whl
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo serve test lint format bench bench-all bench-setup clean

setup: $(VENV)/ready

# PYTHONWARNINGS: setuptools warns of every editable installation.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "setup: Python %d.%d, needed 3.10 to 3.12; try make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "setup: installing torch, diffusers and NVIDIA's tritonserver into $(VENV); this takes a minute"
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: setup
	$(BIN)/python -m demo.run

serve: setup
	$(BIN)/fullpipe serve

test: setup
	$(BIN)/python -m pytest

# Both want a machine with nothing else to do, and make bench/README.md and the README's figures anew.
# `bench` takes about 6 minutes on 2 cores, `bench-all` half an hour.
bench: bench-setup
	$(BIN)/python -m bench.perf_analyzer
	$(BIN)/python -m bench.report

bench-all: bench-setup
	set -e; for name in continuous perf_analyzer concurrency overhead diffusers_pipeline unet_apart \
	  transports startup soak advance demo_quality; do $(BIN)/python -m bench.$$name; done
	$(BIN)/python -m bench.report

bench-setup: setup
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
