# Every target sets itself up: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := cluster/constraints.txt
UNPACKED := $(VENV)/debian
APT := apt-get -qq -o Dir::State::Lists=$(CURDIR)/$(UNPACKED)/lists -o Dir::Cache=$(CURDIR)/$(UNPACKED)/cache \
	-o APT::Sandbox::User=root -o Acquire::Retries=3

.DEFAULT_GOAL := help
# Switches off AVX-512 and bfloat16 instructions, which ordinary CPUs lack.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
# Several test processes share the cores, so each computes in one thread: more threads than cores mostly wait.
# The empty PYTHONDONTWRITEBYTECODE lets the processes share compiled bytecode, even in containers that forbid it.
# PROCESSES exceeds the cores of an ordinary machine, since tests often wait; but each process imports everything again.
PROCESSES ?= 3
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo test test-fast test-more test-avx2 test-long test-gpu tools browser chaos lint fix pages docs constraints release-check clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# torch comes first and alone: with it in place, no other package installs another build of it.
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

demo: $(VENV)/run.stamp ## render the demo prompts with the demo model on two workers, into out/demo; edit images, and draw from edge maps
	$(BIN)/flux-batch run jobs/demo.yaml
	$(BIN)/flux-batch preview jobs/edit.yaml --rows 12
	$(BIN)/flux-batch preview jobs/control.yaml --rows 12
	$(BIN)/flux-batch gallery out/demo

test: $(VENV)/dev.stamp ## run all tests but the longest
	$(PYTEST) -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/dev.stamp ## run the quick tests: no processes, servers, compilers or large models
	$(PYTEST) -n $(PROCESSES) --dist loadfile -m "not slow"

test-more: $(VENV)/dev.stamp ## run the tests that `make test` leaves to CI: clusters of several nodes, torch.compile
	$(PYTEST) -n $(PROCESSES) --dist loadfile -m "(nodes or compiled) and not long"

test-avx2: $(VENV)/dev.stamp ## run the tests of model and pipeline as on a CPU without bfloat16 and AVX-512
	$(AVX2) $(PYTEST) -n auto --dist loadfile -m "not compiled and not long" tests/model tests/pipeline

test-long: $(VENV)/dev.stamp ## run the tests that take minutes
	$(PYTEST) -m long --ignore tests/chaos

# Installing Debian's package would need root and start a server, so only the tool is extracted from it.
$(BIN)/promtool: | $(VENV)/torch.stamp
	rm -rf $(UNPACKED)
	mkdir -p $(UNPACKED)/lists/partial $(UNPACKED)/cache/archives/partial
	$(APT) update
	cd $(UNPACKED) && $(APT) download prometheus && dpkg -x prometheus_*.deb .
	mv $(UNPACKED)/usr/bin/promtool $@
	rm -rf $(UNPACKED)

test-gpu: $(VENV)/dev.stamp ## run the tests that need a CUDA device, in three minutes at most
	timeout 180 $(BIN)/python -m pytest -q tests/gpu

tools: $(BIN)/promtool ## extract promtool, which checks the alerts in tests, from a Debian package

browser: ## install Chromium, for tests that open pages, from Debian's packages; needs root
	command -v chromium || { apt-get -qq update && apt-get -qq install -o Acquire::Retries=3 --yes --no-install-recommends chromium; }

chaos: $(VENV)/dev.stamp ## kill and break the parts of a run for some 20 minutes, and print a table of the results
	$(PYTEST) -n 2 --dist loadfile -m "long or not long" tests/chaos

lint: $(VENV)/dev.stamp ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/dev.stamp ## format, and fix lint errors automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pages: $(VENV)/dev.stamp ## write the tables of keys into jobs/README.md
	$(BIN)/python tests/helpers/job_file_table.py

docs: $(VENV)/dev.stamp ## write the reference of all modules into out/docs, from their docstrings
	$(BIN)/python tests/helpers/reference.py out/docs

constraints: $(VENV)/dev.stamp ## write the installed versions into cluster/constraints.txt
	@{ head -2 $(CONSTRAINTS); $(BIN)/pip freeze --exclude-editable | grep -v '^torch=='; } > $(CONSTRAINTS).new
	@mv $(CONSTRAINTS).new $(CONSTRAINTS)

release-check: $(VENV)/dev.stamp ## build wheel and sdist, and test them with the lowest and the newest dependencies
	$(BIN)/python tests/helpers/release_check.py

clean: ## remove everything that the targets made
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
