PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: conform test docs bench gpu lint clean

conform: $(STAMP) ## hold every backend this machine can run against the spec
	$(BIN)/rattention conform all --profile quick --report report

test: $(STAMP) lint ## every test
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[torch,jax,conformance,onnx,dev,pinned]'
	touch $@

clean:
	rm -rf $(VENV) report site build dist
