# The README's two commands are `make demo` and `make test`. Each skips what is already done.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test chaos lint format clean

demo: $(INSTALLED)
	$(BIN)/sgid demo --out demo

test: lint
	$(PYTEST) -n 2 -m "not timing"
	$(PYTEST) -m timing

chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers $(BIN)/python tests/faults/chaos.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp file, so that a second call does not ask pip again until pyproject.toml changes.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo
