# make demo   a scheme, its kernels, and a real model generating through its packed cache
# make test   the whole test suite
# make gpu-test   the laws with kernels compiled for the GPU of this machine
# make lint   ruff and mypy
# make docs   the documentation site, in build/site
# Each makes .venv first, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The checkout's own path is part of the name: a copied or moved .venv is made anew.
STAMP := $(VENV)/installed.$(shell pwd | cksum | cut -d ' ' -f 1)

.PHONY: demo test gpu-test lint docs
.NOTPARALLEL:

demo: $(STAMP)
	$(RUN) examples/demo.py

# Triton's interpreter and its compiler cannot share a process, so the kernels run interpreted in a process of their own.
test: $(STAMP)
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/interpreted -n auto --dist worksteal
	env -u TRITON_INTERPRET $(RUN) -m pytest tests --ignore tests/interpreted -n auto --dist worksteal

gpu-test: $(STAMP)
	env -u TRITON_INTERPRET $(RUN) -m pytest tests -m gpu

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# Strict: a link to nowhere, or a page that nothing leads to, ends it.  (With --quiet it would not: nothing is counted.)
docs: $(STAMP)
	rm -rf docs/systems
	$(RUN) benchmarks/systems.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvdsl needs Python 3.11 or newer; run make PYTHON=python3.11")'
	@test -e $@ || rm -rf $(VENV)
	@$(RUN) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,search,check,docs,dev]'
	@touch $@
