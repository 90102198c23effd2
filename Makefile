# Everything a newcomer or a build machine runs. Needs python3 (3.11 or newer), make and PyPI.
#   make test                     with python3, in .venv
#   make test PYTHON=python3.12   with another interpreter, in .venv-python3.12
#   make test ARGS='-k rope'      arguments for pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-only test-short test-all lint format demo docs interpreter clean clean-all

PYTHON ?= python3
ARGS ?=
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# Stamps: what the demo runs on, and what the tests and the documentation need besides.
RUN := $(VENV)/.installed
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
# Two workers whatever the machine: a third would only fight XLA's own threads for two cores.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

# Prints an interpreter that really runs: $(PYTHON) itself or, where that name is a pyenv shim with
# no version behind it, the newest one of that name among pyenv's versions.
FIND_PYTHON = for python in "$(PYTHON)" $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/$(notdir $(PYTHON)) 2>/dev/null | sort -rV); do \
	  if "$$python" -c '' >/dev/null 2>&1; then echo "$$python"; exit 0; fi; \
	done; \
	echo "make: '$(PYTHON)' does not run on this machine; name another: make PYTHON=python3.12" >&2; exit 1

# $(call install,what) makes the venv if it is missing or broken and installs what into it.
define install
	@python=$$($(FIND_PYTHON)) || exit 1; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }; \
	"$$python" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' cannot make a venv; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear "$(VENV)"
	@echo "Installing $(1) into $(VENV): a few minutes the first time"
	@# Without byte code of what nobody imports: half of the time that pip takes.
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable '$(1)'
endef

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | while IFS=@ read -r a b; do printf '%-18s %s\n' "$$a" "$$b"; done

$(RUN): pyproject.toml
	$(call install,.)
	@touch $@

$(DEV): pyproject.toml
	$(call install,.[dev])
	@touch $(RUN) $(TEST) $@

$(TEST): pyproject.toml
	$(call install,.[test])
	@touch $(RUN) $@

$(DOCS): pyproject.toml
	$(call install,.[docs])
	@touch $(RUN) $@

setup: $(DEV)  ## make the virtual environment; again when pyproject.toml changes

test: lint test-only  ## linters and every test that is not slow

test-only: $(DEV)
	$(PYTEST) -m "not slow" $(ARGS)

# Tests named in ARGS with what they alone need: a second Python does not lint, and loads less.
test-short: $(TEST)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint  ## the slow proofs too
	$(PYTEST) $(ARGS)

lint: $(DEV)  ## ruff and pyright; an error fails the build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(DEV)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(RUN)  ## the whole way on this machine, in demo_out/
	$(BIN)/echovlm demo --out demo_out

docs: $(DOCS)  ## the documentation, in site/; a warning fails the build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

interpreter:  # prints the interpreter that PYTHON stands for, or fails
	@$(FIND_PYTHON)

clean:  ## remove caches and outputs
	rm -rf build dist site demo_out bench_out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -exec rm -rf {} +

clean-all: clean  ## remove the virtual environments too
	rm -rf .venv .venv-*
