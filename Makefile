# Each target does its own set-up; README prints the same steps without make.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python

.PHONY: install demo test test-fast faults lint

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install -e '.[test]'
	touch $@

demo: install
	$(RUN) tools/demo.py --out out/demo

test: install
	$(RUN) -m pytest -n 2 --dist loadgroup

test-fast: install
	$(RUN) -m pytest -n 2 --dist loadgroup -m "not slow"

faults: install
	PYTHONPATH=tests $(RUN) -m faults --readme

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
