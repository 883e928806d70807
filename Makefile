# Every target sets itself up in .venv; give PYTHON=... to use an interpreter that has all it needs.
VENV := .venv
PYTHON ?= $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest
# two workers with a thread each: more threads than cores would slow both
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n 2
# the oldest Triton that is supported, beside the pinned one
OLD_TRITON := $(VENV)/triton-3.6.0
# both ends of what pyproject.toml allows; some 5 GB each, as torch brings CUDA along
OLDEST := $(CURDIR)/$(VENV)/torch-2.11.0-triton-3.6.0
NEWEST := $(CURDIR)/$(VENV)/torch-2.15.0-triton-3.9.0
# the rules of the stub and the counts are not Triton's
OLD_TRITON_TESTS := $(addprefix tests/launch/test_,block_sparse.py operators.py)
MORE_PATHS := $(if $(PYTHONPATH),:$(PYTHONPATH))
SETUP := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/ready)

.PHONY: demo test test-fast test-versions lint test-reference test-interpret test-aot test-launch test-gpu bench bench-gpu gpu-bundle figures clean

demo: $(SETUP)
	$(PYTHON) -m triton_sparsity.bench.demo

# cheapest first
test: lint test-reference test-interpret test-aot test-launch

# for those who work on it: some four minutes on two cores, which should be two
FAST := $(PARALLEL) -m "not gpu and not aot and not launch and not slow"
test-fast: $(SETUP)
	$(FAST)

# what a version may break soonest: the fast tests, and all of Triton down to the driver
test-versions: $(SETUP) $(OLDEST)/ready $(NEWEST)/ready
	PYTHONPATH=$(OLDEST)$(MORE_PATHS) $(FAST)
	PYTHONPATH=$(OLDEST)$(MORE_PATHS) $(PARALLEL) --dist loadfile tests/launch
	PYTHONPATH=$(NEWEST)$(MORE_PATHS) $(FAST)
	PYTHONPATH=$(NEWEST)$(MORE_PATHS) $(PARALLEL) --dist loadfile tests/launch

lint: $(SETUP)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m basedpyright --pythonpath $(PYTHON)

test-reference: $(SETUP)
	$(PARALLEL) -m "not gpu and not aot and not launch"

# the interpreter replaces the compiler when a kernel is decorated, hence a process of its own
test-interpret: $(SETUP)
	TRITON_INTERPRET=1 $(PARALLEL) -m "not gpu and not aot" tests/kernels

test-aot: $(SETUP)
	$(PARALLEL) -m aot tests/kernels

# all of Triton down to a stub of the driver, which replaces the driver of a whole process
test-launch: $(SETUP) $(OLD_TRITON)/ready
	$(PARALLEL) --dist loadfile tests/launch
	PYTHONPATH=$(OLD_TRITON)$(MORE_PATHS) $(PARALLEL) --dist loadfile $(OLD_TRITON_TESTS)

# in parts, each within ten minutes on 16 cores; records in runs/gpu, by which it goes on
test-gpu: $(SETUP)
	$(PYTHON) tests/gpu_parts.py

# both write bench/results/<device>/; the second needs a GPU
bench: $(SETUP)
	$(PYTHON) -m triton_sparsity.bench.studies.suite

bench-gpu: $(SETUP)
	$(PYTHON) -m triton_sparsity.bench.studies.gpu

# what a GPU machine without a network lacks, for bench/studies/gpu.sh there: .gpu-bundle/wheels,
# some 32 MB, to be copied along with the checkout
BUNDLE_FOR := --python-version 3.12 --implementation cp \
	$(foreach n,28 27 24 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64
gpu-bundle: $(SETUP)
	rm -rf .gpu-bundle
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: $(BUNDLE_FOR) \
		--dest .gpu-bundle/wheels --requirement requirements-gpu.txt

# those of docs/benchmarks.md, from what is in bench/results
figures: $(SETUP)
	$(PYTHON) -m triton_sparsity.bench.studies.render

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	mkdir -p $(VENV)/typing && ln -sfn $(CURDIR) $(VENV)/typing/triton_sparsity
	touch $@

$(OLD_TRITON)/ready:
	$(PYTHON) -m pip install --quiet --no-deps --target $(OLD_TRITON) triton==3.6.0
	touch $@

$(OLDEST)/ready: PAIR := torch==2.11.0 triton==3.6.0
$(NEWEST)/ready: PAIR := torch==2.15.0 triton==3.9.0
$(OLDEST)/ready $(NEWEST)/ready: | $(SETUP)
	mkdir -p $(@D)
	grep -v -e '^torch=' -e '^triton=' constraints.txt > $(@D)/constraints.txt
	$(PYTHON) -m pip install --quiet --target $(@D) --constraint $(@D)/constraints.txt $(PAIR)
	touch $@

clean:
	rm -rf $(VENV) .gpu-bundle build *.egg-info .pytest_cache .ruff_cache .hypothesis runs
