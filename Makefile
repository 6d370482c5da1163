# make demo   train with hand-tuned, equal and learned weights on scikit-learn's digits
# make test   run the test suite; the quick part: make test PYTEST_ARGS='-m "not slow"'
# make docs   build the documentation's site: docs/_build/html
# make check  format, lint, types and the import contract
# make dist   build the sdist and the wheel, and check their metadata and contents
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test docs check dist clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/grap-solo demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --no-loadscope-reorder $(PYTEST_ARGS)

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build -W --keep-going -n -q docs docs/_build/html

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy grap_solo
	$(BIN)/lint-imports --no-logo

# A file that has been deleted must not come back from an earlier build.
dist: $(VENV)/.installed-dev
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package itself is installed in place, so an edit needs no second install.
$(VENV)/.installed: requirements.txt setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/notebooks *.egg-info .pytest_cache .ruff_cache .mypy_cache
