# Every target sets up what it needs in $(VENV) the first time and leaves it alone afterwards, until
# pyproject.toml, setup.py or constraints.txt change. Another interpreter: make test PYTHON=python3.12
VENV ?= .venv
# The first interpreter that starts: a version manager's shim may be there and refuse to.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13; do \
	$$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
SETUP := pyproject.toml setup.py constraints.txt
# Folders of scripts, which import each other by bare names; mypy takes them so too.
SPACE := $(subst ,, )
SCRIPTS := benchmarks checks examples examples/shapes
SCRIPT_NAMES := $(basename $(notdir $(wildcard $(addsuffix /*.py,$(SCRIPTS)))))
# Those that can be started; the others are what they share.
BENCHMARKS := $(basename $(notdir $(shell grep -l __main__ benchmarks/*.py)))

# Passed on: make test ARGS="tests/bundle -x", make bench ARGS="import_time"
ARGS ?=

.PHONY: help demo test lint format typecheck bench gpu-check jetson-check clean
.DELETE_ON_ERROR:

help:
	@echo "make demo          convert, verify, profile and search with the trained CLIP; see demo-output/"
	@echo "make test          the test suite (ARGS=... goes to pytest)"
	@echo "make lint          ruff: rules and formatting"
	@echo "make format        ruff: put the formatting right"
	@echo "make typecheck     strict mypy over the package, the examples and the benchmarks"
	@echo "make bench         run the benchmarks into benchmarks/results/ (ARGS=NAME for one)"
	@echo "make gpu-check     on a machine with a GPU: the tests marked gpu, and benchmarks/gpu.py"
	@echo "make jetson-check  on a Jetson, with BUNDLE=clip.mmedge; see docs/jetson-checks.md"
	@echo "make clean         remove everything made, the environment in $(VENV) included"

# An environment that could not be finished is removed, or the next call would take it for one.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No python3.11, 3.12 or 3.13 found. Install one, or name yours: make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "The environment could not be made. On Debian: apt install python3-venv"; exit 1; }

$(DEV): $(SETUP) | $(BIN)/python
	@echo "Installing mmedge[convert,cpu,dev] into $(VENV)"
	@$(INSTALL) --editable ".[convert,cpu,dev]"
	@touch $@

$(BENCH): $(DEV)
	@echo "Installing mmedge[bench] into $(VENV)"
	@$(INSTALL) --editable ".[convert,cpu,dev,bench]"
	@touch $@

demo: $(DEV)
	$(BIN)/python examples/demo.py --output demo-output $(ARGS)

test: $(DEV)
	$(BIN)/python -m pytest $(ARGS)

lint: $(DEV)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(DEV)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# mypy knows nothing of package-dir, so it is shown the tree as it installs, in links. Every start
# makes a tree of its own, so that two may run at once.
typecheck: $(DEV)
	@mkdir -p .typecheck && tree=$$(mktemp -d .typecheck/tree.XXXXXX) && trap 'rm -rf "$$tree"' EXIT && \
	mkdir "$$tree/mmedge" && ln -s $(addprefix ../../../,$(wildcard mmedge/*) converters runtimes) "$$tree/mmedge/" && \
	cd "$$tree" && MYPYPATH=$(subst $(SPACE),:,$(addprefix ../../,$(SCRIPTS))) \
	$(abspath $(BIN))/python -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		--package mmedge $(addprefix --module ,$(SCRIPT_NAMES))

# Each benchmark writes benchmarks/results/NAME.json; one that fails does not keep the others back.
bench: $(BENCH)
	@failed=; for name in $(or $(ARGS),$(BENCHMARKS)); do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "Failed:$$failed"; exit 1; }

# Both make an environment of their own, which sees the system's packages.
gpu-check:
	@checks/gpu.sh

jetson-check:
	@BUNDLE="$(BUNDLE)" checks/jetson.sh

clean:
	rm -rf $(VENV) .venv-gpu .venv-jetson gpu-check-output jetson-check-output .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo-output *.egg-info
	find mmedge converters runtimes tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
