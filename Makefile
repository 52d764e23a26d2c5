# make demo   train on the bundled digits and draw, and in colour: demo/index.html
# make test   every test that takes seconds, and the linters; the same examples everywhere
# make test-all   the long tests and pages too, and fresh examples from a SEED that it draws and prints
# make docs   the site, strictly: site/index.html
# make wheel  what would be released: built, its contents checked, tried alone in a clean venv
# make paper  every table and figure of the paper, small: results/report.html (15 to 20 minutes)
# Each sets up what it needs in .venv, from PyPI.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   ?= demo
RESULTS ?= results
MODEL  ?= cifar10-small
SEED   := $(or $(SEED),$(shell od -An -N4 -tu4 /dev/urandom | tr -d ' '))

.PHONY: demo paper test test-all lint format docs wheel constraints clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/ddim-jax demo --out $(DEMO)

# Killed and called again, it goes on; finished experiments only write their results anew.
paper: $(VENV)/.train
	$(BIN)/python -m experiments.paper --model $(MODEL) --out $(RESULTS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: $(VENV)/.test lint
	@echo "examples of seed $(SEED); again: make test-all SEED=$(SEED)"
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow" \
	  --hypothesis-profile=explore --hypothesis-seed=$(SEED)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Warnings are errors, and so are links to what is not there.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/bin/python
	rm -rf dist build
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt build
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(BIN)/python .ci/wheel.py
	$(PYTHON) -I -m venv build/alone
	build/alone/bin/python -I -m pip install -q --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && PYTHONPATH= alone/bin/ddim-jax sample digits --num-images 4 --steps 10 --out four.png

# The versions that the tests passed with, for reproducible installs.
constraints: $(VENV)/.test $(VENV)/.docs
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt build
	$(BIN)/python -m pip freeze --exclude-editable | grep -iv '^\(torch\|diffusers\)==' > constraints.txt

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("ddim_jax needs Python >= 3.11, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.train

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site *.egg-info
