# `make demo` and `make test` set up all they need: a virtual environment in .venv with the exact
# versions of constraints.txt. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check lint types docs bench-cpu bench-gpu setup clean

demo: $(READY)
	$(BIN)/hess demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile

check: lint types docs test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m pytest tests/test_docs.py

# Speed, which no test measures: rows into benchmarks/results/, tables on the terminal. On a GPU
# machine without a network, where python3 has torch and triton:
#     make bench-gpu READY= BIN=$(dirname $(command -v python3))
bench-cpu: $(READY)
	PYTHONPATH=src $(BIN)/python3 benchmarks/suite.py cpu -o benchmarks/results/cpu.jsonl

bench-gpu: $(READY)
	PYTHONPATH=src $(BIN)/python3 benchmarks/suite.py gpu -o benchmarks/results/gpu.jsonl

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv out
