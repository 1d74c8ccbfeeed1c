# One virtual environment for everything; `make train` and `make test` create it if it does not exist.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: train test test-release mutants lint types resources results language-model docs-results bench setup clean

setup: $(VENV)/ready

# torch first: as a dependency of another package, pip would install the newest build with its CUDA packages.
$(VENV)/ready: pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[models,triton,dev]'
	touch $@

train: setup
	$(BIN)/feddistill train

test: setup
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What takes minutes or compiles for every GPU target.
test-release: setup resources
	$(BIN)/pytest -m release --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Faults put in on purpose must still be found; some 25 minutes.  See docs/testing.md.
mutants: setup
	$(BIN)/python -m tests.mutants --check tests/mutants/before.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Check that every specialisation of each GPU kernel compiles for Hopper without spills; no GPU is needed.
resources: setup
	$(BIN)/python -m bench.resources --target 90 --check bench/results/resources.json

# The committed metrics: three seeds of the quickstart; then `make docs-results`.
results: setup
	for seed in 0 1 2; do $(BIN)/feddistill train --set seed=$$seed --out runs/results/quickstart-$$seed || exit; done
	mkdir -p docs/results
	$(BIN)/python docs/build_tables.py --collect runs/results/quickstart-* > docs/results/quickstart.json

# Three seeds of the language model example, some eight minutes each.
language-model: setup
	for seed in 0 1 2; do $(BIN)/feddistill train examples/language_model.yaml --set seed=$$seed \
		--out runs/results/language-model-$$seed || exit; done
	$(BIN)/python docs/build_tables.py --collect runs/results/language-model-* > docs/results/language_model.json

docs-results: setup
	$(BIN)/python docs/build_tables.py

# The committed timings of the kernels; then `make docs-results`.  Some ten minutes on an idle machine.
bench: setup
	$(BIN)/python -m bench --out bench/results/cpu.json
	$(BIN)/python -m bench --check bench/results/cpu.json

clean:
	rm -rf build dist $(VENV)
