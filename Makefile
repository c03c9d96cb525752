# `make quickstart` and `make test` need nothing but Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-all lint bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,lora]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/refine-nsp quickstart --output_dir runs/quickstart

# One thread: the models are tiny, and a second OpenMP thread beside another process costs more than it gives.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" --durations=10

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/delta_rule.py
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/train_throughput.py
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
