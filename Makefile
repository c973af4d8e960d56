# Every target sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := cluster/constraints.txt
UNPACKED := $(VENV)/debian
APT := apt-get -qq -o Dir::State::Lists=$(CURDIR)/$(UNPACKED)/lists -o Dir::Cache=$(CURDIR)/$(UNPACKED)/cache \
	-o APT::Sandbox::User=root -o Acquire::Retries=3

.DEFAULT_GOAL := help
# Instructions that ordinary CPUs have not, switched off.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
# Each of the processes that share the cores computes on one: more threads than cores mostly wait for each other.
# They keep the code that one of them compiled for the others, also where containers are told to keep none.
# How many of them run the tests: more than an ordinary machine has cores, since much of a test is waiting. Where
# little is, each further one costs more than it saves: it imports everything once more.
PROCESSES ?= 4
FAST_PROCESSES := 3
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo test test-fast test-more test-avx2 test-long test-gpu tools browser chaos lint fix pages docs constraints release-check clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# torch comes first and alone: with it in place, no other package draws in another build of it.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	@touch $@

$(VENV)/run.stamp: $(VENV)/torch.stamp pyproject.toml $(CONSTRAINTS)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,test]'
	@touch $@

demo: $(VENV)/run.stamp ## render the demo prompts with the demo model on two workers, into out/demo; edit and draw to edges
	$(BIN)/flux-batch run jobs/demo.yaml
	$(BIN)/flux-batch preview jobs/edit.yaml --rows 12
	$(BIN)/flux-batch preview jobs/control.yaml --rows 12
	$(BIN)/flux-batch gallery out/demo

test: $(VENV)/dev.stamp ## run the tests
	$(PYTEST) -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/dev.stamp ## run those that give the first answer: no processes, servers, compilers or large models
	$(PYTEST) -n $(FAST_PROCESSES) --dist loadfile -m "not slow"

test-more: $(VENV)/dev.stamp ## run what it leaves out and CI runs too: clusters of several nodes, job servers, torch.compile
	$(PYTEST) -n $(PROCESSES) --dist loadfile -m "(nodes or compiled) and not long"

test-avx2: $(VENV)/dev.stamp ## run those of the model and the pipeline as on a CPU without bfloat16 and AVX-512
	$(AVX2) $(PYTEST) -n auto --dist loadfile -m "not compiled and not long" tests/model tests/pipeline

test-long: $(VENV)/dev.stamp ## run the tests that take minutes
	$(PYTEST) -m long --ignore tests/chaos

# Installed, Debian's package would start a server, and need root: only the tool is taken out of it.
$(BIN)/promtool: | $(VENV)/torch.stamp
	rm -rf $(UNPACKED)
	mkdir -p $(UNPACKED)/lists/partial $(UNPACKED)/cache/archives/partial
	$(APT) update
	cd $(UNPACKED) && $(APT) download prometheus && dpkg -x prometheus_*.deb .
	mv $(UNPACKED)/usr/bin/promtool $@
	rm -rf $(UNPACKED)

test-gpu: $(VENV)/dev.stamp ## run those that need a CUDA device, in three minutes at most
	timeout 180 $(BIN)/python -m pytest -q tests/gpu

tools: $(BIN)/promtool ## fetch promtool, by which tests check the alerts, from Debian's packages

browser: ## install Chromium, in which tests open pages, from Debian's packages; needs root
	command -v chromium || { apt-get -qq update && apt-get -qq install -o Acquire::Retries=3 --yes --no-install-recommends chromium; }

chaos: $(VENV)/dev.stamp ## break everything that can break, for some 20 minutes, and print what came of it
	$(PYTEST) -n 2 --dist loadfile -m "long or not long" tests/chaos

lint: $(VENV)/dev.stamp ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/dev.stamp ## format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pages: $(VENV)/dev.stamp ## write the tables of keys into jobs/README.md
	$(BIN)/python tests/helpers/job_file_table.py

docs: $(VENV)/dev.stamp ## write the reference of all modules into out/docs, from their docstrings
	$(BIN)/python tests/helpers/reference.py out/docs

constraints: $(VENV)/dev.stamp ## write down the versions that are installed
	@{ head -2 $(CONSTRAINTS); $(BIN)/pip freeze --exclude-editable | grep -v '^torch=='; } > $(CONSTRAINTS).new
	@mv $(CONSTRAINTS).new $(CONSTRAINTS)

release-check: $(VENV)/dev.stamp ## build what is published, and try it with the lowest and the newest dependencies
	$(BIN)/python tests/helpers/release_check.py

clean: ## remove what the targets made
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
