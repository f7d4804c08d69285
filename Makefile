# Thin on purpose: every target is a command that can be typed. `make demo` is where to begin.
PYTHON3 ?= python3
TARGET ?= container
N ?= 30
SEED ?= 22
PY := .venv/bin/python
LAB := $(PY) -m lab

# These targets use a lab run (QUIETPORT_LAB_RUN, else `default`), never your own hosts: see `lab-hosts`.

.PHONY: help venv demo test test-all lint types programs unit fixtures kills chaos docs-table bench lock lab-up lab-down
.PHONY: lab-hosts
help:
	@echo "make demo [TARGET=vm]  a blank host becomes private, before your eyes"
	@echo "make test              lint, types, unit, fixtures, end to end (CI=true: nothing is skipped)"
	@echo "make test-all          the same, the plain VM with Debian 12, and each variant alone on Debian 12"
	@echo "make kills N= SEED=    the converge killed N times, and what came of each host"
	@echo "make chaos FAULTS= SEED=  faults while the operator could be locked out, and what came of each"
	@echo "make lab-up, lab-down  a blank target to try things on, and its end"
	@echo "make bench [HOSTS=10]  each program beside a peer, ten hosts against one, into docs/benchmarks.md"
	@echo "make venv lint types unit fixtures docs-table lock"

venv:
	@$(PYTHON3) -m lab.bootstrap venv

demo: venv
	@$(PYTHON3) -m lab.bootstrap lab --target $(TARGET)
	@env -u QUIETPORT_HOSTS $(LAB) demo --target $(TARGET)

lint: venv
	.venv/bin/ruff check .

types: venv
	.venv/bin/mypy

unit: venv
	env -u QUIETPORT_HOSTS .venv/bin/pytest -q -n 4 tests/unit

# Apart from the unit tests: pyinfra's command line, which these load, patches the standard library.
fixtures: venv
	env -u QUIETPORT_HOSTS .venv/bin/pytest -q tests/facts tests/operations

# Root on Debian gets what is missing; otherwise the tests say what they skip, or fail with CI=true.
programs:
	-@$(PYTHON3) -m lab.bootstrap lab --target vm --tests

test: lint types programs unit fixtures
	@$(LAB) e2e

test-all: export QUIETPORT_TEST_ALL = 1
test-all: test

# Moments that the seed chooses; the table names the command that does a failed chain again.
kills: venv
	@$(PYTHON3) -m lab.bootstrap lab --target container
	@$(PY) -m tests.lab.kills --kills $(N) --seed $(SEED) --json build/kills-$(SEED).json

# What --only does again is one fault of the table.
chaos: SEED = 5
chaos: FAULTS ?= 36
chaos: venv
	@$(PYTHON3) -m lab.bootstrap lab --target container
	@$(PY) -m tests.lab.lockout --faults $(FAULTS) --seed $(SEED) --json build/chaos-$(SEED).json

lab-up: venv
	@$(PYTHON3) -m lab.bootstrap lab --target $(TARGET)
	@$(LAB) up --target $(TARGET)

lab-down: venv
	@$(LAB) down

# docs/when-things-go-wrong.md, from what the last end-to-end run saw.
docs-table: venv
	@$(PY) -m tests.lab.table

# Takes a quarter of an hour with the machine to itself; docs/benchmarks.md says what it was measured on.
bench: venv
	@$(PYTHON3) -m lab.bootstrap lab --target container
	@env -u QUIETPORT_HOSTS $(PY) -m bench.fleet --hosts $(or $(HOSTS),10)
	@$(PY) -m bench.agent_access --append docs/benchmarks.md
	@$(PY) -m bench.ports --append docs/benchmarks.md
	@$(PY) -m bench.doctor --page build/bench/doctor.json --append docs/benchmarks.md

# Names the lab's hosts file, or fails: `QUIETPORT_HOSTS=$$(make -s lab-hosts) pyinfra inventory ...`
lab-hosts: venv
	@$(LAB) hosts

# Hashes of every wheel, and no index addresses.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes requirements.in -o requirements.lock
