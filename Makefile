# The README's two commands are `make demo` and `make test`. Each skips what is already done.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test docs wheel chaos lint format clean

demo: $(INSTALLED)
	$(BIN)/sgid demo --out demo

test: lint docs
	$(PYTEST) -n 2 -m "not timing"
	$(PYTEST) -m timing
	$(MAKE) wheel

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The wheel alone, without extras, in an environment and a folder of its own.
wheel: $(INSTALLED)
	rm -rf dist build
	$(BIN)/python -m hatchling build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/env
	build/env/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && env/bin/python -c "import sgid_transforms" && env/bin/sgid demo --steps 20 --out demo

chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers $(BIN)/python tests/faults/chaos.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp file, so that a second call does not ask pip again until pyproject.toml changes.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo site dist build
