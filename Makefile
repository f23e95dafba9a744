# make demo   install, then train and evaluate a gravity recommender on the embedded data set
# make test   install, then run the test suite
# make docs   install with the docs extra, then build the site into site/; a broken link or reference fails
# make lint   install, then ruff check, ruff format --check and mypy
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Test processes side by side, each of one thread: `make test JOBS=8` on a larger machine.
JOBS   ?= 2

.PHONY: install demo docs lint test test-slow bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"found Python {v[0]}.{v[1]}, GFML needs 3.11 or newer: run make PYTHON=python3.11 (or newer)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python recsys/main.py --dataset demo --tensorboard 1 --overwrite

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	$(BIN)/python scripts/bench.py recsys

clean:
	rm -rf build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
