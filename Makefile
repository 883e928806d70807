# Every target sets itself up in .venv; give PYTHON=... to use an interpreter that has all it needs.
VENV := .venv
PYTHON ?= $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest
SETUP := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/ready)

.PHONY: demo test lint test-reference test-interpret test-aot test-gpu bench clean

demo: $(SETUP)
	$(PYTHON) -m triton_sparsity.bench.demo

# cheapest first
test: lint test-reference test-interpret test-aot

lint: $(SETUP)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m basedpyright --pythonpath $(PYTHON)

test-reference: $(SETUP)
	$(PYTEST) -m "not gpu and not aot" -n 2

# the interpreter replaces the compiler when a kernel is decorated, hence a process of its own
test-interpret: $(SETUP)
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu and not aot" -n 2 tests/kernels

test-aot: $(SETUP)
	$(PYTEST) -m aot -n 2

test-gpu: $(SETUP)
	$(PYTEST) -m "not aot" tests/kernels tests/controller

bench: $(SETUP)
	$(PYTHON) -m triton_sparsity.bench.compare

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	mkdir -p $(VENV)/typing && ln -sfn $(CURDIR) $(VENV)/typing/triton_sparsity
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis runs
