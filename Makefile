# The two commands: `make conform` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.docs
ROOTS := spec:backends/numpy:backends/torch:backends/jax:conformance
JOBS ?= 2
# A GPU's own installation of torch, triton and jax, rather than .venv.
GPU = PYTHONPATH=$(ROOTS) $(PYTHON)

# Without an accelerator, Triton's kernels run in its interpreter, and libtpu complains on stderr in every process.
ifeq ($(wildcard /dev/accel* /dev/vfio/* /dev/nvidia* /dev/kfd),)
conform mutants: export JAX_PLATFORMS ?= cpu
conform: export TRITON_INTERPRET ?= 1
endif

.PHONY: help conform test lint docs bench gpu mutants vectors clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

conform: $(STAMP) ## hold every backend that this machine can run against the spec; writes report/
	$(BIN)/rattention conform all --profile quick --report report

test: $(STAMP) lint ## lint, type check and every test
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP) ## CPU ratios, written to benchmarks/results/cpu.json
	$(BIN)/python benchmarks/cpu.py

gpu: ## on this machine's GPU, by $(PYTHON): benchmarks/results/gpu.json, native conformance into report/gpu
	@$(GPU) benchmarks/gpu.py --check
	@failed=; \
	$(GPU) benchmarks/gpu.py || failed="$$failed benchmark"; \
	$(GPU) -m rattention.conformance.cli conform torch-triton --profile full --report report/gpu/torch-triton \
	  || failed="$$failed torch-triton"; \
	if $(GPU) -c "import jax; jax.devices('gpu')" 2>/dev/null; then \
	  $(GPU) -m rattention.conformance.cli conform jax --profile full --report report/gpu/jax || failed="$$failed jax"; \
	else echo "jax has no GPU here: its suite was not run on one"; fi; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

docs: $(DOCS_STAMP) ## the site, into site/; warnings are errors
	PYTHONPATH=spec $(BIN)/python docs/build.py site

mutants: $(STAMP) ## the suite against every wrong implementation of its catalogue; writes report/mutants/
	$(BIN)/rattention mutants --profile quick --report report/mutants

vectors: $(STAMP) ## capture the activations of spec/vectors again
	$(BIN)/pip install --quiet -e '.[vectors]'
	HF_HUB_OFFLINE=1 $(BIN)/python spec/vectors/capture.py

clean: ## remove what the other targets made
	rm -rf .venv report site build dist

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[torch,jax,conformance,onnx,dev,docs,pinned]'
	touch $@

$(DOCS_STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@
