# `make run` and `make test` need nothing but Python 3.11 or newer with pip: they make .venv first, and reuse it.

# The first Python that is there, starts (a version manager's shim may not) and is new enough.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help venv run test lint types bench bench-peers check clean

help:
	@echo "make run     start the supervisor script (FOLDER=..., KILL_EVERY=seconds)"
	@echo "make test    run the tests"
	@echo "make check   lint, types and tests"
	@echo "make bench   measure, some twenty minutes, and draw into docs/plots (make bench-peers: beside other packages)"

venv: $(READY)

# Some distributions ship Python without ensurepip: then the Python's own pip fills the environment.
install = if $(BIN)/python -c 'import pip' 2>/dev/null; then $(BIN)/python -m pip install -e $(1); \
	else $(PYTHON) -m pip --python $(BIN)/python install -e $(1); fi

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "found no Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv || $(PYTHON) -m venv --without-pip .venv
	$(call install,'.[dev]')
	@touch $@

# The script reads FOLDER and KILL_EVERY; make hands them on from its environment and its command line.
run: venv
	$(BIN)/python scripts/supervisor.py

# Two at a time: most tests wait for processes.
test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

# All values go to docs/plots/results.json; scripts/plots.py draws them again.
bench: venv
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || { $(call install,'.[bench]'); }
	@mkdir -p docs/plots
	$(BIN)/python scripts/bench.py --json docs/plots/results.json --plots docs/plots

# Other packages on the same work, in an environment of their own. redis-server and nats-server are used if they are on the PATH
# (`apt install redis-server nats-server`); without them, Redis Streams and NATS JetStream are not run.
bench-peers: venv
	$(BIN)/python -m venv .venv/peers || $(PYTHON) -m venv --without-pip .venv/peers
	$(BIN)/python -m pip --python .venv/peers/bin/python install -e . \
		numpy pyzmq faster-fifo mpire pebble loky ray distributed 'redis[hiredis]' nats-py huey persist-queue
	.venv/peers/bin/python scripts/bench.py --families throughput-1,roundtrip,roundtrip-p99 --peers

check: lint types test

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
