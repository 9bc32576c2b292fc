# `make` lists the targets. How many threads torch and numba use is yours to say: OMP_NUM_THREADS=1 make quality

# The interpreter that .venv is made from (3.11 or newer).
PYTHON ?= python3
# Where pip looks for torch besides your usual index. On Linux the usual index has the CUDA build with gigabytes of
# libraries; without a GPU, or to save the download:  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Processes that run tests side by side, each with one thread of torch; 0: all tests in one process, with all threads.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# `make reference` without runs/corpus: the directory with the source corpora (named in examples/reference_texts.py). `make bench-tasks`: items.
DATA ?=
# `make golden`: the revision that the working tree is compared with.
BASE ?=

BIN   := .venv/bin
PIP   := $(BIN)/python -m pip
# `make torture`: for so long.
SECONDS ?= 600
STAMP := .venv/.setup-stamp
REFERENCES := olmoe qwen2_moe

.DEFAULT_GOAL := help
.PHONY: help setup lint test test-all torture tables demo bench-solver bench-speed bench-memory bench-runtime bench-prices bench-ebss bench-tasks quality quality-moequant \
        quality-eaquant quality-routers quality-moqa quality-best architectures formats gguf-architectures golden docs \
        reference wheel-check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with the pinned versions of constraints.txt and moebit, editable

# torch first and by itself, so that the resolver finds it there and never considers another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moebit needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,docs]'
	@touch $@

lint: setup  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## what has to pass before a commit: lint, and the tests that are not slow
	$(BIN)/pytest -m "not slow" -n $(JOBS) --dist worksteal

test-all: lint  ## lint and every test, the slow ones too
	$(BIN)/pytest

torture: setup  ## kills, damages and mutated documents for SECONDS (600), with the counts of what was found
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.torture --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

tables: setup  ## every table that needs no other hardware, those that are out of date (hours; goes on where it was interrupted)
	$(BIN)/python -m benchmarks.tables

demo: setup  ## quantize a shipped reference model and show what it cost
	$(BIN)/python examples/demo.py

bench-solver: setup  ## how fast the batched solver is, against the textbook form
	$(BIN)/python benchmarks/solver.py

bench-speed: setup  ## from end to end, beside the bare products and two other quantizers (tens of minutes; installs them into runs/peers)
	-PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) benchmarks/peers/setup.sh
	$(BIN)/python benchmarks/speed.py

bench-memory: setup  ## resident memory on real shapes (hours, 40 GB of disk; goes on where it was interrupted)
	$(BIN)/python benchmarks/memory.py

bench-runtime: setup  ## how small and how fast packed models run, against bf16 (needs 20 GB of disk and 16 GB of memory; --layers 8: half)
	$(BIN)/python benchmarks/runtime.py --layers 16

quality: setup  ## the quality table: every preset on every reference model
	$(BIN)/python benchmarks/quality.py

bench-prices: setup  ## prices of widths: predicted against measured divergence, and widths chosen by them (tens of minutes)
	$(BIN)/python -m benchmarks.prices

bench-ebss: setup  ## text that models write themselves, against windows of text: use of experts, perplexity, speed
	$(BIN)/python benchmarks/ebss.py

bench-tasks: setup  ## scores of packed outputs in lm-evaluation-harness, which it installs (DATA=... has the items: docs/evaluation.md)
	@test -n "$(DATA)" || { echo "where are the items? make bench-tasks DATA=... (see docs/evaluation.md)" >&2; exit 2; }
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[eval]'
	$(BIN)/python benchmarks/tasks.py --data "$(DATA)"

quality-moequant: setup  ## MoEQuant, its parts and its baselines on every reference model (hours; goes on where it was interrupted)
	$(BIN)/python benchmarks/moequant.py

quality-eaquant: setup  ## EAQuant, its parts and its baselines, with and without outliers (hours; goes on where it was interrupted)
	$(BIN)/python benchmarks/eaquant.py

quality-routers: setup  ## how many tokens keep their experts: routers of few bits, aligned, and routers realigned (tens of minutes)
	$(BIN)/python benchmarks/routers.py

quality-moqa: setup  ## widths from data against uniform ones, and switching channels (hours; goes on where it was interrupted)
	$(BIN)/python -m benchmarks.moqa

quality-best: setup  ## what our own presets are made of, chosen on text that no evaluation looks at (an hour; goes on where it was interrupted)
	$(BIN)/python benchmarks/best.py

architectures: setup  ## which model types of the installed transformers work: docs/architectures.md
	$(BIN)/python -m benchmarks.architectures

formats: setup  ## which format of which architecture runs where, as logits
	$(BIN)/python -m benchmarks.formats

gguf-architectures: setup  ## which architectures llama.cpp computes as transformers does, from files that moebit writes
	$(BIN)/python -m benchmarks.gguf_architectures

golden: setup  ## small outputs of every method, made by the revision BASE=... and by this tree, compared byte for byte (minutes)
	@test -n "$(BASE)" || { echo "compare with which revision? make golden BASE=main" >&2; exit 2; }
	$(BIN)/python -m tests.golden $(BASE)

docs: setup  ## build the documentation site in runs/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

reference: setup runs/corpus  ## retrain the reference models (hours; goes on where it was interrupted)
	set -e; for name in $(REFERENCES); do \
	    $(BIN)/python examples/train_reference.py examples/reference_$$name.yaml \
	        --corpus runs/corpus --texts reference/text --out reference/$$name --work runs/$$name; \
	done

runs/corpus: | $(STAMP)
	@test -n "$(DATA)" || { echo "runs/corpus is not there: make reference DATA=... (see examples/reference_texts.py)" >&2; exit 2; }
	$(BIN)/python examples/reference_texts.py --data "$(DATA)" --out reference/text --train $@

wheel-check: setup  ## build the wheel, install it outside the clone, run it there on a tiny model
	$(BIN)/python tests/wheel_check.py
