# Two commands need nothing before them but Python 3.11 or newer:  make demo   make test
VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
BIN := $(VENV)/bin
SLOW ?= .venv-slow
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile  # a process a core; a file's tests share what they compiled
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.installed  ## Train, compress and report the quickstart; goes on where it was stopped.
	$(BIN)/lmeff run configs/quickstart.py

test: $(VENV)/test.installed  ## Everything but the tests marked slow.
	$(PYTEST) -m "not slow"

test-slow: $(SLOW)/slow.installed  ## What `make test` leaves out; in an environment that can also compile for TPUs.
	$(subst $(BIN),$(SLOW)/bin,$(PYTEST)) --dist worksteal -m "(slow or tpu_aot) and not gallery"

lint: $(VENV)/lint.installed $(VENV)/test.installed  ## Style, types, which module may import which, and the launch scripts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x tpu_scripts/*.sh tests/tpu_scripts/*.sh tests/tpu_scripts/fakes/*

format: $(VENV)/lint.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "lmeff needs Python 3.11 or newer and found none; install one, or say which: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[report,text]'
	@touch $@

$(VENV)/test.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[test]'
	@touch $@

# With libtpu beside it JAX looks for TPUs first, and says so; hence not in the environment of the demo.
$(SLOW)/slow.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "lmeff needs Python 3.11 or newer and found none" >&2; exit 1; }
	$(PYTHON) -m venv $(SLOW)
	$(SLOW)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,tpu]'
	@touch $@

$(VENV)/lint.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[lint]'
	@touch $@

clean:  ## Removes environments and caches; runs stay.
	rm -rf $(VENV) $(SLOW) .venv-newest .jax_cache .pytest_cache .ruff_cache .import_linter_cache
