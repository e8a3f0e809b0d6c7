# The two commands for a new machine are `make demo` and `make test`; both install what they need, and say so.
# `make setup` does only that. A second run of any of them is quick.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GUESTS := debian-6.1 debian-6.12 debian-backports
PYTEST := $(BIN)/python -m pytest
# Processes that tests run in. A guest of one vCPU leaves a second processor nearly idle. WORKERS=0: one after the other.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist worksteal

.PHONY: help all demo test test-all soak unit flaky setup check coverage bench bench-storage fuzz clean

## Style, types, and all tests; what `make` alone does.
all: check test

## What can be made.
help:
	@awk '/^## / {text = substr($$0, 4)} \
		/^[a-z-]+:/ && text {sub(/:.*/, "", $$1); printf "make %-13s  %s\n", $$1, text; text = ""}' Makefile

$(STAMP): pyproject.toml requirements/dev.lock emulator/vmbus/provision/bootstrap.sh
	@sh emulator/vmbus/provision/bootstrap.sh $(VENV)
	@touch $@

## Only install: Python packages, a private QEMU, the default guest kernel.
setup: $(STAMP)
	@$(BIN)/vmbus setup

## Boot a guest and show what its host does for it: bus, devices, live migration, snapshot, shutdown.
demo: setup
	@$(BIN)/vmbus demo

.PHONY: test-guests
test-guests: $(STAMP)
	@$(BIN)/vmbus setup $(foreach guest,$(GUESTS),--guest $(guest))
	-@$(BIN)/vmbus setup --guest debian-5.10 # old releases leave the mirrors; its test then says so
	-@$(BIN)/vmbus setup --firmware # likewise
	-@$(BIN)/vmbus setup --system # where it cannot be made, the tests that need it say so

## State machines, a real QEMU, real kernels: what must pass before a change is merged.
test: test-guests
	$(PYTEST) tests -m "not full" $(PARALLEL) $(TESTFLAGS)

## The same, and every other case of the matrices: kernels, vCPUs, moments, cache modes.
test-all: test-guests
	$(PYTEST) tests $(PARALLEL) $(TESTFLAGS)

## Run tests again and again: make flaky N=20 K=expression LOAD=2, alone and beside LOAD busy processes.
N ?= 20
LOAD ?= 2
flaky: test-guests
	@$(BIN)/python -m tests.tools.flaky --runs $(N) --load $(LOAD) -k "$(or $(K),$(error say which tests: make flaky K=expression))" $(FLAKYFLAGS)

## N migrations of one guest, mixed with all that may come between (SEED=S repeats them); SOAK=N: N of each kernel.
SOAK ?= 100
SOAK_N = $(if $(filter command environment,$(firstword $(origin N))),$(N))
soak: $(STAMP)
	@$(BIN)/vmbus setup $(foreach guest,$(GUESTS),--guest $(guest))
	$(if $(SOAK_N),MIXED=$(SOAK_N) MIXED_SECONDS=$(or $(SECONDS),inf) SEED=$(or $(SEED),$$(date +%s)) $(PYTEST) -s -p no:logging -o faulthandler_timeout=0 \
		tests/migration/test_soak.py -k mixed $(TESTFLAGS),SOAK=$(SOAK) $(PYTEST) -s tests/migration/test_soak.py $(TESTFLAGS))

## Only what needs no QEMU.
unit: $(STAMP)
	$(PYTEST) tests/unit tests/tools -m "not full" $(TESTFLAGS)

## Style, types, and the static analyser on all C.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.analyse

## How much of the code the unit tests run: measured, no gate. The lines are in build/coverage.
coverage: $(STAMP)
	@mkdir -p build
	@$(PYTEST) tests/unit -m "not full" -q -n $(WORKERS) -p no:cacheprovider --cov=vmbus --cov=vmbus_devices \
		--cov-report=html:build/coverage --cov-report=term >build/coverage.log || { cat build/coverage.log; exit 1; }
	@awk '$$1 == "TOTAL" {print "unit tests run " $$NF " of the statements; see build/coverage/index.html"}' \
		build/coverage.log

## Guided fuzzing of every target for FUZZ_TIME seconds each, then random messages, rings and requests; FUZZ_SEED=N.
FUZZ_SEED ?= 1
FUZZ_TIME ?= 60
fuzz: $(STAMP)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]' || \
		echo 'atheris cannot be installed here: the Python targets run without guidance'
	$(BIN)/python -m tests.fuzz.guided all --seconds $(FUZZ_TIME) --seed $(FUZZ_SEED)
	$(BIN)/python -m tests.fuzz.bus_messages --count 1000000 --seed $(FUZZ_SEED)
	$(BIN)/python -m tests.fuzz.ring_images --count 1000000 --seed $(FUZZ_SEED)
	$(BIN)/python -m tests.fuzz.storvsc_requests --count 300000 --seed $(FUZZ_SEED)
	$(BIN)/python -m tests.fuzz.compiled_requests --count 50000 --seed $(FUZZ_SEED)

## Speed and size, in a few minutes. BENCH="traps boot": only these; JSON=1: all figures as JSON on the last line.
bench: setup
	@$(BIN)/python -m tests.bench $(BENCH) $(if $(JSON),--json)

## This disk against QEMU's own. FOLDER=DIR: where the image is made; JSON=1: as above.
bench-storage: setup
	@$(BIN)/python -m tests.bench.storage $(if $(FOLDER),--folder $(FOLDER)) $(if $(JSON),--json)

# An environment of its own: the pages need mkdocs and nothing of the package, no QEMU, no compiler.
DOCS_VENV := build/docs-venv
## The documentation as a site in build/site; a dead link is an error.
.PHONY: docs
docs:
	@[ -x $(DOCS_VENV)/bin/mkdocs ] && [ $(DOCS_VENV)/bin/mkdocs -nt pyproject.toml ] || { \
		python3 -m venv $(DOCS_VENV) && \
		$(DOCS_VENV)/bin/python -m pip install -qq --disable-pip-version-check \
			$$(python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])') && \
		touch $(DOCS_VENV)/bin/mkdocs; }
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# An environment of its own, too: uv is for this only. UV_DEFAULT_INDEX: another package index.
LOCK_VENV := build/lock-venv
## Renew the versions and hashes of Python packages in requirements/dev.lock.
.PHONY: lock
lock:
	@[ -x $(LOCK_VENV)/bin/uv ] || { python3 -m venv $(LOCK_VENV) && \
		$(LOCK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv; }
	$(LOCK_VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" \
		--extra dev pyproject.toml requirements/build.in --output-file requirements/dev.lock

## Remove what was made here; what was fetched stays in ~/.cache/vmbus.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
