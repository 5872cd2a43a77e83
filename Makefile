# Each target does its own set-up. PYTHON=python3.12 picks another interpreter, VIDEO=clip.mp4 your own video.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUESTION ?= What happens?
export OMP_NUM_THREADS ?= 2

.PHONY: help setup demo test test-slow test-compat test-newest lint bench clean

help:
	@echo "make demo        train a tiny model and ask it about videos, some minutes; with VIDEO=clip.mp4"
	@echo "                 QUESTION='...' the steps from that file to an answer instead, untrained"
	@echo "make test        the test suite, some minutes on two cores"
	@echo "make test-slow   the slow tests"
	@echo "make test-compat the test suite on the oldest transformers that is supported"
	@echo "make test-newest the test suite on the newest releases, with TORCH=newest also of torch (GBs)"
	@echo "                 with TESTS='tests/test_a.py -k name' these alone, for test and both of the last"
	@echo "make lint        ruff"
	@echo "make bench       the benchmarks behind docs/benchmarks.md"

# The stamp names what the environment was made from, so that it is made again when that changes.
STAMP := $(VENV)/.installed
setup: $(STAMP)
$(STAMP): setup.py constraints-cpu.txt
	@echo "== setting up $(VENV) (about a minute and 1.4 GB the first time)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "hico needs Python 3.10 or newer, this is " + sys.version'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ test "$$(id -u)" = 0 && echo "== installing python3-venv" && apt-get update -qq && \
		apt-get install -qq -y python3-venv && $(PYTHON) -m venv $(VENV); } || \
		{ echo "cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	@touch $@

demo: setup
	@echo "== hico demo: from a video file to an answer"
	@$(BIN)/hico demo --untrained $(if $(VIDEO),"$(VIDEO)") --question "$(QUESTION)"
	@$(if $(VIDEO),,echo && echo "== hico demo: a tiny model learns" && $(BIN)/hico demo)

test: setup
	@echo "== running the tests"
	@$(BIN)/python -m pytest -m "not slow" $(TESTS)

test-slow: setup
	@echo "== running the slow tests, those of DeepSpeed too (it needs a C++ compiler)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e '.[dev,deepspeed,submitit,tensorboard]'
	@$(BIN)/python -m pytest -m slow

COMPAT := .venv-compat
test-compat:
	@echo "== running the tests on transformers 5.17"
	@test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	@sed -e 's/^transformers==.*/transformers==5.17.0/' -e '/^huggingface.hub==/d' constraints-cpu.txt > $(COMPAT)/constraints.txt
	@$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check -c $(COMPAT)/constraints.txt -e '.[dev]'
	@$(COMPAT)/bin/python -m pytest -m "not slow" $(TESTS)

# Bounds of setup.py do not hold back the second install: this is how a release that no test has seen gets tested.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints-cpu.txt)
NEWEST := .venv-newest$(if $(filter newest,$(TORCH)),-torch)
UPGRADED := transformers accelerate peft tokenizers numpy $(if $(filter newest,$(TORCH)),torch,'torch==$(TORCH)')
test-newest:
	@echo "== running the tests on the newest releases, torch $(TORCH)"
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check $(lastword $(UPGRADED)) -e '.[dev]'
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(UPGRADED)
	@$(NEWEST)/bin/python -m pip list --disable-pip-version-check | grep -E '^(torch|transformers|accelerate|peft|tokenizers|numpy) '
	@$(NEWEST)/bin/python -m pytest -m "not slow" $(TESTS)

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: setup
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(COMPAT) .venv-newest .venv-newest-torch build dist demo *.egg-info
