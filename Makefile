# make demo        a short tour of jhop
# make test        lint, types, tests, tracer leaks, notebooks
# make bench       timings
#
# Variables, for example: make test PYTHON=python3.11 JAX="jax==0.10.2 jaxlib==0.10.2" VENV=.venv-floor
#   PYTHON   interpreter the environment is made from, 3.11 or newer  (default: the first on PATH that will do)
#   JAX      requirements that say which JAX                          (default: the newest)
#   VENV     the environment, made when missing                       (default: .venv)

.PHONY: help demo test lint types unit leaks notebooks bench FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

JAX ?= jax jaxlib
VENV ?= .venv

usable := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
candidates := python3 python3.13 python3.12 python3.11 python
ifndef PYTHON
PYTHON := $(shell for p in $(candidates); do "$$p" -c "$(usable)" >/dev/null 2>&1 && { echo "$$p"; exit; }; done)
chosen_by := make
endif

py := $(VENV)/bin/python
pip := PIP_DISABLE_PIP_VERSION_CHECK=1 $(py) -m pip install -qq --no-input --upgrade
pytest := $(py) -m pytest
spread := -n auto --maxprocesses=8

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo
	@$(py) -m jhop demo

test: lint types unit leaks notebooks
	@$(py) -c "$$versions"

lint: $(VENV)/.installed-test
	$(py) -m ruff check

types: $(VENV)/.installed-test
	$(py) -m mypy

unit: $(VENV)/.installed-test
	@$(py) -c "$$versions"
	$(pytest) -m "not leaks" $(spread)
	$(pytest) -q --doctest-modules jhop

# pytest exits with 5 when no test is marked.
leaks: $(VENV)/.installed-test
	JAX_CHECK_TRACER_LEAKS=1 $(pytest) -m leaks $(spread) || [ $$? -eq 5 ]

# Warnings as errors are for jhop; here they would come from Jupyter's own machinery.
notebooks: $(VENV)/.installed-test
	@if ls notebooks/*.ipynb >/dev/null 2>&1; then \
		echo "$(pytest) --nbmake notebooks"; \
		$(pytest) --nbmake --nbmake-timeout=300 -n 2 -W default notebooks; \
	fi

bench: $(VENV)/.installed-demo
	$(py) benchmarks/hooks.py

define versions
import sys, jax, jaxlib
print(f"jhop: Python {sys.version.split()[0]}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, in {sys.prefix}")
endef
export versions

# The environment. It is installed into again only when pyproject.toml, the JAX asked for or this folder's path changed.

$(VENV)/.installed-demo: pyproject.toml $(VENV)/.made-for
	@echo "jhop: installing .[demo] and $(JAX) into $(VENV)"
	@$(pip) -e '.[demo]' $(JAX)
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.made-for
	@echo "jhop: installing .[test,demo,notebooks] and $(JAX) into $(VENV)"
	@$(pip) -e '.[test,demo,notebooks]' $(JAX)
	@touch $(VENV)/.installed-demo $@

$(VENV)/.made-for: FORCE
	@if [ -z "$(PYTHON)" ]; then \
		echo "jhop needs Python 3.11 or newer, with venv and pip; none of these will do: $(candidates)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.13" >&2; exit 1; \
	fi; \
	if ! "$(PYTHON)" -c "$(usable)"; then \
		echo "jhop needs Python 3.11 or newer, with venv and pip; PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; exit 1; \
	fi; \
	if ! $(py) -c "import pip" >/dev/null 2>&1; then \
		echo "jhop: making $(VENV) with $(PYTHON), $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv $(VENV) || exit 1; \
	fi; \
	version='import sys; print("Python %d.%d" % sys.version_info[:2])'; \
	has=$$($(py) -c "$$version"); asked=$$("$(PYTHON)" -c "$$version"); \
	if [ "$(chosen_by)" != make ] && [ "$$has" != "$$asked" ]; then \
		echo "$(VENV) holds $$has, but PYTHON=$(PYTHON) is $$asked. Remove $(VENV), or name another: VENV=.venv-other" >&2; exit 1; \
	fi; \
	for_="$(JAX) in $(CURDIR)"; \
	if [ "$$(cat $@ 2>/dev/null)" != "$$for_" ]; then echo "$$for_" > $@; fi
