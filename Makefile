# `make demo` and `make test` each work alone on a fresh clone: both set up what they need.

PYTHON ?= python3
# Another build of torch, for example a CPU-only wheel: make demo TORCH=/path/to/torch.whl
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
# PYTHONWARNINGS: setuptools warns of every editable installation.
INSTALL := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: setup demo serve test gpu lint format bench bench-all clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "setup: Python %d.%d, needed 3.10 to 3.12; try make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "setup: installing torch, diffusers and NVIDIA's tritonserver into $(VENV); this takes a minute"
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable '.[server]'
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready
	@echo "setup: installing what the tests and linters need"
	$(INSTALL) --editable '.[test,lint]'
	touch $@

$(VENV)/ready-to-bench: $(VENV)/ready
	$(INSTALL) --editable '.[bench]'
	touch $@

demo: setup
	$(BIN)/python -m demo.run

serve: setup
	$(BIN)/fullpipe serve

test: $(VENV)/ready-to-test
	$(BIN)/python -m pytest

# What only an NVIDIA GPU can show: tests there, errors, speed; into gpu-report/.
gpu: $(VENV)/ready-to-test
	$(BIN)/python -m tests.on_gpu gpu-report

# Both want a machine with nothing else to do, and make bench/README.md and the README's figures anew.
# `bench` takes about 6 minutes on 2 cores, `bench-all` half an hour.
bench: $(VENV)/ready-to-bench
	$(BIN)/python -m bench.perf_analyzer
	$(BIN)/python -m bench.report

bench-all: $(VENV)/ready-to-bench
	set -e; for name in continuous perf_analyzer concurrency overhead diffusers_pipeline unet_apart \
	  transports startup soak advance demo_quality; do $(BIN)/python -m bench.$$name; done
	$(BIN)/python -m bench.report

lint: $(VENV)/ready-to-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/ready-to-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
