# Every target builds the virtual environment it needs: a clean clone, Python 3.11 or newer, make and a
# package index are enough. Another interpreter: make test PYTHON=python3.13
PYTHON ?= python3
VENV ?= .venv
# Lines and branches of flask_rq_webhooks that `make coverage` must reach, percent.
COVERAGE ?= 90
PYTEST_ARGS ?=
# Test processes side by side; most tests wait for servers more than they compute.
PYTEST_WORKERS ?= 6

# Where it is set, each of the many processes the tests start would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help games demo quick test kills coverage bench bench-quick chaos screenshots lint format types docs links package installed oldest clean

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.demo  ## run every part on this machine and show three webhooks arriving
	@$(BIN)/python -m example_app.demo $(DEMO_ARGS)

SUITE := $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile

test: $(VENV)/.dev  ## run the suite; but for what kills processes
	$(SUITE) --ignore tests/chaos $(PYTEST_ARGS)

kills: $(VENV)/.dev  ## kill web process, worker and dispatcher at every named step
	$(SUITE) tests/chaos $(PYTEST_ARGS)

# Measuring takes half as much time again.
coverage: $(VENV)/.dev  ## run both and measure what they reach, at least COVERAGE percent
	rm -f .coverage .coverage.*
	$(SUITE) --cov --cov-report=term --cov-fail-under=$(COVERAGE) $(PYTEST_ARGS)

quick: $(VENV)/.dev  ## run the unit tests only: no servers, no coverage
	$(BIN)/python -m pytest -q tests/unit $(PYTEST_ARGS)

# Three storms side by side: they wait more than they compute.
chaos: $(VENV)/.dev  ## storms and kills, a quarter of an hour, LONG=1 half an hour; write what they measured into the documentation
	rm -f .chaos.jsonl .endings.json
	RQ_WEBHOOKS_ENDINGS_FILE=.endings.json $(BIN)/python -m pytest -q -m "chaos or not chaos" \
		tests/acceptance/test_endings.py \
		"tests/acceptance/test_processes.py::test_parent_and_children_killed_at_random_lose_nothing"
	RQ_WEBHOOKS_CHAOS_LONG=$(LONG) RQ_WEBHOOKS_CHAOS_FILE=.chaos.jsonl $(BIN)/python -m pytest -v -n 3 --dist worksteal \
		tests/chaos -m "chaos or slow" $(PYTEST_ARGS)
	$(BIN)/python -m tests.chaos.write_tables .endings.json .chaos.jsonl

games: $(VENV)/.dev  ## 20,000 games of one job against ingest and reconcile; then negate each rule in turn
	RQ_WEBHOOKS_GAMES=$(GAMES) $(BIN)/python -m pytest -q -s tests/unit/test_observe_machine.py $(PYTEST_ARGS)
	$(BIN)/python -m tests.mutants

GAMES ?= 20000

bench: .venv-bench/.bench  ## measure everything, twenty minutes, and write it into the documentation; BENCH="name …" measures only those
	@status=0; $(BENCHMARKS) $(BENCH) --json $(if $(BENCH),.bench.json,benchmarks/results.json) || status=$$?; \
		$(if $(BENCH),,.venv-bench/bin/python -m benchmarks.write_tables benchmarks/results.json || status=$$?;) \
		exit $$status

bench-quick: .venv-bench/.bench  ## a short look at every benchmark, less than three minutes
	@$(BENCHMARKS) $(BENCH) --quick --json .bench.json

BENCHMARKS := .venv-bench/bin/python -m benchmarks
# Which benchmarks; all by default. `make bench BENCH=callback`
BENCH ?=

screenshots: $(VENV)/.dev  ## take the dashboard's pictures for the documentation
	$(BIN)/python -m tests.browser.screenshots

lint: $(VENV)/.dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## let ruff put things right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## mypy --strict on the package and the example app
	$(BIN)/mypy

docs: $(VENV)/.dev  ## build the documentation into docs/_build/html; any warning is an error
	$(BIN)/sphinx-build -W --keep-going -n -b html docs docs/_build/html

links: docs  ## follow the links within the documentation, the README and the other pages here
	$(BIN)/python docs/_ext/links.py docs/_build/html

package: $(VENV)/.dev  ## build sdist and wheel into dist/ and check them
	rm -rf dist build flask_rq_webhooks.egg-info
	mkdir build
	$(INSTALL) build twine check-wheel-contents
	@echo "Building ..."
	@$(BIN)/python -m build --outdir dist . >build/log 2>&1 || { cat build/log; exit 1; }
	@! grep -E '^warning: |Setuptools[A-Za-z]*Warning|\*{40}|is absent from' build/log
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

installed: $(VENV)/.dev  ## install what is in dist/ into empty environments and try it
	$(BIN)/python -m pytest -q -m packaging tests/packaging

oldest: .venv-oldest/.oldest  ## run the server tests on the oldest supported versions
	.venv-oldest/bin/python -m pytest -q -W default -p no:cacheprovider -n 2 --dist loadfile \
		-k 'not test_two_hundred_jobs' $(OLDEST_TESTS)

OLDEST_TESTS ?= $(addprefix tests/acceptance/test_,pipeline.py example_app.py endings.py) tests/unit/test_callbacks.py tests/unit/test_attach.py $(wildcard tests/integration/test_capture_*.py) \
	tests/integration/test_accepts_webhook.py tests/integration/test_enqueue_with_webhook.py tests/integration/test_four_endings.py tests/integration/test_running_jobs.py tests/integration/test_operator_events.py tests/integration/test_progress.py tests/integration/test_attach_all.py \
	tests/integration/test_wire.py tests/integration/test_traces.py tests/integration/test_erase.py

clean:  ## remove what these targets made
	rm -rf $(VENV) .venv-oldest .venv-bench .bench.json build dist docs/_build htmlcov .coverage .coverage.* *.egg-info \
		.mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- virtual environments: a stamp file per set of requirements, made again when setup.cfg changes ----

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "flask_rq_webhooks needs Python 3.11 or newer; $(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1). Say which to use: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python setup.cfg pyproject.toml
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/python setup.cfg pyproject.toml
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

.venv-oldest/.oldest: setup.cfg requirements/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements/oldest.txt --editable .
	@touch $@

# The newest of everything, with what we are compared with.
.venv-bench/.bench: setup.cfg requirements/bench.txt
	$(PYTHON) -m venv .venv-bench
	@echo "Installing into .venv-bench ..."
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
		--editable '.[demo,postgres]' -r requirements/bench.txt
	@touch $@
