# `make quickstart` and `make test` need Python 3.11 or newer and nothing else: each sets up $(VENV) by itself, once.
#
# Torch comes from pip's own index. For another build of it (CPU only, which on Linux is a far smaller download, or a given
# CUDA version) name the index that PyTorch's installation page gives:  PIP_EXTRA_INDEX_URL=URL make quickstart

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=
comma := ,

export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport PYTHONDONTWRITEBYTECODE  # Python starts hundreds of times in the tests, and torch's import takes thrice as long without bytecode

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test slow check clean

help:
	@echo "make quickstart   train a small DeepSeek-V3-style model on this machine, minutes on a CPU, and talk to it (ARGS=--no-chat)"
	@echo "make test         the tests but the slow ones, a process a core (ARGS='-k router' passes arguments to pytest, ARGS=-n0 makes it one process)"
	@echo "make slow         the slow ones: minutes of work, some need a real model (.ci/run brings it)"
	@echo "make check        ruff and mypy"
	@echo "make setup        $(VENV) with everything that test and check need"
	@echo "make clean        remove $(VENV) and caches; runs/ stays"

quickstart: $(VENV)/.core
	@$(BIN)/jevons quickstart $(ARGS)

# Processes share no test's state: one that has no tests left takes some of another's (worksteal), so files are rarely split.
test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

slow: $(VENV)/.dev
	@$(BIN)/python -m pytest -n auto --dist worksteal -m slow $(ARGS)

check: $(VENV)/.dev
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

setup: $(VENV)/.dev

clean:
	rm -rf "$(VENV)" .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find jevons tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps inside the environment, so that a second call is instant and a deleted environment is made again. `pip` is the last
# thing that venv installs: where it is missing the environment is absent or was interrupted.
$(VENV)/.core $(VENV)/.dev: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Jevons needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; make PYTHON=python3.12 ...")'
	@test -x $(BIN)/pip || { echo "making $(VENV)" && $(PYTHON) -m venv "$(VENV)"; }
	@echo "installing Jevons into $(VENV) (once: a minute or two, and the download of torch)"
	@$(BIN)/python -m pip install -qq --no-compile --editable '.$(if $(findstring .dev,$(notdir $@)),[dev$(comma)clients])'
	@touch $(if $(findstring .dev,$(notdir $@)),$(VENV)/.core) "$@"
