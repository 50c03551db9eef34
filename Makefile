PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo tables tables-tiny faults gpu mutants test lint format bench clean

demo: $(READY)  ## one CAAE, eight segmentation networks, Table 3
	$(BIN)/semformer-sweep run table03 --preset tiny

tables: $(READY)  ## all 14 tables on toy networks
	$(BIN)/semformer-sweep run --all --preset micro

tables-tiny: $(READY)  ## all 14 tables on small networks that learn: half an hour to an hour
	$(BIN)/semformer-sweep run --all --preset tiny

faults: $(READY)  ## what a cluster does to a sweep, and what that costs
	$(BIN)/python -m tests.faults

gpu: $(READY)  ## does everything work on this machine's GPU, and how fast: docs/results/gpu.md
	$(BIN)/python -m tests.gpu --compile

mutants: $(READY)  ## which changes of the science do the fast tests not notice? hours
	-$(BIN)/mutmut run --max-children 2
	$(BIN)/python -m tests.mutants

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) runs mlflow.db mlartifacts

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@
