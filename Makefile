# make demo: the whole chain on the embedded demo set; make test, make lint: what CI runs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/fastbyol-prep demo runs/demo-data --overwrite
	$(BIN)/fastbyol-train demo --data runs/demo-data/train.beton --val runs/demo-data/val.beton \
		--budget 90s --device cpu --out runs/demo --overwrite
	$(BIN)/fastbyol-eval knn runs/demo --train runs/demo-data/train.beton --val runs/demo-data/val.beton

test: $(INSTALLED)
	$(BIN)/python -m pytest --ignore tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	for group in views step optimizer; do $(BIN)/python benchmarks/bench.py $$group --json benchmarks/results/bench.jsonl; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
