# `make quickstart` and `make test` need nothing but Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e
CORE := $(VENV)/.installed
ALL := $(VENV)/.installed-all
GPU := $(VENV)/.installed-gpu

# mkdocs' successors are none of a build's business.
export NO_MKDOCS_2_WARNING := 1

.PHONY: quickstart real install test test-all test-gpu test-interpreter test-wheel table fuzz docs notebook lint bench clean

# The package alone.
$(CORE): pyproject.toml constraints.txt
	$(INSTALL) .
	touch $(CORE)

# With everything optional (evaluation, LoRA) and the tools of development.
$(ALL): pyproject.toml constraints.txt
	$(INSTALL) '.[dev,docs,eval,lora]'
	touch $(CORE) $(ALL)

# With flash-linear-attention's kernels, which run on the Triton that torch's CUDA builds bring.
$(GPU): $(ALL)
	$(INSTALL) '.[dev,gpu]'
	touch $(CORE) $(ALL) $(GPU)

install: $(ALL)

quickstart: $(CORE)
	$(BIN)/refine-nsp quickstart --output_dir runs/quickstart

# SmolLM2-135M converted, taught and studied: a day of one core; stopped, it goes on by the same command.
real: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python recipes/smollm2/study.py

# A process for each core, of one thread: the models are tiny, and a second thread costs more than it gives.
PROCESSES := -n auto --maxprocesses 8 --dist worksteal

test: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PROCESSES) -m "not slow" --durations=10 -rs

test-all: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PROCESSES) --durations=10 -rs

# On a CUDA device; without one the tests are skipped, unless TRITON_INTERPRET=1 runs the kernels on the CPU (Triton is needed).
test-gpu: $(GPU)
	$(BIN)/python -m pytest -q -rs tests/gpu

# What help, completion and errors of the command line are read from, after a change of a command or of a setting.
table: $(ALL)
	$(BIN)/python -m refine_nsp.commands.table

# Broken input by the thousand, through the command line.
fuzz: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases 10000

# The same kernels under Triton's interpreter, on the CPU, beside the environment so that its torch stays as it is.
test-interpreter: $(ALL)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/interpreter \
		flash-linear-attention fla-core einops triton==3.7.1
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/interpreter $(BIN)/python -m pytest -q tests/gpu

# The wheel on Python 3.10 to 3.13 (or those of WHEEL_PYTHONS), with the newest and the lowest releases of what it needs: minutes and gigabytes of downloads.
test-wheel:
	bash tests/wheel.sh

# The documentation as a site, in site/: open site/index.html.
docs: $(ALL)
	$(BIN)/mkdocs build --quiet

# Runs examples/refine.ipynb and keeps what it shows.
notebook: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/jupyter execute --inplace examples/refine.ipynb

lint: $(ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --quiet --site-dir $(VENV)/site  # strict: a link that leads nowhere is an error

bench: $(ALL)
	$(BIN)/python benchmarks/delta_rule.py
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/train_throughput.py
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache
